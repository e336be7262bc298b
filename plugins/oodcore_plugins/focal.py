"""focal: the focal loss."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor, finfo
from torch.nn.functional import log_softmax

import oodcore
from oodcore.features import Features, required
from oodcore.regularizer import Inner


class Focal(oodcore.Regularizer):
    """In place of cross-entropy, with ``p`` the softmax probability of a row's label:

        -(1 - p)^gamma log p

    so that rows that are right already count less. With gamma 0 it is cross-entropy. Decoupling
    MaxLogit trains the network of its MaxCosine so, with a ``cosine_head`` of scale 40.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        gamma: at least 0, without unit; 2 is the paper's.
        detach_pt: let no gradient through the factor ``(1 - p)^gamma``, as the code of Decoupling
            MaxLogit does; the paper's loss lets it.
        weight: 0 switches it off.

    Raises a DataError if the features have no logits.
    """

    kind = "focal"
    replaces_loss = True
    paper = oodcore.Paper(
        title="Focal Loss for Dense Object Detection",
        authors="Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He, Piotr Dollár",
        venue="ICCV",
        year=2017,
        url="https://arxiv.org/abs/1708.02002",
    )

    gamma: NonNegativeFloat = 2.0
    detach_pt: bool = False

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        logs = log_softmax(required(rows.logits, "logits"), dim=1)
        log_p = logs.gather(1, labels[:, None]).squeeze(1)
        if self.gamma == 0:
            return -log_p
        missed = -log_p.expm1()  # 1 - p
        # Below gamma = 1 the slope of the power is infinite at 0; there the loss is 0 anyway.
        factor = missed.clamp_min(finfo(missed.dtype).tiny).pow(self.gamma)
        return -(factor.detach() if self.detach_pt else factor) * log_p


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(Focal)
