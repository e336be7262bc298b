from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import jsonschema
import pytest
from jsonschema import Draft202012Validator
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core.core_schema import ErrorType

import oodcore
from oodcore.component import FilePath, Settings, Slot
from oodcore.config import BenchmarkConfig, DetectorConfig
from oodcore.errors import ConfigurationError
from oodcore.plugins import SLOTS, registry
from oodcore.regularizer import Regularizer
from oodcore.schema import schema
from oodcore.scorer import Scorer
from oodcore.statistics import Statistic
from oodcore.training_config import TrainingConfig

Share = Annotated[float, Field(gt=0, lt=1)]


class Part(Settings):
    """A group of fields.

    Args:
        size: in pixels.
    """

    size: PositiveInt
    mean: tuple[float, ...] = ()


class Tree(Settings):
    name: str = ""
    children: tuple[Tree, ...] = ()


class Plain(Scorer):
    """No fields.

    And a second paragraph.
    """

    kind = "plain_test"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Any, state: Any) -> Any:
        return features.logits[:, 0]


class Many(Plain):
    """A field of every type.

    Args:
        whole: a number without a fraction,
            of any sign.
        low, high: the ends.
    """

    kind = "many_test"

    whole: int
    count: PositiveInt = 1
    digit: Annotated[int, Field(ge=0, le=9)] = 0
    ratio: float = 0.5
    share: Share = 0.5
    low: NonNegativeFloat = 0.0
    high: float | None = None
    on: bool = False
    text: str = "a"
    code: Annotated[str, StringConstraints(pattern="^[a-z]+$", max_length=3)] = "a"
    mode: Literal["mean", "max"] = "mean"
    size: Literal[2, 4, "auto"] = "auto"
    lam: float | Literal["auto"] = "auto"
    alpha: Share | Literal["auto", "off"] | None = None
    sizes: tuple[int, ...] = ()
    few: Annotated[tuple[Share, ...], Field(min_length=1, max_length=2)] = (0.5,)
    pair: tuple[float, int] = (0.0, 1)
    grid: tuple[tuple[int, int], ...] = ()
    means: tuple[float, ...] | float = 0.0
    where: FilePath | None = None
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    tree: Tree = Tree()
    inner: Annotated[Scorer, Slot("scorer")] = Plain()
    maybe: Annotated[Scorer, Slot("scorer")] | None = None
    several: tuple[Annotated[Scorer, Slot("scorer")], ...] = ()
    statistic: Annotated[Statistic, Slot("statistic")] | None = None
    regularizers: tuple[Annotated[Regularizer, Slot("regularizer")], ...] = ()


class Ruled(Plain):
    kind = "ruled_test"
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Ruled:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Plugin:
    @oodcore.hookimpl
    def register_scorers(self, register: Any) -> None:
        for cls in (Plain, Many, Ruled):
            register(cls)


@pytest.fixture(scope="module", autouse=True)
def plugged():
    with registry.using(Plugin()):
        yield


@pytest.fixture(scope="module")
def definitions(plugged):
    """Every definition, also of slots that a detector's configuration does not reach."""
    return schema("detector")["$defs"]


WRONG: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10,
    2.0,
    3.0,
    2.5,
    0.25,
    -0.5,
    1e300,
    -1e300,
    "",
    "x",
    "3",
    "true",
    "auto",
    "abcd",
    "A",
    "plain_test",
    "many_test",
    "nothing",
    [],
    [0.5],
    [1, 2],
    [1.5, 2],
    [0.1, 0.2, 0.3],
    [True],
    [None],
    ["x"],
    ["plain_test", "nothing"],
    [[1, 2]],
    [[1, 2.5]],
    {},
    {"a": 1},
    {"size": 1},
    {"size": 0},
    {"size": 2.0, "mean": [1, 2.5]},
    {"size": 2, "mean": ["1"]},
    {"kind": "plain_test"},
    {"kind": "plain_test", "extra": 1},
    {"kind": "many_test"},
    {"kind": "nothing"},
    {"kind": 3},
    {"kind": ["plain_test"]},
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key and every item inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def changed(value: Any, place: tuple[Any, ...], change: Any) -> Any:
    """A copy in which ``change(holder, key)`` was done at a place."""
    again = copy.deepcopy(value)
    holder = again
    for step in place[:-1]:
        holder = holder[step]
    change(holder, place[-1])
    return again


