"""Results as a table: for Markdown, and for whoever lays one out himself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oodcore.errors import ConfigurationError
from oodcore.metrics import METRICS, SEPARATION

if TYPE_CHECKING:
    from oodcore.results import Results


@dataclass(frozen=True)
class Column:
    """A column of numbers: a metric on a data set, or its mean over a group of them."""

    title: str
    metric: str
    data: str
    group: str


def columns(results: Results, metric: str = "auroc") -> tuple[Column, ...]:
    """What a table of one metric shows: means, each OOD set, then what was measured on ID alone.

    Raises:
        ConfigurationError: the metric does not compare ID with OOD data.
    """
    if metric not in SEPARATION:
        raise ConfigurationError(f"a table shows one of {', '.join(SEPARATION)}, not {metric!r}")
    sets = [Column(ood.name, metric, ood.name, ood.group) for ood in results.ood_data]
    means = [Column("mean", metric, "mean", "all")] if len(sets) > 1 else []
    if len({ood.group for ood in results.ood_data}) > 1:
        means += [Column(f"{group} mean", metric, "mean", group) for group in results.groups]
    inside = results.id_data
    measured = {row.metric for row in results.rows}
    alone = [
        Column(METRICS[name].title.lower(), name, inside.name, inside.group)
        for name in ("accuracy", "false_alarm_rate")
        if name in measured
    ]
    return (*means, *sets, *alone)


def percent(value: float | None) -> str:
    """A share in percent with two decimals; nothing for None."""
    return "" if value is None else f"{100 * value:.2f}"


def table_rows(results: Results, metric: str = "auroc") -> list[list[str]]:
    """A header and a line for each detector, best first; numbers in percent.

    Raises:
        ConfigurationError: the metric does not compare ID with OOD data.
    """
    shown = columns(results, metric)
    names = _name_columns(results)
    models = {entry.name: entry.model for entry in results.entries}
    lines = [[*names, *(column.title for column in shown)]]
    for detector in results.ranked(metric):
        numbers = [percent(results.cell(detector, column)) for column in shown]
        lines.append([*[detector, models[detector]][: len(names)], *numbers])
    return lines


def markdown(results: Results, metric: str = "auroc") -> str:
    """``table_rows`` as Markdown."""
    escaped = [
        [cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line]
        for line in table_rows(results, metric)
    ]
    words = len(_name_columns(results))
    rule = ["---" if number < words else "---:" for number in range(len(escaped[0]))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [escaped[0], rule, *escaped[1:]])


def best_of(values: list[float], metric: str) -> float | None:
    """The best of some values of a metric; None where there are none or neither end is better."""
    better = METRICS[metric].better
    if not values or better is None:
        return None
    return max(values) if better == "higher" else min(values)


def _name_columns(results: Results) -> list[str]:
    """A detector, and its model where there are several that the name does not begin with."""
    told = all(entry.name.startswith(f"{entry.model}/") for entry in results.entries)
    several = len({entry.model for entry in results.entries}) > 1
    return ["detector", "model"] if several and not told else ["detector"]
