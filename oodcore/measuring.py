"""From scores to numbers: every metric of a protocol, for every detector on every data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from oodcore.calibration import Calibration
from oodcore.confidence import correctness, risks
from oodcore.curves import Floats, finite_scores
from oodcore.errors import ConfigurationError, DataError
from oodcore.figures import Figure, draw
from oodcore.protocol import Pair, Protocol
from oodcore.records import ALL, ID, MEAN, POOLED, DataSet, Entry, Row, known_names, same_names

Numbers = dict[tuple[str, str], tuple[float, ...]]
"""By data set and metric, a number for each repeat."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What detectors said about the same rows.

    Args:
        scores: by detector and data set, ``[N]`` each, higher = more in-distribution.
        accuracy: by model, on the in-distribution test data; where ``correct`` has the model, it is
            counted there.
        correct: by model, ``[N]`` booleans: whether each in-distribution test row is classified as
            labelled.
        calibrations: by detector; one left out has no measured false-alarm rate.
    """

    scores: Mapping[str, Mapping[str, ArrayLike]]
    accuracy: Mapping[str, float] = field(default_factory=dict)
    correct: Mapping[str, ArrayLike] = field(default_factory=dict)
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Measured:
    """What comes of it: the data sets, the rows of numbers, a figure for each detector."""

    data: tuple[DataSet, ...]
    rows: tuple[Row, ...]
    figures: Mapping[str, Figure]


def measure(
    entries: Sequence[Entry],
    splits: Mapping[str, Scored],
    protocol: Protocol,
    *,
    id_name: str,
    groups: Mapping[str, str],
    false_alarm_rate: float | None,
) -> Measured:
    """Measure detectors as a protocol says.

    Args:
        entries: the detectors.
        splits: what they said, for each division of the classes; a single one where they are not
            divided.
        protocol: what to measure.
        id_name: the in-distribution test data among the data sets; all others are OOD.
        groups: of OOD sets.
        false_alarm_rate: that calibrations are asked for.

    Raises:
        ConfigurationError: names that do not fit together or with the protocol.
        DataError: scores that are not ``[N]``, empty or not finite, or not of the same rows; too
            few rows for the protocol, or no labels where it needs them.
    """
    if not splits:
        raise ConfigurationError("there is no detector to compare")
    parts = [
        _Part(entries, scored, protocol, id_name, groups, false_alarm_rate)
        for scored in splits.values()
    ]
    first, *others = parts
    for other in others:
        same_names("data sets of two splits", [d.name for d in first.data], other.sizes)
    data = tuple(
        DataSet(one.name, one.group, sum(part.sizes[one.name] for part in parts))
        for one in first.data
    )
    rows: list[Row] = []
    figures = {}
    for entry in entries:
        read = [part.read(entry) for part in parts]
        found = [numbers for numbers, _ in read]
        figures[entry.name] = read[0][1]
        together = {
            key: tuple(value for numbers in found for value in numbers[key])
            for key in found[0]
            if all(key in numbers for numbers in found)
        }
        rows += _rows(entry, data, together)
    return Measured(data, tuple(rows), figures)


class _Part:
    """One division of the classes: scores that were checked, and what is read from them."""

    def __init__(
        self,
        entries: Sequence[Entry],
        scored: Scored,
        protocol: Protocol,
        id_name: str,
        groups: Mapping[str, str],
        rate: float | None,
    ) -> None:
        names = [entry.name for entry in entries]
        models = [entry.model for entry in entries]
        same_names("detectors", names, scored.scores)
        known_names("detector", scored.calibrations, names)
        known_names("model", [*scored.accuracy, *scored.correct], models)
        if scored.calibrations and rate is None:
            raise ConfigurationError("calibrations need the false_alarm_rate that was asked for")
        self._scores = {
            name: {
                data: finite_scores(values, f"the scores of {name} on {data}")
                for data, values in scored.scores[name].items()
            }
            for name in names
        }
        self._protocol, self._id, self._rate = protocol, id_name, rate
        self._calibrations = scored.calibrations
        self.data = _data_sets(self._scores, id_name, groups, protocol.takes_sets)
        self.sizes = {one.name: one.rows for one in self.data}
        self._correct = {
            model: correctness(right, self.sizes[id_name])
            for model, right in scored.correct.items()
        }
        counted = {model: float(right.mean()) for model, right in self._correct.items()}
        self._accuracy = {**scored.accuracy, **counted}
        if protocol.takes_labels and (without := sorted(set(models) - set(self._correct))):
            whose = f" of the model '{without[0]}'" if without[0] else ""
            raise DataError(
                f"this protocol needs to know which predictions{whose} are right: give {id_name} "
                "with a label for every row, and a model that has logits"
            )
        protocol.check_rows(self.sizes[id_name], {d.name: d.rows for d in self.data[1:]})

    def read(self, entry: Entry) -> tuple[Numbers, Figure]:
        """Every metric of a detector on every set, without means, and what its scores look like."""
        own, right = self._scores[entry.name], self._correct.get(entry.model)
        inside, protocol = own[self._id], self._protocol
        alone = protocol.alone(inside, right)
        if entry.model in self._accuracy:
            alone["accuracy"] = float(self._accuracy[entry.model])
        threshold = None
        calibration = self._calibrations.get(entry.name)
        if calibration is not None and self._rate is not None:
            alone["false_alarm_rate"] = float(calibration.flagged(inside, self._rate).mean())
            threshold = calibration.threshold(self._rate)
        numbers: Numbers = {(self._id, metric): (value,) for metric, value in alone.items()}
        pairs = [Pair(inside, own[ood.name], right, ood.name) for ood in self.data[1:]]
        curves = {pair.name: pair.curve for pair in pairs}
        if protocol.pools and len(pairs) > 1:
            everything = np.concatenate([pair.outside for pair in pairs])
            pairs.append(Pair(inside, everything, right, POOLED))
        for pair in pairs:
            for metric, values in protocol.numbers(pair).items():
                numbers[pair.name, metric] = values
        sets = {one.name: own[one.name] for one in self.data}
        risk = None if protocol.measured or right is None else risks(inside, right)
        return numbers, draw(sets, self._id, curves, threshold, risk)


def _rows(entry: Entry, data: Sequence[DataSet], numbers: Numbers) -> Iterator[Row]:
    """A detector's rows on every data set, then the means over all OOD sets and over groups."""
    inside, *sets = data
    group_of = {one.name: one.group for one in data} | {POOLED: ALL}
    for (name, metric), values in numbers.items():
        yield _row(entry, name, group_of[name], metric, values)
    groups: dict[str, list[str]] = {ALL: [ood.name for ood in sets]} if sets else {}
    for ood in sets:
        if ood.group:
            groups.setdefault(ood.group, []).append(ood.name)
    on_sets = dict.fromkeys(metric for name, metric in numbers if name not in (inside.name, POOLED))
    for group, members in groups.items():
        for metric in on_sets:
            means = np.mean([numbers[name, metric] for name in members], axis=0)
            yield _row(entry, MEAN, group, metric, tuple(means.tolist()))


