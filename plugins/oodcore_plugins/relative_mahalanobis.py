"""Relative Mahalanobis distance: to the nearest class, less that to all rows together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.mahalanobis import class_moments, nearest, shrunk, whiten


class RelativeMahalanobis(Scorer):
    """``-(min_k MD_k(h) - MD_0(h))``, in squared standard deviations, of either sign.

    ``MD_k(h) = (h - mu_k)' S^+ (h - mu_k)`` with the class means and the tied within-class
    covariance, as in ``mahalanobis``; ``MD_0(h) = (h - mu)' T^+ (h - mu)`` with the mean and the
    covariance of all rows together. Both covariances are divided by the number of rows, and each
    pseudo-inverse ignores directions with less than 1e-10 of its largest variance. Classes without
    rows are left out. With one class the score is 0 for every row.

    Args:
        normalize: give embeddings unit norm first; a zero row stays zero.
        shrinkage: s, which makes each covariance ``(1 - s) S + s trace(S) / D I``. With s > 0 no
            direction is ignored.
    """

    kind = "relative_mahalanobis"
    paper = Paper(
        "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
        "Jie Ren, Stanislav Fort, Jeremiah Liu, Abhijit Guha Roy, Shreyas Padhy, Balaji "
        "Lakshminarayanan",
        "arXiv",
        2021,
        "https://arxiv.org/abs/2106.09022",
    )
    normalize: bool = False
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (class_moments(self.normalize),)

    def fit(self, store: FeatureStore) -> State:
        moments = store[class_moments(self.normalize)]
        whitening = whiten(shrunk(moments.covariance, self.shrinkage), moments.mean)
        centre = moments.total_mean
        means = moments.mean[moments.present]
        return {
            "centre": centre,
            "whitening": whitening,
            "means": (means - centre) @ whitening,
            "background": whiten(shrunk(moments.total_covariance, self.shrinkage), moments.mean),
        }

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        rows = (unit(rows) if self.normalize else rows) - state["centre"]
        background = (rows @ state["background"]).square().sum(dim=1)
        return background - nearest(rows @ state["whitening"], state["means"])


@hookimpl
def register_scorers(register: Register) -> None:
    register(RelativeMahalanobis)
