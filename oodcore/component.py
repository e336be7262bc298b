"""Component and Slot: how a frozen model is named, validated and dumped."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from oodcore.errors import ConfigurationError
from oodcore.plugins import SLOTS, one, registry
from oodcore.space import Choice, Range, Space

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


class Settings(BaseModel):
    """A frozen group of fields, as a configuration writes them.

    Numbers are strict: ``"3"`` and ``true`` are no integers, but 3.0 is one. Lists become tuples,
    so that settings are hashable and equal by value. An unknown field is an error. A group of
    fields inside a component is a subclass of this.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        arbitrary_types_allowed=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _from_plain(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: _plain(value) for key, value in data.items()}


class Component(Settings):
    """A method as its configuration: a frozen model whose fields are its hyperparameters.

    What a component learns is kept outside it, as data.
    """

    slot: ClassVar[str]
    """The registry's slot that this family of components fills."""
    kind: ClassVar[str]
    """The name in configurations, unique within its slot."""
    paper: ClassVar[Paper | None] = None
    """The method's source; None for what has no paper of its own."""
    search: ClassVar[Mapping[str, Space]] = {}
    """The values worth trying, by field, for ``oodcore tune``."""

    @model_validator(mode="before")
    @classmethod
    def _from_configuration(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or "kind" not in data:
            return data
        if data["kind"] != getattr(cls, "kind", None):
            raise PydanticCustomError(
                "kind_mismatch",
                "the kind is {given}, and this is a {name}",
                {"given": repr(data["kind"]), "name": cls.__name__},
            )
        return {key: value for key, value in data.items() if key != "kind"}

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
    value = _unboxed(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _unboxed(value: Any) -> Any:
    """A number of NumPy as a number of Python."""
    boxed = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    return value.item() if boxed else value


def canonical(value: Any) -> str:
    """The one JSON text of a component or of plain data: sorted keys, no spaces.

    Equal components have equal texts, so that a text can be compared, hashed and used as a key.

    Raises:
        ConfigurationError: something in it is no JSON: a tensor, NaN, infinity, a key that is no
            text.
    """
    try:
        return json.dumps(
            _bare(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"this cannot be written as JSON: {error}") from None


def _bare(value: Any) -> Any:
    """Plain JSON values of components, paths, tuples and mappings."""
    if isinstance(value, BaseModel):
        return _bare(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {odd[0]!r} is no text")
        return {key: _bare(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(item) for item in value]
    return str(value) if isinstance(value, Path) else _unboxed(value)


def named(slot: str, value: Any) -> Component:
    """The component that a kind, a mapping with a kind, or an instance stands for.

    Raises:
        PydanticCustomError: unknown kind, wrong slot, or no kind at all (pydantic adds the path).
    """
    if isinstance(value, Component):
        if value.slot != slot:
            raise PydanticCustomError(
                "wrong_slot",
                "this is {given} '{kind}', and {slot} is needed here",
                {"given": one(value.slot), "kind": type(value).kind, "slot": one(slot)},
            )
        return value
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
        raise PydanticCustomError(
            "no_kind",
            "write {slot} as its kind ('name') or as a mapping with a 'kind'",
            {"slot": one(slot)},
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

    def __post_init__(self) -> None:
        if self.name not in SLOTS:
            raise ConfigurationError(
                f"unknown slot '{self.name}'; the slots are: {', '.join(SLOTS)}"
            )

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


def notes(cls: type[Any]) -> dict[str, str]:
    """What docstrings say of a class's fields, under ``Args:``; a subclass's word goes first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("\nArgs:\n")
        indented = re.split(r"^(?=\S)", section, maxsplit=1, flags=re.MULTILINE)[0]
        for names, text in _NOTE.findall(indented):
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return found


_NOTE = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)


def suggestion(name: str, known: list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest known name, or nothing."""
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def faults(cls: Any, base: type[Component]) -> str | None:
    """Why a class cannot be registered as a component of ``base``'s slot, or None.

    Refused is what pydantic or a configuration would trip over later: a missing or ill-formed
    kind, a field that cannot be written in a configuration, hashed and compared (list, dict, set,
    tensor), a field that hides an attribute of the base class.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        return f"{cls!r} is not a subclass of {base.__name__}"
    if "kind" in cls.model_fields:
        return f"{cls.__name__}.kind: write it without an annotation, or as a ClassVar[str]"
    kind = getattr(cls, "kind", None)
    if not isinstance(kind, str) or not KIND.fullmatch(kind):
        return (
            f"{cls.__name__} needs a kind: a ClassVar[str] of lower-case letters, digits and "
            f"underscores, not {kind!r}"
        )
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        return f"{cls.__name__} does not define {', '.join(missing)}"
    try:
        cls.model_rebuild()
    except PydanticUndefinedAnnotation as error:
        return (
            f"{cls.__name__}: the annotation {error.name!r} is not defined at run time; "
            f"import it outside of TYPE_CHECKING"
        )
    for name in cls.model_fields:
        if hasattr(base, name):
            return (
                f"{cls.__name__}.{name}: a field cannot be named like an attribute of "
                f"{base.__name__}"
            )
    return next(chain(_unfit(cls), _unsearchable(cls)), None)


def _unfit(cls: type[Settings], seen: frozenset[type] = frozenset()) -> Iterator[str]:
    """What keeps a class from being written in a configuration and read back the same."""
    for key, value in Settings.model_config.items():
        if cls.model_config.get(key) != value:
            yield f"{cls.__name__}: model_config[{key!r}] must stay {value!r}"
    for name in cls.model_computed_fields:
        yield f"{cls.__name__}.{name}: a computed field is not read back; make it a property"
    for name, field in cls.model_fields.items():
        where = f"{cls.__name__}.{name}"
        if field.alias or field.validation_alias or field.serialization_alias or field.exclude:
            yield f"{where}: a field is written and read under its own name: no alias, no exclude"
        for fault in _misfits(field.annotation, field.metadata, seen | {cls}):
            yield f"{where}: {fault}"


def _unsearchable(cls: type[Component]) -> Iterator[str]:
    """What keeps a search space from giving values of the fields that it names."""
    if not isinstance(cls.search, Mapping):
        yield f"{cls.__name__}.search must map fields to a Choice or a Range"
        return
    for name, space in cls.search.items():
        where = f"{cls.__name__}.search['{name}']"
        if name not in cls.model_fields:
            yield f"{where}: there is no such field"
            continue
        if not isinstance(space, Choice | Range):
            yield f"{where} must be a Choice or a Range, not {space!r}"
            continue
        field = cls.model_fields[name]
        marked: Any = Annotated[field.annotation, field]
        rules = TypeAdapter[Any](marked, config=ConfigDict(strict=True, allow_inf_nan=False))
        for value in space.examples:
            if value is not None and not isinstance(value, bool | int | float | str):
                yield f"{where}: {value!r} is no number, text, true, false or None"
                continue
            try:
                rules.validate_python(_plain(value))
            except ValidationError as error:
                yield f"{where}: {value!r} does not fit the field: {error.errors()[0]['msg']}"


def _misfits(annotation: Any, marks: Iterable[Any], seen: frozenset[type]) -> Iterator[str]:
    """What in a field's type does not fit a configuration; ``marks`` are its annotations."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _misfits(parts[0], parts[1:], seen)
        return
    if any(isinstance(mark, Slot) for mark in marks):
        return
    strict = [getattr(m, "strict", None) for mark in marks for m in _flat(mark)]
    if False in strict and annotation is not Path:
        yield "numbers and texts are strict; only a path may be lenient (FilePath)"
    shown = getattr(annotation, "__name__", str(annotation))
    if origin is Literal:
        if any(part in (0, 1) for part in parts):
            yield "a Literal of 0, 1, True or False takes each for the other; use a range or a bool"
    elif origin in (Union, UnionType, tuple):
        for part in parts:
            if part is not Ellipsis:
                yield from _misfits(part, (), seen)
    elif annotation is tuple:
        yield "say what the tuple holds, as in tuple[float, ...]"
    elif annotation is Path:
        if False not in strict:
            yield "a path is a FilePath, so that it can be written as text"
    elif isinstance(annotation, type) and issubclass(annotation, Component):
        yield f"a component is looked up by its kind; use Annotated[{shown}, Slot(...)]"
    elif isinstance(annotation, type) and issubclass(annotation, Settings):
        if annotation not in seen:
            yield from _unfit(annotation, seen)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield f"{shown} must be a subclass of oodcore.component.Settings"
    elif annotation not in _SCALARS and not hasattr(annotation, "__get_pydantic_core_schema__"):
        yield (
            f"a field cannot be a {shown}; use numbers, text, bool, Literal, tuples, FilePath, "
            f"Settings or a Slot"
        )


def _flat(mark: Any) -> tuple[Any, ...]:
    return (mark, *getattr(mark, "metadata", ()))


_SCALARS = (int, float, str, bool, None, NoneType)
