"""kNN: the distance to the nearest training rows."""

from __future__ import annotations

import warnings
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Index, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import Bank, State


class KNN(Scorer):
    """``-||h - h_(k)||``, the Euclidean distance to the k-th nearest training embedding, at most 0.

    With ``normalize`` the embeddings have unit norm first, as in the paper, which recommends 50 for
    CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet. A zero row stays zero. A training row that is
    scored is its own nearest neighbour. With fewer than k training rows the farthest one counts,
    and a warning says so.

    With ``inner_product`` the score is ``<h, h_(k)>``, the k-th largest: the cosine where
    embeddings are normalised, 0 for a zero row.

    Args:
        k: which neighbour.
        normalize: give embeddings unit norm.
        metric: ``l2``, or ``inner_product``.
        reduce: ``kth`` for the k-th neighbour alone, ``mean`` for the mean over the k nearest.
        index: a faiss index factory string; ``Flat`` is exact.
    """

    kind = "knn"
    paper = Paper(
        "Out-of-Distribution Detection with Deep Nearest Neighbors",
        "Yiyou Sun, Yifei Ming, Xiaojin Zhu, Yixuan Li",
        "ICML",
        2022,
        "https://arxiv.org/abs/2204.06507",
    )
    search = spaces(
        k=Choice(
            (10, 50, 100, 200, 500, 1000),
            "OpenOOD sweeps 50 to 1000; the paper takes 10 of a small bank",
        )
    )
    k: PositiveInt = 50
    normalize: bool = True
    metric: Literal["l2", "inner_product"] = "l2"
    reduce: Literal["kth", "mean"] = "kth"
    index: str = "Flat"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Bank(),)

    def fit(self, store: FeatureStore) -> State:
        rows = store[Bank()].embeddings
        if len(rows) < self.k:
            warnings.warn(
                f"knn: k is {self.k}, and there are {len(rows)} training rows: the farthest counts",
                stacklevel=2,
            )
        return {"bank": Index(rows, self.metric, self.index, self.normalize)}

    def score(self, features: Features, state: State) -> Tensor:
        bank = state["bank"]
        rows = required(features.embeddings, "embeddings")
        k = min(self.k, len(bank))
        near = bank.kth(rows, k) if self.reduce == "kth" else bank.search(rows, k)[0].mean(dim=1)
        return -near if self.metric == "l2" else near


@hookimpl
def register_scorers(register: Register) -> None:
    register(KNN)
