"""Results as one HTML file that opens anywhere: tables, drawings, a view of each detector."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from oodcore.metrics import METRICS
from oodcore.picture import GRID
from oodcore.report.detectors import as_yaml, detectors, headline, methods
from oodcore.report.drawing import scatter
from oodcore.report.table import columns_of, lines, metrics_of, spans, switches
from oodcore.results import Results, write_text
from oodcore.tables import columns, protocol_line

SCRIPTS = ("elements.js", "table.js", "detector.js", "views.js")
POINTS = 12_000
"""How many points the pictures of a page have at most, but for ``FEWEST`` a set."""
FEWEST = 50


def write(results: Results, path: str | Path) -> Path:
    """Write the report into a file, replaced in one step; its folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """The report as one self-contained HTML page: it asks no network for anything."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("oodcore"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    folder = files("oodcore") / "templates" / "report"
    script = "\n".join((folder / name).read_text("utf-8") for name in SCRIPTS)
    order = results.ranked()
    versions = _flat(results.provenance.get("versions"))
    plugins = _flat(results.provenance.get("plugins"))
    shown = {*versions, *(["versions"] if versions else []), *(["plugins"] if plugins else [])}
    others = {name: value for name, value in results.provenance.items() if name not in shown}
    told = methods(results)
    drawn = detectors(results, order, told)
    return environment.get_template("report/page.html.jinja").render(
        style=Markup((folder / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        results=results,
        metrics=METRICS,
        choices=results.metrics or (results.main,),
        explained=_explained(results),
        columns=columns(results),
        lines=lines(results, results.main, order),
        spans=spans(results),
        switches=switches(results),
        detectors=drawn,
        kinds=sorted({kind for one in drawn for kind in one["kinds"]}),
        models=list(dict.fromkeys(entry.model for entry in results.entries)),
        protocol=protocol_line(results),
        best={"name": order[0], "numbers": headline(results, order[0])},
        asked=results.configuration.get("false_alarm_rate"),
        pictures=_pictures(results),
        basis=_basis(results),
        grid=GRID,
        data={
            "detectors": drawn,
            "methods": told.shown,
            "sets": [[one.name, one.group, one.rows] for one in results.data],
            "columns": columns_of(results),
            "metrics": metrics_of(results, order),
            "basis": _basis(results),
            "main": METRICS[results.main].title,
            "mean": bool(results.metrics) and len(results.ood_data) > 1,
        },
        configuration=as_yaml(results.configuration),
        versions=versions,
        plugins=plugins,
        others=as_yaml(others) if others else "",
    )


def _explained(results: Results) -> list[str]:
    """The metrics whose meaning a reader of the page needs."""
    shown = {*results.metrics, *results.id_metrics}
    return [name for name in METRICS if name in shown]


def _basis(results: Results) -> str:
    """Which rows are drawn, where numbers are means over repeats."""
    if not results.repeats:
        return ""
    if results.protocol.get("kind") == "open_set":
        return f"Drawn is the first split, {results.repeats[0]}; numbers are of all."
    return "Drawn are all rows of every set, and not the draws that the numbers are taken from."


def _pictures(results: Results) -> list[dict[str, Any]]:
    """The pictures of the embeddings: a title, two shares, and a path for each set."""
    sets = len(results.data) + 1
    each = max(FEWEST, POINTS // max(sets * len(results.pictures), 1))
    return [
        {
            "model": model,
            "variance": picture.variance,
            "train": scatter(picture.train[:each]),
            "sets": [scatter(picture.points[one.name][:each]) for one in results.data],
        }
        for model, picture in results.pictures.items()
    ]


def _flat(value: Any) -> dict[str, str]:
    """A flat mapping to show as a table; empty where the value is anything else."""
    if not isinstance(value, Mapping):
        return {}
    if any(isinstance(item, Mapping | list) for item in value.values()):
        return {}
    return {str(name): str(item) for name, item in value.items()}
