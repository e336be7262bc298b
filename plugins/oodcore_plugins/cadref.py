"""CARef and CADRef: how far an embedding is from the mean of its predicted class, relatively."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import EPS, required
from oodcore.hookspecs import Register
from oodcore.moments import Means
from oodcore.statistics import State
from oodcore_plugins.gen import log_variance

PAPER = Paper(
    "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature "
    "Leveraging",
    "Zhiwei Ling, Yachen Chang, Hailiang Zhao, Xinkui Zhao, Kingsum Chow, Shuiguang Deng",
    "CVPR",
    2025,
    "https://arxiv.org/abs/2503.00325",
)

Confidence = Literal["energy", "max_logit", "msp", "gen"]

FLOOR = 1e-6
"""The least confidence that is divided by, as a share of the mean one."""


class PredictedMeans(Statistic):
    """The mean embedding of the rows that are predicted as each class: ``count [K]``,
    ``mean [K, D]``, zero where there is no row."""

    kind = "predicted_means"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def init(self, shape: Shape) -> State:
        total = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {"count": total.new_zeros(shape.K), "total": total}

    def update(self, state: State, features: Features) -> State:
        rows, classes = required(features.embeddings, "embeddings"), features.predicted
        state["count"].index_add_(0, classes, rows.new_ones(len(rows)))
        state["total"].index_add_(0, classes, rows)
        return state

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Any:
        count = state["count"].clone()
        return Means(count, state["total"] / count.clamp_min(1)[:, None])


@dataclass(frozen=True)
class Level:
    """The ``mean`` confidence over ``count`` rows, each one number."""

    count: Tensor
    mean: Tensor


class MeanConfidence(Statistic):
    """The mean confidence of the predictions.

    Args:
        confidence: as in ``cadref``.
    """

    kind = "mean_confidence"
    confidence: Confidence = "energy"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def init(self, shape: Shape) -> State:
        zero = torch.zeros((), dtype=torch.float64, device=shape.device)
        return {"count": zero, "total": zero.clone()}

    def update(self, state: State, features: Features) -> State:
        values = confidences(required(features.logits, "logits"), self.confidence)
        return {"count": state["count"] + len(values), "total": state["total"] + values.sum()}

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Any:
        return Level(state["count"].clone(), state["total"] / state["count"].clamp_min(1))


class CARef(Scorer):
    """``-||h - mu_y||_1 / ||h||_1`` with y the predicted class, at most 0.

    ``mu_k`` is the mean embedding of the training rows that are predicted as class k; their labels
    are not used. A class that is never predicted has the mean of all rows (the authors' code has no
    number there). The norm of a zero embedding counts as 1e-12. The score jumps where the predicted
    class changes.
    """

    kind = "caref"
    paper = PAPER

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (PredictedMeans(),)

    def fit(self, store: FeatureStore) -> State:
        return {"means": class_means(store[PredictedMeans()])}

    def score(self, features: Features, state: State) -> Tensor:
        return -relative(features, state).abs().sum(dim=1)


class CADRef(Scorer):
    """``-(E_p / S + E_n / S_train)`` with y the predicted class, of a positive confidence S.

        E_p = sum_i max(sign(w_yi) (h_i - mu_yi), 0) / ||h||_1
        E_n = sum_i max(-sign(w_yi) (h_i - mu_yi), 0) / ||h||_1

    w_y is the row of the head's weight for class y, and mu_y the mean embedding of the training
    rows that are predicted as y, as in ``caref``, whose error this divides in two: what raises the
    predicted logit above that of the class's mean, and what lowers it. The first is divided by the
    confidence ``S = S(z)`` of the row, the second by the mean confidence of the training rows. A
    dimension of weight 0 counts in neither.

    The paper prints the sign of ``w_yi h_i``; its text and the authors' code mean the relative
    feature, as here. A confidence below 1e-6 of the mean one counts as that, so that rows of no or
    of negative confidence come last instead of first; a mean that is not positive is refused.

    Args:
        confidence: S: ``energy``, logsumexp(z), the paper's choice; ``max_logit``; ``msp``, the
            largest softmax probability; or ``gen``, one over the sum of ``p^0.1 (1 - p)^0.1`` over
            the max(10, K / 10) largest probabilities, as in the authors' code.
    """

    kind = "cadref"
    paper = PAPER
    confidence: Confidence = "energy"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (PredictedMeans(), MeanConfidence(confidence=self.confidence))

    def fit(self, store: FeatureStore) -> State:
        level = store[MeanConfidence(confidence=self.confidence)].mean
        if not bool(level > 0):
            raise DataError(
                f"cadref: the mean confidence of the training rows ({self.confidence}) is "
                f"{float(level):.4g}, and errors are divided by it; give confidence: msp"
            )
        return {"means": class_means(store[PredictedMeans()]), "level": level}

    def score(self, features: Features, state: State) -> Tensor:
        logits, head = required(features.logits, "logits"), features.head
        if head is None:
            raise DataError("cadref: the signs are those of the head's weight, and there is none")
        aligned = relative(features, state) * head.weight[features.predicted].sign()
        level = state["level"].to(logits)
        own = confidences(logits, self.confidence).clamp_min(FLOOR * level)
        raises = aligned.clamp_min(0).sum(dim=1) / own
        score: Tensor = -(raises + (-aligned).clamp_min(0).sum(dim=1) / level)
        return score


def relative(features: Features, state: State) -> Tensor:
    """``(h - mu_y) / ||h||_1``, ``[N, D]``."""
    rows, means = required(features.embeddings, "embeddings"), state["means"].to(features.device)
    norms = rows.abs().sum(dim=1, keepdim=True).clamp_min(EPS)
    errors: Tensor = (rows - means[features.predicted]) / norms
    return errors


def class_means(known: Means) -> Tensor:
    """The mean of each class, ``[K, D]``, and that of all rows where a class has none."""
    overall: Tensor = (known.count / known.count.sum()) @ known.mean
    return torch.where(known.count[:, None] > 0, known.mean, overall)


def confidences(logits: Tensor, confidence: Confidence) -> Tensor:
    """The confidence S of each row, ``[N]``."""
    if confidence == "energy":
        return logits.logsumexp(dim=1)
    if confidence == "max_logit":
        return logits.amax(dim=1)
    if confidence == "msp":
        return logits.softmax(dim=1).amax(dim=1)
    top = min(max(10, logits.shape[1] // 10), logits.shape[1])
    largest = logits.detach().topk(top, dim=1).indices
    entropy = (0.1 * log_variance(logits).gather(1, largest)).exp().sum(dim=1)
    return 1 / entropy.clamp_min(EPS)


@hookimpl
def register_statistics(register: Register) -> None:
    register(PredictedMeans)
    register(MeanConfidence)


@hookimpl
def register_scorers(register: Register) -> None:
    register(CARef)
    register(CADRef)
