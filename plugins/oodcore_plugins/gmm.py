"""GMM: the log-density of an embedding under one Gaussian a class, as in DDU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import ClassMoments, State, assigned


@dataclass(frozen=True)
class Scatters:
    """``count [K]``, ``mean [K, D]`` (zero where a class is absent) and ``scatter [K, D, D]``, for
    each class the sum over its rows of outer products of ``x - mean``."""

    count: Tensor
    mean: Tensor
    scatter: Tensor


class ClassScatters(Statistic):
    """Count, mean and scatter of the embeddings of each class; 8 K D^2 bytes.

    Batches and parts are put together by the update of Chan, Golub and LeVeque (1983).
    """

    kind = "class_scatters"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        mean = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {
            "count": mean.new_zeros(shape.K),
            "mean": mean,
            "scatter": mean.new_zeros(shape.K, shape.D, shape.D),
        }

    def update(self, state: State, features: Features) -> State:
        rows, classes = required(features.embeddings, "embeddings"), assigned(features)
        present, counts = torch.unique(classes, return_counts=True)
        grouped = torch.split(rows[classes.argsort(stable=True)], counts.tolist())
        for number, some in zip(present.tolist(), grouped, strict=True):
            mean, before = some.mean(dim=0), float(state["count"][number])
            share = len(some) / (before + len(some))
            shift = mean - state["mean"][number]
            inside = torch.cat([some - mean, shift[None] * math.sqrt(before * share)])
            state["scatter"][number].addmm_(inside.T, inside)
            state["mean"][number] += shift * share
            state["count"][number] += len(some)
        return state

    def merge(self, a: State, b: State) -> State:
        count = a["count"] + b["count"]
        shift = b["mean"] - a["mean"]
        share = b["count"] / count.clamp_min(1)
        scatter = a["scatter"] + b["scatter"]
        for number in ((a["count"] > 0) & (b["count"] > 0)).nonzero().flatten().tolist():
            between = shift[number] * (a["count"] * share)[number].sqrt()
            scatter[number].addr_(between, between)
        return {"count": count, "mean": a["mean"] + shift * share[:, None], "scatter": scatter}

    def view(self, state: State) -> Any:
        return Scatters(*(state[name].clone() for name in ("count", "mean", "scatter")))


class GMM(Scorer):
    """``log sum_k pi_k N(h; mu_k, S_k)``, in nats, of either sign.

    ``mu_k`` and ``S_k`` are mean and covariance of the training embeddings of class k. Before it is
    inverted, the jitter is added to each covariance: ``S_k + jitter v I``, v the mean variance of a
    dimension within the classes. The authors add the smallest absolute number with which every
    Cholesky factorisation succeeds; that is at the level of rounding, and a share of the variance
    does not depend on the embeddings' units. A class with no more rows than D has directions whose
    variance is the jitter alone, so that its density is high close to its rows and low everywhere
    else: give more rows or a larger jitter, or share one covariance. Classes without rows are left
    out. Embeddings that do not vary within their classes are refused.

    The authors train with spectral normalisation, which is not done here. Fitting and scoring take
    8 K D^2 bytes, and a row K products with a matrix ``[D, D]``; with ``shared``, D^2 and one.

    Args:
        shared: one covariance for all classes, that of rows about the means of their classes.
        prior: pi_k: ``train``, the share of class k among the training rows, as in the paper; or
            ``uniform``, which ranks as the authors' code does.
        unbiased: divide by the number of rows of a class less 1, as the authors' code does (of all
            rows less the number of classes, with ``shared``); otherwise by the number of rows.
        jitter: what is added to each variance, as a share of the mean variance.
    """

    kind = "gmm"
    paper = Paper(
        "Deep Deterministic Uncertainty: A New Simple Baseline",
        "Jishnu Mukhoti, Andreas Kirsch, Joost van Amersfoort, Philip H. S. Torr, Yarin Gal",
        "CVPR",
        2023,
        "https://arxiv.org/abs/2102.11582",
    )
    shared: bool = False
    prior: Literal["train", "uniform"] = "train"
    unbiased: bool = True
    jitter: NonNegativeFloat = 1e-6

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMoments(),) if self.shared else (ClassScatters(),)

    def fit(self, store: FeatureStore) -> State:
        moments = store[self.statistics()[0]]
        present = moments.count > 0
        means, counts = moments.mean[present], moments.count[present]
        if self.shared:
            scatter, degrees = moments.scatter[None], (counts.sum() - len(counts))[None]
        else:
            scatter, degrees = moments.scatter[present], counts - 1
        rows = counts.sum()[None] if self.shared else counts
        variance = self._variance(scatter, counts.sum(), means)
        covariance = scatter / (degrees.clamp_min(1) if self.unbiased else rows)[:, None, None]
        covariance.diagonal(dim1=1, dim2=2).add_(self.jitter * variance)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if bool(failed.any()):
            which = int(present.nonzero()[int(failed.nonzero()[0])])
            whose = "the shared covariance" if self.shared else f"the covariance of class {which}"
            raise DataError(f"gmm: {whose} is singular; give a larger jitter, or more rows")
        size = means.shape[1]
        identity = torch.eye(size).to(factor).expand_as(factor)
        whitening = torch.linalg.solve_triangular(factor, identity, upper=False).mT.contiguous()
        log_volume = factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        shares = counts / counts.sum() if self.prior == "train" else counts.new_ones(len(counts))
        levels = (shares / shares.sum()).log() - log_volume - size / 2 * math.log(2 * math.pi)
        if not self.shared:
            return {"means": means, "whitening": whitening, "levels": levels}
        centre = moments.total_mean
        return {
            "centre": centre,
            "means": (means - centre) @ whitening[0],
            "whitening": whitening[0],
            "levels": levels,
        }

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        if self.shared:
            white = (rows - state["centre"]) @ state["whitening"]
            distances = squared_distances(white, state["means"])
        else:
            # One class after the other: all at once would hold N K D numbers.
            parts = zip(state["means"], state["whitening"], strict=True)
            columns = [((rows - mean) @ white).square().sum(dim=1) for mean, white in parts]
            distances = torch.stack(columns, dim=1)
        density: Tensor = (state["levels"] - distances / 2).logsumexp(dim=1)
        return density

    def _variance(self, scatter: Tensor, rows: Tensor, means: Tensor) -> Tensor:
        """The mean over dimensions of the variance within classes, if there is any."""
        if not bool(torch.isfinite(scatter).all()):
            raise DataError(
                "gmm: the covariance of the embeddings is too large for float64: scale them down"
            )
        variance = scatter.diagonal(dim1=1, dim2=2).sum() / (rows * means.shape[1])
        rounding = (64 * torch.finfo(means.dtype).eps * means.abs().max()).square()
        if not bool(variance > rounding):
            raise DataError(
                "gmm: the embeddings do not vary within their classes, so there is no covariance: "
                "give more than one row a class"
            )
        return variance


def squared_distances(rows: Tensor, means: Tensor) -> Tensor:
    """Squared Euclidean distances ``[N, K]``, as differences but without N K D numbers at once."""
    distances: Tensor = torch.cdist(rows, means, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square()


@hookimpl
def register_statistics(register: Register) -> None:
    register(ClassScatters)


@hookimpl
def register_scorers(register: Register) -> None:
    register(GMM)
