"""cac: class anchors in the space of the logits, to train on and to measure distances from."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy

import oodcore
from oodcore.features import Features, required
from oodcore.regularizer import Inner
from oodcore.statistics import State, Statistic
from oodcore_plugins.openmax import CorrectLogits

TINY = 1e-24
"""The smallest squared distance whose root is taken; at 0 it has no slope."""

PAPER = oodcore.Paper(
    title="Class Anchor Clustering: A Loss for Distance-based Open Set Recognition",
    authors="Dimity Miller, Niko Sünderhauf, Michael Milford, Feras Dayoub",
    venue="WACV",
    year=2021,
    url="https://arxiv.org/abs/2004.02434",
)


class ClassAnchors(oodcore.Regularizer):
    """Class anchor clustering: the classification loss becomes, for logits ``z`` of class y,

        log(1 + sum_{j != y} exp(d_y - d_j)) + lam * d_y,    d_k = ||z - alpha e_k||_2

    where ``alpha e_k`` is the anchor of class k, a fixed point on the k-th axis. All anchors have
    the same norm, so the nearest is that of the largest logit, and accuracy is measured as ever.
    The scorer ``cac`` belongs to it.

    It replaces the loss, whatever another regularizer makes of it further in. Distances are
    computed in float64, as in the authors' code. There is no term, so a ``weight`` above 0 means
    nothing more than that it takes part.

    Args:
        alpha: the norm of the anchors, in units of the logits.
        lam: of the distance to the own anchor, per unit of the logits.
        weight: 0 switches it off.

    Raises a DataError if the features have no logits.
    """

    kind = "cac"
    replaces_loss = True
    paper = PAPER

    alpha: PositiveFloat = 10.0
    lam: NonNegativeFloat = 0.1

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: oodcore.Step, state: Any
    ) -> Tensor:
        logits = required(rows.logits, "logits")
        distances = anchor_distances(logits.double(), self.alpha)
        # The first part is the cross-entropy of the softmin of the distances.
        apart = cross_entropy(-distances, labels, reduction="none")
        own = distances.gather(1, labels[:, None])[:, 0]
        return (apart + self.lam * own).to(logits)


class AnchorDistance(oodcore.Scorer):
    """``-min_k d_k (1 - softmin(d)_k)``, d_k the Euclidean distance of the logits to the centre of
    class k, in units of the logits.

    Meant for a network that was trained with the regularizer ``cac``. The centres are, as in the
    authors' code, the mean logits of each class's correctly classified training rows; the centre of
    a class without such rows is its anchor.

    Args:
        centers: "means", or "anchors": the points ``alpha e_k`` that the network was trained on,
            for which nothing is fitted.
        alpha: the norm of the anchors, as in training.

    Raises a DataError if the features have no logits.
    """

    kind = "cac"
    paper = PAPER

    centers: Literal["means", "anchors"] = "means"
    alpha: PositiveFloat = 10.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (CorrectLogits(),) if self.centers == "means" else ()

    def fit(self, store: oodcore.FeatureStore) -> State:
        if self.centers == "anchors":
            return {}
        found = store[CorrectLogits()]
        anchors = self.alpha * torch.eye(len(found.count)).to(found.mean)
        return {"centers": torch.where(found.count[:, None] > 0, found.mean, anchors)}

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        if self.centers == "anchors":
            return -rejections(anchor_distances(logits, self.alpha)).amin(dim=1)
        # The usual way to many distances at once subtracts large numbers.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(logits, state["centers"], compute_mode=mode)
        return -rejections(distances).amin(dim=1)


def anchor_distances(logits: Tensor, alpha: float) -> Tensor:
    """``||z - alpha e_k||_2`` of logits ``[N, K]`` and every k, ``[N, K]``."""
    squares = logits.square()
    others = (squares.sum(dim=1, keepdim=True) - squares).clamp_min(0)
    return (others + (logits - alpha).square()).clamp_min(TINY).sqrt()


def rejections(distances: Tensor) -> Tensor:
    """``d_k (1 - softmin(d)_k)``, ``[N, K]``."""
    shares = (-distances).softmax(dim=1)
    nearest = distances.argmin(dim=1, keepdim=True)
    # 1 - p loses its digits where p is near 1; the sum of the others does not.
    others = shares.scatter(1, nearest, 0).sum(dim=1, keepdim=True)
    return distances * (1 - shares).scatter(1, nearest, others)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(ClassAnchors)


@oodcore.hookimpl
def register_scorers(register: Any) -> None:
    register(AnchorDistance)
