"""kNN: the distance to the k-th nearest training row."""

from __future__ import annotations

import warnings

from pydantic import PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Index, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import Bank, State


class KNN(Scorer):
    """``-||h - h_(k)||``, the Euclidean distance to the k-th nearest training embedding, at most 0.

    With ``normalize`` the embeddings have unit norm first, as in the paper, which recommends 50 for
    CIFAR-10, 200 for CIFAR-100 and 1000 for ImageNet. A zero row stays zero. A training row that is
    scored is its own nearest neighbour. With fewer than k training rows the farthest one counts,
    and a warning says so.

    Args:
        k: which neighbour.
        normalize: give embeddings unit norm.
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
    k: PositiveInt = 50
    normalize: bool = True
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
        return {"bank": Index(rows, "l2", self.index, self.normalize)}

    def score(self, features: Features, state: State) -> Tensor:
        bank = state["bank"]
        rows = required(features.embeddings, "embeddings")
        return -bank.kth(rows, min(self.k, len(bank)))


@hookimpl
def register_scorers(register: Register) -> None:
    register(KNN)
