"""Detectors: what the page tells of each, its drawings, its configuration, where it is from."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oodcore.metrics import METRICS
from oodcore.records import Entry, Method
from oodcore.report.citing import bibtex
from oodcore.report.drawing import heights, line, position, precision_recall
from oodcore.results import Results
from oodcore.tables import Column, cell_text


@dataclass
class Methods:
    """What is told of methods, once each, and the place of each in that list."""

    shown: list[dict[str, Any]] = field(default_factory=list)
    places: dict[Method, int] = field(default_factory=dict)


def methods(results: Results) -> Methods:
    """Every method that takes part in some detector."""
    told = Methods()
    for method in (one for entry in results.entries for one in entry.methods):
        if method not in told.places:
            told.places[method] = len(told.shown)
            told.shown.append(_told(method))
    return told


def detectors(results: Results, order: Sequence[str], told: Methods) -> list[dict[str, Any]]:
    """What the page's script draws, for each detector in order."""
    entries = {entry.name: entry for entry in results.entries}
    anchors = _anchors(order)
    return [_detector(results, entries[name], anchors[name], told) for name in order]


def headline(results: Results, name: str) -> list[tuple[str, str]]:
    """A detector's first two metrics: what each is called, and the number."""
    mean = "mean " if len(results.ood_data) > 1 else ""
    inside = results.id_data
    metrics = results.metrics or results.id_metrics
    return [
        (f"{mean}{METRICS[metric].title}", cell_text(results, name, Column("", metric, *place)))
        for metric in metrics[:2]
        for place in [("mean", "all") if results.metrics else (inside.name, inside.group)]
    ]


def as_yaml(value: Any) -> str:
    """Plain values as a configuration file writes them."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 88
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue().rstrip()


def paragraphs(about: str) -> list[list[Any]]:
    """A docstring's paragraphs: whether its lines are to be kept, then text and code in turn."""
    found: list[list[Any]] = []
    for part in re.split(r"\n\s*\n", about.strip()):
        kept = any(re.match(r"\s|[-*|]\s|\d+\.\s", one) for one in part.splitlines())
        text = part if kept else " ".join(part.split())
        found.append([kept, *re.split(r"``(.+?)``", text, flags=re.DOTALL)])
    return found if about.strip() else []


def _detector(results: Results, entry: Entry, anchor: str, told: Methods) -> dict[str, Any]:
    """All that the page says about one detector, but for its numbers."""
    figure = results.figures[entry.name]
    inside, *outside = results.data
    rows = {name: sum(counts) for name, counts in figure.counts.items()}
    citation, url = ("", "") if entry.methods else _linked(entry.citation)
    short = entry.name.removeprefix(f"{entry.model}/") if entry.model else entry.name
    return {
        "name": entry.name,
        "short": short,
        "model": entry.model,
        "anchor": anchor,
        "kinds": sorted(set(_kinds(entry.configuration))),
        "configuration": as_yaml(entry.configuration) if entry.configuration else "",
        "methods": [told.places[method] for method in entry.methods],
        "citation": citation,
        "url": url,
        "seconds": None if entry.seconds is None else f"{entry.seconds:.3g}",
        "headline": headline(results, entry.name),
        "alone": [
            (METRICS[metric].title, text)
            for metric in results.id_metrics
            if (
                text := cell_text(
                    results, entry.name, Column("", metric, inside.name, inside.group)
                )
            )
        ],
        "threshold": position(figure),
        "range": [f"{figure.edges[0]:.4g}", f"{figure.edges[-1]:.4g}"],
        "histograms": [heights(figure.counts[one.name]) for one in results.data],
        "curves": [
            [
                line(points),
                *(
                    line(precision_recall(points, rows[inside.name], rows[one.name], positive))
                    for positive in ("id", "ood")
                ),
            ]
            for one in outside
            for points in [figure.roc[one.name]]
        ],
        "coverage": line(figure.coverage) if figure.coverage else "",
    }


def _told(method: Method) -> dict[str, Any]:
    paper = method.paper
    return {
        "slot": method.slot,
        "kind": method.kind,
        "about": paragraphs(method.about),
        **(
            {}
            if paper is None
            else {
                "citation": f"{paper.authors}. {paper.title}. {paper.venue} {paper.year}.",
                "url": paper.url if _WEB.fullmatch(paper.url) else "",
                "bibtex": bibtex(paper),
            }
        ),
    }


def _kinds(configuration: Any) -> Iterator[str]:
    """The kinds of all components in a configuration."""
    if isinstance(configuration, Mapping):
        if isinstance(kind := configuration.get("kind"), str):
            yield kind
        for value in configuration.values():
            yield from _kinds(value)
    elif isinstance(configuration, list | tuple):
        for value in configuration:
            yield from _kinds(value)


def _anchors(names: Sequence[str]) -> dict[str, str]:
    """An address within the page for each detector: of its name, with a number where need be."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(names):
        plain = "detector-" + (re.sub(r"[^\w.]+", "-", name.lower()).strip("-") or "unnamed")
        anchor, count = plain, 1
        while anchor in taken:
            count += 1
            anchor = f"{plain}-{count}"
        taken.add(anchor)
        found[name] = anchor
    return found


def _linked(citation: str | None) -> tuple[str, str]:
    """A citation's text, and the web address at its end if it has one."""
    found = re.fullmatch(rf"(.*?)\s*({_WEB.pattern})", citation or "", flags=re.DOTALL)
    return (found[1], found[2]) if found else (citation or "", "")


_WEB = re.compile(r"https?://[^\s]+")
