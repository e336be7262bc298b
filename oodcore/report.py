"""Results as one HTML file that opens anywhere: tables, histograms, ROC curves, what was run."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oodcore.figures import Figure
from oodcore.metrics import METRICS
from oodcore.results import Entry, Results, write_text
from oodcore.tables import Column, best_of, cell_text, columns, percent, protocol_line

BIN_WIDTH, HEIGHT, ROC = 10, 100, 500
"""The drawings' own units: a bin, a histogram's height, a side of the ROC square."""


def write(results: Results, path: str | Path) -> Path:
    """Write the report into a file, replaced in one step; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """The report as one self-contained HTML page: it asks no network for anything."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("oodcore"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    order = results.ranked()
    entries = {entry.name: entry for entry in results.entries}
    choices = results.metrics or (results.main,)
    tables = {metric: _table(results, metric, order) for metric in choices}
    versions = _mapping(results.provenance.get("versions"))
    plugins = _mapping(results.provenance.get("plugins"))
    shown = {*versions, *(["versions"] if versions else []), *(["plugins"] if plugins else [])}
    others = {name: value for name, value in results.provenance.items() if name not in shown}
    return environment.get_template("report.html.jinja").render(
        results=results,
        metrics=METRICS,
        choices=choices,
        main=tables[results.main],
        protocol=protocol_line(results),
        spans=_spans(results),
        several_models=len({entry.model for entry in results.entries}) > 1,
        tables=tables,
        best={"name": order[0], "numbers": _headline(results, order[0])},
        asked=results.configuration.get("false_alarm_rate"),
        detectors=[_detector(results, entries[name]) for name in order],
        embedded=_embedded(results, tables, order),
        configuration=_yaml(results.configuration),
        versions=versions,
        plugins=plugins,
        others=_yaml(others) if others else "",
        bins=len(next(iter(results.figures.values())).edges) - 1,
        size={"bin": BIN_WIDTH, "height": HEIGHT, "roc": ROC},
        percent=percent,
    )


def _table(results: Results, metric: str, order: Sequence[str]) -> dict[str, Any]:
    """One metric's table: its columns, and a line of cells for each detector in order."""
    shown = columns(results, metric)
    values = [[results.cell(name, column) for column in shown] for name in order]
    best = []
    for column, numbers in zip(shown, zip(*values, strict=True), strict=True):
        measured = [number for number in numbers if number is not None]
        differ = len({percent(number) for number in measured}) > 1
        best.append(best_of(measured, column.metric) if differ else None)
    lines = [
        [
            {
                "text": cell_text(results, name, column),
                "tint": _tint(value, column, results),
                "best": value is not None and percent(value) == percent(top),
            }
            for value, column, top in zip(line, shown, best, strict=True)
        ]
        for name, line in zip(order, values, strict=True)
    ]
    return {"columns": shown, "values": values, "lines": lines}


def _tint(value: float | None, column: Column, results: Results) -> float:
    """How strongly a cell is coloured, in [0, 1]: from chance to perfect, alike in all tables."""
    if value is None or column.data == results.id_data.name:
        return 0.0
    if column.metric == "auroc":
        return round(max(2 * value - 1, 0.0), 3)
    return round(value if METRICS[column.metric].better == "higher" else 1 - value, 3)


def _spans(results: Results) -> list[tuple[str, int]]:
    """The heads over the table's columns: (text, how many columns), side by side."""
    spans: list[tuple[str, int]] = []
    for column in columns(results):
        if column.data == results.id_data.name:
            text = f"on {results.id_data.name}"
        elif column.data in ("mean", "pooled"):
            text = "means over OOD sets" if column.data == "mean" else "all OOD sets"
        else:
            text = f"{column.group} OOD" if column.group else "OOD"
        count = spans.pop()[1] if spans and spans[-1][0] == text else 0
        spans.append((text, count + 1))
    return spans


def _headline(results: Results, name: str) -> list[tuple[str, str]]:
    """A detector's first two metrics: what each is called, and the number."""
    mean = "mean " if len(results.ood_data) > 1 else ""
    inside = results.id_data
    metrics = results.metrics or results.id_metrics
    return [
        (f"{mean}{METRICS[metric].title}", cell_text(results, name, Column("", metric, *place)))
        for metric in metrics[:2]
        for place in [("mean", "all") if results.metrics else (inside.name, inside.group)]
    ]


