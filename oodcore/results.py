"""What a benchmark found: tidy rows, the figures beside them, and how they came about."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict, TypeAdapter, ValidationError

from oodcore import __version__
from oodcore.calibration import Calibration
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.figures import Figure, draw
from oodcore.metrics import METRICS, SEPARATION, Curve, Floats, curve, finite_scores
from oodcore.tables import Column, markdown, table_rows

if TYPE_CHECKING:
    from oodcore.overview import Overview

SCHEMA = 1
ID = "id"
"""The group of the in-distribution test data."""
MEAN, ALL = "mean", "all"
"""A mean's data, and its group where it is over every OOD set."""

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Entry:
    """One detector of a benchmark.

    Args:
        name: unique in the benchmark.
        model: the name of the model it stands on; empty if there is only one.
        configuration: its shapers and scorer, in plain JSON values.
        citation: of the paper behind it.
        seconds_fit: how long fitting took.
        seconds_score: how long scoring all data took.

    Raises:
        ConfigurationError: a name that cannot be printed, a configuration that is not plain JSON.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    model: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    citation: str | None = None
    seconds_fit: float | None = None
    seconds_score: float | None = None

    def __post_init__(self) -> None:
        _printable(self.name, "a detector")
        _printable(self.model or "one", "a model")
        _plain(self.citation, f"the citation of {self.name}")
        plain = _plain(self.configuration, f"the configuration of {self.name}")
        object.__setattr__(self, "configuration", plain)


@dataclass(frozen=True)
class DataSet:
    """A data set of a benchmark; its group is ``id``, or that of an OOD set (empty for none)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    group: str
    rows: int

    def __post_init__(self) -> None:
        _printable(self.name, "a data set")
        _printable(self.group or "none", "a group")
        if self.name == MEAN or self.group == ALL:
            raise ConfigurationError(
                f"no data set can be called '{MEAN}' and no group '{ALL}': these stand for means"
            )


