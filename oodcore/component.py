"""Component and Slot: how a frozen model is named, validated and dumped."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

KIND = re.compile(r"[a-z][a-z0-9_]*")

FilePath = Annotated[Path, Field(strict=False)]
"""A field that holds a path and is written as text in a configuration."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; shown, cited and tested.

    Args:
        title: the paper's title.
        authors: the authors, separated by commas.
        venue: journal or conference, in its short form.
        year: of publication.
        url: where to read it.
    """

    title: str
    authors: str
    venue: str
    year: int
    url: str

    def __str__(self) -> str:
        return f"{self.authors}. {self.title}. {self.venue} {self.year}. {self.url}"


class Component(BaseModel):
    """A method as its configuration: a frozen model whose fields are its hyperparameters.

    What a component learns is kept outside it. Numbers are strict: ``"3"`` and ``true`` are no
    integers. Lists become tuples, so that a component is hashable and equal by value.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        arbitrary_types_allowed=False,
    )

    slot: ClassVar[str]
    """The registry's slot that this family of components fills."""
    kind: ClassVar[str]
    """The name in configurations, unique within its slot."""
    paper: ClassVar[Paper | None] = None
    """The method's source; None for what has no paper of its own."""

    @model_validator(mode="before")
    @classmethod
    def _from_configuration(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        plain = {key: _plain(value) for key, value in data.items()}
        kind = plain.pop("kind", None)
        if kind is not None and kind != getattr(cls, "kind", None):
            raise PydanticCustomError(
                "kind_mismatch", "this is a {given}, not a {kind}", {"given": kind, "kind": cls.kind}
            )
        return plain

    @model_serializer(mode="wrap")
    def _with_kind(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": type(self).kind, **fields(self)}

    def dump(self) -> dict[str, Any]:
        """The full mapping that rebuilds this component: plain JSON values, ``kind`` first."""
        return self.model_dump(mode="json")

    def components(self) -> Iterator[tuple[tuple[str, ...], Component]]:
        """The components held in this one's fields, each with its path (field, index)."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Component):
                yield (name,), value
            elif isinstance(value, tuple):
                for index, item in enumerate(value):
                    if isinstance(item, Component):
                        yield (name, str(index)), item

    def walk(self) -> Iterator[Component]:
        """This component and every component inside it, outermost first."""
        yield self
        for _, part in self.components():
            yield from part.walk()


def _plain(value: Any) -> Any:
    """What a strict field should see of a value from YAML, JSON or NumPy."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_plain(item) for item in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def named(slot: str, value: Any) -> Component:
    """The component that a kind, a mapping with a kind, or an instance stands for.

    Raises:
        PydanticCustomError: unknown kind, wrong slot, or no kind at all (pydantic adds the path).
    """
    from oodcore.plugins import registry

    if isinstance(value, Component):
        if value.slot != slot:
            raise PydanticCustomError(
                "wrong_slot",
                "this is a {given}, and a {slot} is needed here",
                {"given": f"{value.slot} '{type(value).kind}'", "slot": slot},
            )
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise PydanticCustomError(
            "no_kind",
            "write a {slot} as its kind ('name') or as a mapping with a 'kind'",
            {"slot": slot},
        )
    cls = registry.find(slot, value["kind"])
    if cls is None:
        raise PydanticCustomError(
            "unknown_kind", "{message}", {"message": registry.unknown(slot, value["kind"])}
        )
    return cls.model_validate({key: item for key, item in value.items() if key != "kind"})


@dataclass(frozen=True)
class Slot:
    """Marks a field that takes any component of a slot: ``Annotated[Scorer, Slot("scorer")]``.

    The kind is looked up in the registry when a value is validated, so that plugins may come late.
    """

    name: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: named(self.name, value),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: value.model_dump(mode=info.mode), info_arg=True
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"x-slot": self.name}


def suggestion(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, or nothing."""
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def faults(cls: Any, base: type[Component]) -> str | None:
    """Why a class cannot be registered as a component of ``base``'s slot, or None.

    Refused is what pydantic or a configuration would trip over later: a missing or ill-formed kind,
    a field that cannot be hashed and compared (list, dict, set, tensor), a field that hides an
    attribute of the base class.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"{cls!r} is not a subclass of {base.__name__}"
    kind = cls.__dict__.get("kind") or getattr(cls, "kind", None)
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
        return (
            f"{cls.__name__} needs a kind: a ClassVar[str] of lower-case letters, digits and "
            f"underscores, not {kind!r}"
        )
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"{cls.__name__} does not define {', '.join(missing)}"
    for name, field in cls.model_fields.items():
        if hasattr(base, name) or name == "kind":
            return f"{cls.__name__}.{name}: a field cannot be named like an attribute of {base.__name__}"
        for part in _types(field.annotation):
            origin = get_origin(part) or part
            if origin in (list, dict, set, bytearray) or _is_array(origin):
                shown = getattr(origin, "__name__", origin)
                return f"{cls.__name__}.{name}: a field cannot be a {shown}; use a tuple or a path"
    return None


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _is_array(origin: Any) -> bool:
    module = cast(str, getattr(origin, "__module__", ""))
    return isinstance(origin, type) and module.split(".")[0] in ("torch", "numpy")
