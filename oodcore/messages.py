"""Messages: what pydantic says about a configuration, in words that tell a person what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from oodcore.component import Component, Slot, suggestion
from oodcore.document import Document, Route
from oodcore.plugins import registry


def explain(
    error: ValidationError, at: str = "", document: Document | None = None, wanted: Any = None
) -> str:
    """All that is wrong, a line each: ``detector.yaml:7: scorer.k: must be at least 1, not 0``.

    Args:
        error: what pydantic raised.
        at: where the values stand, put before every place: ``scorer`` makes ``scorer.k`` of ``k``.
        document: the values that were validated, and their lines.
        wanted: what they were meant for, a model or a ``Slot``; with it, a field that is unknown
            is answered with those that are known.
    """
    document = document or Document(None)
    known = document.data is not None
    faults = [
        _fault(item, document.data if known else _UNKNOWN, wanted)
        for item in error.errors(include_url=False)
    ]
    lines = []
    for route, text in _merged(faults):
        place = ".".join(str(step) for step in (*filter(None, [at]), *route))
        said = f"{place}: {text}" if place else text
        lines.append((document.line(route), f"{document.where(route)}{said}"))
    return "\n".join(text for _, text in sorted(lines, key=lambda line: line[0]))


@dataclass(frozen=True)
class _Fault:
    """One of pydantic's errors.

    ``union`` is how much of the route leads to a union that the error comes from one member of;
    ``expected`` completes "must be", ``said`` is a message of its own.
    """

    route: Route
    given: Any
    union: int | None
    expected: str = ""
    said: str = ""


_UNKNOWN = object()
_ABSENT = object()


def _fault(item: Mapping[str, Any], data: Any, wanted: Any) -> _Fault:
    route, union = _route(item["loc"], item["type"], data)
    context: Mapping[str, Any] = item.get("ctx", {})
    given = item["input"]
    if item["type"] == "missing":
        return _Fault(route, given, union, said="is needed")
    if item["type"] == "extra_forbidden":
        fields = [] if wanted is None else _fields(wanted, data, route[:-1])
        near = suggestion(str(route[-1]), fields)
        names = f"; there are: {', '.join(fields)}" if fields and not near else ""
        return _Fault(route, given, union, said=f"unknown field{near or names}")
    if item["type"] in _EXPECTED:
        return _Fault(route, given, union, expected=_EXPECTED[item["type"]](context))
    if item["type"] in ("value_error", "assertion_error"):
        return _Fault(route, given, union, said=str(context.get("error", item["msg"])))
    return _Fault(route, given, union, said=item["msg"])


def _route(place: Sequence[str | int], kind: str, data: Any) -> tuple[Route, int | None]:
    """Where in the data an error is; pydantic also names the member of a union it comes from.

    A step that the data does not have is such a name, unless it is the field that is missing. The
    places of rules between fields are ours, and taken as they are.
    """
    if kind == "rule" or data is _UNKNOWN:
        return tuple(place), None
    route: list[str | int] = []
    union = None
    for number, step in enumerate(place):
        inner = _child(data, step)
        if inner is not _ABSENT or (kind == "missing" and number == len(place) - 1):
            route.append(step)
            data = inner
        elif union is None:
            union = len(route)
    return tuple(route), union


def _child(data: Any, step: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(step, _ABSENT)
    if isinstance(data, list | tuple) and isinstance(step, int) and step < len(data):
        return data[step]
    return _ABSENT


def _merged(faults: list[_Fault]) -> Iterator[tuple[Route, str]]:
    """One message a place. A member of a union that fits on the outside speaks for all of it."""
    deeper = {
        fault.route[: fault.union]
        for fault in faults
        if fault.union is not None and len(fault.route) > fault.union
    }
    places: dict[Route, list[_Fault]] = {}
    for fault in faults:
        if fault.union != len(fault.route) or fault.route not in deeper:
            places.setdefault(fault.route, []).append(fault)
    for route, here in places.items():
        expected = list(dict.fromkeys(fault.expected for fault in here if fault.expected))
        if expected:
            yield route, _must(expected, here[0].given)
        for said in dict.fromkeys(fault.said for fault in here if fault.said):
            yield route, said


def _must(expected: list[str], given: Any) -> str:
    words = re.findall("'([^']*)'", " ".join(expected))
    near = suggestion(given, words) if isinstance(given, str) else ""
    wanted = " or ".join(expected)
    if isinstance(given, list | tuple | Mapping) and re.search(r"\d item", wanted):
        return f"must be {wanted}, not of {len(given)}"
    return f"must be {wanted}, not {_shown(given, bare=bool(words))}{near}"


def _shown(given: Any, bare: bool = False) -> str:
    """A value, in the words of a configuration."""
    if given is None or isinstance(given, bool):
        return {None: "null", True: "true", False: "false"}[given]
    if isinstance(given, int | float):
        return _short(f"{given:g}" if isinstance(given, float) else _digits(given))
    if isinstance(given, str):
        return f"'{_short(given)}'" if bare else f"text '{_short(given)}'"
    if isinstance(given, Component):
        return f"the {given.slot} '{type(given).kind}'"
    if isinstance(given, list | tuple):
        return "a list"
    return "a mapping" if isinstance(given, Mapping) else f"a {type(given).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _digits(number: int) -> str:
    """A whole number; Python refuses to write out one that is very long."""
    return str(number) if abs(number) < 10**40 else "a number of more than 40 digits"


def _fields(wanted: Any, data: Any, route: Route) -> list[str]:
    """The names of the fields that the mapping at a place may have."""
    places: list[Any] = [wanted]
    for step in route:
        places = [inner for place in places for inner in _inside(place, data, step)]
        data = _child(data, step)
    models = [model for place in places for model in _models(place, data)]
    return sorted({name for model in models for name in model.model_fields})


def _models(wanted: Any, data: Any) -> Iterator[type[BaseModel]]:
    """The models that a value may be meant for."""
    for leaf in _members(wanted):
        if isinstance(leaf, Slot):
            kind = data.get("kind") if isinstance(data, Mapping) else data
            if isinstance(kind, str) and (cls := registry.find(leaf.name, kind)):
                yield cls
        elif isinstance(leaf, type) and issubclass(leaf, BaseModel):
            yield leaf


def _inside(wanted: Any, data: Any, step: str | int) -> Iterator[Any]:
    """What a value's part may be meant for."""
    for model in _models(wanted, data):
        if field := model.model_fields.get(str(step)):
            slots = [mark for mark in field.metadata if isinstance(mark, Slot)]
            yield slots[0] if slots else field.annotation
    for leaf in _members(wanted):
        parts = get_args(leaf)
        if get_origin(leaf) is tuple and isinstance(step, int):
            yield parts[0] if Ellipsis in parts else parts[min(step, len(parts) - 1)]
        elif get_origin(leaf) in (dict, Mapping) and isinstance(step, str):
            yield parts[1]