@dataclass(frozen=True)
class Row:
    """One number: a metric of a detector on a data set, a share in [0, 1].

    A mean over the OOD sets of a group has the data ``mean`` and that group; over all of them, the
    group ``all``. Every set weighs the same.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    detector: str
    model: str
    data: str
    group: str
    metric: str
    value: float


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

    Raises:
        ConfigurationError: parts that do not fit together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    entries: tuple[Entry, ...]
    data: tuple[DataSet, ...]
    rows: tuple[Row, ...]
    figures: Mapping[str, Figure]
    configuration: Mapping[str, Any]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("configuration", "provenance"):
            object.__setattr__(self, name, _plain(getattr(self, name), f"the {name}"))
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
        calibrations: Mapping[str, Calibration] | None = None,
        false_alarm_rate: float | None = None,
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
            calibrations: by detector; one left out has no measured false-alarm rate.
            false_alarm_rate: that was asked for; recorded in the configuration.
            configuration: of the whole benchmark, in plain JSON values.
            provenance: what else to record, in plain JSON values; versions are added.

        Raises:
            ConfigurationError: names that do not fit together, or calibrations without a rate.
            DataError: scores that are not ``[N]``, empty or not finite, or not of the same rows.
        """
        entries = tuple(entries)
        groups, accuracy, calibrations = groups or {}, accuracy or {}, calibrations or {}
        names = [entry.name for entry in entries]
        _same_names("detectors", names, scores)
        _known_names("detector", calibrations, names)
        _known_names("model", accuracy, [entry.model for entry in entries])
        if calibrations and false_alarm_rate is None:
            raise ConfigurationError("calibrations need the false_alarm_rate that was asked for")
        checked = {
            name: {
                data: finite_scores(values, f"the scores of {name} on {data}")
                for data, values in scores[name].items()
            }
            for name in names
        }
        data = _data_sets(checked, id_name, groups)
        rows: list[Row] = []
        figures = {}
        for entry in entries:
            own = {item.name: checked[entry.name][item.name] for item in data}
            curves = {ood.name: curve(own[id_name], own[ood.name]) for ood in data[1:]}
            alone = {"accuracy": accuracy[entry.model]} if entry.model in accuracy else {}
            threshold = None
            if entry.name in calibrations and false_alarm_rate is not None:
                calibration = calibrations[entry.name]
                threshold = calibration.threshold(false_alarm_rate)
                flagged = calibration.flagged(own[id_name], false_alarm_rate)
                alone["false_alarm_rate"] = float(flagged.mean())
            for metric, value in alone.items():
                rows.append(Row(entry.name, entry.model, id_name, ID, metric, float(value)))
            rows += _separation(entry, data[1:], curves)
            figures[entry.name] = draw(own, id_name, curves, threshold)
        asked = {} if false_alarm_rate is None else {"false_alarm_rate": false_alarm_rate}
        return cls(
            entries,
            data,
            tuple(rows),
            figures,
            {**(configuration or {}), **asked},
            {"versions": versions(), **(provenance or {})},
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

    @cached_property
    def _values(self) -> dict[tuple[str, str, str, str], float]:
        return {(row.detector, row.metric, row.data, row.group): row.value for row in self.rows}

    @cached_property
    def _group_of(self) -> dict[str, str]:
        return {data.name: data.group for data in self.data}

    def value(self, detector: str, metric: str, data: str) -> float | None:
        """A metric on one data set; None if it was not measured."""
        return self._values.get((detector, metric, data, self._group_of.get(data, "")))

    def mean(self, detector: str, metric: str, group: str = ALL) -> float | None:
        """The mean of a metric over the OOD sets of a group; None if it was not measured."""
        return self._values.get((detector, metric, MEAN, group))

    def cell(self, detector: str, column: Column) -> float | None:
        """The number of a detector in a table's column; None if it was not measured."""
        return self._values.get((detector, column.metric, column.data, column.group))

    def ranked(self, metric: str = "auroc") -> tuple[str, ...]:
        """The detectors, best first: by the mean over the OOD sets, or by accuracy.

        Equal ones stay in the order of the configuration; those without a value come last.

        Raises:
            ConfigurationError: an unknown metric, or one of which neither end is better.
        """
        _known_names("metric", [metric], METRICS)
        better = METRICS[metric].better
        if better is None:
            raise ConfigurationError(f"detectors cannot be ranked by {metric}: neither end is best")
        sign = -1.0 if better == "higher" else 1.0

        def key(name: str) -> float:
            inside = self.value(name, metric, self.id_data.name)
            value = self.mean(name, metric) if metric in SEPARATION else inside
            return float("inf") if value is None else sign * value

        return tuple(sorted((entry.name for entry in self.entries), key=key))

    def best(self, metric: str = "auroc") -> str:
        """The name of the best detector by a metric; see ``ranked``."""
        return self.ranked(metric)[0]

    def table_rows(self, metric: str = "auroc") -> list[list[str]]:
        """See ``oodcore.tables.table_rows``."""
        return table_rows(self, metric)

    def markdown(self, metric: str = "auroc") -> str:
        """See ``oodcore.tables.markdown``."""
        return markdown(self, metric)

    def table(self, metric: str = "auroc") -> Overview:
        """What ``rich.print`` shows in a terminal; see ``oodcore.overview.Overview``."""
        from oodcore.overview import Overview

        return Overview(self, metric)

    def save(self, folder: str | Path) -> Path:
        """Write ``results.csv`` (the rows) and ``results.json`` (everything) into a folder.

        Each file is replaced in one step, so that a reader never finds half of one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(column.name for column in fields(Row))
        writer.writerows(asdict(row).values() for row in self.rows)
        write_text(folder / "results.csv", table.getvalue())
        content = {
            "schema": SCHEMA,
            "conventions": {name: metric.meaning for name, metric in METRICS.items()},
            **asdict(self),
        }
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
        write_text(folder / "results.json", "{\n" + ",\n".join(lines) + "\n}\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """Read back what ``save`` wrote.

        Raises:
            ArtifactError: no results there, damaged ones, or ones of a schema unknown here.
        """
        path = Path(folder) / "results.json"
        try:
            content = json.loads(path.read_bytes())
            schema = content.pop("schema", None) if isinstance(content, dict) else None
            if type(schema) is not int or schema < 1:
                raise ArtifactError(f"{path} has no schema number: it is not a benchmark's results")
            if schema > SCHEMA:
                raise ArtifactError(
                    f"{path} has schema {schema} and this oodcore reads schema {SCHEMA}: upgrade it"
                )
            content.pop("conventions", None)
            return TypeAdapter(cls).validate_json(json.dumps(content))
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ArtifactError(f"{path} is not JSON: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "as a whole"
            raise ArtifactError(f"{path}: {where}: {first['msg']}") from None


def versions() -> dict[str, str]:
    """The versions of Python, of oodcore and of what its numbers depend on."""
    found = {"python": platform.python_version(), "oodcore": __version__}
    for name in ("torch", "numpy", "scikit-learn", "faiss-cpu", "faiss-gpu"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def write_text(path: Path, text: str) -> None:
    """Put a text file in its place in one step."""
    passing = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        passing.write_text(text, encoding="utf-8", newline="\n")
        os.replace(passing, path)
    finally:
        passing.unlink(missing_ok=True)


def _separation(
    entry: Entry, sets: Sequence[DataSet], curves: Mapping[str, Curve]
) -> Iterator[Row]:
    """A detector's rows on every OOD set, then the means over all of them and over groups."""
    values = {ood.name: curves[ood.name].measures() for ood in sets}
    for ood in sets:
        for metric, value in values[ood.name].items():
            yield Row(entry.name, entry.model, ood.name, ood.group, metric, value)
    groups = {ALL: [ood.name for ood in sets]}
    for ood in sets:
        if ood.group:
            groups.setdefault(ood.group, []).append(ood.name)
    for group, members in groups.items():
        for metric in SEPARATION:
            mean = float(np.mean([values[name][metric] for name in members]))
            yield Row(entry.name, entry.model, MEAN, group, metric, mean)


def _data_sets(
    scores: Mapping[str, Mapping[str, Floats]], id_name: str, groups: Mapping[str, str]
) -> tuple[DataSet, ...]:
    """The data sets that every detector scored: ID, then OOD by group, near and far first."""
    if not scores:
        raise ConfigurationError("there is no detector to compare")
    first, *others = scores
    rows = {name: len(values) for name, values in scores[first].items()}
    outside = [name for name in rows if name != id_name]
    if id_name not in rows or not outside:
        raise ConfigurationError(
            f"needed are scores on '{id_name}' and on at least one OOD set, and those of {first} "
            f"are on: {', '.join(rows) or 'nothing'}"
        )
    for other in others:
        _same_names(f"data sets of {first} and {other}", rows, scores[other])
        for name, values in scores[other].items():
            if len(values) != rows[name]:
                raise DataError(
                    f"{first} scored {rows[name]} rows of {name}, and {other} {len(values)}: "
                    "detectors are compared on the same rows"
                )
    _known_names("OOD set", groups, outside)
    named = [group for name in outside if (group := groups.get(name, ""))]
    order = list(dict.fromkeys(["near", "far", *named, ""]))
    outside.sort(key=lambda name: order.index(groups.get(name, "")))
    sets = (DataSet(name, groups.get(name, ""), rows[name]) for name in outside)
    return (DataSet(id_name, ID, rows[id_name]), *sets)


def _check(results: Results) -> None:
    """Refuse results whose parts do not fit together."""
    detectors = {entry.name: entry.model for entry in results.entries}
    data = {item.name: item.group for item in results.data}
    if len(detectors) != len(results.entries) or len(data) != len(results.data):
        raise ConfigurationError("two detectors, or two data sets, have the same name")
    if not detectors or len(data) < 2:
        raise ConfigurationError("results are of at least one detector, ID data and one OOD set")
    if [group == ID for group in data.values()] != [True] + [False] * (len(data) - 1):
        raise ConfigurationError(f"the first data set, and no other, is of the group '{ID}'")
    known = {*data.items(), *((MEAN, group) for group in (ALL, *results.groups))}
    for row in results.rows:
        if detectors.get(row.detector) != row.model or (row.data, row.group) not in known:
            raise ConfigurationError(f"{row} is about nothing in these results")
        if row.metric not in METRICS or not 0 <= row.value <= 1:
            raise ConfigurationError(f"{row} is no share in [0, 1] of a known metric")
    if len(results._values) != len(results.rows):
        raise ConfigurationError("a metric is given twice for the same detector and data")
    _same_names("detectors and figures", detectors, results.figures)
    for name, figure in results.figures.items():
        _same_names(f"histograms of {name}", data, figure.counts)
        _same_names(f"ROC curves of {name}", list(data)[1:], figure.roc)
        if not figure.sound():
            raise ConfigurationError(f"the figure of {name} is damaged")


def _same_names(what: str, one: Iterable[str], other: Iterable[str]) -> None:
    if only := sorted(set(one) ^ set(other)):
        raise ConfigurationError(f"the {what} do not match: only one side has {', '.join(only)}")


def _known_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    if strange := [name for name in given if name not in known]:
        raise ConfigurationError(f"unknown {what} '{strange[0]}'; there are: {', '.join(known)}")


def _printable(name: str, what: str) -> None:
    if not (name.isprintable() and name.strip()):
        raise ConfigurationError(f"{name!r} cannot name {what}: it cannot be printed on one line")


def _plain(value: Any, what: str) -> Any:
    """A copy in plain JSON values, as it will be read back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{what} cannot be recorded as JSON: {error}") from None
