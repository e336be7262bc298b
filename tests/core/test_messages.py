from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

import oodcore
from oodcore.component import FilePath, Settings, Slot
from oodcore.document import Document, read
from oodcore.messages import explain
from oodcore.plugins import registry


def _even(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


class Crop(Settings):
    size: int = 1
    mean: tuple[float, ...] = ()


class Box(Settings):
    width: int
    height: int


class Thing(oodcore.Source):
    kind = "thing"

    count: int = 1
    ratio: float = 0.5
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    level: Annotated[int, Field(ge=1, le=9)] = 1
    step: Annotated[int, Field(multiple_of=4)] = 4
    on: bool = False
    text: str = "a"
    code: Annotated[str, StringConstraints(pattern="^[a-z]+$", min_length=2, max_length=4)] = "ab"
    sizes: tuple[int, ...] = ()
    few: Annotated[tuple[int, ...], Field(min_length=1, max_length=2)] = (1,)
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["mean", "max"] = "mean"
    lam: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    means: tuple[float, ...] | float = 0.0
    shape: Crop | Box = Crop()
    where: FilePath | None = None
    maybe: int | None = None
    crop: Crop = Crop()
    crops: tuple[Crop, ...] = ()
    even: Annotated[int, AfterValidator(_even)] = 2
    inner: Annotated[oodcore.Source, Slot("source")] | None = None
    many: tuple[Annotated[oodcore.Source, Slot("source")], ...] = ()
    either: Annotated[oodcore.Source, Slot("source")] | float = 1.0

    @model_validator(mode="after")
    def _check(self) -> Thing:
        if self.on and self.count > 1:
            raise ValueError("on allows a count of 1")
        return self

    def open(self) -> Any:
        return []


class Plugin:
    @oodcore.hookimpl
    def register_sources(self, register: Any) -> None:
        register(Thing)


@pytest.fixture(autouse=True)
def plugged():
    with registry.using(Plugin()):
        yield


def said(fields: Mapping[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ValidationError) as error:
        Thing.model_validate(fields)
    options = {"document": Document(fields), "wanted": Thing, **options}
    return explain(error.value, **options).splitlines()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", "3", "count: must be a whole number, not text '3'"),
        ("count", 2.5, "count: must be a whole number, not 2.5"),
        ("count", True, "count: must be a whole number, not true"),
        ("count", None, "count: must be a whole number, not null"),
        ("count", [1], "count: must be a whole number, not a list"),
        ("count", {"a": 1}, "count: must be a whole number, not a mapping"),
        ("count", object(), "count: must be a whole number, not a object"),
        ("count", Crop(), "count: must be a whole number, not a Crop"),
        ("ratio", "x" * 50, f"ratio: must be a number, not text '{'x' * 37}...'"),
        ("ratio", 10**400, "ratio: must be a number, not a number of more than 40 digits"),
        ("ratio", float("inf"), "ratio: must be finite, not inf"),
        ("share", 0, "share: must be greater than 0, not 0"),
        ("share", 1.0, "share: must be less than 1, not 1"),
        ("level", 0, "level: must be at least 1, not 0"),
        ("level", 10, "level: must be at most 9, not 10"),
        ("step", 3, "step: must be a multiple of 4, not 3"),
        ("on", "true", "on: must be true or false, not text 'true'"),
        ("on", 1, "on: must be true or false, not 1"),
        ("text", 3, "text: must be text, not 3"),
        ("code", "a1", "code: must be text of the form ^[a-z]+$, not text 'a1'"),
        ("code", "a", "code: must be text of at least 2 characters, not text 'a'"),
        ("code", "abcde", "code: must be text of at most 4 characters, not text 'abcde'"),
        ("sizes", 3, "sizes: must be a list, not 3"),
        ("sizes", "12", "sizes: must be a list, not text '12'"),
        ("sizes", [1, "2"], "sizes.1: must be a whole number, not text '2'"),
        ("few", [], "few: must be a list of at least 1 item, not of 0"),
        ("few", [1, 2, 3], "few: must be a list of at most 2 items, not of 3"),
        ("pair", [1], "pair.1: is needed"),
        ("pair", [1, 2, 3], "pair: must be a list of at most 2 items, not of 3"),
        ("mode", "men", "mode: must be 'mean' or 'max', not 'men'; did you mean 'mean'?"),
        ("mode", "sum", "mode: must be 'mean' or 'max', not 'sum'"),
        ("mode", 3, "mode: must be 'mean' or 'max', not 3"),
        ("lam", "atuo", "lam: must be a number or 'auto', not 'atuo'; did you mean 'auto'?"),
        ("lam", -1, "lam: must be greater than 0 or 'auto', not -1"),
        ("lam", True, "lam: must be a number or 'auto', not true"),
        ("means", "x", "means: must be a list or a number, not text 'x'"),
        ("means", [1, "x"], "means.1: must be a number, not text 'x'"),
        ("where", 3, "where: must be a path, not 3"),
        ("maybe", "x", "maybe: must be a whole number, not text 'x'"),
        ("crop", 3, "crop: must be a mapping, not 3"),
        ("crop", {"size": "1"}, "crop.size: must be a whole number, not text '1'"),
        ("crop", {"sze": 1}, "crop.sze: unknown field; did you mean 'size'?"),
        ("crop", {"zzz": 1}, "crop.zzz: unknown field; there are: mean, size"),
        ("crops", [{}, {"sze": 1}], "crops.1.sze: unknown field; did you mean 'size'?"),
        ("even", 3, "even: 3 is odd"),
        ("conut", 3, "conut: unknown field; did you mean 'count'?"),
        (
            "inner",
            {"kind": "thing", "conut": 1},
            "inner.conut: unknown field; did you mean 'count'?",
        ),
        (
            "inner",
            {"kind": "thing", "count": "1"},
            "inner.count: must be a whole number, not text '1'",
        ),
        (
            "many",
            ["thing", {"kind": "thing", "inner": {"kind": "thing", "crop": {"sze": 2}}}],
            "many.1.inner.crop.sze: unknown field; did you mean 'size'?",
        ),
        (
            "inner",
            3,
            "inner: write a source as its kind ('name') or as a mapping with a 'kind'",
        ),
        ("inner", {"kind": "thing", "kin": 1}, "inner.kin: unknown field; there are:"),
        (
            "either",
            {"kind": "thing", "conut": 1},
            "either.conut: unknown field; did you mean 'count'?",
        ),
    ],
)
def test_messages_are_for_people(field, value, message):
    (line,) = said({field: value})
    assert line.startswith(message)
    if not message.endswith(":"):
        assert line == message