def mutations(value: dict[str, Any], field: str | None = None) -> Iterator[Any]:
    """The value with one thing changed: a field or item replaced or gone, a field too many."""
    yield value
    yield {**value, "unknown_field": 1}
    for place in places(value):
        if field not in (None, place[0]):
            continue
        for wrong in WRONG:
            yield changed(value, place, lambda holder, key, w=wrong: holder.__setitem__(key, w))
        yield changed(value, place, lambda holder, key: holder.__delitem__(key))
        inner = value
        for step in place:
            inner = inner[step]
        if isinstance(inner, dict):
            yield changed(
                value, place, lambda holder, key: holder[key].__setitem__("unknown_field", 1)
            )


def example(node: Any, definitions: dict[str, Any]) -> Any:
    """A value that a schema accepts, with as little in it as can be, but no null."""
    if "$ref" in node:
        return example(definitions[node["$ref"].removeprefix("#/$defs/")], definitions)
    if "const" in node:
        return node["const"]
    if "enum" in node:
        return node["enum"][0]
    if "anyOf" in node or "oneOf" in node:
        members = node.get("anyOf", node.get("oneOf"))
        return example(next(m for m in members if m.get("type") != "null"), definitions)
    if node.get("type") in ("integer", "number"):
        whole = node["type"] == "integer"
        low = node.get("minimum", node.get("exclusiveMinimum"))
        high = node.get("maximum", node.get("exclusiveMaximum"))
        if low is not None and high is not None:
            return low if whole else (low + high) / 2
        return (low if low is not None else 0) + 1
    if node.get("type") == "boolean":
        return True
    if node.get("type") == "string":
        return "a:b" if ":" in node.get("pattern", "") else "a"
    if node.get("type") == "array":
        if "prefixItems" in node:
            return [example(item, definitions) for item in node["prefixItems"]]
        return [example(node.get("items", {}), definitions)] * max(1, node.get("minItems", 1))
    if node.get("type") == "object":
        fields = node.get("properties", {})
        return {name: example(fields[name], definitions) for name in node.get("required", ())}
    return "a"


KNOWN = set(get_args(ErrorType)) - {"value_error", "assertion_error"}
OURS = {"unknown_kind", "no_kind", "kind_mismatch", "wrong_slot", "not_arguments", "path_type"}


def verdict(wanted: TypeAdapter[Any], value: Any) -> str:
    """accepted, refused, or ruled: by what a schema cannot say, code of the component's own."""
    try:
        wanted.validate_python(copy.deepcopy(value))
    except ValidationError as error:
        kinds = {item["type"] for item in error.errors(include_url=False)}
        return "refused" if kinds & (KNOWN | OURS) else "ruled"
    return "accepted"


def compare(
    wanted: TypeAdapter[Any], validator: Draft202012Validator, values: Any
) -> dict[str, int]:
    """How often they agreed; what the schema refuses, oodcore must, and the other way round."""
    count = {"accepted": 0, "refused": 0, "ruled": 0}
    for value in values:
        said = verdict(wanted, value)
        valid = validator.is_valid(value)
        assert valid == (said != "refused") or said == "ruled", (said, valid, value)
        count[said] += 1
    return count


