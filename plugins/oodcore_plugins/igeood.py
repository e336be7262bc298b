"""Igeood on logits: the Fisher-Rao distance of a prediction to that of each class."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.moments import Means
from oodcore.statistics import State, assigned


class ClassLogits(Statistic):
    """The mean logits of each class's rows: ``count [K]``, ``mean [K, K]``."""

    kind = "class_logits"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def init(self, shape: Shape) -> State:
        total = torch.zeros(shape.K, shape.K, dtype=torch.float64, device=shape.device)
        return {"count": total.new_zeros(shape.K), "total": total}

    def update(self, state: State, features: Features) -> State:
        logits, classes = required(features.logits, "logits"), assigned(features)
        state["count"].index_add_(0, classes, torch.ones_like(logits[:, 0]))
        state["total"].index_add_(0, classes, logits)
        return state

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Any:
        count = state["count"].clone()
        return Means(count, state["total"] / count.clamp_min(1)[:, None])


class Igeood(Scorer):
    """``sum_k d(p, q_k)`` with ``d(p, q) = 2 arccos(sum_j sqrt(p_j q_j))``, in radians, at least 0.

    d is the Fisher-Rao distance of two predictions, at most pi, ``p = softmax(z / T)``, and ``q_k =
    softmax(c_k / T)`` with c_k the mean logits of the training rows of class k. A known row is near
    one class and far from all others, so its sum is large; an uncertain one is in between. Classes
    without rows are left out.

    This is the paper's score where only the logits are seen, without its input perturbation (see
    ``perturbed``); the one that joins several layers needs weights trained on further rows. The
    paper moves c_k from the k-th unit vector down the mean distance to the rows of class k, by a
    fixed number of gradient steps; the mean logits are what the authors' own library takes. It also
    has the mean in place of the sum.

    The distance is computed from differences, so that it is exact for near predictions; a row costs
    K^2.

    Args:
        temperature: T.
        reduce: ``sum`` over the classes; or ``min``, minus the distance to the nearest, at most 0,
            which the authors' code offers as a variant.
    """

    kind = "igeood"
    paper = Paper(
        "Igeood: An Information Geometry Approach to Out-of-Distribution Detection",
        "Eduardo Dadalto Camara Gomes, Florence Alberge, Pierre Duhamel, Pablo Piantanida",
        "ICLR",
        2022,
        "https://arxiv.org/abs/2203.07798",
    )
    temperature: PositiveFloat = 1.0
    reduce: Literal["sum", "min"] = "sum"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassLogits(),)

    def fit(self, store: FeatureStore) -> State:
        known = store[ClassLogits()]
        return {"roots": self._roots(known.mean[known.count > 0])}

    def score(self, features: Features, state: State) -> Tensor:
        roots = self._roots(required(features.logits, "logits"))
        chords = torch.cdist(roots, state["roots"], compute_mode="donot_use_mm_for_euclid_dist")
        distances = 4 * (chords / 2).asin()
        return distances.sum(dim=1) if self.reduce == "sum" else -distances.amin(dim=1)

    def _roots(self, logits: Tensor) -> Tensor:
        """The square roots of the softmax, which lie on a sphere of radius 1, ``[N, K]``."""
        return ((logits / self.temperature).log_softmax(dim=1) / 2).exp()


@hookimpl
def register_statistics(register: Register) -> None:
    register(ClassLogits)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Igeood)
