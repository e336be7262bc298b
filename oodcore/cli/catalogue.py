"""What is installed: plugins, the kinds that they bring, and one kind in full."""

from __future__ import annotations

import json
import warnings
from difflib import get_close_matches
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from oodcore.cli import description, streams
from oodcore.errors import ConfigurationError, PluginWarning
from oodcore.plugins import SLOTS, Plugin, registry


def plugins(as_json: bool) -> None:
    """Print every plugin: what it brings, or why it was left out."""
    with warnings.catch_warnings():
        # That a plugin is left out is part of the answer here.
        warnings.simplefilter("ignore", PluginWarning)
        found = registry.plugins()
    if as_json:
        streams.write_json([_plain(plugin) for plugin in found])
        return
    table = _table("plugin", "from", "brings")
    for plugin in found:
        brought = _brought(plugin) if plugin.error is None else f"left out: {plugin.error}"
        table.add_row(
            plugin.name,
            f"{plugin.distribution} {plugin.version}",
            Text(brought, "" if plugin.error is None else "red"),
        )
    streams.draw(table)


def kinds(slot: str | None, as_json: bool) -> None:
    """Print the kinds of a slot, or of all.

    Raises:
        ConfigurationError: there is no such slot.
    """
    slots = list(SLOTS) if slot is None else [slot]
    found = {name: [description.brief(name, kind) for kind in registry.all(name)] for name in slots}
    if as_json:
        streams.write_json([one for name in slots for one in found[name]])
        return
    for number, name in enumerate(slots):
        table = _table(name, "what it is", "paper")
        for one in found[name]:
            table.add_row(one["kind"], one["summary"], one["paper"] or "")
        streams.draw(*([""] if number else []), table if found[name] else f"{name}: none")


def show(name: str, as_json: bool) -> None:
    """Print all about a kind; of one that two slots have, both.

    Args:
        name: a kind, or ``slot.kind``.

    Raises:
        ConfigurationError: there is none.
    """
    slot, dot, kind = name.rpartition(".")
    slots = [slot] if dot else list(SLOTS)
    found = [description.described(one, kind) for one in slots if registry.find(one, kind)]
    if not found:
        raise ConfigurationError(_unknown(slot, kind))
    if as_json:
        streams.write_json(found)
        return
    for number, one in enumerate(found):
        streams.draw(*([""] if number else []), *_page(one))


def _unknown(slot: str, kind: str) -> str:
    if slot:
        return registry.unknown(slot, kind)
    every = sorted({other for name in SLOTS for other in registry.all(name)})
    near = get_close_matches(kind, every, n=3, cutoff=0.6)
    meant = f"did you mean {' or '.join(near)}?" if near else "see 'oodcore list'"
    return f"there is no kind '{kind}'; {meant}"


def _page(one: dict[str, Any]) -> list[Any]:
    origin = f"plugin {one['plugin']} ({one['distribution']} {one['version']})"
    parts: list[Any] = [Text.assemble((f"{one['slot']} {one['kind']}", "bold"), f"  {origin}"), ""]
    parts += [Text(one["documentation"]), ""]
    if one["fields"]:
        table = _table("field", "type", "default", "")
        for field in one["fields"]:
            default = "required" if field["required"] else _written(field["default"])
            table.add_row(field["name"], field["type"], default, field["note"])
        parts += [table, ""]
    needs = one["needs"]
    if needs is None:
        parts.append(Text("needs  what its fields say"))
    elif needs:
        parts.append(Text(f"needs  {', '.join(needs)}"))
    for name, space in one["search"].items():
        parts.append(_hanging("tuned  ", f"{name}: {_range(space)} ({space['source']})"))
    if one["citation"]:
        parts.append(_hanging("paper  ", one["citation"]))
    return parts if parts[-1] else parts[:-1]


def _range(space: dict[str, Any]) -> str:
    """What a field is tuned over, in words."""
    if "values" in space:
        return ", ".join(map(_written, space["values"]))
    return f"{space['low']} to {space['high']}{', in logarithms' if space['log'] else ''}"


def _hanging(title: str, text: str) -> Table:
    """A title, and beside it a text over as many lines as it takes."""
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(title, Text(text))
    return grid


def _written(value: Any) -> str:
    """A value as a configuration writes it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def _brought(plugin: Plugin) -> str:
    by_slot: dict[str, list[str]] = {}
    for slot, kind in plugin.components:
        by_slot.setdefault(slot, []).append(kind)
    return "; ".join(
        f"{slot}{'s' if len(some) > 1 else ''} {', '.join(some)}" for slot, some in by_slot.items()
    )


def _plain(plugin: Plugin) -> dict[str, Any]:
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "module": plugin.module,
        "components": [{"slot": slot, "kind": kind} for slot, kind in plugin.components],
        "error": plugin.error,
    }


def _table(name: str, *others: str) -> Table:
    """A table whose first column is never broken, and whose others are folded as need be."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column(name, no_wrap=True)
    for other in others:
        table.add_column(other, overflow="fold")
    return table
