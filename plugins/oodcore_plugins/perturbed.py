"""A scorer on inputs moved along the sign of its own score's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, Slot, hookimpl
from oodcore.errors import DataError
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import State

PAPER = Paper(
    "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks",
    "Shiyu Liang, Yixuan Li, R. Srikant",
    "ICLR",
    2018,
    "https://arxiv.org/abs/1706.02690",
)

Scale = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None
"""A field that holds what a step is divided by, one positive number a channel; None for 1."""


class Perturbed(Scorer):
    """``s(x + epsilon * sign(ds/dx) / scale)``: the score of inputs after one step that raises it.

    In-distribution inputs gain more from the step than others do. Where the gradient is zero the
    input stays (the reference implementation adds epsilon there). The model sees each row twice
    more: once with a gradient, once moved.

    The step is taken in the model's input space, after preprocessing. Papers mean epsilon in pixels
    of [0, 1]: with inputs that were divided by the standard deviation of each channel, ``scale`` is
    that standard deviation.

    Args:
        scorer: the score s; it must have a gradient.
        epsilon: the length of the step in each coordinate of the input, before it is divided by
            ``scale``; 0 leaves the score as it is.
        scale: what the step is divided by, one number for each channel (axis 1 of the inputs); None
            for 1.
    """

    kind = "perturbed"
    paper = PAPER
    search = spaces(epsilon=Choice((0.0014, 0.0028), "OpenOOD's sweep for ODIN"))
    differentiable: ClassVar[bool] = False
    scorer: Annotated[Scorer, Slot("scorer")]
    epsilon: NonNegativeFloat = 0.0014
    scale: Scale = None

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Perturbed:
        if not self.scorer.smooth:
            raise ValueError(
                f"the score of '{self.scorer.kind}' has no gradient to move the input along"
            )
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    def score(self, features: Features, state: State) -> Tensor:
        inner = state.get("scorer", {})
        return moved_score(self.scorer, features, inner, self.epsilon, self.scale)


def moved_score(
    scorer: Scorer,
    features: Features,
    state: State,
    epsilon: float,
    scale: tuple[float, ...] | None = None,
    direction: Callable[[Tensor], Tensor] = torch.sign,
) -> Tensor:
    """The score of inputs after one step of ``epsilon`` along its gradient, ``[N]``.

    Args:
        scorer: the score.
        features: with inputs, and the way through the model.
        state: of the scorer.
        epsilon: the length of the step.
        scale: what it is divided by, one number for each channel.
        direction: what the step takes of a gradient of the inputs' shape.

    Raises:
        DataError: inputs that are no tensor of floating numbers, or of other channels than
            ``scale`` has numbers.
    """
    inputs, rerun = moveable(features)
    sizes = _channels(inputs, scale)
    if epsilon == 0:
        return scorer.score(features, state)
    gradient = slope(scorer, features, state)
    return scorer.score(rerun(inputs.detach() + epsilon * direction(gradient) / sizes), state)


def slope(scorer: Scorer, features: Features, state: State) -> Tensor:
    """The gradient of each row's score with respect to its input, of the inputs' shape.

    Raises:
        DataError: as ``moveable``.
    """
    inputs, rerun = moveable(features)
    # A caller's inference mode would forbid the gradient.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        total = scorer.score(rerun(leaf), state).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def moveable(features: Features) -> tuple[Tensor, Callable[..., Features]]:
    """The inputs of features, and the way from other inputs to their features.

    Raises:
        DataError: the inputs are not one tensor of floating numbers.
    """
    inputs, rerun = features.inputs, features.rerun
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or rerun is None:
        raise DataError("moving the input needs inputs that are one tensor of floating numbers")
    return inputs, rerun


def _channels(inputs: Tensor, scale: tuple[float, ...] | None) -> Tensor:
    """The scale in the shape of inputs ``[N, C, ...]``."""
    if scale is None:
        return inputs.new_ones(())
    if inputs.ndim < 2 or inputs.shape[1] != len(scale):
        raise DataError(
            f"scale has {len(scale)} numbers, and the inputs are {list(inputs.shape)}: give one "
            "number for each channel (axis 1)"
        )
    return inputs.new_tensor(scale).reshape(-1, *[1] * (inputs.ndim - 2))


@hookimpl
def register_scorers(register: Register) -> None:
    register(Perturbed)
