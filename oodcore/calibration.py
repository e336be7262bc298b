"""From scores to decisions: conformal p-values and thresholds with a stated false-alarm rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodcore.curves import Floats, finite_scores
from oodcore.errors import ConfigurationError
from oodcore.ties import Ties

_SLACK = 1e-9
"""Keeps a rate such as 1 - 0.9, a little under a tenth in binary, from losing its last rank."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The scores of in-distribution rows on which nothing was fitted: what is normal.

    With them a new in-distribution row is flagged with a chance of at most the rate asked for, over
    draws of calibration and new rows, whatever the scores are and however many of them are tied
    (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; Bates et al., Annals
    of Statistics 2023). Nothing is promised for one fixed set of calibration rows.

    Where many calibration rows have one score up to rounding (blank images), a score as near counts
    as equal to them; see ``oodcore.ties.Ties``. Else rounding, which depends on the batch, would
    decide whether all further copies of such a row are flagged.

    Args:
        scores: ``[n]``, higher = more in-distribution; kept as a sorted float64 copy.

    Raises:
        DataError: no scores, or one that is not finite.
    """

    scores: Floats

    def __post_init__(self) -> None:
        ranked = np.sort(finite_scores(self.scores, "calibration scores"))
        ranked.flags.writeable = False
        object.__setattr__(self, "scores", ranked)

    def __len__(self) -> int:
        return len(self.scores)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and np.array_equal(self.scores, other.scores)

    def __hash__(self) -> int:
        # Adding zero makes -0.0, which equals 0.0, hash like it.
        return hash((self.scores + 0.0).tobytes())

    def p_values(self, scores: ArrayLike) -> Floats:
        """Conformal p-values ``[N]`` in (0, 1]: (1 + number of calibration scores <= s) / (n + 1).

        A small one says that hardly any in-distribution row scored as low.

        Raises:
            DataError: scores that are not ``[N]`` or not finite.
        """
        return self._ranks(scores) / (len(self) + 1)

    def threshold(self, rate: float) -> float:
        """The score below which a row is flagged: the k-th smallest, k = floor(rate (n + 1)).

        Raises:
            ConfigurationError: a rate outside (0, 1), or too few calibration scores for it; the
                message says how many are needed.
        """
        return float(self.scores[self._rank(rate) - 1])

    def flagged(self, scores: ArrayLike, rate: float) -> NDArray[np.bool_]:
        """Whether each row is out-of-distribution at a false-alarm rate: its p-value is <= rate.

        Args:
            scores: ``[N]``.
            rate: the chance, in (0, 1), with which an in-distribution row may be flagged.

        Raises:
            DataError: scores that are not ``[N]`` or not finite.
            ConfigurationError: a rate outside (0, 1), or too few calibration scores for it.
        """
        given = finite_scores(scores, "scores", empty=True)
        flagged: NDArray[np.bool_] = self._ties.settled(given) < self.threshold(rate)
        return flagged

    def discoveries(self, scores: ArrayLike, fdr: float) -> NDArray[np.bool_]:
        """Which of these rows to flag, so that few of the flagged are in-distribution.

        Benjamini and Hochberg (JRSS B 1995) on the p-values: the false discovery rate, the expected
        share of in-distribution rows among the flagged, is at most ``fdr``. The rows are judged
        together, so a row's answer depends on the others.

        Args:
            scores: ``[N]``, all rows of the question at once.
            fdr: the false discovery rate, in (0, 1).

        Raises:
            DataError: scores that are not ``[N]`` or not finite.
            ConfigurationError: a rate outside (0, 1).
        """
        level = _share(fdr, "fdr")
        ranks = self._ranks(scores)
        if not len(ranks):
            return np.zeros(0, dtype=np.bool_)
        ranked = np.sort(ranks)
        allowed = level * np.arange(1, len(ranks) + 1) * (len(self) + 1) / len(ranks)
        passing = np.flatnonzero(ranked <= allowed + _SLACK)
        if not len(passing):
            return np.zeros(len(ranks), dtype=np.bool_)
        found: NDArray[np.bool_] = ranks <= ranked[passing[-1]]
        return found

    def _ranks(self, scores: ArrayLike) -> NDArray[np.int64]:
        given = finite_scores(scores, "scores", empty=True)
        return 1 + np.searchsorted(self._ties.scores, self._ties.settled(given), side="right")

    @cached_property
    def _ties(self) -> Ties:
        return Ties(self.scores)

    def _rank(self, rate: float) -> int:
        check_rows(len(self), rate)
        return _lowest(float(rate), len(self))


def check_rows(rows: int, rate: float) -> None:
    """Raise a ConfigurationError where so many calibration rows are too few for a rate.

    Before anything is fitted this tells what ``Calibration.threshold`` would say afterwards.
    """
    share = _share(rate, "false-alarm rate")
    if _lowest(share, rows) < 1:
        raise ConfigurationError(
            f"a false-alarm rate of {share:g} needs at least {_rows_needed(share)} calibration "
            f"scores and there are {rows}: calibrate on more rows, or ask for at least "
            f"{_readable_rate(rows)}"
        )


def _share(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ConfigurationError(f"{name} must be a number between 0 and 1, not {value!r}")
    if not 0 < value < 1:
        raise ConfigurationError(f"{name} must be between 0 and 1, both excluded, not {value}")
    return float(value)


def _lowest(rate: float, rows: int) -> int:
    """How many ranks, from the lowest, are flagged."""
    return min(math.floor(rate * (rows + 1) + _SLACK), rows)


def _rows_needed(rate: float) -> int:
    """The smallest number of calibration scores with which anything is flagged at this rate."""
    return math.ceil(Fraction(1 - _SLACK) / Fraction(rate)) - 1


def _readable_rate(rows: int) -> str:
    """1 / (rows + 1), rounded up to three digits, so that asking for it succeeds."""
    exact = 1 / (rows + 1)
    unit = 10.0 ** (math.floor(math.log10(exact)) - 2)
    return f"{math.ceil(exact / unit - _SLACK) * unit:.3g}"
