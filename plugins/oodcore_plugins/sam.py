"""sam: steps along the gradient of the worst weights nearby."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch.optim import Optimizer

import oodcore
from oodcore.regularizer import Closure

EPS = 1e-12


class SAM(oodcore.Regularizer):
    """Sharpness-aware minimization: the step at w takes the gradient at ``w + e``, where

        e = rho g / (||g||_2 + 1e-12)                       (g: the gradient at w)
        e = rho w^2 g / (|| |w| g ||_2 + 1e-12)             (adaptive)

    and norms are over all parameters that have a gradient. The optimizer is untouched: it makes its
    own step from w with that gradient. Each step passes the batch through the network twice; both
    passes draw the same numbers (dropout, mixing), and running statistics move in the first only.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        rho: the length of e, in units of the weights; with 0 training is as without.
        adaptive: measure e relative to each weight, as ASAM (Jungmin Kwon et al., ICML 2021,
            https://arxiv.org/abs/2102.11600) does; its rho is about 10 times larger.
        weight: 0 switches it off.
    """

    kind = "sam"
    paper = oodcore.Paper(
        title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
        authors="Pierre Foret, Ariel Kleiner, Hossein Mobahi, Behnam Neyshabur",
        venue="ICLR",
        year=2021,
        url="https://arxiv.org/abs/2010.01412",
    )

    rho: NonNegativeFloat = 0.05
    adaptive: bool = False

    def wrap_closure(self, closure: Closure, optimizer: Optimizer) -> Closure:
        def twice() -> torch.Tensor:
            loss = closure()
            with torch.no_grad():
                moved = self._moved(optimizer)
                # Adding e and taking it away again would leave rounding behind.
                kept = [parameter.clone() for parameter, _ in moved]
                for parameter, shift in moved:
                    parameter += shift
            try:
                closure()
            finally:
                with torch.no_grad():
                    for (parameter, _), before in zip(moved, kept, strict=True):
                        parameter.copy_(before)
            return loss

        return twice if self.rho else closure

    def _moved(self, optimizer: Optimizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter with a gradient, and its part of e."""
        found = [
            (parameter, parameter.grad)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self.adaptive:
            norms = [(parameter.abs() * grad).norm() for parameter, grad in found]
            found = [(parameter, parameter.square() * grad) for parameter, grad in found]
        else:
            norms = [grad.norm() for _, grad in found]
        length = torch.stack(norms).norm() if norms else torch.zeros(())
        return [(parameter, self.rho * shift / (length + EPS)) for parameter, shift in found]


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(SAM)
