"""Relation graph: how many training rows are alike in embedding and in prediction."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Rows, Scorer, Statistic, hookimpl
from oodcore.features import EPS, required, unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import Bank, State

FIELDS = Bank(fields=("embeddings", "logits"))

BLOCK = 512
"""Training rows of like predictions, which are looked at or passed over together."""

PAIRS = 2**22
"""Pairs of a row and a training row that are looked at together."""

MARGIN = 1 + 1e-9
"""Room for rounding where a block is passed over."""


class Relation(Scorer):
    """``sum_i r_i^power`` over the training rows with ``r_i > threshold``, at least 0.

    ``r_i = max(cos(h, h_i), 0) <p, p_i>`` with p the softmax probabilities, in [0, 1]. The sum is
    not divided by the number of training rows. A zero embedding scores 0, and so does a row that
    resembles none, so that rows can tie there. The score jumps where an r_i crosses the threshold;
    its gradient is that between the jumps. Each row costs a product of embeddings with the training
    rows whose predictions are alike enough to count: a K-th of them where predictions are certain,
    all where none is.

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
    search = spaces(power=Choice((1.0, 2.0, 4.0, 6.0, 8.0), "OpenOOD's sweep"))
    power: PositiveFloat = 1.0
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.03

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (FIELDS,)

    def fit(self, store: FeatureStore) -> State:
        kept = store[FIELDS]
        embeddings, shares = Rows(kept.embeddings.shape), Rows(kept.logits.shape)
        ceilings, norms = [], []
        for some in torch.split(_by_prediction(kept.logits), BLOCK):
            block = kept.logits[some].double().softmax(dim=1)
            rows = kept.embeddings[some]
            embeddings.append(rows)
            shares.append(block)
            norms.append(rows.double().norm(dim=1).clamp_min(EPS))
            ceilings.append(block.amax(dim=0))
        state = {"embeddings": embeddings, "shares": shares, "norms": torch.cat(norms)}
        return {**state, "ceilings": torch.stack(ceilings)}

    def score(self, features: Features, state: State) -> Tensor:
        rows = unit(required(features.embeddings, "embeddings"))
        shares = required(features.logits, "logits").softmax(dim=1)
        # A relation is at most <p, p_i>, and that at most what p makes of the block's ceiling.
        highest = shares.detach() @ state["ceilings"].to(shares).T
        counts = highest * MARGIN > self.threshold
        total = rows.new_zeros(len(rows))
        for number in counts.any(dim=0).nonzero().flatten().tolist():
            first, last = number * BLOCK, (number + 1) * BLOCK
            others = state["embeddings"].between(first, last).to(rows)
            # Predictions have fewer columns than embeddings, so that dividing these costs less.
            beside = state["shares"].between(first, last).to(rows)
            beside = beside / state["norms"][first:last, None].to(rows)
            asked = counts[:, number].nonzero().flatten()
            for some in torch.split(asked, max(1, PAIRS // BLOCK)):
                relations = (rows[some] @ others.T).clamp_min(0) * (shares[some] @ beside.T)
                total = total.index_add(0, some, self._kernel(relations).sum(dim=1))
        return total

    def _kernel(self, relations: Tensor) -> Tensor:
        near = relations > self.threshold
        if self.power == 1:
            return torch.where(near, relations, 0.0)
        # A power of what is left out could have an infinite gradient.
        powers = relations.masked_fill(~near, 1.0) ** self.power
        return torch.where(near, powers, 0.0)


def _by_prediction(logits: Rows) -> Tensor:
    """Row numbers by predicted class, and within a class by how certain it is, ``[N]``."""
    best = [block.double().softmax(dim=1).max(dim=1) for block in logits.blocks()]
    certain, classes = torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
    order = certain.argsort(stable=True)
    return order[classes[order].argsort(stable=True)]


@hookimpl
def register_scorers(register: Register) -> None:
    register(Relation)
