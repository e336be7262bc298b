"""A scorer on inputs moved along the sign of its own score's gradient."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import NonNegativeFloat, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, Slot, hookimpl
from oodcore.errors import DataError
from oodcore.hookspecs import Register
from oodcore.statistics import State

PAPER = Paper(
    "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks",
    "Shiyu Liang, Yixuan Li, R. Srikant",
    "ICLR",
    2018,
    "https://arxiv.org/abs/1706.02690",
)


class Perturbed(Scorer):
    """``s(x + epsilon * sign(ds/dx))``: the score of the input after one step that raises it.

    In-distribution inputs gain more from the step than others do. Where the gradient is zero the
    input stays (the reference implementation adds epsilon there). The model sees each row twice
    more: once with a gradient, once moved.

    Args:
        scorer: the score s; it must have a gradient.
        epsilon: the length of the step in each coordinate of the model's input, after
            preprocessing; 0 leaves the score as it is.
    """

    kind = "perturbed"
    paper = PAPER
    differentiable: ClassVar[bool] = False
    scorer: Annotated[Scorer, Slot("scorer")]
    epsilon: NonNegativeFloat = 0.0014

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
        return moved_score(self.scorer, features, state.get("scorer", {}), self.epsilon)


def moved_score(scorer: Scorer, features: Features, state: State, epsilon: float) -> Tensor:
    """The score of inputs after one step of ``epsilon`` along the sign of its gradient, ``[N]``."""
    inputs, rerun = features.inputs, features.rerun
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or rerun is None:
        raise DataError("moving the input needs inputs that are one tensor of floating numbers")
    if epsilon == 0:
        return scorer.score(features, state)
    # A caller's inference mode would forbid the gradient.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        total = scorer.score(rerun(leaf), state).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return scorer.score(rerun(inputs.detach() + epsilon * gradient.sign()), state)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Perturbed)
