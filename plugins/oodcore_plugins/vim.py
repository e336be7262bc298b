"""ViM and the residual it is made of: how far a row is from the principal subspace."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Head, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.moments import Moments
from oodcore.space import Choice, spaces
from oodcore.statistics import ClassMoments, State

Origin = Literal["head", "mean"]

HEAD_CUT_OFF = 1e-6
"""Directions in which the head does less than this share of its most are rounding to float32."""


class Residual(Scorer):
    """``-||R' (h - u)||_2``, in the embedding's units, at most 0.

    R ``[D, D - dim]`` are the eigenvectors with the smallest eigenvalues of the second moment of
    the training embeddings about the origin u, ``sum_i (h_i - u)(h_i - u)' / N``. The paper's
    origin, which is ViM's too, is where the head's weight W and bias b give zero logits,
    ``u = -W^+ b`` (0 without a bias). Labels are not used.

    ViM's authors take dim = 1000 from D = 2048 on, 512 from D = 768 on, and half of D below, as
    here. A dim that leaves nothing is refused. The paper cited is the source of the score; ViM
    compares with it under this name.

    Args:
        dim: of the principal subspace; left out, it follows from D.
        origin: u: ``head``, or ``mean`` for the mean of the training embeddings.
    """

    kind = "residual"
    paper = Paper(
        "Out-Of-Distribution Detection With Subspace Techniques And Probabilistic Modeling Of "
        "Features",
        "Ibrahima Ndiour, Nilesh Ahuja, Omesh Tickoo",
        "arXiv",
        2020,
        "https://arxiv.org/abs/2012.04250",
    )
    search = spaces(
        dim=Choice((None, 256, 512, 1000), "OpenOOD takes 512, and sweeps 256 and 1000 for ViM")
    )
    dim: PositiveInt | None = None
    origin: Origin = "head"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"} if self.origin == "head" else {"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMoments(),)

    def fit(self, store: FeatureStore) -> State:
        return subspace(store, self.dim, self.origin, self.kind)

    def score(self, features: Features, state: State) -> Tensor:
        return -residual(features, state)


class ViM(Scorer):
    """``log sum_k exp(z_k) - alpha ||R' (h - u)||_2``, in logits, of either sign.

    R and u are those of ``residual``, and alpha is the mean largest logit over the mean residual of
    the training rows. It ranks as the paper's probability of the virtual logit does. A negative
    alpha (mean largest logit below 0) would reward residuals; a warning says so.

    Args:
        dim: of the principal subspace; left out, 1000 from D = 2048 on, 512 from D = 768 on, and
            half of D below.
        origin: u: ``head`` for the paper's, ``mean`` for the mean of the training embeddings.
    """

    kind = "vim"
    paper = Paper(
        "ViM: Out-Of-Distribution with Virtual-logit Matching",
        "Haoqi Wang, Zhizhong Li, Litong Feng, Wayne Zhang",
        "CVPR",
        2022,
        "https://arxiv.org/abs/2203.10807",
    )
    search = spaces(
        dim=Choice(
            (None, 256, 512, 1000), "OpenOOD sweeps 256 and 1000; the authors take 512 or 1000"
        )
    )
    dim: PositiveInt | None = None
    origin: Origin = "head"

    def needs(self) -> frozenset[str]:
        head = {"head"} if self.origin == "head" else set()
        return frozenset({"embeddings", "logits"} | head)

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMoments(),)

    def fit(self, store: FeatureStore) -> State:
        return subspace(store, self.dim, self.origin, self.kind)

    def measure(self, features: Features, state: State) -> Tensor | None:
        rows = required(features.embeddings, "embeddings") - state["origin"]
        largest = required(features.logits, "logits").amax(dim=1)
        left = torch.linalg.vector_norm(rows @ state["null"], dim=1)
        return torch.stack([largest, left, torch.linalg.vector_norm(rows, dim=1)], dim=1)

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        largest, left, whole = rows.mean(dim=0)
        if left <= 1e-10 * whole:
            raise DataError(
                "vim: the training rows lie within the principal subspace, so their residual has "
                "no scale; give a smaller dim or more rows"
            )
        if largest < 0:
            warnings.warn(
                f"vim: the mean largest logit is {float(largest):.4g}, so alpha is negative and a "
                "larger residual raises the score",
                stacklevel=2,
            )
        return {**state, "alpha": largest / left}

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        return logits.logsumexp(dim=1) - state["alpha"] * residual(features, state)


def subspace(store: FeatureStore, dim: int | None, origin: Origin, who: str) -> State:
    """``origin [D]`` and ``null [D, D - dim]``, the directions of least variance about it.

    Raises:
        ConfigurationError: a dim that leaves no direction.
        DataError: the origin is the head's, and there is no head.
    """
    moments = store[ClassMoments()]
    size = moments.scatter.shape[0]
    dim = principal(size) if dim is None else dim
    if dim >= size:
        raise ConfigurationError(
            f"{who}: the principal subspace has dim {dim}, and embeddings have {size}: nothing is "
            f"left; give a dim below {size}"
        )
    centre = moments.total_mean
    if origin == "head":
        if store.head is None:
            raise DataError(
                f"{who}: the origin comes from the head, and these features have none; give a "
                "head, or origin: mean"
            )
        centre = silent(store.head).to(centre)
    directions = torch.linalg.eigh(second_moment(moments, centre)).eigenvectors
    return {"origin": centre, "null": directions[:, : size - dim].contiguous()}


def principal(size: int) -> int:
    """The dimension of the principal subspace that ViM's authors choose for D."""
    return 1000 if size >= 2048 else 512 if size >= 768 else size // 2


def silent(head: Head) -> Tensor:
    """The embedding nearest to 0 at which the head's logits are nearest to 0, ``-W^+ b``."""
    weight = head.scale * (unit(head.weight) if head.normalize_weight else head.weight)
    if head.bias is None:
        return torch.zeros_like(weight[0])
    return -torch.linalg.pinv(weight, rtol=HEAD_CUT_OFF) @ head.bias


def second_moment(moments: Moments, origin: Tensor) -> Tensor:
    """``sum_i (h_i - origin)(h_i - origin)' / N``, ``[D, D]``."""
    shift = moments.total_mean - origin
    return moments.total_covariance + torch.outer(shift, shift)


def residual(features: Features, state: State) -> Tensor:
    """``||R' (h - u)||_2``, ``[N]``."""
    rows = required(features.embeddings, "embeddings") - state["origin"]
    return torch.linalg.vector_norm(rows @ state["null"], dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Residual)
    register(ViM)
