"""ODIN: temperature and a small step of the input."""

from __future__ import annotations

from typing import ClassVar

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from oodcore import Features, Scorer, hookimpl
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import State
from oodcore_plugins.msp import MSP
from oodcore_plugins.perturbed import PAPER, Scale, moved_score


class ODIN(Scorer):
    """``max softmax(z(x') / T)`` with ``x' = x - epsilon * sign(grad_x CE(z(x) / T, argmax z))``.

    The same as ``perturbed`` around ``msp`` with the temperature: the gradients of the largest
    probability and of its logarithm have the same sign. The step is taken in the model's input
    space, after preprocessing, and divided by ``scale`` in each channel.

    The paper means epsilon in pixels of [0, 1]. Where the preprocessing divides by the standard
    deviation of each channel, give that as ``scale``, as the reference implementations do.

    Args:
        temperature: T; the paper uses 1000.
        epsilon: the length of the step in each coordinate; the paper tunes it, often to 0.0014.
        scale: what the step is divided by, one number for each channel (axis 1 of the inputs); None
            for 1.
    """

    kind = "odin"
    paper = PAPER
    search = spaces(
        temperature=Choice((1.0, 10.0, 100.0, 1000.0), "OpenOOD's sweep"),
        epsilon=Choice((0.0014, 0.0028), "OpenOOD's sweep"),
    )
    differentiable: ClassVar[bool] = False
    temperature: PositiveFloat = 1000.0
    epsilon: NonNegativeFloat = 0.0014
    scale: Scale = None

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs", "logits"})

    def score(self, features: Features, state: State) -> Tensor:
        msp = MSP(temperature=self.temperature)
        return moved_score(msp, features, {}, self.epsilon, self.scale)


@hookimpl
def register_scorers(register: Register) -> None:
    register(ODIN)
