"""The cache: the model is asked once, nothing found is wrong, and nothing damaged does harm."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from toy_models import MLP, Convolutions, Mapped, Texts, drawn, seeded

import oodcore
from oodcore import Detector, FeatureModel, Features, Head
from oodcore.behaviour import Behaviour
from oodcore.cache import Cache
from oodcore.errors import ConfigurationError
from oodcore.evaluation import compare, study_of
from oodcore.extractor import FeatureModel as Model
from oodcore.passes import features_of
from oodcore.preprocess import Preprocess

TRAIN = (drawn(90, 6), torch.arange(90) % 4)
TEST, WIDE = drawn(40, 6, seed=1), 3 * drawn(30, 6, seed=2)
SCORERS: list[Any] = [
    "msp",
    "mahalanobis",
    "vim",
    {"kind": "knn", "k": 5},
    {"shapers": ["react"], "scorer": "energy"},
    {"name": "mix", "scorer": {"kind": "sum", "scorers": ["knn", "gen"], "normalize": "zscore"}},
]

pytestmark = pytest.mark.filterwarnings("ignore:knn. k is 50")


def network() -> nn.Module:
    return seeded(MLP())


def read(model: Model, inputs: Any, folder: Path | None, needs: str = "") -> list[Features]:
    detector = Detector(model, scorer="msp", batch_size=16, cache=folder)
    return list(features_of(detector, inputs, frozenset({needs}), "reading"))


def asked(model: Model, inputs: Any, folder: Path) -> int:
    """How many rows a model sees of some inputs that come by way of the cache."""
    before = model.rows_seen
    read(model, inputs, folder)
    return model.rows_seen - before


def entries(folder: Path, kind: str = "features") -> list[Path]:
    return sorted(folder.rglob(f"*.{kind}"))


def same(one: Features, other: Features) -> None:
    for name in ("embeddings", "logits", "labels", "ids"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype)
    assert one.layers.keys() == other.layers.keys()
    for name, value in one.layers.items():
        assert torch.equal(value, other.layers[name])
        assert value.dtype == other.layers[name].dtype
    assert (one.head is None) == (other.head is None)
    if one.head is not None and other.head is not None:
        assert torch.equal(one.head.weight, other.head.weight)
        assert (one.head.bias is None) == (other.head.bias is None)
        assert one.head.scale == other.head.scale


# The model is asked once


def test_second_benchmark_asks_no_model_and_gives_the_same_to_the_bit(tmp_path: Path) -> None:
    def run(cache: Path | None) -> tuple[Any, int]:
        model = FeatureModel.wrap(network())
        results = oodcore.benchmark(
            model,
            train=TRAIN,
            id_test=(TEST, torch.arange(40) % 4),
            ood={"wide": WIDE},
            scorers=SCORERS,
            calibrate=drawn(30, 6, seed=3),
            cache=cache,
        )
        return results, model.rows_seen

    plain, first, second = run(None), run(tmp_path / "cache"), run(tmp_path / "cache")
    assert (plain[1], first[1], second[1]) == (190, 190, 0)
    assert plain[0].rows == first[0].rows == second[0].rows
    assert plain[0].figures == second[0].figures
    assert "cache" not in plain[0].configuration
    assert plain[0].configuration == second[0].configuration


def test_configuration_names_a_cache(tmp_path: Path) -> None:
    digits = {"kind": "digits", "classes": [0, 1, 2]}
    config = {
        "extractor": {
            "kind": "torch",
            "factory": "oodcore_plugins.networks:digits_cnn",
            "arguments": {"classes": 3, "width": 4},
        },
        "scorers": ["msp", "mahalanobis"],
        "train": {**digits, "split": "train"},
        "id_test": {**digits, "split": "test"},
        "ood": {"others": {"kind": "digits", "split": "test", "classes": [7, 8]}},
        "cache": str(tmp_path / "cache"),
    }
    seen = []
    for _ in range(2):
        outcome = compare(study_of(config))
        models = {id(m): m for d in outcome.detectors.values() if (m := d.model) is not None}
        seen.append(sum(model.rows_seen for model in models.values()))
    assert seen[0] > 0
    assert seen[1] == 0


def test_head_that_is_found_by_running_a_batch_comes_from_the_cache(tmp_path: Path) -> None:
    first = read(FeatureModel.wrap(network()), TEST, tmp_path)
    model = FeatureModel.wrap(network())
    again = read(model, TEST, tmp_path)
    assert model.rows_seen == 0
    assert again[0].head is not None
    for one, other in zip(first, again, strict=True):
        same(one, other)
    assert len(entries(tmp_path, "head")) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types_are_those_of_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = FeatureModel.wrap(network().to(dtype))
    cached = Cache(tmp_path).of(model)
    plain, kept = model.forward(TEST), cached.forward(TEST)
    found = Cache(tmp_path).of(model).forward(TEST)
    assert found.embeddings is not None
    assert found.embeddings.dtype == dtype
    same(plain, kept)
    same(plain, found)
    assert (cached.found, cached.asked) == (0, 1)


@pytest.mark.parametrize("head", ["auto", "fc", None, Head(drawn(3, 4), scale=2.0)])
def test_every_kind_of_head_and_layers(tmp_path: Path, head: Any) -> None:
    model = FeatureModel.wrap(network(), head=head, layers=["second", "first"])
    for _ in range(2):
        same(model.forward(TEST), Cache(tmp_path).of(model).forward(TEST))


def test_texts_and_mappings(tmp_path: Path) -> None:
    texts = FeatureModel.wrap(seeded(Texts()))
    words = ["a cat", "banana", "nothing", "aaa"]
    mapped = FeatureModel.wrap(seeded(Mapped()))
    tokens = {"input_ids": torch.arange(12).reshape(4, 3) % 10, "attention_mask": torch.ones(4, 3)}
    for model, inputs in ((texts, words), (mapped, {"input": tokens})):
        before = read(model, inputs, tmp_path)
        assert asked(model, inputs, tmp_path) == 0
        same(before[0], read(model, inputs, None)[0])
    assert asked(texts, [*words[:3], "aa"], tmp_path) == 4
    other = {**tokens, "attention_mask": torch.tensor([[1.0, 1, 1]] * 3 + [[1, 1, 0]])}
    assert asked(mapped, {"input": other}, tmp_path) == 4


def test_method_that_passes_again_asks_for_those_passes_alone(tmp_path: Path) -> None:
    plain = Detector(FeatureModel.wrap(network()), scorer="odin").score(TEST)
    model = FeatureModel.wrap(network())
    detector = Detector(model, scorer="odin", cache=tmp_path)
    first = detector.score(TEST)
    assert model.rows_seen == 3 * 40
    second = detector.score(TEST)
    assert model.rows_seen == 5 * 40
    assert np.array_equal(plain, first)
    assert np.array_equal(first, second)


def test_found_features_have_inputs_only_where_they_are_needed(tmp_path: Path) -> None:
    model = FeatureModel.wrap(network(), preprocess=None)
    read(model, TEST, tmp_path)
    assert all(features.inputs is None for features in read(model, TEST, tmp_path))
    (features, *_) = read(model, TEST, tmp_path, needs="inputs")
    assert features.rerun is not None
    same(model.forward(features.inputs).double(), features.rerun(features.inputs))


def test_detectors_that_share_a_pass_share_the_cache(tmp_path: Path) -> None:
    model = FeatureModel.wrap(network())
    detectors = {
        "with": Detector(model, scorer="energy", cache=tmp_path),
        "without": Detector(model, scorer="msp"),
    }
    oodcore.passes.score(detectors, TEST)  # type: ignore[attr-defined]
    oodcore.passes.score(dict(reversed(detectors.items())), TEST)  # type: ignore[attr-defined]
    assert model.rows_seen == 40


def test_features_and_embeddings_need_no_cache(tmp_path: Path) -> None:
    detector = Detector(scorer="mahalanobis", cache=tmp_path / "cache").fit(TRAIN)
    assert detector.score(TEST).shape == (40,)
    assert entries(tmp_path) == []


def test_cache_is_no_part_of_an_artifact(tmp_path: Path) -> None:
    model = FeatureModel.wrap(network())
    detector = Detector(model, scorer="mahalanobis", cache=tmp_path / "cache").fit(TRAIN)
    detector.save(tmp_path / "artifact")
    text = "".join(path.read_text("latin-1") for path in (tmp_path / "artifact").iterdir())
    assert "cache" not in text
    loaded = oodcore.load(tmp_path / "artifact", model)
    assert loaded.cache is None
    loaded.cache = Cache(tmp_path / "cache")
    before = model.rows_seen
    loaded.score(TRAIN[0])
    assert model.rows_seen == before


# What makes another entry


def test_whatever_decides_the_features_makes_another_entry(tmp_path: Path) -> None:
    images = drawn(8, 3, 9, 9).abs().clamp(0, 1)

    def wrapped(**how: Any) -> FeatureModel:
        return FeatureModel.wrap(seeded(Convolutions()), **how)

    assert asked(wrapped(), images, tmp_path) == 8
    assert asked(wrapped(), images, tmp_path) == 0
    pixel = images.clone()
    pixel[3, 1, 4, 4] = torch.nextafter(pixel[3, 1, 4, 4], torch.tensor(2.0))
    bent = seeded(Convolutions())
    with torch.no_grad():
        bent.conv.weight[0, 0, 0, 0] += 1e-6  # type: ignore[union-attr, operator, index]
    moved = seeded(Convolutions())
    moved.bn.running_mean += 1e-6  # type: ignore[union-attr, operator]
    others = {
        "pixel": (wrapped(), pixel),
        "shape": (wrapped(), images.reshape(8, 3, 3, 27)),
        "type": (wrapped(), images.double()),
        "weight": (FeatureModel.wrap(bent), images),
        "buffer": (FeatureModel.wrap(moved), images),
        "preprocessing": (wrapped(preprocess=Preprocess(mean=(0.0, 0.0, 0.0))), images),
        "other preprocessing": (wrapped(preprocess=Preprocess(mean=(0.0, 0.0, 0.1))), images),
        "layers": (wrapped(layers=["bn"]), images),
        "other layers": (wrapped(layers=["conv"]), images),
        "no head": (wrapped(head=None), images),
        "head": (wrapped(head=Head(drawn(2, 4))), images),
        "other head": (wrapped(head=Head(drawn(2, 4), scale=2.0)), images),
    }
    for name, (model, inputs) in others.items():
        assert asked(model, inputs, tmp_path) == 8, name
        assert asked(model, inputs, tmp_path) == 0, name


class Net(nn.Module):
    """One linear layer before the head, and what else decides what it gives."""

    slope = 1.0

    def __init__(self, middle: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.middle, self.fc = nn.Linear(6, 6), middle, nn.Linear(6, 4)
        self.scale = scale
        self.table = torch.ones(6)
        self.register_buffer("unsaved", torch.ones(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.scale * self.middle(self.first(x)) * self.table * self.unsaved
        return self.fc(changed(hidden) * self.slope)


class Squared(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.scale * self.middle(self.first(x)) ** 2)


def changed(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + FACTOR


FACTOR = 1.0


def test_what_is_no_weight_is_seen_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these has the same state dict, and gives other features."""

    def hooked() -> nn.Module:
        net = seeded(Net(nn.ReLU()))
        net.middle.register_forward_hook(lambda part, args, output: output + 1)  # type: ignore[union-attr]
        return net

    def tabled() -> nn.Module:
        net = seeded(Net(nn.ReLU()))
        net.table = 2 * torch.ones(6)
        return net

    def unsaved() -> nn.Module:
        net = seeded(Net(nn.ReLU()))
        net.unsaved = 2 * torch.ones(6)
        return net

    def sloped() -> nn.Module:
        monkeypatch.setattr(Net, "slope", 2.0)
        return seeded(Net(nn.ReLU()))

    def called() -> nn.Module:
        monkeypatch.setattr(Net, "slope", 1.0)
        monkeypatch.setitem(globals(), "changed", lambda hidden: hidden * 3)
        return seeded(Net(nn.ReLU()))

    def counted() -> nn.Module:
        monkeypatch.undo()
        monkeypatch.setitem(globals(), "FACTOR", 5.0)
        return seeded(Net(nn.ReLU()))

    makers = {
        "plain": lambda: seeded(Net(nn.ReLU())),
        "activation": lambda: seeded(Net(nn.Tanh())),
        "its setting": lambda: seeded(Net(nn.LeakyReLU(0.3))),
        "its other setting": lambda: seeded(Net(nn.LeakyReLU(0.4))),
        "attribute": lambda: seeded(Net(nn.ReLU(), scale=2.0)),
        "code": lambda: seeded(Squared(nn.ReLU())),
        "hook": hooked,
        "tensor that is no buffer": tabled,
        "buffer that is not saved": unsaved,
        "attribute of the class": sloped,
        "function that is called": called,
        "constant that it names": counted,
    }
    given = None
    for name, make in makers.items():
        model = FeatureModel.wrap(make())
        weights = {key: value.clone() for key, value in model.module.state_dict().items()}
        given = given or weights
        assert all(torch.equal(value, weights[key]) for key, value in given.items()), name
        assert asked(model, TEST, tmp_path) == 40, name
        assert asked(model, TEST, tmp_path) == 0, name


