"""Trust score: how much nearer the predicted class is than any other."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Index, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.rows import Rows
from oodcore.statistics import Bank, State

MOST = 1e12
"""The largest ratio that is told from infinity."""


class TrustScore(Scorer):
    """``d_other / d_predicted``, Euclidean distances from an embedding to the nearest training row
    of the predicted class and to that of all other classes; in [0, 1e12].

    Above 1 where the nearest training row agrees with the classifier, below 1 where it does not. A
    ratio above 1e12 counts as that: on a training row of the predicted class, and where only that
    class has rows. Rows on both classes at once have 1, a predicted class without rows gives 0.
    The authors' code adds 1e-12 to the lower distance instead, which is a length of no scale.

    With ``alpha`` a class is its rows of high density: those whose distance to their k-th nearest
    row of the class, themselves among them, is not among the largest ``floor(alpha n)`` of n. Rows
    at the limit that tie stay. The authors' code takes an interpolated percentile for the limit,
    which leaves one row more or less. It measures the distance to the second nearest row of a
    class, as ``neighbour: 2`` does; the paper, that to the nearest. A class with fewer rows than
    that has its farthest row in their place.

    All training rows are kept, each in the index of its class, and a row costs a search of every
    class. Fitting with alpha searches each class for each of its rows.

    Args:
        alpha: the share of each class that is left out, in [0, 1); 0 keeps all.
        k: which neighbour says how dense it is around a training row; the authors use 10.
        neighbour: which row of a class the distance is to, 1 for the nearest.
        index: a faiss index factory string; ``Flat`` is exact.
    """

    kind = "trust_score"
    paper = Paper(
        "To Trust Or Not To Trust A Classifier",
        "Heinrich Jiang, Been Kim, Melody Y. Guan, Maya Gupta",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1805.11783",
    )
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.0
    k: PositiveInt = 10
    neighbour: PositiveInt = 1
    index: str = "Flat"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Bank(),)

    def fit(self, store: FeatureStore) -> State:
        bank = store[Bank()]
        labels = bank.classes.tensor()
        state = {}
        for label in labels.unique().tolist():
            own = Rows.of(bank.embeddings[(labels == label).nonzero().flatten()])
            state[f"class_{label}"] = Index(self._dense(own), factory=self.index)
        return {"classes": state}

    def _dense(self, rows: Rows) -> Rows:
        """The rows of high density among those of a class."""
        left_out = math.floor(self.alpha * len(rows))
        if not left_out:
            return rows
        index, k = Index(rows), min(self.k, len(rows))
        radii = torch.cat([index.kth(block.double(), k) for block in rows.blocks(4096)])
        limit = radii.sort().values[len(rows) - 1 - left_out]
        return Rows.of(rows[(radii <= limit).nonzero().flatten()])

    def score(self, features: Features, state: State) -> Tensor:
        rows, predicted = required(features.embeddings, "embeddings"), features.predicted
        agreeing = rows.new_full((len(rows),), torch.inf)
        other = agreeing.clone()
        for name, index in state["classes"].items():
            distance = index.kth(rows, min(self.neighbour, len(index)))
            own = predicted == int(name.removeprefix("class_"))
            agreeing = torch.where(own, distance, agreeing)
            other = torch.where(own, other, torch.minimum(other, distance))
        return ratio(other, agreeing)


def ratio(upper: Tensor, lower: Tensor) -> Tensor:
    """``upper / lower``, at most 1e12; 1 where both are zero, 0 where the lower is infinite."""
    both = (upper == 0) & (lower == 0)
    most = ~both & ((upper == torch.inf) | (lower <= upper / MOST)) & (lower != torch.inf)
    none = lower == torch.inf
    plain = ~(both | most | none)
    # A division by zero that is not chosen would still spoil the gradient.
    quotient = torch.where(plain, upper, 1.0) / torch.where(plain, lower, 1.0)
    quotient = torch.where(none, 0.0, quotient)
    return torch.where(most, MOST, quotient)


@hookimpl
def register_scorers(register: Register) -> None:
    register(TrustScore)
