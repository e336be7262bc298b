from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, computed_field

import oodcore
from oodcore.component import (
    Component,
    FilePath,
    Paper,
    Settings,
    Slot,
    canonical,
    faults,
    named,
    notes,
    suggestion,
)
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry

if TYPE_CHECKING:
    from decimal import Decimal


class Gauge(oodcore.Source):
    """A source is the smallest component."""

    def open(self) -> Any:
        return []


class Crop(Settings):
    size: PositiveInt = 1
    mean: tuple[float, ...] = ()


class Plain(Gauge):
    kind = "plain"

    count: int = 1
    ratio: float = 0.5
    on: bool = False
    text: str = "a"
    sizes: tuple[int, ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["mean", "max"] = "mean"
    lam: float | Literal["auto"] = "auto"
    where: FilePath = Path("x")
    maybe: int | None = None
    crop: Crop = Crop()


class Outer(Gauge):
    kind = "outer"

    inner: Annotated[Gauge, Slot("source")] = Plain()
    many: tuple[Annotated[Gauge, Slot("source")], ...] = ()
    maybe: Annotated[Gauge, Slot("source")] | None = None


class Needy(Gauge):
    kind = "needy"

    k: PositiveInt


class Plugin:
    @oodcore.hookimpl
    def register_sources(self, register: Any) -> None:
        for cls in (Plain, Outer, Needy):
            register(cls)


@pytest.fixture
def plugged():
    with registry.using(Plugin()):
        yield


def where(error: pytest.ExceptionInfo[ValidationError]) -> list[tuple[Any, ...]]:
    return [item["loc"] for item in error.value.errors()]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", "3"),
        ("count", True),
        ("count", 3.5),
        ("count", None),
        ("ratio", "0.5"),
        ("ratio", True),
        ("ratio", float("nan")),
        ("ratio", float("inf")),
        ("on", 1),
        ("on", "true"),
        ("text", 3),
        ("sizes", [1, 2.5]),
        ("sizes", ["1"]),
        ("sizes", [True]),
        ("sizes", 3),
        ("sizes", "12"),
        ("sizes", {"a": 1}),
        ("sizes", np.array([1, 2])),
        ("pair", [1.0]),
        ("pair", [1.0, 2.0, 3.0]),
        ("mode", "min"),
        ("lam", "never"),
        ("lam", True),
        ("where", 3),
        ("maybe", "1"),
        ("crop", {"size": 0}),
        ("crop", {"sze": 1}),
        ("crop", {"mean": ["1"]}),
        ("crop", 3),
    ],
)
def test_values_are_strict(field, value):
    with pytest.raises(ValidationError) as error:
        Plain(**{field: value})
    assert {place[0] for place in where(error)} == {field}


def test_an_unknown_field_is_refused():
    with pytest.raises(ValidationError, match="cuont"):
        Plain(cuont=3)


def test_a_component_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Plain().count = 2
    with pytest.raises(ValidationError, match="frozen"):
        Plain().crop.size = 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"count": 3.0}, {"count": 3}),
        ({"ratio": 3}, {"ratio": 3.0}),
        ({"sizes": [1, 2.0]}, {"sizes": (1, 2)}),
        ({"pair": [1, 2]}, {"pair": (1.0, 2.0)}),
        ({"where": "a/b"}, {"where": Path("a/b")}),
        ({"crop": {"size": 2.0, "mean": [1, 2]}}, {"crop": Crop(size=2, mean=(1.0, 2.0))}),
        ({"count": np.int64(3)}, {"count": 3}),
        ({"count": np.float32(3)}, {"count": 3}),
        ({"ratio": np.float32(0.25)}, {"ratio": 0.25}),
        ({"on": np.bool_(True)}, {"on": True}),
        ({"sizes": [np.int32(4)]}, {"sizes": (4,)}),
    ],
)
def test_what_means_the_same_is_the_same(given, meant):
    a, b = Plain(**given), Plain(**meant)
    assert a == b
    assert hash(a) == hash(b)
    assert canonical(a) == canonical(b)


