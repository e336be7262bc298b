"""Results as a table: for Markdown, and for whoever lays one out himself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oodcore.errors import ConfigurationError
from oodcore.metrics import METRICS

if TYPE_CHECKING:
    from oodcore.results import Results


@dataclass(frozen=True)
class Column:
    """A column of numbers: a metric on a data set, or its mean over a group of them."""

    title: str
    metric: str
    data: str
    group: str


def columns(results: Results, metric: str | None = None) -> tuple[Column, ...]:
    """What a table of one metric shows: means, each OOD set, then what was measured on ID alone.

    Args:
        results: what to show.
        metric: measured on the OOD sets, or where there are none, on the ID test data; left out,
            the protocol's first.

    Raises:
        ConfigurationError: the metric is not among those that a table can show.
    """
    metric = results.main if metric is None else metric
    shown = results.metrics or results.id_metrics
    if metric not in shown:
        raise ConfigurationError(f"a table shows one of {', '.join(shown)}, not {metric!r}")
    inside = results.id_data
    alone = [
        Column(_told(METRICS[name].title), name, inside.name, inside.group)
        for name in results.id_metrics
    ]
    if not results.metrics:
        return tuple(alone)
    sets = [Column(ood.name, metric, ood.name, ood.group) for ood in results.ood_data]
    means = [Column("mean", metric, "mean", "all")] if len(sets) > 1 else []
    if len({ood.group for ood in results.ood_data}) > 1:
        means += [Column(f"{group} mean", metric, "mean", group) for group in results.groups]
    if any(row.data == "pooled" for row in results.rows):
        means.insert(0, Column("pooled", metric, "pooled", "all"))
    return (*means, *sets, *alone)


def percent(value: float | None) -> str:
    """A share in percent with two decimals; nothing for None."""
    return "" if value is None else f"{100 * value:.2f}"


def cell_text(results: Results, detector: str, column: Column) -> str:
    """What stands in a cell, in percent: with its standard deviation where there are repeats."""
    value, sd = results.cell(detector, column), results.sd(detector, column)
    return percent(value) if sd is None else f"{percent(value)} ± {percent(sd)}"


def table_rows(results: Results, metric: str | None = None) -> list[list[str]]:
    """A header and a line for each detector, best first; numbers in percent.

    Raises:
        ConfigurationError: as ``columns``.
    """
    shown = columns(results, metric)
    names = _name_columns(results)
    models = {entry.name: entry.model for entry in results.entries}
    lines = [[*names, *(column.title for column in shown)]]
    for detector in results.ranked(metric):
        numbers = [cell_text(results, detector, column) for column in shown]
        lines.append([*[detector, models[detector]][: len(names)], *numbers])
    return lines


def markdown(results: Results, metric: str | None = None) -> str:
    """``table_rows`` as Markdown, below it the protocol, where it is not the plain one."""
    escaped = [
        [cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line]
        for line in table_rows(results, metric)
    ]
    words = len(_name_columns(results))
    rule = ["---" if number < words else "---:" for number in range(len(escaped[0]))]
    table = "".join(f"| {' | '.join(line)} |\n" for line in [escaped[0], rule, *escaped[1:]])
    return f"{table}\n{said}\n" if (said := protocol_line(results)) else table


def protocol_line(results: Results) -> str:
    """The protocol and what it does, in a line; nothing for the plain one, ``separation``."""
    kind, meaning = (results.protocol.get(name) for name in ("kind", "meaning"))
    return "" if kind == "separation" else f"Protocol {kind}: {meaning}."


def best_of(values: list[float], metric: str) -> float | None:
    """The best of some values of a metric; None where there are none or neither end is better."""
    better = METRICS[metric].better
    if not values or better is None:
        return None
    return max(values) if better == "higher" else min(values)


def _told(title: str) -> str:
    """A metric's title within a head: in lower case, unless it is an acronym."""
    return title.lower() if title[1].islower() else title


def _name_columns(results: Results) -> list[str]:
    """A detector, and its model where there are several that the name does not begin with."""
    told = all(entry.name.startswith(f"{entry.model}/") for entry in results.entries)
    several = len({entry.model for entry in results.entries}) > 1
    return ["detector", "model"] if several and not told else ["detector"]