def test_the_same_network_made_again_is_the_same() -> None:
    one, other = (Behaviour().text(FeatureModel.wrap(network(), layers=["first"])) for _ in "ab")
    assert one == other
    random.seed(1)
    assert Behaviour().text({"b": {3, "x"}, "a": [1.5, None, True]}) == Behaviour().text(
        {"a": [1.5, None, True], "b": {"x", 3}}
    )


def test_values_that_contain_themselves_come_to_an_end() -> None:
    net = network()
    net.itself, friend = [net], MLP()
    friend.friend, net.friends = [net], [friend]
    net.ring = {}  # type: ignore[assignment]
    net.ring["ring"] = [net.ring]  # type: ignore[operator, index]
    net.words, net.days = np.array(["a", net], object), np.array(["2024-01-01"], "datetime64[D]")  # type: ignore[assignment]
    net.partial, net.again = {"a": lambda x: net(x)}, net.fc
    assert "again" in Behaviour().text(FeatureModel.wrap(net))


# What goes wrong


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1), flip=st.integers(1, 255), cut=st.booleans())
def test_damaged_entry_is_a_warning_and_made_again(
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    place: float,
    flip: int,
    cut: bool,
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    model = FeatureModel.wrap(network())
    before = read(model, TEST[:16], folder)
    for kind, seen in (("features", 16), ("head", 16)):
        (path,) = entries(folder, kind)
        raw = bytearray(path.read_bytes())
        where = min(int(place * len(raw)), len(raw) - 1)
        raw[where] ^= flip
        path.write_bytes(raw[:where] if cut else raw)
        caplog.clear()
        assert asked(model, TEST[:16], folder) == seen
        assert "damaged" in caplog.text
        same(before[0], read(model, TEST[:16], folder)[0])
        assert asked(model, TEST[:16], folder) == 0


@pytest.mark.parametrize("content", [b"", b"x" * 64, b"x" * 64 + b"\n", b"\n" * 200])
def test_entry_that_is_none_is_made_again(tmp_path: Path, content: bytes) -> None:
    model = FeatureModel.wrap(network())
    read(model, TEST[:16], tmp_path)
    (path,) = entries(tmp_path)
    path.write_bytes(content)
    assert asked(model, TEST[:16], tmp_path) == 16


def test_sealed_entry_of_another_form_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from oodcore.cache import _sha256

    model = FeatureModel.wrap(network())
    read(model, TEST[:16], tmp_path)
    (path,) = entries(tmp_path)
    path.write_bytes(f"{_sha256(b'no safetensors')}\n".encode() + b"no safetensors")
    assert asked(model, TEST[:16], tmp_path) == 16
    assert "made again" in caplog.text


def test_lost_head_is_a_miss(tmp_path: Path) -> None:
    model = FeatureModel.wrap(network())
    read(model, TEST[:16], tmp_path)
    entries(tmp_path, "head")[0].unlink()
    assert asked(model, TEST[:16], tmp_path) == 16
    assert asked(model, TEST[:16], tmp_path) == 0


def test_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "inside"):
        with pytest.raises(ConfigurationError, match="give a folder"):
            Detector(network(), scorer="msp", cache=folder)


