"""confidence_reweighting: a second stage of training, on the rows that the first is unsure of."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

import oodcore
from oodcore.features import Features, required
from oodcore.regularizer import Inner

CLAMP = (1e-4, 1.0)


class ConfidenceReweighting(oodcore.Regularizer):
    """The classification loss of a row times ``exp(-t s)``, divided by the mean of these over the
    batch; s is the largest softmax probability that the network gave the row before this run.

    It is the second stage that SURE adds on long-tailed data: start from a finished run
    (``network: {weights: runs/first}``), for about 20 epochs of a tenth of the rate. Rows that
    other regularizers bring (mixed ones) keep their loss.

    Departures from the published code. s is measured once on the rows as they are, of every row;
    there it is measured on augmented rows, and up to a batch of them keep s = 0. Both passes of SAM
    are weighted; there the second is not. No parameter of batch normalisation is frozen.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        t: at least 0, without unit; 0 weighs all rows alike.
        clamp: bound the weights to [1e-4, 1] after they were divided, as the published code does:
            then all rows above the mean count 1.
        weight: 0 switches it off.

    Raises a DataError if the features have no logits.
    """

    kind = "confidence_reweighting"
    paper = oodcore.Paper(
        title="SURE: SUrvey REcipes for building reliable and robust deep networks",
        authors="Yuting Li, Yingyi Chen, Xuanlong Yu, Dexiong Chen, Xi Shen",
        venue="CVPR",
        year=2024,
        url="https://arxiv.org/abs/2403.00543",
    )

    t: NonNegativeFloat = 1.0
    clamp: bool = False

    def build(self, run: oodcore.Run) -> nn.Module:
        modes = [(part, part.training) for part in run.model.modules()]
        run.model.eval()
        state = nn.Module()
        confidence = torch.ones(run.rows, device=run.device)
        try:
            with torch.no_grad():
                for batch in run.batches():
                    logits = required(run.model(batch.inputs).logits, "logits")
                    ids = required(batch.ids, "ids")
                    confidence[ids] = logits.softmax(dim=1).amax(dim=1).to(confidence)
        finally:
            for part, training in modes:
                part.training = training
        state.register_buffer("confidence", confidence)
        return state

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        losses = inner(rows, labels)
        if rows.ids is None:
            return losses
        weights = torch.exp(-self.t * state.confidence[rows.ids])
        weights = weights / weights.mean()
        return losses * (weights.clamp(*CLAMP) if self.clamp else weights)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(ConfidenceReweighting)
