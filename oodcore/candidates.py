"""Candidates: what may be compared in a benchmark, a detector or an ensemble, each with a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from oodcore.component import Component, Settings, Slot, canonical, suggestion
from oodcore.document import Route
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore.scorer import Combination, Scorer, Shaper, check_recipe

Name = Annotated[str, StringConstraints(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(lambda v: tuple(v) if type(v) is list else v)]
Fault = tuple[Route, str]
Shapers = tuple[Annotated[Shaper, Slot("shaper")], ...]


def _bare(combination: Scorer) -> Scorer:
    if not isinstance(combination, Combination) or combination.scorers:
        raise PydanticCustomError(
            "no_combination", "must be a combination without scorers of its own, such as 'sum'"
        )
    return combination


Combine = Annotated[Scorer, Slot("scorer"), AfterValidator(_bare)]
"""How members' scores become one: a combination whose scorers are the members."""


class Candidate(Settings):
    """A detector that takes part in a benchmark.

    Args:
        name: in tables; left out, it is made of the kinds and of the fields that tell it apart.
        shapers: its own, in place of the benchmark's.
        scorer: the method.
    """

    name: Name | None = None
    shapers: Shapers | None = None
    scorer: Annotated[Scorer, Slot("scorer")]


class Part(Settings):
    """A member of an ensemble that takes part in a benchmark.

    Args:
        model: the name of one of the benchmark's models; left out, and by all members then, the
            ensemble is made for each model.
        shapers: its own, in place of the benchmark's.
        scorer: the method.
    """

    model: Name | None = None
    shapers: Shapers | None = None
    scorer: Annotated[Scorer, Slot("scorer")]


class Joint(Settings):
    """An ensemble that takes part in a benchmark.

    Its predicted classes, where a protocol asks for them, are those of its first member's model.

    Args:
        name: in tables; left out, it is made of the kinds and of the fields that tell it apart.
        members: by name.
        combine: how their scores become one.
    """

    name: Name | None = None
    members: Annotated[Mapping[Name, Part], Field(min_length=1)]
    combine: Combine = Field(default="sum")  # type: ignore[assignment]

    @property
    def models(self) -> tuple[str, ...]:
        """The models that its members name, each once."""
        return tuple(dict.fromkeys(p.model for p in self.members.values() if p.model is not None))

    def faults(self, known: Iterable[str], route: Route) -> list[Fault]:
        """What is wrong with it, each with its place.

        Args:
            known: the names of the models that there are.
            route: where it stands.
        """
        found: list[Fault] = weight_faults(self.combine, len(self.members), route)
        known, named = list(known), [p for p in self.members.values() if p.model is not None]
        for title, part in self.members.items():
            at = (*route, "members", title)
            found += recipe_faults(part.scorer, part.shapers or (), at)
            if part.model is None and named:
                found.append((at, "names no model, and others do: all members name one, or none"))
            elif part.model is not None and part.model not in known:
                there = f"; there are: {', '.join(known)}" if known else ": leave model out"
                hint = suggestion(part.model, known) or there
                found.append(((*at, "model"), f"there is no model '{part.model}'{hint}"))
        return found


Contender = Candidate | Joint
Shapeable = TypeVar("Shapeable", Candidate, Part)


def _form(item: Any) -> str:
    if isinstance(item, Joint):
        return "(ensemble)"
    if isinstance(item, Candidate):
        return "(candidate)"
    if not isinstance(item, Mapping) or "kind" in item:
        return "(scorer)"
    return "(ensemble)" if "members" in item else "(candidate)"


Item = Annotated[
    Annotated[Scorer, Slot("scorer"), Tag("(scorer)")]
    | Annotated[Candidate, Tag("(candidate)")]
    | Annotated[Joint, Tag("(ensemble)")],
    Discriminator(_form),
]
"""An item of a benchmark's ``scorers``."""


def titled(
    items: Iterable[Scorer | Contender], shapers: tuple[Shaper, ...]
) -> tuple[Contender, ...]:
    """Items with the shapers that they do not name themselves, and each with a name."""
    full = [_shaped(Candidate(scorer=i) if isinstance(i, Scorer) else i, shapers) for i in items]
    plain = [item.name or _title(item, fields=False) for item in full]
    often = Counter(plain)
    return tuple(
        item.model_copy(update={"name": name if often[name] == 1 else _title(item)})
        if item.name is None
        else item
        for item, name in zip(full, plain, strict=True)
    )


def installed() -> tuple[Scorer, ...]:
    """Every registered scorer that can be made of its kind alone."""
    scorers = []
    for cls in registry.all("scorer").values():
        try:
            scorer = cls()
        except ValidationError:
            continue
        if isinstance(scorer, Scorer) and not recipe_faults(scorer, (), ()):
            scorers.append(scorer)
    return tuple(scorers)


def recipe_faults(scorer: Scorer, shapers: tuple[Shaper, ...], route: Route) -> list[Fault]:
    """What no data could make work in a detector."""
    try:
        check_recipe(scorer, shapers)
    except ConfigurationError as error:
        return [(route, str(error).removeprefix("scorer: "))]
    return []


def weight_faults(combine: Scorer, members: int, route: Route) -> list[Fault]:
    """Weights of an ensemble's combination that are not one a member."""
    weights = combine.weights if isinstance(combine, Combination) else None
    if weights is None or len(weights) == members:
        return []
    text = f"there are {len(weights)} weights for {members} members"
    return [((*route, "combine", "weights"), text)]


def _shaped(item: Contender, shapers: tuple[Shaper, ...]) -> Contender:
    if isinstance(item, Candidate):
        return _own(item, shapers)
    members = {name: _own(part, shapers) for name, part in item.members.items()}
    return item.model_copy(update={"members": members})


def _own(item: Shapeable, shapers: tuple[Shaper, ...]) -> Shapeable:
    return item if item.shapers is not None else item.model_copy(update={"shapers": shapers})


def _title(item: Contender, fields: bool = True) -> str:
    if isinstance(item, Candidate):
        return _told(item, fields)
    members = ", ".join(f"{name}: {_told(part, fields)}" for name, part in item.members.items())
    return f"{_described(item.combine) if fields else item.combine.kind} of {members}"


def _told(item: Candidate | Part, fields: bool) -> str:
    parts: list[Component] = [*(item.shapers or ()), item.scorer]
    return " + ".join(_described(part) if fields else type(part).kind for part in parts)


def _described(part: Component) -> str:
    """A kind and the fields that are not at their default: ``knn(k=50)``."""
    told = []
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            inner = value if isinstance(value, tuple) else (value,)
            if inner and all(isinstance(one, Component) for one in inner):
                told.append(" ".join(_described(one) for one in inner))
            else:
                told.append(f"{name}={canonical(value)}")
    return f"{type(part).kind}({', '.join(told)})" if told else type(part).kind
