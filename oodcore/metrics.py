"""What scores are worth: AUROC, average precision, FPR at a level, detection error, OSCR.

Scores are higher for in-distribution (ID) rows. Both polarities are reported, each under its own
name, because the literature disagrees on which class is positive. Every function reads its arrays
without changing them; ties are counted, never broken by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from numpy.typing import ArrayLike

from oodcore.confidence import accuracy, accuracy_at, aurc, correctness, eaurc, ece
from oodcore.curves import Curve, Floats, Polarity, curve, finite_scores, wins

__all__ = [
    "METRICS",
    "SEPARATION",
    "Curve",
    "Floats",
    "Metric",
    "Polarity",
    "accuracy",
    "accuracy_at",
    "auin",
    "auout",
    "aurc",
    "auroc",
    "average_precision",
    "curve",
    "detection_error",
    "eaurc",
    "ece",
    "finite_scores",
    "fpr_at_tpr",
    "measures",
    "oscr",
]


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
    **{
        f"fpr{level}_ood_nearest": Metric(
            f"FPR{level} nearest, OOD positive",
            "lower",
            f"the share of ID inputs that are flagged at the threshold whose share of flagged OOD "
            f"inputs is nearest to {level} %, on either side",
        )
        for level in (90, 95, 99)
    },
    "auin": Metric(
        "AUIN",
        "higher",
        "the area under precision against recall of ID inputs by the trapezoid rule, with a "
        "precision of 0 where nothing is accepted; it depends on how many inputs of each kind "
        "there are",
    ),
    "auout": Metric(
        "AUOUT",
        "higher",
        "the area under precision against recall of OOD inputs by the trapezoid rule, with a "
        "precision of 0 where nothing is flagged; it depends on how many inputs of each kind "
        "there are",
    ),
    "dterr": Metric(
        "DTERR",
        "lower",
        "the smallest share of all inputs, ID and OOD together, that any threshold takes for the "
        "other kind",
    ),
    "oscr": Metric(
        "OSCR",
        "higher",
        "the area under the share of all ID inputs that are accepted and classified correctly, "
        "against the share of OOD inputs that are accepted",
    ),
    "aurc": Metric(
        "AURC",
        "lower",
        "the error rate among the inputs with the highest scores, averaged over how many of them "
        "are kept, from one to all",
    ),
    "eaurc": Metric(
        "E-AURC",
        "lower",
        "AURC less that of a score that puts every right prediction above every wrong one",
    ),
    "error_auroc": Metric(
        "AUROC of errors",
        "higher",
        "the chance that a rightly classified input scores above a wrongly classified one, a tie "
        "counting half; none where all are right, or all wrong",
    ),
    "error_aupr": Metric(
        "AUPR of errors",
        "higher",
        "average precision (step) of finding wrongly classified inputs by their low scores; none "
        "where all are right, or all wrong",
    ),
    **{
        f"accuracy_at_{level}": Metric(
            f"Accuracy at {level} %",
            "higher",
            f"the accuracy on the {level} % of inputs with the highest scores",
        )
        for level in (80, 90)
    },
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
"""What benchmarks report, each a share in [0, 1]; a protocol chooses among them."""

SEPARATION = ("auroc", "fpr95_id", "fpr95_ood", "aupr_id", "aupr_ood")
"""The metrics that compare ID with OOD scores where no protocol says otherwise."""


READINGS: Mapping[str, Callable[[Curve], float]] = {
    "auroc": Curve.auroc,
    "fpr95_id": lambda points: points.fpr_at_tpr(0.95, "id"),
    "fpr95_ood": lambda points: points.fpr_at_tpr(0.95, "ood"),
    "aupr_id": lambda points: points.average_precision("id"),
    "aupr_ood": lambda points: points.average_precision("ood"),
    "fpr90_ood_nearest": lambda points: points.fpr_at_tpr(0.90, "ood", "nearest"),
    "fpr95_ood_nearest": lambda points: points.fpr_at_tpr(0.95, "ood", "nearest"),
    "fpr99_ood_nearest": lambda points: points.fpr_at_tpr(0.99, "ood", "nearest"),
    "auin": lambda points: points.trapezoid("id"),
    "auout": lambda points: points.trapezoid("ood"),
    "dterr": lambda points: points.detection_error("counts"),
}
"""Each metric that a curve alone tells."""


def measures(id_scores: ArrayLike, ood_scores: ArrayLike) -> dict[str, float]:
    """``auroc``, ``fpr95_id``, ``fpr95_ood``, ``aupr_id`` and ``aupr_ood``, from one sort.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    points = curve(id_scores, ood_scores)
    return {name: READINGS[name](points) for name in SEPARATION}


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


def auin(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """The area under precision against recall of ID rows, by the trapezoid rule.

    The points are those of the distinct scores, after (0, 0) for no row accepted: so the code of
    the SSB-OSR challenge (and of ODIN's descendants) draws them. A perfect detector of N rows
    without ties therefore has 1 - 1/(2N). ``average_precision`` is the step-wise sum.

    Args:
        id_scores: ``[N]``.
        ood_scores: ``[M]``.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    return curve(id_scores, ood_scores).trapezoid("id")


def auout(id_scores: ArrayLike, ood_scores: ArrayLike) -> float:
    """As ``auin``, with the OOD rows as the positive class, found by their low scores.

    Args:
        id_scores: ``[N]``.
        ood_scores: ``[M]``.

    Raises:
        DataError: scores that are not ``[N]``, empty, or not finite.
    """
    return curve(id_scores, ood_scores).trapezoid("ood")


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
    right = correctness(correct, len(inside))
    if not right.any():
        return 0.0
    return wins(curve(inside[right], outside)) / (len(inside) * len(outside))
