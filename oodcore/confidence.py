"""What confidence in predictions is worth: accuracy, AURC, E-AURC, accuracy at a coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodcore.curves import Floats, finite_scores
from oodcore.errors import ConfigurationError, DataError


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
    return float(risks(scores, correct).mean())


def eaurc(scores: ArrayLike, correct: ArrayLike) -> float:
    """The excess AURC (Geifman et al., ICLR 2019): AURC less the least that any scores could have.

    The least is that of scores that put every right prediction above every wrong one, exactly, as
    the mean over i of max(0, i - right) / i. The paper has its limit for many rows in its place,
    r + (1 - r) ln(1 - r) at an error rate of r, under which few rows fall below zero.

    Args:
        scores: ``[N]``, the confidence in each prediction.
        correct: ``[N]`` booleans, whether the prediction is right.

    Raises:
        DataError: as ``aurc``.
    """
    found = risks(scores, correct)
    kept = np.arange(1, len(found) + 1)
    errors = round(float(found[-1]) * len(found))
    least = np.maximum(0, kept - (len(found) - errors)) / kept
    return max(0.0, float(found.mean() - least.mean()))


def accuracy_at(coverage: float, scores: ArrayLike, correct: ArrayLike) -> float:
    """The accuracy on the rows with the highest scores: ``ceil(coverage N)`` of them.

    Tied rows count with the mean over all their orders.

    Args:
        coverage: the share of the rows that are kept, in (0, 1].
        scores: ``[N]``, the confidence in each prediction.
        correct: ``[N]`` booleans, whether the prediction is right.

    Raises:
        DataError: as ``aurc``.
        ConfigurationError: a coverage outside (0, 1].
    """
    if not 0 < coverage <= 1:
        raise ConfigurationError(f"coverage must be above 0 and at most 1, not {coverage}")
    found = risks(scores, correct)
    # A share such as 0.9 of 10 rows is a little more than 9 in binary.
    kept = max(1, math.ceil(coverage * len(found) - 1e-9))
    return 1.0 - float(found[kept - 1])


def risks(scores: ArrayLike, correct: ArrayLike) -> Floats:
    """The error rate among the i rows with the highest scores, ``[N]`` for i = 1..N.

    Tied rows count with the mean over all their orders.

    Raises:
        DataError: as ``aurc``.
    """
    confidence = finite_scores(scores, "scores")
    wrong = ~correctness(correct, len(confidence))
    _, block, size = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors_in_block = np.bincount(block[wrong], minlength=len(size))
    expected = np.repeat(errors_in_block / size, size)
    found: Floats = np.minimum(np.cumsum(expected) / np.arange(1, len(confidence) + 1), 1.0)
    return found


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
    right = correctness(correct, len(shares))
    upper = np.arange(1, bins + 1) / bins
    bin_of = np.searchsorted(upper, shares, side="left")
    gap = np.bincount(bin_of, weights=right - shares, minlength=bins)
    return float(np.abs(gap).sum() / len(shares))


def correctness(correct: ArrayLike, rows: int) -> NDArray[np.bool_]:
    """Whether each row is classified correctly, ``[N]`` booleans.

    Raises:
        DataError: another length, or something other than booleans (or 0 and 1).
    """
    array: NDArray[Any] = np.asarray(correct)
    if array.shape != (rows,):
        raise DataError(f"correct must be [{rows}], one boolean a score, not {list(array.shape)}")
    if array.dtype.kind == "b":
        return array.astype(np.bool_, copy=False)
    if array.dtype.kind in "iuf" and np.isin(array, (0, 1)).all():
        return array.astype(np.bool_)
    raise DataError("correct must be booleans: whether each row was classified correctly")