def test_numbers_have_the_type_of_their_field():
    plain = Plain(count=3.0, ratio=3, pair=[1, 2])
    assert type(plain.count) is int
    assert type(plain.ratio) is float
    assert [type(part) for part in plain.pair] == [float, float]


def test_what_is_given_is_not_changed():
    given = {"sizes": [1, 2], "crop": {"mean": [0.5]}}
    before = copy.deepcopy(given)
    Plain.model_validate(given)
    assert given == before


def test_equality_compares_type_and_fields():
    class Other(Plain):
        kind = "other"

    assert Plain() == Plain()
    assert Plain() != Plain(count=2)
    assert Plain() != Other()
    assert len({Plain(), Plain(), Plain(count=2)}) == 2


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(-(2**70), 2**70),
            "ratio": numbers,
            "on": st.booleans(),
            "text": st.text(),
            "sizes": st.lists(st.integers()),
            "pair": st.tuples(numbers, numbers),
            "mode": st.sampled_from(["mean", "max"]),
            "lam": st.one_of(numbers, st.just("auto")),
            "where": st.text("ab./", min_size=1).map(Path),
            "maybe": st.none() | st.integers(),
            "crop": st.builds(
                Crop, size=st.integers(1, 9), mean=st.lists(numbers, max_size=3).map(tuple)
            ),
        },
    )
)
def test_a_dump_is_json_and_rebuilds_the_component(fields):
    plain = Plain(**fields)
    dumped = plain.dump()
    assert next(iter(dumped)) == "kind"
    again = Plain.model_validate(json.loads(json.dumps(dumped)))
    assert again == plain
    assert hash(again) == hash(plain)
    assert canonical(again) == canonical(plain) == canonical(dumped)


def test_nested_components_round_trip(plugged):
    outer = Outer(
        inner={"kind": "needy", "k": 3},
        many=["plain", {"kind": "outer", "maybe": "plain"}],
        maybe=Plain(count=2),
    )
    assert isinstance(outer.inner, Needy)
    again = registry.build("source", json.loads(json.dumps(outer.dump())))
    assert again == outer
    assert again.many[1].maybe == Plain()
    assert [type(part).kind for part in outer.walk()] == [
        "outer",
        "needy",
        "plain",
        "outer",
        "plain",
        "plain",
        "plain",
    ]
    assert [path for path, _ in outer.components()] == [
        ("inner",),
        ("many", "0"),
        ("many", "1"),
        ("maybe",),
    ]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_component_pickles(protocol, plugged):
    outer = Outer(inner={"kind": "needy", "k": 3}, many=["plain"])
    again = pickle.loads(pickle.dumps(outer, protocol))
    assert again == outer
    assert hash(again) == hash(outer)
    assert copy.deepcopy(outer) == outer


def test_the_kind_may_be_written_and_must_be_right():
    assert Plain(kind="plain", count=2) == Plain(count=2)
    with pytest.raises(ValidationError, match="the kind is 'outer', and this is a Plain"):
        Plain(kind="outer")


def test_errors_carry_the_path_through_slots(plugged):
    with pytest.raises(ValidationError) as error:
        Outer(
            inner={"kind": "needy", "k": "3"},
            many=["plain", {"kind": "outer", "maybe": {"kind": "needy"}}, 3],
            maybe="nothing",
        )
    assert where(error) == [
        ("inner", "k"),
        ("many", 1, "maybe", "k"),
        ("many", 2),
        ("maybe",),
    ]


@pytest.mark.parametrize("value", [3, None, [], {}, {"k": 3}, {"kind": 3}, ["plain"], True])
def test_what_names_no_component_is_told_how(value, plugged):
    with pytest.raises(ValidationError, match="write a source as its kind"):
        Outer(inner=value)


