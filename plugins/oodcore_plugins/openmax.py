"""OpenMax: the probability of an unknown class, from the tails of distances to known ones."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import CorrectMeans, State, assigned

STEEPEST = 1e4
"""The largest Weibull shape: that of a tail whose distances hardly differ."""
UNREACHED = torch.finfo(torch.float64).max
"""Where the tail of a class without rows begins."""


class CorrectLogits(Statistic):
    """The mean logits of each class's correctly classified rows: ``count [K]``, ``mean [K, K]``."""

    kind = "correct_logits"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def init(self, shape: Shape) -> State:
        return CorrectMeans().init(Shape(shape.K, shape.K, device=shape.device))

    def update(self, state: State, features: Features) -> State:
        logits = required(features.logits, "logits")
        rows = Features(embeddings=logits, logits=logits, labels=features.labels)
        return CorrectMeans().update(state, rows)

    def merge(self, a: State, b: State) -> State:
        return CorrectMeans().merge(a, b)

    def view(self, state: State) -> Any:
        return CorrectMeans().view(state)


class OpenMax(Scorer):
    """``-P(unknown)``, in [-1, 0].

    The distance of a row's logits to the mean logits of class k's correctly classified training
    rows, ``d_k = ||z - mean_k||``, is compared with a Weibull distribution fitted to the ``tail``
    largest such distances of those rows, moved so that the smallest of them is 1: ``w_k`` is its
    value at ``d_k``. The logits of the ``alpha`` largest classes, by rank i = 1, 2, ..., lose a
    share to the unknown class, and the softmax of all K + 1 is taken:

        z'_k = z_k (1 - w_k (alpha + 1 - i) / alpha)
        z'_unknown = sum_k (z_k - z'_k)

    The weights by rank are those of the authors' code; the paper prints (alpha - i) / alpha. The
    paper leaves the distance open (its code mixes Euclidean and cosine); here it is Euclidean. The
    fit is exact maximum likelihood. A negative logit that is revised grows, as in the original: the
    method means logits that are mostly positive.

    A class with fewer such rows than ``tail`` has a shorter tail; where its distances do not
    differ, every row beyond them is outside; where there are no rows, its logit is not revised.
    With few classes ``alpha`` is at most K. The score jumps where two logits change ranks.

    Args:
        tail: how many of the largest distances of a class make its tail.
        alpha: how many of the largest logits are revised.
    """

    kind = "openmax"
    paper = Paper(
        "Towards Open Set Deep Networks",
        "Abhijit Bendale, Terrance E. Boult",
        "CVPR",
        2016,
        "https://arxiv.org/abs/1511.06233",
    )
    tail: PositiveInt = 20
    alpha: PositiveInt = 3

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (CorrectLogits(),)

    def fit(self, store: FeatureStore) -> State:
        return {"means": store[CorrectLogits()].mean}

    def measure(self, features: Features, state: State) -> Tensor | None:
        """Each row's class and its distance; a row that is classified wrong has the class -1."""
        classes = assigned(features)
        distance = (required(features.logits, "logits") - state["means"][classes]).norm(dim=1)
        wrong = classes != features.predicted
        return torch.stack([classes.masked_fill(wrong, -1).to(distance), distance], dim=1)

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        means = state["means"]
        start = torch.full_like(means[:, 0], UNREACHED)
        shape, scale = torch.ones_like(start), torch.ones_like(start)
        right = rows[rows[:, 0] >= 0]
        right = right[right[:, 0].argsort()]
        counts = right[:, 0].long().bincount(minlength=len(means)).tolist()
        for number, distances in enumerate(torch.split(right[:, 1], counts)):
            if len(distances):
                largest = distances.topk(min(self.tail, len(distances))).values
                start[number] = largest[-1]
                shape[number], scale[number] = weibull(largest - largest[-1] + 1)
        return {**state, "start": start, "shape": shape, "scale": scale}

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        count = min(self.alpha, logits.shape[1])
        largest, classes = logits.topk(count, dim=1)
        distance = (logits[:, None] - state["means"][classes]).norm(dim=2)
        beyond = distance - state["start"][classes] + 1
        depth = state["shape"][classes] * (beyond.clamp_min(1e-300) / state["scale"][classes]).log()
        # Beyond exp(4) = 55 the distribution is 1 in float64, and its slope 0.
        outside = torch.where(beyond > 0, -torch.expm1(-depth.clamp_max(4).exp()), 0.0)
        share = (count - torch.arange(count).to(logits)) / count
        lost = largest * outside * share
        revised = logits.scatter(1, classes, largest - lost)
        unknown = lost.sum(dim=1, keepdim=True)
        return -torch.cat([revised, unknown], dim=1).softmax(dim=1)[:, -1]


def weibull(values: Tensor) -> tuple[float, float]:
    """Shape and scale of the Weibull distribution most likely to give some positive values.

    The derivative of the likelihood in the shape is solved by bisection, at most ``STEEPEST``.
    """
    logs = values.log()
    logs = logs - logs.max()
    mean = float(logs.mean())

    def slope(shape: float) -> float:
        """Positive beyond the most likely shape."""
        return float((shape * logs).softmax(dim=0) @ logs) - 1 / shape - mean

    low, high = 1e-3, STEEPEST
    if slope(high) < 0:
        low = high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    scale = float((high * logs).exp().mean()) ** (1 / high) * float(values.max())
    return high, scale


@hookimpl
def register_statistics(register: Register) -> None:
    register(CorrectLogits)


@hookimpl
def register_scorers(register: Register) -> None:
    register(OpenMax)
