"""What scores are worth: AUROC, average precision, FPR at a level, OSCR, AURC, ECE.

Scores are higher for in-distribution (ID) rows. Both polarities are reported, each under its own
name, because the literature disagrees on which class is positive. Every function reads its arrays
without changing them; ties are counted, never broken by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodcore.errors import ConfigurationError, DataError

Floats = NDArray[np.float64]
Polarity = Literal["id", "ood"]


@dataclass(frozen=True)
class Metric:
    """How a number is to be read: its title, which end is better, and what it says."""

    title: str
    better: Literal["higher", "lower"] | None
    meaning: str


METRICS: Mapping[str, Metric] = {
    "auroc": Metric(
        "AUROC",
        "higher",
        "the chance that an in-distribution input scores above an out-of-distribution one, a tie "
        "counting half",
    ),
    "fpr95_id": Metric(
        "FPR95, ID positive",
        "lower",
        "the share of OOD inputs that are accepted when 95 % of ID inputs are, read at the first "
        "threshold that accepts 95 % of ID",
    ),
    "fpr95_ood": Metric(
        "FPR95, OOD positive",
        "lower",
        "the share of ID inputs that are flagged when 95 % of OOD inputs are, read at the first "
        "threshold that flags 95 % of OOD",
    ),
    "aupr_id": Metric(
        "AUPR, ID positive",
        "higher",
        "average precision (step) of finding ID inputs by their high scores; it depends on how "
        "many inputs of each kind there are",
    ),
    "aupr_ood": Metric(
        "AUPR, OOD positive",
        "higher",
        "average precision (step) of finding OOD inputs by their low scores; it depends on how "
        "many inputs of each kind there are",
    ),
    "accuracy": Metric(
        "Accuracy", "higher", "the share of ID test inputs whose predicted class is right"
    ),
    "false_alarm_rate": Metric(
        "False alarms",
        None,
        "the share of ID test inputs that are flagged at the calibrated threshold, to be compared "
        "with the rate that was asked for",
    ),
}
"""What a benchmark reports, each a share in [0, 1]."""

SEPARATION = ("auroc", "fpr95_id", "fpr95_ood", "aupr_id", "aupr_ood")
"""The metrics that compare ID with OOD scores: what ``measures`` gives."""


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
        return _wins(self) / (int(self.id_accepted[-1]) * int(self.ood_accepted[-1]))

    def average_precision(self, positive: Polarity) -> float:
        """See ``average_precision``."""
        hits, alarms = self.hits_and_alarms(positive)
        precision = hits[1:] / (hits[1:] + alarms[1:])
        return float(np.diff(hits) @ precision) / int(hits[-1])

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

    def measures(self) -> dict[str, float]:
        """See ``measures``."""
        return {
            "auroc": self.auroc(),
            "fpr95_id": self.fpr_at_tpr(0.95, "id"),
            "fpr95_ood": self.fpr_at_tpr(0.95, "ood"),
            "aupr_id": self.average_precision("id"),
            "aupr_ood": self.average_precision("ood"),
        }


def measures(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """``auroc``, ``fpr95_id``, ``fpr95_ood``, ``aupr_id`` and ``aupr_ood``, from one sort.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    return curve(id_scores, ood_scores).measures()


