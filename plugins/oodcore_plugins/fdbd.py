"""fDBD: the distance to the decision boundaries, regularised by the deviation from the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from oodcore import Features, FeatureStore, Head, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import EPS, required, unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import ClassMeans, State

PAIRS = 2**22
"""Numbers that the differences between weights of classes take at once."""


class FDBD(Scorer):
    """``1/(K-1) sum_{k != m} |z_m - z_k| / ||w_m - w_k||``, over ``||h - mean||``; at least 0.

    m is the predicted class, mean that of the training embeddings. Each term of the sum is the
    distance of h, in its own units, to the boundary where class k overtakes m; the quotient has no
    unit. With ``centre`` off it is divided by ``||h||``, as OpenOOD's variant. (OpenOOD sums where
    the paper averages: a constant factor.)

    Classes of equal weight have no boundary between them and are left out of the average. With one
    class it is 0. A row at the mean (with ``centre`` off: a zero row) is divided by 1e-12.

    Args:
        centre: divide by the distance from the training mean rather than by the norm.
    """

    kind = "fdbd"
    paper = Paper(
        "Fast Decision Boundary based Out-of-Distribution Detector",
        "Litian Liu, Yao Qin",
        "ICML",
        2024,
        "https://arxiv.org/abs/2312.11536",
    )
    search = spaces(centre=Choice((True, False), "OpenOOD's sweep"))
    centre: bool = True

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMeans(),) if self.centre else ()

    def fit(self, store: FeatureStore) -> State:
        if store.head is None:
            raise DataError("fdbd: the boundaries are those of the head, and there is none")
        state = {"closeness": closeness(directions(store.head).double())}
        if self.centre:
            state["centre"] = store[ClassMeans()].total_mean
        return state

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        rows = required(features.embeddings, "embeddings")
        first = features.predicted
        inverse: Tensor = state["closeness"][first]
        leads = logits.gather(1, first[:, None]) - logits
        distance = (leads.abs() * inverse).sum(dim=1) / (inverse > 0).sum(dim=1).clamp_min(1)
        deviation = (rows - state["centre"] if self.centre else rows).norm(dim=1)
        quotient: Tensor = distance / deviation.clamp_min(EPS)
        return quotient


def directions(head: Head) -> Tensor:
    """The rows ``[K, D]`` that a head's logits are products with, on the way from its input."""
    return head.scale * (unit(head.weight) if head.normalize_weight else head.weight)


def closeness(weight: Tensor) -> Tensor:
    """``1 / ||w_m - w_k||``, ``[K, K]``; 0 where the two are the same."""
    size = max(1, PAIRS // max(1, weight.numel()))
    norms = [(some[:, None] - weight).norm(dim=2) for some in torch.split(weight, size)]
    apart = torch.cat(norms)
    return torch.where(apart > EPS, 1 / apart.clamp_min(EPS), 0.0)


@hookimpl
def register_scorers(register: Register) -> None:
    register(FDBD)
