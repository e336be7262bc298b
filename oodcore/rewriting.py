"""Rewriting: a configuration's text with other values of some fields, and all else as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from oodcore.document import Route, parse
from oodcore.errors import ConfigurationError

_BARE = re.compile(r"[A-Za-z][\w-]*")
_WORDS = ("true", "false", "null")

_Edit = tuple[int, int, str]
"""From where to where in the text, and what stands there instead."""


def rewritten(text: str, name: str, values: Mapping[Route, Any]) -> str:
    """A configuration with these values; comments, order and layout of all else stay.

    Args:
        text: YAML or JSON, as ``document.parse`` takes it.
        name: the file's, for messages.
        values: by place. A component on the way has its ``kind`` among them: where it is written
            as its kind alone it becomes a mapping, and where it is left out it is added.

    Raises:
        ConfigurationError: no configuration, or a place that cannot be made in it.
    """
    data = parse(text, name).data
    top = YAML(typ="safe", pure=True).compose(text)
    edits = _edits(top, data, _nested(values), text)
    try:
        for first, last, told in sorted(edits, reverse=True):
            text = text[:first] + told + text[last:]
    except _NoPlace as error:
        raise ConfigurationError(f"{name}: {error.args[0]} has no place; write it out") from None
    return text


class _NoPlace(Exception):
    """There is no place for a value."""


def _nested(values: Mapping[Route, Any]) -> dict[str | int, Any]:
    top: dict[str | int, Any] = {}
    for route, value in values.items():
        inner = top
        for step in route[:-1]:
            inner = inner.setdefault(step, {})
        inner[route[-1]] = value
    return top


def _edits(node: Node, data: Any, wanted: Any, text: str) -> Iterator[_Edit]:
    """What is to be changed in a node, whose value is ``data``, to be as wanted."""
    if isinstance(wanted, dict) and isinstance(node, SequenceNode):
        for step, inner in wanted.items():
            yield from _edits(node.value[step], data[step], inner, text)
    elif isinstance(wanted, dict) and isinstance(node, MappingNode):
        written = {key.value: value for key, value in node.value}
        for step, inner in wanted.items():
            if step in written:
                yield from _edits(written[step], data[step], inner, text)
        if added := {step: inner for step, inner in wanted.items() if step not in written}:
            yield _addition(node, added, text)
    elif isinstance(wanted, dict) or type(data) is not type(wanted) or data != wanted:
        quoted = isinstance(node, ScalarNode) and node.style == '"'
        yield node.start_mark.index, node.end_mark.index, _flow(wanted, quoted)


def _addition(node: MappingNode, added: Mapping[str | int, Any], text: str) -> _Edit:
    """More fields of a component, behind its kind."""
    found = [(key, value) for key, value in node.value if key.value == "kind"]
    if not found:
        raise _NoPlace(", ".join(map(str, added)))
    (key, kind), quoted = found[0], found[0][0].style == '"'
    parts = _flow(added, quoted, parts=True)
    if node.flow_style:
        place = kind.end_mark.index
        return place, place, "".join(f", {part}" for part in parts)
    indent = " " * key.start_mark.column
    line = text.find("\n", kind.end_mark.index)
    if line < 0:
        return len(text), len(text), "".join(f"\n{indent}{part}" for part in parts)
    end = "\r\n" if text[line - 1] == "\r" else "\n"
    return line + 1, line + 1, "".join(f"{indent}{part}{end}" for part in parts)


def _flow(value: Any, quoted: bool, parts: bool = False) -> Any:
    """A value on one line; with ``parts``, the fields of a mapping as a list."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise _NoPlace(f"item {odd[0]} of a list that is left out")
        told = [f"{_flow(key, quoted)}: {_flow(part, quoted)}" for key, part in value.items()]
        return told if parts else f"{{{', '.join(told)}}}"
    if isinstance(value, str) and not quoted and _BARE.fullmatch(value):
        return json.dumps(value) if value.lower() in _WORDS else value
    return json.dumps(value)
