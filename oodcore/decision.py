"""Decision: from scores to p-values and flags, by conformal calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np

from oodcore.calibration import Calibration
from oodcore.errors import ConfigurationError, NotFittedError

Array = np.ndarray[Any, Any]
Self = TypeVar("Self", bound="Decision")


class Decision(ABC):
    """What detectors and ensembles share: a threshold with a stated false-alarm rate."""

    calibration: Calibration | None = None
    false_alarm_rate: float | None = None

    @abstractmethod
    def score(self, data: Any) -> Array:
        """The score of each row, ``[N]`` float64; higher is more in-distribution."""

    def calibrate(self: Self, data: Any, false_alarm_rate: float = 0.05) -> Self:
        """Learn the scores of in-distribution data, and so the threshold; returns the detector.

        Args:
            data: in-distribution rows that were neither fitted on nor held out.
            false_alarm_rate: the share of in-distribution inputs that may be flagged.

        Raises:
            ConfigurationError: too few rows for the rate; the message says how many are needed.
        """
        calibration = Calibration(self.score(data))
        calibration.threshold(false_alarm_rate)
        self.calibration, self.false_alarm_rate = calibration, false_alarm_rate
        return self

    def p_value(self, data: Any) -> Array:
        """The conformal p-value of each row, ``(1 + #{calibration <= s}) / (n + 1)``, in (0, 1]."""
        calibration = self._calibrated()
        return calibration.p_values(self.score(data))

    def predict(
        self, data: Any, false_alarm_rate: float | None = None, *, fdr: float | None = None
    ) -> Array:
        """1 for in-distribution, -1 for out, ``[N]`` int64.

        Args:
            data: rows to judge.
            false_alarm_rate: flag at most this share of in-distribution inputs; that of
                ``calibrate`` if not given.
            fdr: instead, flag so that at most this share of the flagged rows are in-distribution
                (Benjamini and Hochberg, over all rows of ``data``).

        Raises:
            ConfigurationError: both rates, or too few calibration rows for the rate.
        """
        if fdr is not None and false_alarm_rate is not None:
            raise ConfigurationError("give either a false_alarm_rate or an fdr")
        calibration = self._calibrated()
        scores = self.score(data)
        if fdr is not None:
            flagged = calibration.discoveries(scores, fdr)
        else:
            rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
            assert rate is not None
            flagged = calibration.flagged(scores, rate)
        return np.where(flagged, -1, 1).astype(np.int64)

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotFittedError("this detector has no threshold yet: call calibrate first")
        return self.calibration
