"""Ensemble: detectors on different models, their scores combined."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.data import Apart, Stream
from oodcore.decision import Array, Decision
from oodcore.detector import Detector
from oodcore.errors import ConfigurationError, DataError, NotFittedError
from oodcore.passes import Classes, fit, partial_fit, score
from oodcore.plugins import registry
from oodcore.recipe import checked_scores, own
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
        if odd := [name for name, one in members.items() if not isinstance(one, Detector)]:
            raise ConfigurationError(
                f"the members of an ensemble are detectors, and '{odd[0]}' is a "
                f"{type(members[odd[0]]).__name__}"
            )
        if combination.weights is not None and len(combination.weights) != len(members):
            raise ConfigurationError(
                f"there are {len(combination.weights)} weights for {len(members)} members"
            )
        self.members = dict(members)
        self.combination = combination
        self.seed = seed
        self.state: State | None = None if combination.measures else {}

    @classmethod
    def from_config(cls, config: Any) -> Ensemble:
        """An ensemble from a YAML file (its path) or a mapping of the same form.

        Raises:
            ConfigurationError: names the file, the line and the field.
        """
        from oodcore.config import EnsembleConfig, read, validate

        document = read(config) if isinstance(config, str | Path) else config
        checked = validate(EnsembleConfig, document)
        members = {
            name: Detector(
                checked.extractor if member.extractor is None else member.extractor,
                scorer=member.scorer,
                shapers=checked.shapers if member.shapers is None else member.shapers,
                device=checked.device,
                batch_size=checked.batch_size,
                num_workers=checked.num_workers,
                seed=checked.seed,
                cache=checked.cache,
            )
            for name, member in checked.members.items()
        }
        return cls(members, checked.combine, seed=checked.seed)

    def fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Ensemble:
        """Fit every member, and measure what the combination normalises with; returns the ensemble.

        Arguments and errors as in ``Detector.fit``. Where the combination normalises scores, it is
        measured on ``held_out``, or on a tenth of the data that no member is fitted on.
        """
        fresh = {name: copy.copy(member) for name, member in self.members.items()}
        if not self.combination.measures:
            fit(fresh, data, held_out, classes=classes)
            self.state = {}
        else:
            rows, apart = self._divided(data, held_out)
            fit(fresh, rows, apart, classes=classes)
            self.measure(_member_scores(fresh, apart))
        for name, member in self.members.items():
            member.adopt(fresh[name])
        self.calibration = self.false_alarm_rate = None
        return self

    def partial_fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Ensemble:
        """Go on fitting every member; the result is that of all rows at once.

        Raises:
            ConfigurationError: the combination normalises scores, which takes all rows at once.
            NotFittedError, DataError: as ``Detector.partial_fit``; no member is changed then.
        """
        if self.combination.measures:
            raise ConfigurationError(
                "an ensemble that normalises scores is fitted in one call of fit"
            )
        partial_fit(self.members, data, held_out, classes=classes)
        self.calibration = self.false_alarm_rate = None
        return self

    def score(self, data: Any) -> Array:
        """The combined score of each row, ``[N]`` float64; higher is more in-distribution."""
        return self.combined(_member_scores(self.members, data))

    def combined(self, scores: Tensor) -> Array:
        """The combined scores ``[N]`` of what the members say, ``[N, M]`` in their order.

        Raises:
            NotFittedError: the combination normalises scores, and nothing was measured yet.
            DataError: it gave something else than finite numbers, one a row.
        """
        if self.state is None:
            raise NotFittedError("this ensemble normalises scores: call fit first")
        together = self.combination.combine(self.combination.normalized(scores, self.state))
        return checked_scores(together, len(scores), self._who).numpy()

    def measure(self, scores: Tensor) -> None:
        """Learn what the combination normalises with.

        Args:
            scores: of the members on rows on which none was fitted, ``[N, M]``.

        Raises:
            DataError: no rows, or scores that cannot be normalised.
        """
        if not len(scores):
            raise DataError(
                "there are no held-out rows to measure the members' scores on; give held_out= "
                "rows, or more data to set a tenth apart from"
            )
        self.state = own(self.combination.finish({}, scores, None), self._who)

    def save(self, folder: str | Path, overwrite: bool = False, store: bool = False) -> Path:
        """Write the fitted ensemble to a folder; arguments and errors as in ``Detector.save``."""
        from oodcore.artifact import write_artifact
        from oodcore.packing import packed_ensemble

        packed = packed_ensemble(self, store=store)
        return write_artifact(Path(folder), "ensemble", packed, overwrite=overwrite)

    @property
    def _who(self) -> str:
        return f"the combination '{self.combination.kind}'"

    def _divided(self, data: Any, held_out: Any) -> tuple[Any, Any]:
        """The rows to fit members on, and those to measure their scores on."""
        first, *others = self.members.values()
        if held_out is not None:
            if not Stream(held_out, adapt=first.adapt).repeatable:
                raise DataError(
                    "the held-out rows are read again to measure the members' scores, and they "
                    "cannot be read twice in the same order: give a Dataset or arrays"
                )
            return data, held_out
        if any(other.adapt is not first.adapt for other in others):
            raise ConfigurationError(
                "members with adapt= of their own read this data differently, so no tenth of it "
                "can be set apart for all: give held_out= rows"
            )
        if not Stream(data, adapt=first.adapt).repeatable:
            raise DataError(
                "a tenth of this data is to be set apart, and it cannot be read twice in the "
                "same order: give a Dataset or arrays, or held_out="
            )
        options = {
            "batch_size": first.batch_size,
            "num_workers": first.num_workers,
            "adapt": first.adapt,
        }
        rest, tenth = (Apart(data, self.seed, inside=inside, **options) for inside in (False, True))
        return rest, tenth


def _member_scores(members: Mapping[str, Detector], data: Any) -> Tensor:
    """The scores of the members, ``[N, M]``."""
    scores = score(members, data)
    return torch.stack([torch.from_numpy(scores[name]) for name in members], dim=1)
