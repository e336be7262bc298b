"""Relation graph: how many training rows are alike in embedding and in prediction."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import Bank, State

FIELDS = Bank(fields=("embeddings", "logits"))

PAIRS = 2**22
"""Pairs of a row and a training row that are looked at together."""


class Relation(Scorer):
    """``sum_i r_i^power`` over the training rows with ``r_i > threshold``, at least 0.

    ``r_i = max(cos(h, h_i), 0) <p, p_i>`` with p the softmax probabilities, in [0, 1]. The sum is
    not divided by the number of training rows. A zero embedding scores 0, and so does a row that
    resembles none, so that rows can tie there. The score jumps where an r_i crosses the threshold;
    its gradient is that between the jumps. Each row costs a product with every training row.

    Args:
        power: the sharpness of the kernel; 1 is usual, up to 8 is tried.
        threshold: relations up to it are left out.
    """

    kind = "relation"
    paper = Paper(
        "Neural Relation Graph: A Unified Framework for Identifying Label Noise and Outlier Data",
        "Jang-Hyun Kim, Sangdoo Yun, Hyun Oh Song",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2301.12321",
    )
    power: PositiveFloat = 1.0
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.03

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (FIELDS,)

    def fit(self, store: FeatureStore) -> State:
        kept = store[FIELDS]
        return {"embeddings": kept.embeddings, "logits": kept.logits}

    def score(self, features: Features, state: State) -> Tensor:
        rows = unit(required(features.embeddings, "embeddings"))
        shares = required(features.logits, "logits").softmax(dim=1)
        known = len(state["embeddings"])
        step = max(1, PAIRS // max(1, len(rows)))
        total = rows.new_zeros(len(rows))
        for first in range(0, known, step):
            others = unit(state["embeddings"].between(first, first + step).to(rows))
            beside = state["logits"].between(first, first + step).to(rows).softmax(dim=1)
            relations = (rows @ others.T).clamp_min(0) * (shares @ beside.T)
            near = relations > self.threshold
            # A power of what is left out could have an infinite gradient.
            powers = relations.masked_fill(~near, 1.0) ** self.power
            total = total + torch.where(near, powers, 0.0).sum(dim=1)
        return total


@hookimpl
def register_scorers(register: Register) -> None:
    register(Relation)