def _members(wanted: Any) -> Iterator[Any]:
    """The members of a union, or the type itself; a slot stands for what it marks."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Annotated:
        slots = [mark for mark in parts[1:] if isinstance(mark, Slot)]
        yield from slots or _members(parts[0])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from _members(part)
    else:
        yield wanted


def _items(bound: str, length: str) -> Callable[[Mapping[str, Any]], str]:
    def say(context: Mapping[str, Any]) -> str:
        noun = "list" if context["field_type"] in ("Tuple", "List") else "mapping"
        number = context[length]
        return f"a {noun} of {bound} {number} {'item' if number == 1 else 'items'}"

    return say


_EXPECTED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), lambda c: "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), lambda c: "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), lambda c: "true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), lambda c: "a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type"), lambda c: "a mapping"
    ),
    "string_type": lambda c: "text",
    "path_type": lambda c: "a path",
    "none_required": lambda c: "null",
    "literal_error": lambda c: c["expected"],
    "finite_number": lambda c: "finite",
    "greater_than": lambda c: f"greater than {c['gt']:g}",
    "greater_than_equal": lambda c: f"at least {c['ge']:g}",
    "less_than": lambda c: f"less than {c['lt']:g}",
    "less_than_equal": lambda c: f"at most {c['le']:g}",
    "multiple_of": lambda c: f"a multiple of {c['multiple_of']:g}",
    "string_too_short": lambda c: f"text of at least {c['min_length']} characters",
    "string_too_long": lambda c: f"text of at most {c['max_length']} characters",
    "string_pattern_mismatch": lambda c: f"text of the form {c['pattern']}",
    "too_short": _items("at least", "min_length"),
    "too_long": _items("at most", "max_length"),
    "invalid_key": lambda c: "text",
    "is_instance_of": lambda c: f"a {c['class']}",
}
