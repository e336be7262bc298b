"""What a component is, in words: its fields and their bounds, what it reads, where it is from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from oodcore.component import Component, Slot, notes
from oodcore.plugins import Plugin, registry
from oodcore.protocols import Choice
from oodcore.scorer import Scorer, Shaper, needed, needed_to_fit
from oodcore.statistics import Statistic

_WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    None: "null",
    NoneType: "null",
    Any: "anything",
}
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def summary(cls: type[Component]) -> str:
    """The first sentence of a class's docstring, without markup."""
    first, _, _ = documentation(cls).partition("\n\n")
    sentence = re.split(r"(?<=[^.]\.)\s|:$", " ".join(first.split()), maxsplit=1)[0]
    return sentence.rstrip(".")


def documentation(cls: type[Component]) -> str:
    """A class's docstring without the list of its fields, which ``fields`` tells."""
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.sub(r"^Args:\n(?: {4}.*\n?|\n)*", "", text, flags=re.MULTILINE)
    return "\n\n".join(_flowing(part) for part in text.replace("``", "").strip().split("\n\n"))


def _flowing(paragraph: str) -> str:
    """A paragraph as one line; formulas, lists and tables stay as they are."""
    lines = paragraph.splitlines()
    kept = any(re.match(r"\s|[-*|]\s|\d+\.\s", line) for line in lines)
    return paragraph if kept else " ".join(lines)


def fields(cls: type[Component]) -> list[dict[str, Any]]:
    """Each field: its name, type with bounds, whether it is required, else its default, a note."""
    told = notes(cls)
    return [
        {
            "name": name,
            "type": type_of(field.annotation, field.metadata),
            "required": field.is_required(),
            **({} if field.is_required() else {"default": _default(field)}),
            "note": told.get(name, "").replace("``", ""),
        }
        for name, field in cls.model_fields.items()
    ]


def needs(cls: type[Component]) -> list[str] | None:
    """The fields of Features that it reads; None where the kind alone does not tell."""
    if not issubclass(cls, Scorer | Shaper | Statistic):
        return []
    try:
        part: Any = cls()
    except ValidationError:
        return None
    if isinstance(part, Scorer):
        return sorted(needed(part) | needed_to_fit(part))
    if isinstance(part, Shaper):
        return sorted(part.needs().union(*(s.needs() for s in part.statistics())))
    return sorted(part.needs())


def described(slot: str, kind: str) -> dict[str, Any]:
    """All that is to be said of a kind, in plain JSON values."""
    cls = registry.get(slot, kind)
    paper = cls.paper
    return {
        **brief(slot, kind),
        "documentation": documentation(cls),
        "fields": fields(cls),
        "needs": needs(cls),
        "search": {name: space.dump() for name, space in cls.search.items()},
        "citation": None if paper is None else str(paper),
    }


def brief(slot: str, kind: str) -> dict[str, Any]:
    """A kind in a line, in plain JSON values."""
    cls = registry.get(slot, kind)
    paper = cls.paper
    return {
        "slot": slot,
        "kind": kind,
        "summary": summary(cls),
        "paper": None if paper is None else f"{paper.venue} {paper.year}",
        **_origin(registry.owner(cls)),
    }


def type_of(annotation: Any, marks: Iterable[Any] = ()) -> str:
    """A field's type in the words of a configuration, with its bounds: ``whole number > 0``."""
    marks = tuple(marks)
    if slots := [mark for mark in marks if isinstance(mark, Slot)]:
        return slots[0].name
    if any(isinstance(mark, Choice) for mark in marks):
        return Choice.word
    bounds = " and ".join(_bounds(marks))
    return f"{_bare(annotation)} {bounds}" if bounds else _bare(annotation)


def _bare(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_of(parts[0], parts[1:])
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_of(part) for part in parts))
    if origin is Literal:
        return " | ".join(str(part) for part in parts)
    if origin is tuple and Ellipsis in parts:
        return f"list of {type_of(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(type_of(part) for part in parts)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"mapping of {', '.join(annotation.model_fields)}"
    if annotation in _WORDS:
        return _WORDS[annotation]
    inside = isinstance(origin or annotation, type) and issubclass(origin or annotation, Mapping)
    return "mapping" if inside else str(getattr(annotation, "__name__", annotation))


def _bounds(marks: Iterable[Any]) -> Iterator[str]:
    for mark in marks:
        for part in (mark, *getattr(mark, "metadata", ())):
            for name, sign in _SIGNS.items():
                if (value := getattr(part, name, None)) is not None:
                    yield f"{sign} {value:g}"
            if (shortest := getattr(part, "min_length", None)) is not None:
                yield f"of at least {shortest}"
            if (longest := getattr(part, "max_length", None)) is not None:
                yield f"of at most {longest}"


def _default(field: FieldInfo) -> Any:
    return _plain(field.get_default(call_default_factory=True))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _origin(plugin: Plugin | None) -> dict[str, str | None]:
    if plugin is None:
        return {"plugin": None, "distribution": None, "version": None}
    return {
        "plugin": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
    }
