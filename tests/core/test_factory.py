"""Factories: what may be named, what arguments are, and what weights fit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file, save_model
from torch import nn

from oodcore.component import Settings
from oodcore.errors import ConfigurationError
from oodcore.extractor import imported as imported_from_extractor
from oodcore.factory import Arguments, Importable, built, imported, load_weights, network, settled

PLAIN = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=3)
VALUES = st.recursive(
    PLAIN | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z_]{1,4}", fullmatch=True)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, importable as ``mine``."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "WIDTH = 3\n"
        "def net(width=3, *, classes=2): return nn.Linear(width, classes)\n"
        "def fails(): raise RuntimeError('inside')\n"
        "def number(): return 3\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "needy.py").write_text("import does_not_exist_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("mine", "broken", "needy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    ["mine", "mine:", ":net", "mine.net", "mine:net.x", "mi ne:net", "mine:net()", "../mine:net",
     "mine:net\n", ".mine:net", "mine..a:net", "1mine:net", ""],
)  # fmt: skip
def test_only_a_module_and_a_name_can_be_imported(name):
    with pytest.raises(ValidationError, match=r"package\.module:name"):
        TypeAdapter(Importable).validate_python(name)
    with pytest.raises(ConfigurationError, match=r"package\.module:name"):
        imported(name)


def test_importing(mine):
    assert imported("mine:WIDTH") == 3
    assert imported("os.path:join") is __import__("os").path.join
    assert imported_from_extractor is imported


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be_found:net", "cannot import 'nowhere_to_be_found:net'.*PYTHONPATH"),
        ("needy:net", "cannot import 'needy:net'.*does_not_exist_anywhere"),
        ("broken:net", "cannot import 'broken:net'.*ZeroDivisionError"),
        ("mine:nett", "'mine' has no 'nett'"),
        ("mine:WIDTH", "'mine:WIDTH' is a int, not a function"),
    ],
)
def test_what_cannot_be_called_is_said(mine, name, message):
    with pytest.raises(ConfigurationError, match=message):
        built(name, {})


def test_building(mine):
    assert built("mine:net", {"classes": 5}).out_features == 5
    assert built("math:hypot", {}) == 0.0  # tells nobody its signature on some Pythons
    with pytest.raises(ConfigurationError, match=r"unexpected keyword.*it takes \(width=3, \*, cl"):
        built("mine:net", {"clases": 5})
    with pytest.raises(RuntimeError, match="inside"):
        built("mine:fails", {})


def test_networks_are_drawn_from_their_own_seed(mine):
    before = torch.get_rng_state()
    first = network("mine:net", {})
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(network("mine:net", {}).weight, first.weight)
    assert not torch.equal(network("mine:net", {}, seed=1).weight, first.weight)
    with pytest.raises(ConfigurationError, match=r"gave a int, and a torch.nn.Module"):
        network("mine:number", {})


class Holder(Settings):
    arguments: Arguments = Arguments()


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_arguments_survive_a_configuration(values):
    holder = Holder.model_validate({"arguments": values})
    again = Holder.model_validate_json(holder.model_dump_json())
    assert again == holder == Holder.model_validate(holder.model_dump())
    assert hash(again) == hash(holder)
    assert set(holder.arguments) == set(values)
    for name, value in values.items():
        if not isinstance(value, list):
            assert holder.arguments[name] == value
            assert type(holder.arguments[name]) is type(value)


def test_arguments_are_a_value():
    assert Arguments({"a": 1, "b": 2}) == Arguments({"b": 2, "a": 1})
    assert len({Arguments({"a": 1}), Arguments({"a": 1.0}), Arguments({"a": True})}) == 3
    assert Arguments({"a": [1, [2.0]]})["a"] == (1, (2.0,))
    assert type(Arguments({"a": np.float64(2)})["a"]) is float
    given = {"a": [1]}
    kept = Arguments(given)
    given["a"].append(2)
    given["b"] = 3
    assert dict(kept) == {"a": (1,)}
    assert "a" in repr(kept)
    assert kept != {"a": (1,)}
    schema = Holder.model_json_schema()["properties"]["arguments"]
    assert schema["type"] == "object"
    assert schema["default"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1], "write arguments as a mapping"),
        ({"a": {"b": 1}}, "a is a dict; an argument is a number"),
        ({"a": [object()]}, "a is a object"),
        ({"a": float("inf")}, "a is not finite"),
        ({"a b": 1}, "'a b' cannot be the name"),
        ({3: 1}, "3 cannot be the name"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises(ValidationError, match=message):
        Holder.model_validate({"arguments": arguments})


# -- weights


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def saved(state: dict, folder: Path, form: str) -> Path:
    if form == "safetensors":
        save_file(state, folder / "net.safetensors")
        return folder / "net.safetensors"
    torch.save(
        {"state_dict": state, "epoch": 3} if form == "checkpoint" else state, folder / "n.pt"
    )
    return folder / "n.pt"


@pytest.mark.parametrize("form", ["safetensors", "state dict", "checkpoint"])
def test_weights_are_loaded_whole(tmp_path, form):
    source, target = net(), net()
    source[1].running_mean += 1.0
    load_weights(target, saved(source.state_dict(), tmp_path, form))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value)


@pytest.mark.parametrize("form", ["safetensors", "state dict", "checkpoint"])
def test_weights_that_do_not_fit_are_named(tmp_path, form):
    state = net().state_dict()
    del state["2.bias"]
    with pytest.raises(ConfigurationError, match=r"do not fit Sequential: it lacks 2\.bias$"):
        load_weights(net(), saved(state, tmp_path, form))
    state = net().state_dict() | {"3.weight": torch.zeros(1)}
    with pytest.raises(ConfigurationError, match=r"it has unknown 3\.weight$"):
        load_weights(net(), saved(state, tmp_path, form))
    with pytest.raises(ConfigurationError, match="size mismatch"):
        load_weights(net(5), saved(net(4).state_dict(), tmp_path, form))
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"it lacks 0\.weight.*without 'module\.'"):
        load_weights(net(), saved(state, tmp_path, form))


def test_one_name_of_shared_weights_is_enough(tmp_path):
    def tied() -> nn.Module:
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
        return module

    source, target = tied(), tied()
    save_model(source, str(tmp_path / "net.safetensors"))
    load_weights(target, tmp_path / "net.safetensors")
    assert torch.equal(target[1].weight, source[0].weight)
    save_file({"0.bias": torch.zeros(3), "1.bias": torch.zeros(3)}, tmp_path / "less.safetensors")
    with pytest.raises(ConfigurationError, match=r"it lacks 0\.weight, 1\.weight"):
        load_weights(target, tmp_path / "less.safetensors")


class Hostile:
    ran = False

    def __reduce__(self):
        return (setattr, (Hostile, "ran", True))


def test_no_code_in_a_file_is_run(tmp_path):
    torch.save({"weight": Hostile()}, tmp_path / "bad.pt")
    with pytest.raises(ConfigurationError, match="cannot be read without running code"):
        load_weights(net(), tmp_path / "bad.pt")
    assert not Hostile.ran


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
def test_files_that_are_none_are_said(tmp_path, name):
    with pytest.raises(ConfigurationError, match="there is no file of weights"):
        load_weights(net(), tmp_path / name)
    (tmp_path / name).write_bytes(b"neither")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_weights(net(), tmp_path / name)


@pytest.mark.parametrize("value", [[torch.zeros(3)], {3: torch.zeros(1)}])
def test_a_checkpoint_without_a_state_dict(tmp_path, value):
    torch.save(value, tmp_path / "n.pt")
    with pytest.raises(ConfigurationError, match="not a state dict"):
        load_weights(net(), tmp_path / "n.pt")


def test_arguments_are_settled_by_the_factory_that_knows_how(mine):
    assert settled("mine:net", {"width": 5}) is None
    imported("mine:net").settled = lambda width, classes=2: {"width": width + classes}
    assert settled("mine:net", {"width": 5}) == {"width": 7}
    with pytest.raises(ConfigurationError, match="cannot import"):
        settled("mine:nothing", {})