def test_an_unknown_kind_names_near_ones():
    (line,) = said({"inner": {"kind": "thnig"}})
    assert line.startswith("inner: unknown source 'thnig'; did you mean 'thing'? installed: ")


def test_all_that_is_wrong_is_said():
    assert said({"count": "3", "conut": 1, "crop": {"size": "x", "men": []}, "pair": [1]}) == [
        "count: must be a whole number, not text '3'",
        "pair.1: is needed",
        "crop.size: must be a whole number, not text 'x'",
        "crop.men: unknown field; did you mean 'mean'?",
        "conut: unknown field; did you mean 'count'?",
    ]


def test_a_rule_between_fields_has_no_place():
    assert said({"on": True, "count": 2}) == ["on allows a count of 1"]
    assert said({"on": True, "count": 2}, at="train") == ["train: on allows a count of 1"]
    (line,) = said({"inner": {"kind": "thing", "on": True, "count": 2}})
    assert line == "inner: on allows a count of 1"


def test_the_mapping_that_fits_best_speaks_for_a_union_of_groups():
    lines = said({"shape": {"width": "3"}})
    assert "shape.width: must be a whole number, not text '3'" in lines
    assert "shape.height: is needed" in lines
    assert said({"shape": 3}) == ["shape: must be a mapping, not 3"]


def test_at_comes_before_every_place():
    assert said({"count": "3", "crop": {"sze": 1}}, at="train") == [
        "train.count: must be a whole number, not text '3'",
        "train.crop.sze: unknown field; did you mean 'size'?",
    ]


def test_lines_are_those_of_the_file_and_in_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.yaml").write_text(
        "conut: 1\n"
        "many:\n"
        "  - thing\n"
        "  - kind: thing\n"
        "    count: x\n"
        "shape: {width: 1, hight: 2}\n"
        "count: y\n"
    )
    document = read("d.yaml")
    assert said(document.data, document=document)[:2] == [
        "d.yaml:1: conut: unknown field; did you mean 'count'?",
        "d.yaml:5: many.1.count: must be a whole number, not text 'x'",
    ]
    rest = said(document.data, document=document)[2:]
    assert "d.yaml:6: shape.hight: unknown field; did you mean 'height'?" in rest
    assert "d.yaml:6: shape.height: is needed" in rest
    assert rest[-1] == "d.yaml:7: count: must be a whole number, not text 'y'"


def test_without_the_values_an_error_is_still_explained():
    with pytest.raises(ValidationError) as error:
        Thing(count="3", conut=1)
    assert explain(error.value).splitlines() == [
        "count: must be a whole number, not text '3'",
        "conut: unknown field",
    ]


def test_an_error_of_another_kind_keeps_pydantics_words():
    class Odd(Settings):
        callback: type = int

    with pytest.raises(ValidationError) as error:
        Odd(callback=3)
    assert explain(error.value) == f"callback: {error.value.errors()[0]['msg']}"
