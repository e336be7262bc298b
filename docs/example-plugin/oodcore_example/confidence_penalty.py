"""A regularizer: predictions are kept from becoming more certain than they need be."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

import oodcore
from oodcore.features import required


class ConfidencePenalty(oodcore.Regularizer):
    """``-H(p) = sum_k p_k log p_k``, in nats, averaged over the batch; p is the predicted softmax.

    Args:
        weight: of the term, beta in the paper.
    """

    kind = "confidence_penalty"
    paper = oodcore.Paper(
        title="Regularizing Neural Networks by Penalizing Confident Output Distributions",
        authors="Gabriel Pereyra, George Tucker, Jan Chorowski, Lukasz Kaiser, Geoffrey Hinton",
        venue="ICLR workshop",
        year=2017,
        url="https://arxiv.org/abs/1701.06548",
    )
    weight: NonNegativeFloat = 0.1

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        log_p = required(step.features.logits, "logits").log_softmax(dim=1)
        return (log_p.exp() * log_p).sum(dim=1).mean()