def test_a_component_of_another_slot_is_refused(plugged):
    class Other(Component):
        slot: ClassVar[str] = "scorer"
        kind: ClassVar[str] = "other"

    with pytest.raises(ValidationError, match="this is a scorer 'other', and a source is needed"):
        Outer(inner=Other())


def test_a_slot_is_looked_up_when_a_value_is_validated():
    with pytest.raises(ValidationError, match="unknown source 'plain'"):
        Outer(inner="plain")
    with registry.using(Plugin()):
        assert Outer(inner="plain").inner == Plain()


def test_an_unknown_slot_is_an_error_where_it_is_written():
    with pytest.raises(ConfigurationError, match="unknown slot 'scorr'; the slots are: extractor"):
        Slot("scorr")


def test_named_gives_an_instance_back():
    plain = Plain()
    assert named("source", plain) is plain


def refusal(cls: Any) -> str:
    return str(faults(cls, Gauge))


class Alien(BaseModel):
    x: int = 1


class Loose(Settings):
    model_config = ConfigDict(strict=False)


class Tree(Settings):
    children: tuple[Tree, ...] = ()


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (list[int], "a field cannot be a list"),
        (list, "a field cannot be a list"),
        (dict[str, int], "a field cannot be a dict"),
        (set[int], "a field cannot be a set"),
        (frozenset[int], "a field cannot be a frozenset"),
        (bytes, "a field cannot be a bytes"),
        (Any, "a field cannot be"),
        (tuple[list[int], ...], "a field cannot be a list"),
        (list[int] | None, "a field cannot be a list"),
        (Annotated[dict[str, int], Field(min_length=1)], "a field cannot be a dict"),
        (tuple, "say what the tuple holds"),
        (Path, "a path is a FilePath"),
        (tuple[Path, ...], "a path is a FilePath"),
        (Annotated[int, Field(strict=False)], "numbers and texts are strict"),
        (tuple[Annotated[int, Field(strict=False)], ...], "numbers and texts are strict"),
        (Plain, r"a component is looked up by its kind; use Annotated\[Plain, Slot"),
        (tuple[Plain, ...], "a component is looked up by its kind"),
        (Alien, "Alien must be a subclass of oodcore.component.Settings"),
        (Loose, r"model_config\['strict'\] must stay True"),
        (Literal[1, 2], "a Literal of 0, 1, True or False"),
        (Literal[True, "auto"], "a Literal of 0, 1, True or False"),
    ],
)
def test_registration_refuses_a_field_that_fits_no_configuration(annotation, message):
    class Odd(Gauge):
        kind = "odd"
        value: annotation  # type: ignore[valid-type]

    assert re.search(message, refusal(Odd))


@pytest.mark.parametrize(
    "annotation",
    [
        int,
        PositiveInt,
        float | None,
        str,
        bool,
        Literal["a", "b", 2],
        tuple[int, ...],
        tuple[tuple[float, str], ...],
        FilePath,
        FilePath | None,
        tuple[FilePath, ...],
        Crop,
        Tree,
        tuple[Crop, ...] | None,
        Annotated[Gauge, Slot("source")],
        Annotated[Gauge, Slot("source")] | None,
        tuple[Annotated[Gauge, Slot("source")], ...],
    ],
)
def test_registration_takes_every_field_that_fits(annotation):
    class Fine(Gauge):
        kind = "fine"
        value: annotation  # type: ignore[valid-type]

    assert faults(Fine, Gauge) is None


def test_registration_refuses_a_tensor():
    with pytest.raises(Exception, match="schema"):

        class Odd(Gauge):
            kind = "odd"
            value: np.ndarray


def test_registration_refuses_what_is_no_component_of_the_slot():
    assert "is not a subclass of Gauge" in refusal(int)
    assert "is not a subclass of Gauge" in refusal(Plain())
    assert "is not a subclass of Gauge" in refusal(Crop)


