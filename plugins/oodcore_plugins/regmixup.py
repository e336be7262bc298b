"""regmixup: mixed rows beside the clean ones; mixup: mixed rows in their place."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

import oodcore
from oodcore.errors import DataError
from oodcore.features import Features
from oodcore.regularizer import Inner


class RegMixup(oodcore.Regularizer):
    """A term of rows mixed in pairs, with one ``b ~ Beta(a, a)`` a batch:

        b L(net(x'), y) + (1 - b) L(net(x'), y_perm),   x' = b x + (1 - b) x_perm

    L is the run's classification loss, and the mean over the batch is taken. With a large a the
    pairs are mixed near halves. Under SAM both passes see the same mixing. It costs a further
    forward and backward pass.

    Args:
        alpha: a; 10 is that of the paper's and of SURE's settings, 20 that of OpenOOD.
        joint: pass mixed and clean rows through the network as one batch, which then share their
            batch statistics, as the paper's code does; SURE passes them one after the other.
        weight: of the term; SURE takes 0.5 on CIFAR-10 and 1 on CIFAR-100.
    """

    kind = "regmixup"
    paper = oodcore.Paper(
        title="Using Mixup as a Regularizer Can Surprisingly Improve Accuracy & "
        "Out-of-Distribution Robustness",
        authors="Francesco Pinto, Harry Yang, Ser-Nam Lim, Philip H.S. Torr, Puneet K. Dokania",
        venue="NeurIPS",
        year=2022,
        url="https://arxiv.org/abs/2206.14502",
    )

    weight: NonNegativeFloat = 0.5
    alpha: PositiveFloat = 10.0
    joint: bool = False

    def before(self, step: oodcore.Step, state: Any) -> Any:
        share, order = draw(self.alpha, step)
        step.memo.update(share=share, order=order, rows=mixed(step.inputs, share, order))
        return step.memo["rows"] if self.joint else None

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        share, order = step.memo["share"], step.memo["order"]
        rows = step.extra if self.joint else step.forward(step.memo["rows"], stats=True)
        assert rows is not None
        own = step.criterion(rows, step.labels).mean()
        other = step.criterion(rows, step.labels[order]).mean()
        total: Tensor = share * own + (1 - share) * other
        return total


class Mixup(oodcore.Regularizer):
    """Mixed rows in place of the clean ones, with one ``b ~ Beta(a, a)`` a batch:

        b L(net(x'), y) + (1 - b) L(net(x'), y_perm),   x' = b x + (1 - b) x_perm

    L is the run's classification loss. The embeddings and logits that other regularizers see are
    those of x', beside the labels y, and so is the accuracy in the metrics.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        alpha: a; the paper takes 0.1 to 0.4 on ImageNet and 1 on CIFAR.
        weight: 0 switches it off.
    """

    kind = "mixup"
    replaces_batch = True
    paper = oodcore.Paper(
        title="mixup: Beyond Empirical Risk Minimization",
        authors="Hongyi Zhang, Moustapha Cisse, Yann N. Dauphin, David Lopez-Paz",
        venue="ICLR",
        year=2018,
        url="https://arxiv.org/abs/1710.09412",
    )

    alpha: PositiveFloat = 1.0

    def before(self, step: oodcore.Step, state: Any) -> Any:
        step.memo["share"], step.memo["order"] = share, order = draw(self.alpha, step)
        return mixed(step.inputs, share, order)

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        own = inner(rows, labels)
        if rows.ids is None:  # rows of another regularizer's, which are not mixed here
            return own
        share, order = step.memo["share"], step.memo["order"]
        both: Tensor = share * own + (1 - share) * inner(rows, labels[order])
        return both


def draw(alpha: float, step: oodcore.Step) -> tuple[float, Tensor]:
    """A share ``b ~ Beta(alpha, alpha)`` and an order of the batch, from the step's generator."""
    device = step.labels.device
    # The share of one of two Gamma draws is a Beta draw. A Gamma draw of a small alpha may be too
    # small for a number, so its logarithm is drawn: that of one of alpha + 1, plus log(U) / alpha.
    above = torch.full((2,), alpha + 1, dtype=torch.float64, device=device)
    logs = torch._standard_gamma(above, generator=step.generator).log()
    uniform = torch.rand(2, dtype=torch.float64, generator=step.generator, device=device)
    logs = logs + (1 - uniform).log() / alpha
    order = torch.randperm(len(step.labels), generator=step.generator, device=device)
    return float((logs[0] - logs[1]).sigmoid()), order


def mixed(inputs: Any, share: float, order: Tensor) -> Any:
    """Rows mixed with the same rows in another order.

    Raises:
        DataError: inputs that are no floating numbers, which cannot be mixed.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return share * inputs + (1 - share) * inputs[order]
    given = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
    raise DataError(f"inputs are mixed as one tensor of floating numbers, not {given}")


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(RegMixup)
    register(Mixup)
