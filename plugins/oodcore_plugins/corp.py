"""CoP and CoRP: how badly kernel PCA of the training rows reconstructs a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.moments import Moments
from oodcore.statistics import ClassMoments, Normalized, State

PAPER = Paper(
    "Kernel PCA for Out-of-Distribution Detection",
    "Kun Fang, Qinghua Tao, Kexin Lv, Mingzhen He, Xiaolin Huang, Jie Yang",
    "NeurIPS",
    2024,
    "https://arxiv.org/abs/2402.02949",
)

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Fourier:
    """Random Fourier features and what they are like in training: ``frequencies [D, M]``,
    ``phases [M]``, and ``moments`` of the features ``[M]`` of all rows."""

    frequencies: Tensor
    phases: Tensor
    moments: Moments


class FourierMoments(Statistic):
    """Mean and scatter of random Fourier features of embeddings of unit norm; 8 dims^2 bytes.

    Labels are not used.

    Args:
        dims: M, how many features.
        gamma: of the Gaussian kernel ``exp(-gamma ||a - b||^2)``.
        seed: of the frequencies and phases.
    """

    kind = "fourier_moments"
    dims: PositiveInt = 2048
    gamma: PositiveFloat = 2.0
    seed: int = 0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        generator = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(shape.D, self.dims, generator=generator, dtype=torch.float64)
        uniform = torch.rand(self.dims, generator=generator, dtype=torch.float64)
        return {
            "frequencies": (math.sqrt(2 * self.gamma) * normal).to(shape.device),
            "phases": (2 * math.pi * uniform).to(shape.device),
            "moments": ClassMoments().init(Shape(1, self.dims, device=shape.device)),
        }

    def update(self, state: State, features: Features) -> State:
        rows = fourier(features, state["frequencies"], state["phases"])
        return {**state, "moments": ClassMoments().update(state["moments"], Features(rows))}

    def merge(self, a: State, b: State) -> State:
        return {**a, "moments": ClassMoments().merge(a["moments"], b["moments"])}

    def view(self, state: State) -> Any:
        moments = ClassMoments().view(state["moments"])
        return Fourier(state["frequencies"].clone(), state["phases"].clone(), moments)


class CoP(Scorer):
    """``-||(I - U U') (phi(h) - m)||_2`` with ``phi(h) = h / ||h||``, at most 0.

    m is the mean of phi over the training rows and U ``[D, q]`` their first principal directions,
    as few as hold the share ``explained`` of the variance. That is the error of reconstructing
    phi(h) from a PCA with the cosine kernel. A zero embedding has phi = 0. Labels are not used. An
    explained share that leaves no direction is refused.

    Args:
        explained: the share of the variance within the subspace. The authors take 0.85 for a
            ResNet-18 on CIFAR-10 and 0.99 for a ResNet-50 on ImageNet.
    """

    kind = "cop"
    paper = PAPER
    explained: Share = 0.85

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Normalized(statistic=ClassMoments()),)

    def fit(self, store: FeatureStore) -> State:
        return subspace(store[self.statistics()[0]], self.explained, self.kind)

    def score(self, features: Features, state: State) -> Tensor:
        return -error(unit(required(features.embeddings, "embeddings")), state)


class CoRP(Scorer):
    """``-||(I - U U') (phi(h) - m)||_2`` with random Fourier features phi, at most 0.

        phi(h) = sqrt(2 / M) cos(W' h / ||h|| + b)

    W ``[D, M]`` are drawn from a normal distribution of variance 2 gamma and b from a uniform one
    in [0, 2 pi), so that products of phi approximate the kernel ``exp(-gamma ||a - b||^2)`` of
    embeddings of unit norm. m is the mean of phi over the training rows and U ``[M, q]`` their
    first principal directions, as few as hold the share ``explained`` of the variance: the error of
    reconstructing phi(h) from a PCA with that kernel. Labels are not used. Fitting keeps 8 M^2
    bytes and takes the eigenvectors of a matrix ``[M, M]`` once.

    The paper also multiplies the error with other scores; ``product`` does that.

    Args:
        explained: the share of the variance within the subspace. The authors take 0.8 for a
            ResNet-18 on CIFAR-10 and 0.5 for a ResNet-50 on ImageNet.
        gamma: of the kernel; the authors take 2 and 3.
        dims: M, how many random features; the authors take 2048 and 4096.
        seed: of W and b.
    """

    kind = "corp"
    paper = PAPER
    explained: Share = 0.8
    gamma: PositiveFloat = 2.0
    dims: PositiveInt = 2048
    seed: int = 0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (FourierMoments(dims=self.dims, gamma=self.gamma, seed=self.seed),)

    def fit(self, store: FeatureStore) -> State:
        known = store[self.statistics()[0]]
        return {
            "frequencies": known.frequencies,
            "phases": known.phases,
            **subspace(known.moments, self.explained, self.kind),
        }

    def score(self, features: Features, state: State) -> Tensor:
        return -error(fourier(features, state["frequencies"], state["phases"]), state)


def fourier(features: Features, frequencies: Tensor, phases: Tensor) -> Tensor:
    """Random Fourier features of embeddings of unit norm, ``[N, M]``."""
    rows = unit(required(features.embeddings, "embeddings"))
    return math.sqrt(2 / len(phases)) * torch.cos(rows @ frequencies + phases)


def subspace(moments: Moments, explained: float, who: str) -> State:
    """``mean [D]`` and ``axes [D, q]``, the fewest directions that hold a share of the variance.

    Raises:
        DataError: the rows do not vary, or every direction is needed.
    """
    variances, directions = torch.linalg.eigh(moments.total_covariance)
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    rounding = torch.finfo(variances.dtype).eps * moments.total_mean.square().sum()
    if not bool(variances.sum() > 64 * rounding):
        raise DataError(f"{who}: the training rows do not vary in direction; give other rows")
    held = variances.cumsum(dim=0) / variances.sum()
    needed = int((held < explained).sum()) + 1
    if needed >= len(held):
        raise DataError(
            f"{who}: a share {explained:g} of the variance takes all {len(held)} directions, and "
            "nothing is left to measure; give a smaller one"
        )
    return {"mean": moments.total_mean, "axes": directions[:, :needed].contiguous()}


def error(rows: Tensor, state: State) -> Tensor:
    """The distance of rows ``[N, D]`` to the subspace, ``[N]``."""
    apart, axes = rows - state["mean"], state["axes"]
    distance: Tensor = torch.linalg.vector_norm(apart - (apart @ axes) @ axes.T, dim=1)
    return distance


@hookimpl
def register_statistics(register: Register) -> None:
    register(FourierMoments)


@hookimpl
def register_scorers(register: Register) -> None:
    register(CoP)
    register(CoRP)
