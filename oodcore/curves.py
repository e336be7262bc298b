"""The counts that measures of scores are read from: rows accepted at every threshold, one sort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodcore.errors import ConfigurationError, DataError

Floats = NDArray[np.float64]
Polarity = Literal["id", "ood"]


def finite_scores(values: ArrayLike, name: str, *, empty: bool = False) -> Floats:
    """Scores as float64 ``[N]``; the caller's array where it is one already.

    Args:
        values: one number a row.
        name: what to call them in an error.
        empty: whether no rows at all are fine.

    Raises:
        DataError: not one real number a row, no rows, or a row that is NaN or infinite.
    """
    try:
        array: NDArray[Any] = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name} must be [N], one score a row: {error}") from None
    if array.ndim != 1:
        raise DataError(f"{name} must be [N], one score a row, not {list(array.shape)}")
    if not array.size:
        if empty:
            return np.empty(0)
        raise DataError(f"{name} are empty; at least one row is needed")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} must be real numbers, not {array.dtype}")
    scores = array.astype(np.float64, copy=False)
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(f"{name}: row {row} is {scores[row]}; scores must be finite")
    return scores


def curve(id_scores: ArrayLike, ood_scores: ArrayLike) -> Curve:
    """How many ID and OOD rows are accepted at every threshold, from one sort.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    inside = finite_scores(id_scores, "id_scores")
    outside = finite_scores(ood_scores, "ood_scores")
    both = np.concatenate([inside, outside])
    order = np.argsort(both)[::-1]
    ranked = both[order]
    last_of_ties = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    accepted = np.append(0, last_of_ties + 1)
    id_accepted = np.append(0, np.cumsum(order < len(inside), dtype=np.int64)[last_of_ties])
    return Curve(
        thresholds=np.append(np.inf, ranked[last_of_ties]),
        id_accepted=id_accepted,
        ood_accepted=accepted - id_accepted,
    )


@dataclass(frozen=True, eq=False)
class Curve:
    """The counts that every measure is read from; made by ``curve``.

    ``thresholds [T + 1]`` are the distinct scores from high to low after an infinite one that
    accepts nothing. ``id_accepted`` and ``ood_accepted``, ``[T + 1]`` int64, count the rows that
    score at least that much; their last entries are the numbers of rows.
    """

    thresholds: Floats
    id_accepted: NDArray[np.int64]
    ood_accepted: NDArray[np.int64]

    def hits_and_alarms(self, positive: Polarity) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """True and false positives ``[T + 1]``, from none positive to all, for either polarity."""
        if positive == "id":
            return self.id_accepted, self.ood_accepted
        if positive == "ood":
            return (
                self.ood_accepted[-1] - self.ood_accepted[::-1],
                self.id_accepted[-1] - self.id_accepted[::-1],
            )
        raise ConfigurationError(f"positive must be 'id' or 'ood', not {positive!r}")

    def auroc(self) -> float:
        """See ``auroc``."""
        return wins(self) / (int(self.id_accepted[-1]) * int(self.ood_accepted[-1]))

    def average_precision(self, positive: Polarity) -> float:
        """See ``average_precision``."""
        hits, alarms = self.hits_and_alarms(positive)
        precision = hits[1:] / (hits[1:] + alarms[1:])
        return float(np.diff(hits) @ precision) / int(hits[-1])

    def trapezoid(self, positive: Polarity) -> float:
        """See ``auin`` and ``auout``."""
        hits, alarms = self.hits_and_alarms(positive)
        precision = hits / np.maximum(hits + alarms, 1)
        return float(np.diff(hits) @ (precision[1:] + precision[:-1])) / (2 * int(hits[-1]))

    def fpr_at_tpr(
        self,
        tpr: float = 0.95,
        positive: Polarity = "id",
        rule: Literal["at_least", "nearest"] = "at_least",
    ) -> float:
        """See ``fpr_at_tpr``."""
        if not 0 < tpr <= 1:
            raise ConfigurationError(f"tpr must be above 0 and at most 1, not {tpr}")
        hits, alarms = self.hits_and_alarms(positive)
        recall = hits / hits[-1]
        if rule == "at_least":
            at = int(np.argmax(recall >= tpr))
        elif rule == "nearest":
            upto = int(np.argmax(recall == 1.0))
            at = upto - int(np.argmin(np.abs(recall[upto:0:-1] - tpr)))
        else:
            raise ConfigurationError(f"rule must be 'at_least' or 'nearest', not {rule!r}")
        return float(alarms[at] / alarms[-1])

    def detection_error(self, weights: Literal["equal", "counts"] = "equal") -> float:
        """See ``detection_error``."""
        missed = self.id_accepted[-1] - self.id_accepted
        if weights == "equal":
            errors = missed / self.id_accepted[-1] + self.ood_accepted / self.ood_accepted[-1]
            return float(errors.min()) / 2
        if weights == "counts":
            rows = self.id_accepted[-1] + self.ood_accepted[-1]
            return float((missed + self.ood_accepted).min() / rows)
        raise ConfigurationError(f"weights must be 'equal' or 'counts', not {weights!r}")


def wins(points: Curve) -> float:
    """The number of pairs in which ID scores above OOD, ties as halves: exact in integers."""
    accepted = points.id_accepted
    twice = int(np.diff(points.ood_accepted) @ (accepted[1:] + accepted[:-1]))
    return twice / 2