def auroc(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """The chance that an ID row scores above an OOD row, a tie counting half.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    return curve(id_scores, ood_scores).auroc()


def average_precision(
    id_scores: ArrayLike, ood_scores: ArrayLike, positive: Polarity = "id"
) -> float:
    """The area under precision against recall as a step function: sum of (R_t - R_(t-1)) P_t.

    The trapezoid that some benchmarks draw through the same points is another, optimistic number
    (Davis and Goadrich, ICML 2006).

    Args:
        id_scores: ``[N]``.
        ood_scores: ``[M]``.
        positive: the class to be retrieved: ``id`` by high scores, ``ood`` by low ones.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
        ConfigurationError: an unknown polarity.
    """
    return curve(id_scores, ood_scores).average_precision(positive)


def fpr_at_tpr(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    tpr: float = 0.95,
    positive: Polarity = "id",
    rule: Literal["at_least", "nearest"] = "at_least",
) -> float:
    """The share of the negative class that is taken along when ``tpr`` of the positive is.

    Args:
        id_scores: ``[N]``.
        ood_scores: ``[M]``.
        tpr: the share of the positive class, in (0, 1].
        positive: ``id``: the share of OOD that is accepted when ``tpr`` of ID is; ``ood``: the
            share of ID that is flagged when ``tpr`` of OOD is. They are different numbers.
        rule: ``at_least``: read at the first threshold that reaches ``tpr``. ``nearest``: at the
            threshold whose recall is nearest to it, on either side, as the code of Outlier Exposure
            (Hendrycks et al., ICLR 2019) and its descendants do: of two equally near recalls the
            higher, of several thresholds with that recall the last one short of the next positive
            row (the first one, where the recall is 1).

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
        ConfigurationError: a level outside (0, 1], an unknown polarity or rule.
    """
    return curve(id_scores, ood_scores).fpr_at_tpr(tpr, positive, rule)


def detection_error(
    id_scores: ArrayLike, ood_scores: ArrayLike, weights: Literal["equal", "counts"] = "equal"
) -> float:
    """The smallest error of any threshold on ID and OOD together.

    Args:
        id_scores: ``[N]``.
        ood_scores: ``[M]``.
        weights: ``equal``: both classes weigh one half, min_t (P(s_id <= t) + P(s_ood > t)) / 2
            (Liang et al., ICLR 2018). ``counts``: every row weighs the same.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
        ConfigurationError: unknown weights.
    """
    return curve(id_scores, ood_scores).detection_error(weights)


def oscr(id_scores: ArrayLike, correct: ArrayLike, ood_scores: ArrayLike) -> float:
    """The area under the open-set classification rate curve (Dhamija et al., NeurIPS 2018).

    At each threshold t: the share of all ID rows that are classified correctly and score above t,
    against the share of OOD rows that score above t. It is the accuracy times the AUROC of the
    correctly classified rows.

    Args:
        id_scores: ``[N]``.
        correct: ``[N]`` booleans, whether an ID row was classified correctly.
        ood_scores: ``[M]``.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite; ``correct`` of another length
            or not boolean.
    """
    inside = finite_scores(id_scores, "id_scores")
    outside = finite_scores(ood_scores, "ood_scores")
    right = _correctness(correct, len(inside))
    if not right.any():
        return 0.0
    return _wins(curve(inside[right], outside)) / (len(inside) * len(outside))


def aurc(scores: ArrayLike, correct: ArrayLike) -> float:
    """The area under the risk-coverage curve (Geifman et al., ICLR 2019): lower is better.

    The mean, over i = 1..N, of the error rate among the i rows with the highest scores. Tied rows
    count with the mean over all their orders.

    Args:
        scores: ``[N]``, the confidence in each prediction.
        correct: ``[N]`` booleans, whether the prediction is right.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite; ``correct`` of another length
            or not boolean.
    """
    confidence = finite_scores(scores, "scores")
    wrong = ~_correctness(correct, len(confidence))
    _, block, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors_in_block = np.bincount(block[wrong], minlength=len(size))
    expected = np.repeat(errors_in_block / size, size)
    coverage = np.arange(1, len(confidence) + 1)
    return float(np.mean(np.cumsum(expected) / coverage))


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of rows whose predicted class is the label.

    Args:
        predictions: ``[N]`` integers.
        labels: ``[N]`` integers.

    Raises:
        DataError: not integers, empty, or of different lengths.
    """
    given, wanted = np.asarray(predictions), np.asarray(labels)
    for name, array in (("predictions", given), ("labels", wanted)):
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            raise DataError(
                f"{name} must be [N] integers, not {list(array.shape)} of {array.dtype}"
            )
    if len(given) != len(wanted):
        raise DataError(f"{len(given)} predictions do not fit {len(wanted)} labels")
    return float(np.mean(given == wanted))


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """The expected calibration error: sum over bins of (n_b / N) |accuracy_b - confidence_b|.

    The bins (lo, hi] have equal widths; a confidence of exactly 0 is in the first (Guo et al.,
    ICML 2017).

    Args:
        confidence: ``[N]``, each in [0, 1].
        correct: ``[N]`` booleans, whether the prediction is right.
        bins: how many bins.

    Raises:
        DataError: a confidence outside [0, 1] or not finite; no rows; ``correct`` of another length
            or not boolean.
        ConfigurationError: fewer than one bin.
    """
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 1:
        raise ConfigurationError(f"bins must be a whole number of at least 1, not {bins!r}")
    shares = finite_scores(confidence, "confidence")
    outside = (shares < 0) | (shares > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(f"confidence: row {row} is {shares[row]}; it must be in [0, 1]")
    right = _correctness(correct, len(shares))
    upper = np.arange(1, bins + 1) / bins
    bin_of = np.searchsorted(upper, shares, side="left")
    gap = np.bincount(bin_of, weights=right - shares, minlength=bins)
    return float(np.abs(gap).sum() / len(shares))


def _wins(points: Curve) -> float:
    """The number of pairs in which ID scores above OOD, ties as halves: exact in integers."""
    accepted = points.id_accepted
    twice = int(np.diff(points.ood_accepted) @ (accepted[1:] + accepted[:-1]))
    return twice / 2


def _correctness(correct: ArrayLike, rows: int) -> NDArray[np.bool_]:
    array: NDArray[Any] = np.asarray(correct)
    if array.shape != (rows,):
        raise DataError(f"correct must be [{rows}], one boolean a score, not {list(array.shape)}")
    if array.dtype.kind == "b":
        return array.astype(np.bool_, copy=False)
    if array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all():
        return array.astype(np.bool_)
    raise DataError("correct must be booleans: whether each row was classified correctly")