FULL: dict[str, Any] = {
    "kind": "many_test",
    "whole": 3,
    "count": 2,
    "digit": 5,
    "ratio": 1.5,
    "share": 0.25,
    "low": 1,
    "high": 2.5,
    "on": True,
    "text": "text",
    "code": "abc",
    "mode": "max",
    "size": 4,
    "lam": 0.5,
    "alpha": 0.5,
    "sizes": [1, 2],
    "few": [0.5, 0.25],
    "pair": [1.5, 2],
    "grid": [[1, 2], [3, 4]],
    "means": [1, 2.5],
    "where": "a/b",
    "part": {"size": 3, "mean": [0.5]},
    "parts": [{"size": 3}],
    "tree": {"name": "a", "children": [{"name": "b", "children": []}]},
    "inner": {"kind": "many_test", "whole": 1, "maybe": "plain_test"},
    "maybe": {"kind": "plain_test"},
    "several": ["plain_test", {"kind": "many_test", "whole": 2}],
    "statistic": None,
    "regularizers": [],
}


@pytest.mark.parametrize("target", ["detector", "benchmark", "training"])
def test_it_is_a_json_schema(target):
    found = schema(target)
    Draft202012Validator.check_schema(found)
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(found)) == found
    assert "x-slot" not in json.dumps(found)


