"""The comparison: one metric's numbers for all detectors, and what is needed to show another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oodcore.metrics import METRICS
from oodcore.records import MEAN, POOLED
from oodcore.results import Results
from oodcore.tables import Column, best_of, cell_text, columns, percent


def lines(results: Results, metric: str, order: Sequence[str]) -> list[list[dict[str, Any]]]:
    """A line of cells for each detector in order: text, tint in [0, 1], whether it is the best."""
    shown = columns(results, metric)
    values = [[results.cell(name, column) for column in shown] for name in order]
    best = []
    for column, numbers in zip(shown, zip(*values, strict=True), strict=True):
        measured = [number for number in numbers if number is not None]
        differ = len({percent(number) for number in measured}) > 1
        best.append(best_of(measured, column.metric) if differ else None)
    return [
        [
            {
                "text": cell_text(results, name, column),
                "tint": tint(value, column, results),
                "best": value is not None and percent(value) == percent(top),
            }
            for value, column, top in zip(line, shown, best, strict=True)
        ]
        for name, line in zip(order, values, strict=True)
    ]


def tint(value: float | None, column: Column, results: Results) -> float:
    """How strongly a cell is coloured, in [0, 1]: from chance to perfect, alike in all tables."""
    if value is None or column.data == results.id_data.name:
        return 0.0
    if column.metric == "auroc":
        return round(max(2 * value - 1, 0.0), 2)
    return round(value if METRICS[column.metric].better == "higher" else 1 - value, 2)


def spans(results: Results) -> list[tuple[str, int]]:
    """The heads over the table's columns: (text, how many columns), side by side."""
    found: list[tuple[str, int]] = []
    for column in columns(results):
        if column.data == results.id_data.name:
            text = f"on {results.id_data.name}"
        elif column.data in (MEAN, POOLED):
            text = "means over OOD sets" if column.data == MEAN else "all OOD sets"
        else:
            text = f"{column.group} OOD" if column.group else "OOD"
        count = found.pop()[1] if found and found[-1][0] == text else 0
        found.append((text, count + 1))
    return found


def switches(results: Results) -> list[tuple[str, str]]:
    """The groups of OOD sets that can be left out, and what each is called; none if there is one.

    Sets that are in no group are the group "".
    """
    groups = list(dict.fromkeys(ood.group for ood in results.ood_data))
    return [(group, group or "others") for group in groups] if len(groups) > 1 else []


def columns_of(results: Results) -> list[list[str]]:
    """Title, metric if it is always the same one, data and group of each column."""
    inside = results.id_data.name
    return [
        [one.title, one.metric if one.data == inside else "", one.data, one.group]
        for one in columns(results)
    ]


def metrics_of(results: Results, order: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each metric's numbers as the table has them, and as it shows them.

    Metrics that are measured on the in-distribution rows alone are told apart by having none.
    """
    found: dict[str, dict[str, Any]] = {}
    for metric in results.metrics or (results.main,):
        shown = columns(results, metric)
        found[metric] = {
            "values": [[results.cell(name, column) for column in shown] for name in order],
            "texts": [[cell_text(results, name, column) for column in shown] for name in order],
        }
    for metric in (*found, *results.id_metrics):
        known = METRICS[metric]
        found.setdefault(metric, {}).update(title=known.title, better=known.better)
    return found
