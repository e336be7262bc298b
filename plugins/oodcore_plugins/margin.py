"""Margin: how far the most probable class leads the second."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Scorer, hookimpl
from oodcore.errors import DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class Margin(Scorer):
    """``p_(1) - p_(2)``, the lead of the largest softmax probability over the second, in [0, 1].

    ``p = softmax(z / T)``. Or, ``of: logits``, ``(z_(1) - z_(2)) / T``, at least 0, which does not
    saturate. A tie gives 0. With two classes both rank like ``msp``. One class has no second, and
    is refused.

    Args:
        temperature: T, which the logits are divided by.
        of: what the lead is measured in.
    """

    kind = "margin"
    temperature: PositiveFloat = 1.0
    of: Literal["probabilities", "logits"] = "probabilities"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        values = required(features.logits, "logits") / self.temperature
        if values.shape[1] < 2:
            raise DataError("margin: there is one class, so nothing to lead; use another scorer")
        if self.of == "probabilities":
            values = values.softmax(dim=1)
        best = values.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]


@hookimpl
def register_scorers(register: Register) -> None:
    register(Margin)
