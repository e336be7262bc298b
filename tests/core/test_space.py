"""Search spaces: what they are, and that those of components give values of their fields."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt

import oodcore
from oodcore import Scorer, hookimpl
from oodcore.errors import ConfigurationError, PluginError
from oodcore.plugins import SLOTS, registry
from oodcore.space import Choice, Range, spaces


def fields() -> list[tuple[str, str, str]]:
    return [
        (slot, kind, name)
        for slot in SLOTS
        for kind, cls in registry.all(slot).items()
        for name in cls.search
    ]


@pytest.mark.parametrize(("slot", "kind", "name"), fields())
def test_declared_values_are_those_of_the_field(slot: str, kind: str, name: str) -> None:
    cls = registry.get(slot, kind)
    space = cls.search[name]
    assert len(set(space.examples)) > 1
    rest: dict[str, Any] = {"scorer": "msp"} if kind == "perturbed" else {}
    for value in space.examples:
        made = registry.build(slot, {"kind": kind, name: value, **rest})
        assert getattr(made, name) == value
        assert type(getattr(made, name)) is type(value)


def test_methods_whose_values_others_swept_say_so() -> None:
    declared = {(kind, name) for _, kind, name in fields()}
    assert {("knn", "k"), ("odin", "epsilon"), ("gen", "gamma"), ("ash", "percentile")} <= declared
    for slot, kind, name in fields():
        assert len(registry.get(slot, kind).search[name].source) > 5


def registered(**body: Any) -> None:
    """Register a scorer with this search space and leave it again."""

    class Searched(Scorer):
        kind = "searched"
        k: PositiveInt = 3
        share: Annotated[float, Field(ge=0, lt=1)] = 0.5
        way: Literal["up", "down"] = "up"
        dim: PositiveInt | None = None

        def needs(self) -> frozenset[str]:
            return frozenset({"logits"})

        def score(self, features: Any, state: Any) -> Any:
            return features.logits.amax(dim=1)

    for name, value in body.items():
        setattr(Searched, name, value)

    def register_scorers(register: Any) -> None:
        register(Searched)

    with oodcore.registry.using(SimpleNamespace(register_scorers=hookimpl(register_scorers))):
        pass


def test_registration_takes_values_of_the_fields() -> None:
    registered(
        search=spaces(
            k=Choice((1, 10), "someone"),
            share=Range(0.0, 0.9, "someone"),
            way=Choice(("up", "down"), "someone"),
            dim=Choice((None, 8), "someone"),
        )
    )
    registered(search={"share": Choice((0, 0.5), "someone"), "k": Range(1, 100, "so", log=True)})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"k": Choice((0, 1), "someone")}, "k.*0 does not fit"),
        ({"k": Choice((True,), "someone")}, "True does not fit"),
        ({"k": Range(1.5, 3.0, "someone")}, "1.5 does not fit"),
        ({"share": Range(0.0, 1.0, "someone")}, "1.0 does not fit"),
        ({"way": Choice(("sideways",), "someone")}, "'sideways' does not fit"),
        ({"dim": Choice(((1, 2),), "someone")}, "no number"),
        ({"depth": Choice((1,), "someone")}, "no such field"),
        ({"k": [1, 2]}, "must be a Choice or a Range"),
        ([("k", 1)], "must map fields"),
    ],
)
def test_registration_refuses_what_no_configuration_could_hold(search: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        registered(search=search)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice((), "someone"),
        lambda: Choice([1, 2], "someone"),  # type: ignore[arg-type]
        lambda: Choice((1, 2, 1), "someone"),
        lambda: Choice((1, 2), " "),
        lambda: Range(2, 1, "someone"),
        lambda: Range(0.0, float("inf"), "someone"),
        lambda: Range(0, 1, "someone", log=True),
        lambda: Range(0, 1, ""),
    ],
)
def test_ill_formed_spaces(make: Any) -> None:
    with pytest.raises(ConfigurationError):
        make()


def test_true_is_not_one() -> None:
    assert Choice((True, 1), "someone").values == (True, 1)
    assert Range(1, 10, "someone").whole
    assert not Range(1.0, 10, "someone").whole
    assert not hasattr(Choice((1,), "someone"), "whole")


def test_spaces_cannot_be_changed() -> None:
    space = registry.get("scorer", "knn").search
    with pytest.raises(TypeError):
        space["k"] = Choice((1,), "me")  # type: ignore[index]
