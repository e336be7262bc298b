"""Mahalanobis distance to the nearest class mean, under one tied covariance."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import ClassMoments, Normalized, State

CUT_OFF = 1e-10
"""Directions whose variance is below this share of the largest carry no information."""


class Mahalanobis(Scorer):
    """``-min_k (h - mu_k)' S^+ (h - mu_k)``, in squared standard deviations, at most 0.

    ``mu_k`` are the class means of the embeddings and ``S`` is the tied within-class covariance,
    divided by the number of rows. ``S^+`` is the pseudo-inverse: directions with less than 1e-10 of
    the largest variance (dead features) are ignored. Classes without rows are left out.

    This is the paper's score on the penultimate features, without its input perturbation (see
    ``perturbed``) and without further layers. With ``normalize`` it is Mahalanobis++ (Maximilian
    Mueller, Matthias Hein, ICML 2025, https://arxiv.org/abs/2505.18032).

    Args:
        normalize: give embeddings unit norm first; a zero row stays zero.
        shrinkage: s, which makes the covariance ``(1 - s) S + s trace(S) / D I``. With s > 0 no
            direction is ignored.
    """

    kind = "mahalanobis"
    paper = Paper(
        "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial "
        "Attacks",
        "Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin",
        "NeurIPS",
        2018,
        "https://arxiv.org/abs/1807.03888",
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
        return {"centre": centre, "whitening": whitening, "means": (means - centre) @ whitening}

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        rows = (unit(rows) if self.normalize else rows) - state["centre"]
        return -nearest(rows @ state["whitening"], state["means"])


def class_moments(normalize: bool) -> Statistic:
    """The class moments of the embeddings, or of embeddings of unit norm."""
    return Normalized(statistic=ClassMoments()) if normalize else ClassMoments()


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """``(1 - s) S + s trace(S) / D I`` of a covariance S ``[D, D]``."""
    size = len(covariance)
    target = covariance.trace() / size * torch.eye(size).to(covariance)
    return (1 - shrinkage) * covariance + shrinkage * target if shrinkage else covariance


def whiten(covariance: Tensor, means: Tensor) -> Tensor:
    """``[D, r]`` with ``whitening @ whitening.T`` the pseudo-inverse of a covariance ``[D, D]``.

    Args:
        covariance: of rows around these means.
        means: ``[K, D]``; rounding makes variances of their own, the larger the means are.

    Raises:
        DataError: the covariance is zero, or its numbers are too large for float64.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise DataError(
            "the covariance of the embeddings is too large for float64: scale them down"
        )
    variances, directions = torch.linalg.eigh(covariance)
    rounding = (64 * torch.finfo(means.dtype).eps * means.abs().max()).square()
    kept = variances > torch.maximum(CUT_OFF * variances[-1], rounding)
    if not bool(kept.any()):
        raise DataError(
            "the embeddings do not vary within their classes, so there is no covariance: "
            "give more than one row a class"
        )
    return directions[:, kept] / variances[kept].sqrt()


def nearest(rows: Tensor, means: Tensor) -> Tensor:
    """The squared Euclidean distance of each row to its nearest mean, ``[N]``.

    One product finds the nearest; only its distance is computed as a difference, free of
    cancellation.
    """
    with torch.no_grad():
        found = (rows @ means.T - means.square().sum(dim=1) / 2).argmax(dim=1)
    return (rows - means[found]).square().sum(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Mahalanobis)