@pytest.mark.parametrize("target", ["detector", "benchmark", "training"])
def test_every_reference_leads_somewhere(target):
    found = schema(target)

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from [node["$ref"]] if "$ref" in node else []
            for inner in node.values():
                yield from references(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from references(inner)

    names = {reference.removeprefix("#/$defs/") for reference in references(found)}
    assert names == set(found["$defs"])


def test_a_slot_takes_a_kind_alone_where_no_field_is_needed(definitions):
    alone, *kinds = definitions["scorer"]["anyOf"]
    assert {"plain_test", "ruled_test"} <= set(alone["enum"])
    assert "many_test" not in alone["enum"]
    assert {"$ref": "#/$defs/scorer.many_test"} in kinds
    assert len(kinds) == len(registry.all("scorer"))


def test_a_kind_is_documented_by_its_docstring(definitions):
    many = definitions["scorer.many_test"]
    assert many["title"] == "many_test"
    assert many["description"] == "A field of every type."
    assert definitions["scorer.plain_test"]["description"] == "No fields."
    fields = many["properties"]
    assert fields["whole"]["description"] == "a number without a fraction, of any sign."
    assert fields["low"]["description"] == fields["high"]["description"] == "the ends."
    assert "title" not in fields["whole"]
    assert fields["share"]["default"] == 0.5
    assert fields["inner"]["default"] == {"kind": "plain_test"}


def test_an_editor_may_show_what_is_wrong(definitions):
    with pytest.raises(jsonschema.ValidationError, match="'percentil' was unexpected"):
        jsonschema.validate(
            {"kind": "plain_test", "percentil": 3},
            {"$ref": "#/$defs/scorer.plain_test", "$defs": definitions},
        )


def test_a_field_of_every_type_is_judged_alike(definitions):
    validator = Draft202012Validator({"$ref": "#/$defs/scorer", "$defs": definitions})
    values = [FULL]
    for field, value in FULL.items():
        values += mutations({"kind": "many_test", "whole": 3, field: value}, field)
    count = compare(TypeAdapter(Annotated[Scorer, Slot("scorer")]), validator, values)
    assert count["accepted"] > 300
    assert count["refused"] > 2000
    assert count["ruled"] == 0


def test_a_rule_between_fields_is_left_open(definitions):
    validator = Draft202012Validator({"$ref": "#/$defs/scorer.ruled_test", "$defs": definitions})
    value = {"kind": "ruled_test", "low": 2.0}
    assert verdict(TypeAdapter(Ruled), value) == "ruled"
    assert validator.is_valid(value)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_installed_component_is_judged_alike(slot, definitions):
    whole = Draft202012Validator({"$ref": f"#/$defs/{slot}", "$defs": definitions})
    wanted = TypeAdapter(Annotated[Any, Slot(slot)])
    for kind, cls in registry.all(slot).items():
        if cls is Many:
            continue
        name = f"{slot}.{kind}"
        fields = definitions[name]["properties"]
        least = example(definitions[name], definitions)
        assert verdict(wanted, least) != "refused", least
        values = [least]
        for field in fields.keys() - {"kind"}:
            given = {**least, field: example(fields[field], definitions)}
            values += mutations(given, field)
        one = Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": definitions})
        compare(wanted, one, values)
        compare(wanted, whole, [kind, *mutations(least, "kind")])


def test_whole_configurations_are_judged_alike():
    detector = {
        "shapers": [],
        "scorer": {"kind": "many_test", "whole": 1},
        "train": {"kind": "digits"},
        "ood": {"far": {"kind": "digits"}},
        "groups": {"all": ["far"]},
        "false_alarm_rate": 0.5,
        "batch_size": 16,
        "num_workers": 1,
        "device": "cuda:1",
        "seed": 3,
    }
    validator = Draft202012Validator(schema("detector"))
    count = compare(TypeAdapter(DetectorConfig), validator, mutations(detector))
    assert count["accepted"] > 50
    assert count["refused"] > 300


def test_whole_benchmarks_are_judged_alike():
    benchmark = {
        "scorers": ["plain_test", {"kind": "ruled_test"}, {"name": "a", "scorer": "plain_test"}],
        "train": "digits",
        "id_test": "digits",
        "ood": {"far": "digits"},
        "groups": {"all": ["far"]},
    }
    validator = Draft202012Validator(schema("benchmark"))
    count = compare(TypeAdapter(BenchmarkConfig), validator, mutations(benchmark))
    assert count["accepted"] > 10
    assert count["refused"] > 300
    fields = {"kind": "outlier_exposure", "level": 95, "draws": 3}
    protocols = compare(
        TypeAdapter(BenchmarkConfig), validator, mutations({**benchmark, "protocol": fields})
    )
    assert protocols["accepted"] > count["accepted"]
    assert protocols["refused"] > count["refused"]
    for given in ("ssb_osr", {"kind": "openood"}, "opnood", "open_set", {"draws": 3}, 3, None):
        compare(TypeAdapter(BenchmarkConfig), validator, [{**benchmark, "protocol": given}])
    installed = {**benchmark, "scorers": "installed"}
    assert verdict(TypeAdapter(BenchmarkConfig), installed) == "accepted"
    assert validator.is_valid(installed)


def test_whole_training_runs_are_judged_alike():
    training = {
        "network": {"factory": "a:b", "arguments": {"width": 3}},
        "train": "digits",
        "epochs": 3,
        "classes": 3,
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.5},
        "schedule": {"kind": "step", "warmup": 1, "milestones": [1]},
        "regularizers": [],
        "preprocess": {"size": 3},
        "device": "cpu",
    }
    validator = Draft202012Validator(schema("training"))
    count = compare(TypeAdapter(TrainingConfig), validator, mutations(training))
    assert count["accepted"] > 50
    assert count["refused"] > 500
    alone = [{**training, "schedule": kind} for kind in ("cosine", "step", "cosin", ["cosine"])]
    compare(TypeAdapter(TrainingConfig), validator, alone)
    assert validator.is_valid(alone[0])


def test_a_slot_without_kinds_takes_nothing(monkeypatch):
    every = type(registry).all
    empty = lambda self, slot: {} if slot == "shaper" else every(self, slot)  # noqa: E731
    monkeypatch.setattr(type(registry), "all", empty)
    found = schema()
    Draft202012Validator.check_schema(found)
    assert found["$defs"]["shaper"] is False
    assert Draft202012Validator(found).is_valid({"scorer": "plain_test", "shapers": []})
    assert not Draft202012Validator(found).is_valid({"scorer": "plain_test", "shapers": ["x"]})


def test_another_target_is_an_error():
    with pytest.raises(ConfigurationError, match="there is no schema 'x'; there are: benchmark"):
        schema("x")
