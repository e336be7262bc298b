"""Document: a configuration file as plain values that know their lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from oodcore.errors import ConfigurationError

Route = tuple[str | int, ...]
"""Where in a configuration: keys and positions in lists, from the top."""

LARGEST = 500_000
"""The size of the largest file that is read, in bytes."""
DEEPEST = 40
"""How many mappings and lists may stand inside each other."""


@dataclass(frozen=True)
class Document:
    """Plain values, and where in which file each of them stands.

    Args:
        data: mappings, lists, texts, numbers, true, false and null.
        file: the file's name, as the user gave it; "" for values that came from no file.
        marks: line and column, from 1, of every key and of every item of a list.
    """

    data: Any
    file: str = ""
    marks: Mapping[Route, tuple[int, int]] = field(default_factory=dict)

    def line(self, route: Route) -> int:
        """The line of a place, or of what holds it; 0 where that is unknown."""
        for end in range(len(route), 0, -1):
            if route[:end] in self.marks:
                return self.marks[route[:end]][0]
        return 0

    def where(self, route: Route) -> str:
        """``file:line: `` of a place, to begin a message with; "" for values from no file."""
        line = self.line(route)
        return f"{self.file}:{line}: " if line else f"{self.file}: " if self.file else ""


def read(path: str | Path) -> Document:
    """The mapping in a YAML 1.2 or JSON file.

    Values are those of YAML's core schema: ``1e-3`` is a number; ``off``, ``12:30`` and
    ``2024-01-01`` are texts. Tags and aliases are refused, for a file may come from a stranger.

    Raises:
        ConfigurationError: no such file, larger than 500 kB, no UTF-8, no YAML, empty, a key that
            is given twice or is no text, no mapping. The message begins with file and line.
    """
    name = str(path)
    try:
        with Path(path).open("rb") as file:
            raw = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise ConfigurationError(f"{name}: there is no such file") from None
    except OSError as error:
        raise ConfigurationError(f"{name}: cannot be read: {error.strerror or error}") from None
    if len(raw) > LARGEST:
        raise ConfigurationError(f"{name}: larger than {LARGEST} bytes; is it a configuration?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigurationError(f"{name}:{line}: not UTF-8; save it as UTF-8") from None
    return parse(text, name)


def parse(text: str, name: str) -> Document:
    """The mapping in a text, YAML or JSON, read as a file of this name is."""
    return _Reading(name).document(text)


@dataclass
class _Open:
    """A mapping or list whose end has not come yet; ``key`` waits for its value."""

    value: Any
    route: Route
    key: str | None = None


class _Reading:
    """Builds the values from YAML's events, so that nothing is built that was refused."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._marks: dict[Route, tuple[int, int]] = {}
        self._open: list[_Open] = []
        self._tops: list[Any] = []

    def document(self, text: str) -> Document:
        for event in self._events(text):
            if isinstance(event, DocumentStartEvent) and self._tops:
                self._fail(event, "a second document; one file is one configuration")
            elif isinstance(event, CollectionEndEvent):
                self._open.pop()
            elif isinstance(event, NodeEvent):
                self._node(event)
        if not self._tops or self._tops == [None]:
            raise ConfigurationError(f"{self._name}: the file is empty")
        if not isinstance(self._tops[0], dict):
            shown = "a list" if isinstance(self._tops[0], list) else "a single value"
            raise ConfigurationError(
                f"{self._name}:1: a configuration is a mapping (name: value), not {shown}"
            )
        return Document(self._tops[0], self._name, self._marks)

    def _events(self, text: str) -> Iterator[Event]:
        try:
            yield from YAML(typ="safe", pure=True).parse(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            reason = ", ".join(part for part in (error.context, error.problem) if part)
            raise ConfigurationError(f"{self._name}{line}: not YAML: {reason}") from None
        except (YAMLError, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigurationError(f"{self._name}: not YAML: {reason}") from None

    def _node(self, event: NodeEvent) -> None:
        if isinstance(event, AliasEvent):
            self._fail(event, f"the alias *{event.anchor}: aliases are not read; repeat the value")
        if tag := getattr(event, "tag", None):
            self._fail(event, f"the tag {tag}: tags are not read; quote what is text")
        parent = self._open[-1] if self._open else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            self._key(event, parent)
            return
        value: Any
        if isinstance(event, ScalarEvent):
            value = self._scalar(event)
        else:
            value = {} if isinstance(event, MappingStartEvent) else []
        route = self._place(event, value, parent)
        if isinstance(event, CollectionStartEvent):
            self._open.append(_Open(value, route))
            if len(self._open) > DEEPEST:
                self._fail(event, f"more than {DEEPEST} mappings and lists inside each other")

    def _place(self, event: NodeEvent, value: Any, parent: _Open | None) -> Route:
        if parent is None:
            self._tops.append(value)
            return ()
        if isinstance(parent.value, list):
            route = (*parent.route, len(parent.value))
            parent.value.append(value)
            self._marks[route] = _position(event)
            return route
        key = parent.key or ""
        parent.value[key] = value
        parent.key = None
        return (*parent.route, key)

    def _key(self, event: NodeEvent, parent: _Open) -> None:
        key = self._scalar(event) if isinstance(event, ScalarEvent) else event
        if not isinstance(key, str):
            shown = f"'{event.value}'" if isinstance(event, ScalarEvent) else "a list or mapping"
            self._fail(event, f"a name must be text, not {shown}; put it in quotes")
        route = (*parent.route, key)
        if key in parent.value:
            dotted = ".".join(map(str, route))
            first = self._marks[route][0]
            self._fail(event, f"{dotted}: given twice; the first is in line {first}")
        parent.key = key
        self._marks[route] = _position(event)

    def _scalar(self, event: ScalarEvent) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            return self._text(event, text)
        if text in _WORDS:
            return _WORDS[text]
        try:
            if match := _WHOLE.fullmatch(text):
                return int(text, {"0o": 8, "0x": 16}.get(match[1] or match[2], 10))
        except ValueError:
            self._fail(event, f"a number of {len(text)} digits cannot be read")
        return float(text) if _FLOAT.fullmatch(text) else text

    def _text(self, event: ScalarEvent, text: str) -> str:
        """A quoted text; JSON writes what is beyond 16 bits as a pair of surrogates."""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._fail(event, "half a surrogate pair stands for no character")

    def _fail(self, event: Event, message: str) -> NoReturn:
        raise ConfigurationError(f"{self._name}:{_position(event)[0]}: {message}")


def _position(event: Event) -> tuple[int, int]:
    return event.start_mark.line + 1, event.start_mark.column + 1


_WORDS: Mapping[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_WHOLE = re.compile(r"[-+]?[0-9]+|(0o)[0-7]+|(0x)[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
