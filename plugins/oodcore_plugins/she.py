"""SHE: the Hopfield energy of an embedding with the stored pattern of its class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import ClassMeans, CorrectMeans, State


class SHE(Scorer):
    """``h' S_m``: the product with the pattern of the predicted class m, in squared units of h.

    ``S_k`` is the mean embedding of the training rows of class k that are classified right. Of a
    class without such rows it is the mean of all its rows, and of one without any rows the mean of
    all training rows. A zero embedding gives 0 (with ``euclidean``, ``-||S_m||``), and one class
    makes no difference.

    Args:
        metric: ``inner_product`` is the paper's; ``euclidean`` is ``-||h - S_m||``, at most 0, and
            ``cosine`` is ``cos(h, S_m)``, in [-1, 1].
    """

    kind = "she"
    paper = Paper(
        "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with "
        "Modern Hopfield Energy",
        "Jinsong Zhang, Qiang Fu, Xu Chen, Lun Du, Zelin Li, Gang Wang, Xiaoguang Liu, Shi Han, "
        "Dongmei Zhang",
        "ICLR",
        2023,
        "https://openreview.net/forum?id=KkazG4lgKL",
    )
    search = spaces(
        metric=Choice(
            ("inner_product", "euclidean", "cosine"),
            "the paper takes inner_product; OpenOOD has the others as options",
        )
    )
    metric: Literal["inner_product", "euclidean", "cosine"] = "inner_product"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return CorrectMeans(), ClassMeans()

    def fit(self, store: FeatureStore) -> State:
        correct, means = store[CorrectMeans()], store[ClassMeans()]
        present = means.present[:, None]
        whole = torch.where(present, means.mean, means.total_mean)
        return {"patterns": torch.where((correct.count > 0)[:, None], correct.mean, whole)}

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        patterns: Tensor = state["patterns"][features.predicted]
        if self.metric == "euclidean":
            distance: Tensor = (rows - patterns).norm(dim=1)
            return -distance
        if self.metric == "cosine":
            rows, patterns = unit(rows), unit(patterns)
        product: Tensor = (rows * patterns).sum(dim=1)
        return product


@hookimpl
def register_scorers(register: Register) -> None:
    register(SHE)