def _row(entry: Entry, data: str, group: str, metric: str, values: tuple[float, ...]) -> Row:
    several = values if len(values) > 1 else ()
    return Row(entry.name, entry.model, data, group, metric, float(np.mean(values)), several)


def _data_sets(
    scores: Mapping[str, Mapping[str, Floats]],
    id_name: str,
    groups: Mapping[str, str],
    takes_sets: bool,
) -> tuple[DataSet, ...]:
    """The data sets that every detector scored: ID, then OOD by group, near and far first."""
    if not scores:
        raise ConfigurationError("there is no detector to compare")
    first, *others = scores
    rows = {name: len(values) for name, values in scores[first].items()}
    outside = [name for name in rows if name != id_name]
    if id_name not in rows or (takes_sets and not outside):
        needed = " and on at least one OOD set" if takes_sets else ""
        raise ConfigurationError(
            f"needed are scores on '{id_name}'{needed}, and those of {first} are on: "
            f"{', '.join(rows) or 'nothing'}"
        )
    for other in others:
        same_names(f"data sets of {first} and {other}", rows, scores[other])
        for name, values in scores[other].items():
            if len(values) != rows[name]:
                raise DataError(
                    f"{first} scored {rows[name]} rows of {name}, and {other} {len(values)}: "
                    "detectors are compared on the same rows"
                )
    known_names("OOD set", groups, outside)
    named: Iterable[str] = [group for name in outside if (group := groups.get(name, ""))]
    order = list(dict.fromkeys(["near", "far", *named, ""]))
    outside.sort(key=lambda name: order.index(groups.get(name, "")))
    sets = (DataSet(name, groups.get(name, ""), rows[name]) for name in outside)
    return (DataSet(id_name, ID, rows[id_name]), *sets)
