"""Ties: scores that many rows share, up to the rounding of the batches that they came in."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ROUNDING = 1e-4
"""What single precision leaves of a score, in units of how far scores spread around it."""
SHARE = 0.01
"""The share of the known scores, three at least, that must be the same up to rounding."""


class Ties:
    """Known scores of which many may be one score.

    The same input has scores that differ by rounding in batches of different sizes. Where it occurs
    often (blank images), such scores are a tie, and rounding must not decide whether a further copy
    is below all of them or above. So each group of at least three known scores, and of at least one
    in a hundred, that lie together as near as rounding is one score: the largest of them, for
    the known ones and for any other score that is as near. All other scores are what they are.

    Rounding is 1e-4 of the interquartile range, or of the distance to the median where that is
    larger. Scores of different inputs do not lie that near in such numbers.

    Args:
        scores: the known ones, ``[n]`` finite and ascending, n > 0.
    """

    def __init__(self, scores: Floats) -> None:
        size = len(scores)
        self._raw = scores
        self._median = scores[size // 2]
        # Halves, for the distance of two numbers may be too large for a number.
        self._spread = scores[3 * size // 4] / 2 - scores[size // 4] / 2

    @cached_property
    def _groups(self) -> tuple[Floats, Floats]:
        """The smallest and the largest score of each group, ascending."""
        raw, size = self._raw, len(self._raw)
        end = np.searchsorted(raw, self._within(raw)[1], side="right")
        begins = np.flatnonzero(end - np.arange(size) >= max(3, SHARE * size))
        low: list[Any] = []
        high: list[Any] = []
        for first in begins:
            if low and raw[first] <= high[-1]:
                high[-1] = raw[end[first] - 1]
            else:
                low.append(raw[first])
                high.append(raw[end[first] - 1])
        return np.array(low), np.array(high)

    @cached_property
    def scores(self) -> Floats:
        """The known scores, ascending, each group as one score."""
        return self.settled(self._raw)

    def settled(self, scores: Floats) -> Floats:
        """Scores of any rows, ``[N]``; what belongs to a group is the group's score."""
        low, high = self._groups
        if not len(low):
            return scores
        least, most = self._within(scores)
        place = np.searchsorted(high, least)
        inside = np.minimum(place, len(high) - 1)
        belongs = (place < len(high)) & (most >= low[inside])
        return np.where(belongs, high[inside], scores)

    def _within(self, scores: Floats) -> tuple[Floats, Floats]:
        """The smallest and the largest number that a score is as good as."""
        apart = np.maximum(np.abs(scores / 2 - self._median / 2), self._spread)
        length = np.maximum(np.abs(scores), np.abs(self._median))
        with np.errstate(over="ignore"):
            margin = np.maximum(2 * ROUNDING * apart, 1e-9 * length)
            return scores - margin, scores + margin
