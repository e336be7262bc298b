"""Decoupling MaxLogit: MaxCosine, MaxNorm, and their weighted sum DML."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import ClassMeans, State

PAPER = Paper(
    "Decoupling MaxLogit for Out-of-Distribution Detection",
    "Zihan Zhang, Xiang Xiang",
    "CVPR",
    2023,
    "https://doi.org/10.1109/CVPR52729.2023.00330",
)


def cosine(features: Features) -> Tensor:
    """``max_k cos(h, w_k)``, ``[N]`` in [-1, 1]; 0 for a zero embedding."""
    head = features.head
    if head is None:
        raise DataError("the cosine is taken with the head, and these features have none")
    return largest_cosine(features, head.weight)


def largest_cosine(features: Features, directions: Tensor) -> Tensor:
    """``max_k cos(h, d_k)`` with directions ``[K, D]``, ``[N]``."""
    rows = unit(required(features.embeddings, "embeddings"))
    return (rows @ unit(directions).T).amax(dim=1)


def norm(features: Features) -> Tensor:
    """``||h||_2``, ``[N]``."""
    return torch.linalg.vector_norm(required(features.embeddings, "embeddings"), dim=1)


class MaxCosine(Scorer):
    """``max_k cos(h, w_k)`` with the rows of the head's weight, in [-1, 1]; the bias is left out.

    A zero embedding has cosine 0. The class of the largest cosine need not be the predicted one.

    With ``means``, w_k is the mean training embedding of class k, and classes without rows are left
    out; the library `detectors` has that under the name of cosine similarity.

    Args:
        source: of the directions: ``head``, as in the paper, or ``means``.
    """

    kind = "max_cosine"
    paper = PAPER
    source: Literal["head", "means"] = "head"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"} if self.source == "head" else {"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMeans(),) if self.source == "means" else ()

    @property
    def learns(self) -> bool:
        return self.source == "means"

    def fit(self, store: FeatureStore) -> State:
        if not self.learns:
            return {}
        means = store[ClassMeans()]
        return {"means": means.mean[means.present]}

    def score(self, features: Features, state: State) -> Tensor:
        if self.source == "head":
            return cosine(features)
        return largest_cosine(features, state["means"])


class MaxNorm(Scorer):
    """``||h||_2``, the norm of the embedding, in the embedding's units."""

    kind = "max_norm"
    paper = PAPER

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def score(self, features: Features, state: State) -> Tensor:
        return norm(features)


class DML(Scorer):
    """``lam * MaxCosine + MaxNorm`` (the paper's equation 6).

    The authors' notes put the factor on the other term: their lambda is 1 / lam. The paper leaves
    lam open. Their script divides each term by its sum over the in-distribution test set, which
    ranks like ``lam = mean(MaxNorm) / mean(MaxCosine)``; ``auto`` is that ratio over the training
    rows, so that a score depends on no test data.

    Args:
        lam: the weight of the cosine, or ``auto``.
    """

    kind = "dml"
    paper = PAPER
    lam: PositiveFloat | Literal["auto"] = "auto"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    @property
    def measures(self) -> bool:
        return self.lam == "auto"

    def measure(self, features: Features, state: State) -> Tensor | None:
        return torch.stack([cosine(features), norm(features)], dim=1) if self.measures else None

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        mean_cosine, mean_norm = rows.mean(dim=0)
        if mean_cosine <= 1e-12:
            raise DataError(
                f"dml: the mean cosine of the training rows is {float(mean_cosine):.3g}, so there "
                "is no ratio to take; give lam a number"
            )
        if rows[:, 1].std(correction=0) <= 1e-9 * mean_norm:
            warnings.warn("dml: all norms are equal, so it ranks like max_cosine", stacklevel=2)
        return {**state, "lam": mean_norm / mean_cosine}

    def score(self, features: Features, state: State) -> Tensor:
        lam = state["lam"] if self.lam == "auto" else self.lam
        return lam * cosine(features) + norm(features)


@hookimpl
def register_scorers(register: Register) -> None:
    register(MaxCosine)
    register(MaxNorm)
    register(DML)
