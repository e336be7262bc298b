"""Protocol: what a benchmark measures, on which rows, and how often."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from oodcore.component import Settings
from oodcore.curves import Curve, Floats, curve
from oodcore.document import Route
from oodcore.metrics import READINGS, SEPARATION, oscr

Bools = NDArray[np.bool_]
Fault = tuple[Route, str]


@dataclass(frozen=True, eq=False)
class Pair:
    """What a detector said of the in-distribution test rows, and of those of one OOD set.

    ``inside [N]`` and ``outside [M]`` are scores, ``correct [N]`` says which rows the model
    classifies as labelled (None where that is unknown), ``name`` is the OOD set's.
    """

    inside: Floats
    outside: Floats
    correct: Bools | None
    name: str

    @cached_property
    def curve(self) -> Curve:
        """The counts at every threshold, of all rows."""
        return curve(self.inside, self.outside)

    def measure(self, metric: str) -> float:
        """A metric on all rows."""
        if metric != "oscr":
            return READINGS[metric](self.curve)
        assert self.correct is not None
        return oscr(self.inside, self.correct, self.outside)


class Protocol(Settings):
    """What is measured: on each OOD set, and on the in-distribution test rows alone.

    All protocols measure accuracy, and false alarms where there is a calibration. A protocol that
    repeats itself gives a number a repeat, of which results show mean and standard deviation.
    """

    takes_sets: ClassVar[bool] = True
    """Whether there must be an OOD set; if not, there must be none."""
    takes_labels: ClassVar[bool] = False
    """Whether it must be known which test rows are classified correctly."""
    counts_rows: ClassVar[bool] = False
    """Whether ``check_rows`` may refuse."""
    pools: ClassVar[bool] = False
    """Whether everything is measured once more on all OOD sets taken together."""

    @property
    @abstractmethod
    def told(self) -> str:
        """What is done, in a sentence."""

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics on each OOD set; by the first one detectors are ranked."""
        return SEPARATION

    @property
    def repeats(self) -> tuple[str, ...]:
        """What the repeats are called; none where everything is measured once."""
        return ()

    def faults(self, groups: Mapping[str, str]) -> list[Fault]:
        """What is wrong with the OOD sets, given with the group of each (empty for none)."""
        if not groups and self.takes_sets:
            return [(("ood",), "is needed: rows that are not in-distribution, by name")]
        return []

    def check_rows(self, inside: int, outside: Mapping[str, int]) -> None:
        """Raise a DataError where there are too few rows of some set."""

    def numbers(self, pair: Pair) -> dict[str, tuple[float, ...]]:
        """Each metric on an OOD set, once a repeat."""
        return {name: (pair.measure(name),) for name in self.measured}

    def alone(self, inside: Floats, correct: Bools | None) -> dict[str, float]:
        """What is measured on the in-distribution test rows alone, besides accuracy."""
        return {}