def _detector(results: Results, entry: Entry) -> dict[str, Any]:
    """All that the page says about one detector."""
    figure = results.figures[entry.name]
    inside, *outside = results.data
    separating = [column for column in columns(results) if column.data != inside.name]
    citation, url = _linked(entry.citation)
    return {
        "entry": entry,
        "headline": _headline(results, entry.name),
        "false_alarms": percent(results.value(entry.name, "false_alarm_rate", inside.name)),
        "numbers": [
            (column.title, [_number(results, entry, column, metric) for metric in results.metrics])
            for column in separating
        ],
        "inside": _steps(figure.counts[inside.name]),
        "panels": [(ood, _steps(figure.counts[ood.name])) for ood in outside],
        "low": f"{figure.edges[0]:.4g}",
        "high": f"{figure.edges[-1]:.4g}",
        "threshold": _position(figure),
        "curves": [(ood, _path(figure.roc[ood.name])) for ood in outside],
        "configuration": _yaml(entry.configuration) if entry.configuration else "",
        "citation": citation,
        "url": url,
    }


def _number(results: Results, entry: Entry, column: Column, metric: str) -> str:
    return cell_text(results, entry.name, Column(column.title, metric, column.data, column.group))


def _embedded(
    results: Results, tables: Mapping[str, Mapping[str, Any]], order: Sequence[str]
) -> dict[str, Any]:
    """What the page's script needs to switch the table and to hand out its numbers."""
    models = {entry.name: entry.model for entry in results.entries}
    return {
        "detectors": [[name, models[name]] for name in order],
        "columns": [
            [
                column.metric if column.data == results.id_data.name else "",
                column.data,
                column.group,
            ]
            for column in columns(results)
        ],
        "metrics": {
            metric: {
                "title": METRICS[metric].title,
                "better": METRICS[metric].better,
                "values": tables[metric]["values"],
                "tints": [[cell["tint"] for cell in line] for line in tables[metric]["lines"]],
                "best": [[int(cell["best"]) for cell in line] for line in tables[metric]["lines"]],
                **(
                    {"texts": [[c["text"] for c in line] for line in tables[metric]["lines"]]}
                    if results.repeats
                    else {}
                ),
            }
            for metric in tables
        },
    }


def _steps(counts: Sequence[int]) -> str:
    """A histogram as an SVG path, scaled to its own tallest bin."""
    tallest = max(counts)
    heights = [round(HEIGHT * count / tallest) for count in counts]
    # A bin with a single row in it should still be seen.
    tops = [HEIGHT - max(height, int(count > 0)) for height, count in zip(heights, counts)]  # noqa: B905
    return f"M0 {HEIGHT}" + "".join(f"V{top}h{BIN_WIDTH}" for top in tops) + f"V{HEIGHT}z"


def _position(figure: Figure) -> float | None:
    """Where the threshold stands in a histogram's units, if it is among the bins."""
    low, high = figure.edges[0], figure.edges[-1]
    if figure.threshold is None or not low <= figure.threshold <= high:
        return None
    # Halved, for the width of scores near the limits of float64 is no float64.
    share = (figure.threshold / 2 - low / 2) / (high / 2 - low / 2)
    return round(share * BIN_WIDTH * (len(figure.edges) - 1), 1)


def _path(points: Sequence[tuple[float, float]]) -> str:
    """An ROC curve as an SVG path, without the points that the eye would not miss."""
    corners = [(round(ROC * x), round(ROC * (1 - y))) for x, y in _simplified(points, 0.002)]
    text, (x, y) = f"M{corners[0][0]} {corners[0][1]}", corners[0]
    for right, down in corners[1:]:
        text += f"l{right - x} {down - y}"
        x, y = right, down
    return text


def _simplified(
    points: Sequence[tuple[float, float]], tolerance: float
) -> list[tuple[float, float]]:
    """The points that keep a line within a tolerance of all (Douglas and Peucker, 1973)."""
    kept = {0, len(points) - 1}
    pending = [(0, len(points) - 1)]
    while pending:
        first, last = pending.pop()
        (x, y), (right, up) = points[first], points[last]
        length = max(((right - x) ** 2 + (up - y) ** 2) ** 0.5, 1e-12)
        offset, at = max(
            (abs((right - x) * (points[i][1] - y) - (up - y) * (points[i][0] - x)) / length, i)
            for i in range(first, last + 1)
        )
        if offset > tolerance:
            kept.add(at)
            pending += [(first, at), (at, last)]
    return [points[i] for i in sorted(kept)]


def _linked(citation: str | None) -> tuple[str, str]:
    """A citation's text, and the web address at its end if it has one."""
    found = re.fullmatch(r"(.*?)\s*(https?://[^\s]+)", citation or "", flags=re.DOTALL)
    return (found[1], found[2]) if found else (citation or "", "")


def _mapping(value: Any) -> dict[str, str]:
    """A flat mapping to show as a table; empty where the value is anything else."""
    if not isinstance(value, Mapping):
        return {}
    if any(isinstance(item, Mapping | list) for item in value.values()):
        return {}
    return {str(name): str(item) for name, item in value.items()}


def _yaml(value: Any) -> str:
    """Plain values as a configuration file writes them."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 88
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue().rstrip()
