"""What a benchmark found: tidy rows, the figures beside them, and how they came about."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict

from oodcore import __version__
from oodcore.calibration import Calibration
from oodcore.errors import ConfigurationError
from oodcore.figures import Figure
from oodcore.measuring import Scored, measure
from oodcore.metrics import METRICS
from oodcore.picture import Picture
from oodcore.protocol import Protocol
from oodcore.protocols import Separation
from oodcore.records import (
    ALL,
    ID,
    MEAN,
    POOLED,
    STRICT,
    DataSet,
    Entry,
    Method,
    Row,
    known_names,
    plain_json,
    same_names,
)
from oodcore.results_folder import SCHEMA, read_results, write_results, write_text
from oodcore.tables import Column, markdown, table_rows

if TYPE_CHECKING:
    from oodcore.overview import Overview

__all__ = [
    "ALL",
    "ID",
    "MEAN",
    "POOLED",
    "SCHEMA",
    "DataSet",
    "Entry",
    "Method",
    "Results",
    "Row",
    "Scored",
    "versions",
    "write_text",
]


@dataclass(frozen=True)
class Results:
    """What a benchmark found; made by ``from_scores``, kept in a folder by ``save``.

    Args:
        entries: the detectors, in the order of the configuration.
        data: the data sets: the in-distribution test data, then the OOD sets, group by group.
        rows: one for each detector, data set and metric.
        figures: by detector.
        configuration: of the whole benchmark.
        provenance: ``versions`` (of Python and packages), ``plugins`` (versions by distribution)
            and whatever else was recorded.
        protocol: what was measured: its kind, its fields, and its ``meaning`` in a sentence.
        repeats: what the repeats of a protocol are called: draws, or divisions of the classes.
        pictures: of the embeddings, by model; of several divisions of the classes, the first one's.

    Raises:
        ConfigurationError: parts that do not fit together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    entries: tuple[Entry, ...]
    data: tuple[DataSet, ...]
    rows: tuple[Row, ...]
    figures: Mapping[str, Figure]
    configuration: Mapping[str, Any]
    provenance: Mapping[str, Any]
    protocol: Mapping[str, Any] = field(default_factory=lambda: _recorded(Separation()))
    repeats: tuple[str, ...] = ()
    pictures: Mapping[str, Picture] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("configuration", "provenance", "protocol"):
            object.__setattr__(self, name, plain_json(getattr(self, name), f"the {name}"))
        _check(self)

    @classmethod
    def from_scores(
        cls,
        entries: Iterable[Entry],
        scores: Mapping[str, Mapping[str, ArrayLike]],
        *,
        id_name: str = "id_test",
        groups: Mapping[str, str] | None = None,
        accuracy: Mapping[str, float] | None = None,
        correct: Mapping[str, ArrayLike] | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
        false_alarm_rate: float | None = None,
        protocol: Protocol | None = None,
        configuration: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Results:
        """Measure what detectors said about the same rows.

        Args:
            entries: the detectors.
            scores: by detector and data set, ``[N]`` each, higher = more in-distribution.
            id_name: the in-distribution test data among the data sets; all others are OOD.
            groups: of OOD sets, such as ``near`` and ``far``; means are taken over each.
            accuracy: by model, on the in-distribution test data.
            correct: by model, ``[N]`` booleans: which of its rows are classified as labelled; some
                protocols need it, and accuracy is counted from it.
            calibrations: by detector; one left out has no measured false-alarm rate.
            false_alarm_rate: that was asked for; recorded in the configuration.
            protocol: what to measure; left out, how well ID and OOD rows come apart.
            configuration: of the whole benchmark, in plain JSON values.
            provenance: what else to record, in plain JSON values; versions are added.

        Raises:
            ConfigurationError: names that do not fit together, or calibrations without a rate.
            DataError: scores that are not ``[N]``, empty or not finite, or not of the same rows;
                what the protocol needs and is not there.
        """
        scored = Scored(scores, accuracy or {}, correct or {}, calibrations or {})
        return cls.from_splits(
            entries,
            {"": scored},
            id_name=id_name,
            groups=groups,
            false_alarm_rate=false_alarm_rate,
            protocol=protocol,
            configuration=configuration,
            provenance=provenance,
        )

    @classmethod
    def from_splits(
        cls,
        entries: Iterable[Entry],
        splits: Mapping[str, Scored],
        *,
        id_name: str = "id_test",
        groups: Mapping[str, str] | None = None,
        false_alarm_rate: float | None = None,
        protocol: Protocol | None = None,
        configuration: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        pictures: Mapping[str, Picture] | None = None,
    ) -> Results:
        """As ``from_scores``, of several divisions of the classes, each with its own rows.

        Args:
            entries: the detectors, the same in every split.
            splits: what they said in each, by the split's name.
            id_name: as in ``from_scores``; so are the others.
            pictures: of the embeddings, by model.

        Raises:
            ConfigurationError, DataError: as ``from_scores``.
        """
        entries, protocol = tuple(entries), protocol or Separation()
        repeats = protocol.repeats or (tuple(splits) if len(splits) > 1 else ())
        measured = measure(
            entries,
            splits,
            protocol,
            id_name=id_name,
            groups=groups or {},
            false_alarm_rate=false_alarm_rate,
        )
        asked = {} if false_alarm_rate is None else {"false_alarm_rate": false_alarm_rate}
        calibrated = {
            name: max(map(len, one.calibrations.values()))
            for name, one in splits.items()
            if one.calibrations
        }
        rows = {"calibration_rows": calibrated} if calibrated else {}
        return cls(
            entries,
            measured.data,
            measured.rows,
            measured.figures,
            {**(configuration or {}), **asked},
            {"versions": versions(), **rows, **(provenance or {})},
            _recorded(protocol),
            repeats,
            dict(pictures or {}),
        )

    @property
    def id_data(self) -> DataSet:
        """The in-distribution test data."""
        return self.data[0]

    @property
    def ood_data(self) -> tuple[DataSet, ...]:
        """The OOD sets, group by group."""
        return self.data[1:]

    @property
    def groups(self) -> tuple[str, ...]:
        """The named groups of OOD sets, ``near`` and ``far`` first."""
        return tuple(dict.fromkeys(ood.group for ood in self.ood_data if ood.group))

    @property
    def calibration_rows(self) -> int | None:
        """How many rows the thresholds stand on, those of all splits; None without a calibration.

        The measured false-alarm rate is to be judged by them: see ``docs/decisions.md``.
        """
        rows = self.provenance.get("calibration_rows")
        return sum(rows.values()) if isinstance(rows, Mapping) and rows else None

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """What was measured on each OOD set, the protocol's first metric first."""
        return tuple(dict.fromkeys(r.metric for r in self.rows if r.data != self.id_data.name))

    @cached_property
    def id_metrics(self) -> tuple[str, ...]:
        """What was measured on the in-distribution test data alone."""
        measured = {row.metric for row in self.rows if row.data == self.id_data.name}
        return tuple(name for name in METRICS if name in measured)

    @property
    def main(self) -> str:
        """The metric by which detectors are ranked where none is named."""
        return (*self.metrics, *self.id_metrics, "auroc")[0]

    @cached_property
    def _found(self) -> dict[tuple[str, str, str, str], Row]:
        return {(row.detector, row.metric, row.data, row.group): row for row in self.rows}

    @cached_property
    def _group_of(self) -> dict[str, str]:
        return {data.name: data.group for data in self.data}

    def row(self, detector: str, metric: str, data: str, group: str | None = None) -> Row | None:
        """The whole record of a number, with its repeats; None if it was not measured.

        Args:
            detector: its name.
            metric: its name.
            data: a data set, ``mean`` or ``pooled``.
            group: of a mean; left out, the data set's own.
        """
        if group is None:
            group = ALL if data in (MEAN, POOLED) else self._group_of.get(data, "")
        return self._found.get((detector, metric, data, group))

    def value(self, detector: str, metric: str, data: str) -> float | None:
        """A metric on one data set; None if it was not measured."""
        return _value(self.row(detector, metric, data))

    def mean(self, detector: str, metric: str, group: str = ALL) -> float | None:
        """The mean of a metric over the OOD sets of a group; None if it was not measured."""
        return _value(self.row(detector, metric, MEAN, group))

    def cell(self, detector: str, column: Column) -> float | None:
        """The number of a detector in a table's column; None if it was not measured."""
        return _value(self.row(detector, column.metric, column.data, column.group))

    def sd(self, detector: str, column: Column) -> float | None:
        """Its standard deviation over the repeats; None where it was measured once."""
        row = self.row(detector, column.metric, column.data, column.group)
        return None if row is None else row.sd

    def ranked(self, metric: str | None = None) -> tuple[str, ...]:
        """The detectors, best first: by the mean over the OOD sets, or on the ID test data.

        Equal ones stay in the order of the configuration; those without a value come last.

        Args:
            metric: left out, the protocol's first.

        Raises:
            ConfigurationError: a metric that was not measured, or one of which neither end is
                better.
        """
        metric = self.main if metric is None else metric
        known_names("metric", [metric], (*self.metrics, *self.id_metrics))
        better = METRICS[metric].better
        if better is None:
            raise ConfigurationError(f"detectors cannot be ranked by {metric}: neither end is best")
        sign = -1.0 if better == "higher" else 1.0

        def key(name: str) -> float:
            inside = self.value(name, metric, self.id_data.name)
            value = self.mean(name, metric) if metric in self.metrics else inside
            return float("inf") if value is None else sign * value

        return tuple(sorted((entry.name for entry in self.entries), key=key))

    def best(self, metric: str | None = None) -> str:
        """The name of the best detector by a metric; see ``ranked``."""
        return self.ranked(metric)[0]

    def table_rows(self, metric: str | None = None) -> list[list[str]]:
        """See ``oodcore.tables.table_rows``."""
        return table_rows(self, metric)

    def markdown(self, metric: str | None = None) -> str:
        """See ``oodcore.tables.markdown``."""
        return markdown(self, metric)

    def table(self, metric: str | None = None) -> Overview:
        """What ``rich.print`` shows in a terminal; see ``oodcore.overview.Overview``."""
        from oodcore.overview import Overview

        return Overview(self, metric)

    def save(self, folder: str | Path) -> Path:
        """Write ``results.csv`` (the rows) and ``results.json`` (everything) into a folder.

        Each file is replaced in one step, so that a reader never finds half of one.
        """
        return write_results(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read back what ``save`` wrote.

        Raises:
            ArtifactError: no results there, damaged ones, or ones of a schema unknown here.
        """
        return read_results(folder)


def versions() -> dict[str, str]:
    """The versions of Python, of oodcore and of what its numbers depend on."""
    found = {"python": platform.python_version(), "oodcore": __version__}
    for name in ("torch", "numpy", "scikit-learn", "faiss-cpu", "faiss-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _recorded(protocol: Protocol) -> dict[str, Any]:
    """What results keep of a protocol, readable without what its extractors come from."""
    return {**protocol.model_dump(mode="json"), "meaning": protocol.told}


def _value(row: Row | None) -> float | None:
    return None if row is None else row.value


def _check(results: Results) -> None:
    """Refuse results whose parts do not fit together."""
    detectors = {entry.name: entry.model for entry in results.entries}
    data = {item.name: item.group for item in results.data}
    if len(detectors) != len(results.entries) or len(data) != len(results.data):
        raise ConfigurationError("two detectors, or two data sets, have the same name")
    if not detectors or not data:
        raise ConfigurationError("results are of at least one detector and of ID data")
    if [group == ID for group in data.values()] != [True] + [False] * (len(data) - 1):
        raise ConfigurationError(f"the first data set, and no other, is of the group '{ID}'")
    known = {*data.items(), (POOLED, ALL), *((MEAN, group) for group in (ALL, *results.groups))}
    for row in results.rows:
        if detectors.get(row.detector) != row.model or (row.data, row.group) not in known:
            raise ConfigurationError(f"{row} is about nothing in these results")
        if row.metric not in METRICS or not all(0 <= v <= 1 for v in (row.value, *row.values)):
            raise ConfigurationError(f"{row} is no share in [0, 1] of a known metric")
        if row.values and len(row.values) != len(results.repeats):
            raise ConfigurationError(f"{row} does not have a value for each of the repeats")
        if row.values and not np.isclose(row.value, np.mean(row.values), rtol=0, atol=1e-12):
            raise ConfigurationError(f"{row} has a value that is not the mean of its repeats")
    if len(results._found) != len(results.rows):
        raise ConfigurationError("a metric is given twice for the same detector and data")
    same_names("detectors and figures", detectors, results.figures)
    known_names("model with a picture", results.pictures, set(detectors.values()))
    for name, picture in results.pictures.items():
        same_names(f"points in the picture of {name or 'the model'}", data, picture.points)
        if not picture.sound():
            raise ConfigurationError(f"the picture of {name or 'the model'} is damaged")
    for name, figure in results.figures.items():
        same_names(f"histograms of {name}", data, figure.counts)
        same_names(f"ROC curves of {name}", list(data)[1:], figure.roc)
        if not figure.sound():
            raise ConfigurationError(f"the figure of {name} is damaged")
