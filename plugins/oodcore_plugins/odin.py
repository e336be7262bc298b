"""ODIN: temperature and a small step of the input."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from oodcore import Features, Scorer, hookimpl
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.msp import MSP
from oodcore_plugins.perturbed import PAPER, moved_score


class ODIN(Scorer):
    """``max softmax(z(x') / T)`` with ``x' = x - epsilon * sign(grad_x CE(z(x) / T, argmax z))``.

    The same as ``perturbed`` around ``msp`` with the temperature: the gradients of the largest
    probability and of its logarithm have the same sign. The step is taken in the model's input
    space, after preprocessing.

    Args:
        temperature: T; the paper uses 1000.
        epsilon: the length of the step in each coordinate; the paper tunes it, often to 0.0014.
    """

    kind = "odin"
    paper = PAPER
    differentiable: ClassVar[bool] = False
    temperature: PositiveFloat = 1000.0
    epsilon: NonNegativeFloat = 0.0014

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs", "logits"})

    def score(self, features: Features, state: State) -> Tensor:
        return moved_score(MSP(temperature=self.temperature), features, {}, self.epsilon)


@hookimpl
def register_scorers(register: Register) -> None:
    register(ODIN)