@pytest.mark.parametrize("kind", ["", "Knn", "k-nn", "1nn", "k nn", 3, None])
def test_registration_refuses_an_ill_formed_kind(kind):
    cls = type("Odd", (Gauge,), {"kind": kind, "__module__": __name__})
    assert "needs a kind" in refusal(cls)


def test_registration_refuses_a_missing_kind_and_a_kind_that_is_a_field():
    class Bare(Gauge):
        pass

    assert "needs a kind" in refusal(Bare)

    class Annotated_(Gauge):
        kind: str = "x"

    assert "write it without an annotation" in refusal(Annotated_)


def test_registration_refuses_an_abstract_class():
    class Odd(oodcore.Source):
        kind = "odd"

    assert faults(Odd, oodcore.Source) == "Odd does not define open"


def test_registration_refuses_a_field_named_like_an_attribute():
    class Odd(Gauge):
        kind = "odd"
        measures: int = 1

    class Base(Gauge):
        @property
        def measures(self) -> bool:
            return True

    assert faults(Odd, Gauge) is None
    with pytest.warns(UserWarning, match="shadows"):

        class Hiding(Base):
            kind = "hiding"
            measures: int = 1

    assert "cannot be named like an attribute of Base" in str(faults(Hiding, Base))


def test_registration_refuses_an_annotation_that_is_not_there_at_run_time():
    class Late(Gauge):
        kind = "late"
        value: Decimal = 1

    assert "'Decimal' is not defined at run time" in refusal(Late)


def test_registration_refuses_what_is_not_read_back():
    class Renamed(Gauge):
        kind = "renamed"
        value: int = Field(1, alias="v")

    class Hidden(Gauge):
        kind = "hidden"
        value: int = Field(1, exclude=True)

    class Computed(Gauge):
        kind = "computed"

        @computed_field
        @property
        def value(self) -> int:
            return 1

    class Open(Gauge):
        model_config = ConfigDict(extra="allow")
        kind = "open"

    assert "no alias, no exclude" in refusal(Renamed)
    assert "no alias, no exclude" in refusal(Hidden)
    assert "a computed field is not read back" in refusal(Computed)
    assert "model_config['extra'] must stay 'forbid'" in refusal(Open)


def test_canonical_is_one_text():
    assert canonical({"b": (1, 2.5), "a": {"y": None, "x": True}}) == (
        '{"a":{"x":true,"y":null},"b":[1,2.5]}'
    )
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})
    assert canonical({"p": Path("a/b"), "n": np.int64(3)}) == '{"n":3,"p":"a/b"}'
    assert canonical("é") == '"é"'
    assert canonical([Plain(count=2)]) == f"[{canonical(Plain(count=2))}]"
    assert json.loads(canonical(Plain())) == Plain().dump()


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {1: 2}, object(), {"a": {1, 2}}])
def test_canonical_refuses_what_is_no_json(value):
    with pytest.raises(ConfigurationError, match="cannot be written as JSON"):
        canonical(value)


def test_notes_are_read_from_docstrings():
    class Parent(Gauge):
        """One.

        Args:
            a: the first
                number.
            b, c: two more: with a colon.

        Raises:
            d: not this.
        """

    class Child(Parent):
        """Two.

        Args:
            b: its own.
        """

    assert notes(Child) == {
        "a": "the first number.",
        "b": "its own.",
        "c": "two more: with a colon.",
    }
    assert notes(Plain) == {}


def test_suggestion():
    assert suggestion("enrgy", ["energy", "msp"]) == "; did you mean 'energy'?"
    assert suggestion("zzz", ["energy", "msp"]) == ""
    assert suggestion("x", []) == ""


def test_a_paper_reads_as_a_citation():
    paper = Paper("On Rows", "A. Author, B. Author", "ICML", 2020, "https://example.org")
    assert str(paper) == "A. Author, B. Author. On Rows. ICML 2020. https://example.org"


def test_importing_oodcore_imports_no_torch():
    code = "import sys, oodcore; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
