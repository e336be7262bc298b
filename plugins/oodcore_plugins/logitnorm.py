"""logitnorm: logit normalisation in the training loss."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat
from torch import Tensor

import oodcore
from oodcore.features import Features, required
from oodcore.regularizer import Inner

EPS = 1e-7


class LogitNorm(oodcore.Regularizer):
    """The classification loss, of logits ``z`` divided by their norm and a temperature t:

        loss(z / (t * (||z||_2 + 1e-7)), label)

    so that the norm of the logits cannot be raised to lower the loss, and overconfidence on unknown
    inputs goes with it. At test time the logits are used as they are. The paper's loss is
    cross-entropy; here it is whatever the run's is further in (focal loss, weighted rows). There is
    no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Its gradient grows as 1 / (t ||z||), and norms are small at first: where training does not begin
    to learn, clip the gradient (``gradient_clip: 1``) or lower the learning rate.

    Args:
        temperature: t, without unit; 0.04 is the paper's for CIFAR-10 and CIFAR-100.
        weight: 0 switches it off.

    Raises a DataError if the features have no logits.
    """

    kind = "logitnorm"
    paper = oodcore.Paper(
        title="Mitigating Neural Network Overconfidence with Logit Normalization",
        authors="Hongxin Wei, Renchunzi Xie, Hao Cheng, Lei Feng, Bo An, Yixuan Li",
        venue="ICML",
        year=2022,
        url="https://arxiv.org/abs/2205.09310",
    )

    temperature: PositiveFloat = 0.04

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        logits = required(rows.logits, "logits")
        norms = logits.norm(dim=1, keepdim=True) + EPS
        return inner(rows.with_logits(logits / (self.temperature * norms)), labels)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(LogitNorm)
