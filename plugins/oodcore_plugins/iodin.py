"""i-ODIN: ODIN that moves only the coordinates of the input that matter most."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.msp import MSP
from oodcore_plugins.perturbed import Scale, moved_score


class IODIN(Scorer):
    """``max softmax(z(x') / T)``, where x' differs from x in one coordinate j:
    ``x'_j = x_j - epsilon * sign(g_j)`` with ``g = grad_x CE(z(x) / T, argmax z)`` and
    ``j = argmax |g|``.

    A coordinate is one number of the input: one channel of one pixel. Of coordinates that tie, the
    first is moved; where the gradient is zero the input stays (the reference implementation
    subtracts epsilon from its first coordinate then). With as many coordinates as the input has, it
    is ``odin``. The largest gradient is looked for before the division by ``scale``, as in the
    authors' code. The model sees each row twice more: once with a gradient, once moved.

    Args:
        temperature: T; the authors use 1000.
        epsilon: the length of the step; the authors use 0.0014, in pixels of [0, 1].
        scale: what the step is divided by, one number for each channel (axis 1 of the inputs): the
            standard deviation that the preprocessing divides by; None for 1.
        coordinates: how many to move, those with the largest gradients; the authors have 1.
    """

    kind = "iodin"
    paper = Paper(
        "Image-based Outlier Synthesis With Training Data",
        "Sudarshan Regmi",
        "CVPR",
        2026,
        "https://arxiv.org/abs/2411.10794",
    )
    differentiable: ClassVar[bool] = False
    temperature: PositiveFloat = 1000.0
    epsilon: NonNegativeFloat = 0.0014
    scale: Scale = None
    coordinates: PositiveInt = 1

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs", "logits"})

    def score(self, features: Features, state: State) -> Tensor:
        msp = MSP(temperature=self.temperature)
        direction = partial(steepest, count=self.coordinates)
        return moved_score(msp, features, {}, self.epsilon, self.scale, direction)


def steepest(gradient: Tensor, count: int) -> Tensor:
    """The sign of a gradient ``[N, ...]`` in its largest coordinates, and 0 in the others."""
    flat = gradient.flatten(1)
    sizes = flat.abs()
    if count == 1:
        largest = sizes.argmax(dim=1, keepdim=True)
    else:
        largest = sizes.argsort(dim=1, descending=True, stable=True)[:, :count]
    signs = flat.gather(1, largest).sign()
    return torch.zeros_like(flat).scatter(1, largest, signs).reshape(gradient.shape)


@hookimpl
def register_scorers(register: Register) -> None:
    register(IODIN)
