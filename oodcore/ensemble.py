"""Ensemble: detectors on different models, their scores combined."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.data import Apart, Stream
from oodcore.decision import Array, Decision
from oodcore.detector import Detector
from oodcore.errors import ConfigurationError, DataError, NotFittedError
from oodcore.passes import Classes, fit, score
from oodcore.plugins import registry
from oodcore.scorer import Combination
from oodcore.statistics import State


class Ensemble(Decision):
    """Several detectors as one, each with a model of its own or not.

    Args:
        members: detectors by name.
        combine: a combination without scorers of its own, its kind, or a mapping.
        seed: of the tenth that is held out, where the combination normalises scores.

    Raises:
        ConfigurationError: no members, or a scorer that is no combination.
    """

    def __init__(
        self, members: Mapping[str, Detector], combine: Any = "sum", *, seed: int = 0
    ) -> None:
        combination = registry.build("scorer", combine)
        if not isinstance(combination, Combination) or combination.scorers:
            raise ConfigurationError(
                "combine is a combination without scorers of its own, such as 'sum'"
            )
        if not members:
            raise ConfigurationError("an ensemble needs members")
        if combination.weights is not None and len(combination.weights) != len(members):
            raise ConfigurationError(
                f"there are {len(combination.weights)} weights for {len(members)} members"
            )
        self.members = dict(members)
        self.combination = combination
        self.seed = seed
        self.state: State | None = None if combination.measures else {}

    def fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Ensemble:
        """Fit every member, and measure what the combination normalises with; returns the ensemble.

        Arguments and errors as in ``Detector.fit``. Where the combination normalises scores, it is
        measured on ``held_out``, or on a tenth of the data that no member is fitted on.
        """
        rows = data
        if self.combination.measures and held_out is None:
            if not Stream(data).repeatable:
                raise DataError(
                    "a tenth of this data is to be set apart, and it cannot be read twice in the "
                    "same order: give a Dataset or arrays, or held_out="
                )
            rows, held_out = (Apart(data, self.seed, inside=inside) for inside in (False, True))
        fit(self.members, rows, held_out, classes=classes)
        if self.combination.measures:
            self.state = self.combination.finish({}, self._member_scores(held_out), None)
        self.calibration = self.false_alarm_rate = None
        return self

    def partial_fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Ensemble:
        """Go on fitting every member; the result is that of all rows at once.

        Raises:
            ConfigurationError: the combination normalises scores, which takes all rows at once.
        """
        if self.combination.measures:
            raise ConfigurationError(
                "an ensemble that normalises scores is fitted in one call of fit"
            )
        for member in self.members.values():
            member.partial_fit(data, held_out, classes=classes)
        self.calibration = self.false_alarm_rate = None
        return self

    def score(self, data: Any) -> Array:
        """The combined score of each row, ``[N]`` float64; higher is more in-distribution."""
        if self.state is None:
            raise NotFittedError("this ensemble normalises scores: call fit first")
        scores = self._member_scores(data)
        combined: Tensor = self.combination.combine(self.combination.normalized(scores, self.state))
        return combined.numpy()

    def save(self, folder: str | Path, overwrite: bool = False, store: bool = False) -> Path:
        """Write the fitted ensemble to a folder; arguments and errors as in ``Detector.save``."""
        from oodcore.artifact import write_artifact
        from oodcore.packing import packed_ensemble

        packed = packed_ensemble(self, store=store)
        return write_artifact(Path(folder), "ensemble", packed, overwrite=overwrite)

    def _member_scores(self, data: Any) -> Tensor:
        scores = score(self.members, data)
        return torch.stack([torch.from_numpy(scores[name]) for name in self.members], dim=1)