def test_folder_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(network(), scorer="msp", cache=tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigurationError, match=r"cannot be written: Permission denied; give a"):
        detector.score(TEST)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_read_only_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to a read-only folder")
    model = FeatureModel.wrap(network())
    read(model, TEST, tmp_path)
    places = [tmp_path, *(path for path in tmp_path.iterdir())]
    for place in places:
        place.chmod(0o500)
    try:
        assert asked(model, TEST, tmp_path) == 0
        with pytest.raises(ConfigurationError, match="cannot be written"):
            read(model, WIDE, tmp_path)
    finally:
        for place in places:
            place.chmod(0o700)


def test_nothing_is_left_beside_the_entries(tmp_path: Path) -> None:
    read(FeatureModel.wrap(network()), TEST, tmp_path)
    names = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {".features", ".head"}


def test_processes_that_keep_the_same_batches(tmp_path: Path) -> None:
    code = """
import sys
from toy_models import MLP, drawn, seeded
from oodcore.cache import Cache
from oodcore.extractor import FeatureModel
model = Cache(sys.argv[1]).of(FeatureModel.wrap(seeded(MLP())))
for number in range(20):
    model.forward(drawn(16, 6, seed=number))
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    several = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(120) for process in several] == [0, 0]
    assert len(entries(tmp_path)) == 20
    model = FeatureModel.wrap(network())
    for number in range(20):
        batch = drawn(16, 6, seed=number)
        same(FeatureModel.wrap(network()).forward(batch), Cache(tmp_path).of(model).forward(batch))
    assert model.rows_seen == 0


def test_threads_that_keep_and_lose_the_same_batches(tmp_path: Path) -> None:
    wanted = _logits(None, TRAIN[0])

    def work(number: int) -> bool:
        right = True
        for _ in range(10):
            right &= torch.equal(_logits(tmp_path, TRAIN[0]), wanted)
            for path in entries(tmp_path)[number::2]:
                path.unlink(missing_ok=True)
        return right

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [True] * 3


def _logits(folder: Path | None, inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([f.logits for f in read(FeatureModel.wrap(network()), inputs, folder)])  # type: ignore[misc]


# Models that do not always give the same


class Drawing(MLP):
    """Draws from a generator of the process."""

    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x) + self.draw()
        return output


class Changing(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # type: ignore[operator]
        output: torch.Tensor = super().forward(x)
        return output


@pytest.mark.parametrize(
    "make",
    [
        lambda: Drawing(lambda: 0 * torch.rand(())),
        lambda: Drawing(random.random),
        lambda: Drawing(lambda: float(np.random.default_rng().random() * 0 + np.random.rand())),
        Changing,
    ],
)
def test_random_and_changing_models_are_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any
) -> None:
    model = FeatureModel.wrap(seeded(make()), head=None)
    with caplog.at_level(logging.WARNING):
        assert asked(model, TEST, tmp_path) == 40
        assert asked(model, TEST, tmp_path) == 40
    assert entries(tmp_path) == []
    assert caplog.text.count("does not keep") == 2


def test_a_generator_of_its_own_that_is_seeded_each_time_is_fine(tmp_path: Path) -> None:
    def draw() -> torch.Tensor:
        return torch.rand((), generator=torch.Generator().manual_seed(3))

    model = FeatureModel.wrap(seeded(Drawing(draw)), head=None)
    assert asked(model, TEST, tmp_path) == 40
    assert asked(model, TEST, tmp_path) == 0


def test_global_generators_stay_as_they_are(tmp_path: Path) -> None:
    model = FeatureModel.wrap(network())
    before = torch.get_rng_state(), random.getstate()
    read(model, TEST, tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_an_entry_in_the_place_of_another_is_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FeatureModel.wrap(network())
    before = read(model, TEST[:16], tmp_path)
    read(model, TEST[16:32], tmp_path)
    one, other = entries(tmp_path, "features")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    same(before[0], read(model, TEST[:16], tmp_path)[0])
    assert "damaged" in caplog.text
