"""Moments: counts, means and scatters of embeddings, norms and softmax outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodcore.features import Features, required
from oodcore.statistic import Shape, State, Statistic, assigned

STRIPE = 128
"""Lines of a symmetric product that are computed together, from the diagonal on."""


def _sums(rows: Tensor, classes: Tensor, count: int) -> Tensor:
    return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, classes, rows)


def _add_products(scatter: Tensor, rows: Tensor) -> None:
    """Add ``rows.T @ rows`` to a matrix, of which what is below the diagonal does not count."""
    for first in range(0, len(scatter), STRIPE):
        stripe = rows[:, first : first + STRIPE]
        scatter[first : first + STRIPE, first:].addmm_(stripe.T, rows[:, first:])


@dataclass(frozen=True)
class Moments:
    """Class moments: ``count [K]``, ``mean [K, D]`` (zero where a class is absent), and
    ``scatter [D, D]``, the sum over rows of outer products of ``x - mean of its class``."""

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return int(self.count.sum())

    @property
    def present(self) -> Tensor:
        """Which classes occur, ``[K]`` bool."""
        return self.count > 0

    @property
    def covariance(self) -> Tensor:
        """The tied within-class covariance, ``scatter / N``, ``[D, D]``."""
        return self.scatter / self.count.sum()

    @property
    def total_mean(self) -> Tensor:
        """The mean of all rows, ``[D]``."""
        return (self.count / self.count.sum()) @ self.mean

    @property
    def total_scatter(self) -> Tensor:
        """The sum over rows of outer products of ``x - total_mean``, ``[D, D]``."""
        between = (self.mean - self.total_mean) * self.count.sqrt()[:, None]
        return self.scatter + between.T @ between

    @property
    def total_covariance(self) -> Tensor:
        """``total_scatter / N``, ``[D, D]``."""
        return self.total_scatter / self.count.sum()


class ClassMoments(Statistic):
    """Count and mean per class, and the tied scatter (Chan, Golub and LeVeque, 1983)."""

    kind = "class_moments"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        mean = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {
            "count": mean.new_zeros(shape.K),
            "mean": mean,
            "scatter": mean.new_zeros(shape.D, shape.D),
        }

    def update(self, state: State, features: Features) -> State:
        rows, classes = required(features.embeddings, "embeddings"), assigned(features)
        present, place = torch.unique(classes, return_inverse=True)
        count = _sums(rows.new_ones(len(rows)), place, len(present))
        mean = _sums(rows, place, len(present)).div_(count[:, None])
        before = state["count"][present]
        share = count / (before + count)
        shift = mean - state["mean"][present]
        # About this point the outer products of a class's rows add up to those about their mean,
        # and to what the two means' distance contributes: there is nothing else to multiply.
        about = mean - shift * (before / (before + count)).sqrt()[:, None]
        inside = torch.index_select(about, 0, place)
        _add_products(state["scatter"], torch.sub(rows, inside, out=inside))
        state["mean"].index_add_(0, present, shift.mul_(share[:, None]))
        state["count"].index_add_(0, present, count)
        return state

    def merge(self, a: State, b: State) -> State:
        count = a["count"] + b["count"]
        shift = b["mean"] - a["mean"]
        share = b["count"] / count.clamp_min(1)
        both = ((a["count"] > 0) & (b["count"] > 0)).nonzero().flatten()
        between = shift[both] * (a["count"] * share)[both].sqrt()[:, None]
        return {
            "count": count,
            "mean": a["mean"] + shift * share[:, None],
            "scatter": a["scatter"] + b["scatter"] + between.T @ between,
        }

    def view(self, state: State) -> Moments:
        upper = state["scatter"].triu()
        scatter = upper + upper.triu(diagonal=1).T
        return Moments(state["count"].clone(), state["mean"].clone(), scatter)


@dataclass(frozen=True)
class Norms:
    """Norms of embeddings per class: ``count``, ``mean``, ``variance`` (over the count),
    ``minimum`` and ``maximum``, each ``[K]``; an absent class has count 0, and infinite
    extremes."""

    count: Tensor
    mean: Tensor
    variance: Tensor
    minimum: Tensor
    maximum: Tensor


_LARGEST = torch.finfo(torch.float64).max
"""Stands for an extreme of no rows: what is saved is finite."""


class NormMoments(Statistic):
    """Count, mean, variance, minimum and maximum of the embedding norm, per class."""

    kind = "norm_moments"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        zeros = torch.zeros(shape.K, dtype=torch.float64, device=shape.device)
        return {
            "count": zeros,
            "mean": zeros.clone(),
            "squares": zeros.clone(),
            "minimum": torch.full_like(zeros, _LARGEST),
            "maximum": torch.full_like(zeros, -_LARGEST),
        }

    def update(self, state: State, features: Features) -> State:
        norms = required(features.embeddings, "embeddings").norm(dim=1)
        classes, size = assigned(features), len(state["count"])
        count = _sums(torch.ones_like(norms), classes, size)
        mean = _sums(norms, classes, size) / count.clamp_min(1)
        batch = {
            "count": count,
            "mean": mean,
            "squares": _sums((norms - mean[classes]).square(), classes, size),
            "minimum": torch.full_like(count, _LARGEST).scatter_reduce(0, classes, norms, "amin"),
            "maximum": torch.full_like(count, -_LARGEST).scatter_reduce(0, classes, norms, "amax"),
        }
        return self.merge(state, batch)

    def merge(self, a: State, b: State) -> State:
        count = a["count"] + b["count"]
        shift = b["mean"] - a["mean"]
        share = b["count"] / count.clamp_min(1)
        return {
            "count": count,
            "mean": a["mean"] + shift * share,
            "squares": a["squares"] + b["squares"] + shift.square() * a["count"] * share,
            "minimum": torch.minimum(a["minimum"], b["minimum"]),
            "maximum": torch.maximum(a["maximum"], b["maximum"]),
        }

    def view(self, state: State) -> Norms:
        count, absent = state["count"].clone(), state["count"] == 0
        return Norms(
            count,
            state["mean"].clone(),
            state["squares"] / count.clamp_min(1),
            state["minimum"].masked_fill(absent, float("inf")),
            state["maximum"].masked_fill(absent, float("-inf")),
        )


@dataclass(frozen=True)
class Logits:
    """Softmax means: ``count [K]`` rows per class, ``prior [K]``, ``predicted_count [K]``,
    ``mean_by_class [K, K]`` and ``mean_by_predicted [K, K]`` (row: the class; zero if absent)."""

    count: Tensor
    predicted_count: Tensor
    mean_by_class: Tensor
    mean_by_predicted: Tensor

    @property
    def prior(self) -> Tensor:
        """The share of each class among the rows, ``[K]``."""
        return self.count / self.count.sum()


class LogitMoments(Statistic):
    """Class prior, and the mean softmax of the rows of each true and of each predicted class."""

    kind = "logit_moments"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def init(self, shape: Shape) -> State:
        zeros = torch.zeros(shape.K, shape.K + 1, dtype=torch.float64, device=shape.device)
        return {
            "count": zeros[:, 0].clone(),
            "predicted_count": zeros[:, 0].clone(),
            "by_class": zeros[:, 1:].clone(),
            "by_predicted": zeros[:, 1:].clone(),
        }

    def update(self, state: State, features: Features) -> State:
        softmax = required(features.logits, "logits").softmax(dim=1)
        ones = torch.ones_like(softmax[:, 0])
        for classes, count, total in (
            (assigned(features), "count", "by_class"),
            (features.predicted, "predicted_count", "by_predicted"),
        ):
            state[count].index_add_(0, classes, ones)
            state[total].index_add_(0, classes, softmax)
        return state

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Logits:
        count, predicted = state["count"].clone(), state["predicted_count"].clone()
        return Logits(
            count,
            predicted,
            state["by_class"] / count.clamp_min(1)[:, None],
            state["by_predicted"] / predicted.clamp_min(1)[:, None],
        )


@dataclass(frozen=True)
class Means:
    """``count [K]`` and ``mean [K, D]``, zero where there was no row."""

    count: Tensor
    mean: Tensor

    @property
    def present(self) -> Tensor:
        """Which classes occur, ``[K]`` bool."""
        return self.count > 0

    @property
    def total_mean(self) -> Tensor:
        """The mean of all rows, ``[D]``."""
        return (self.count / self.count.sum()) @ self.mean


class ClassMeans(Statistic):
    """Count and mean per class: ``class_moments`` without the scatter, which costs D times more."""

    kind = "class_means"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        zeros = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {"count": zeros.new_zeros(shape.K), "total": zeros}

    def update(self, state: State, features: Features) -> State:
        return _add_rows(state, required(features.embeddings, "embeddings"), assigned(features))

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Means:
        return _means(state)


def _add_rows(state: State, rows: Tensor, classes: Tensor) -> State:
    state["count"].index_add_(0, classes, rows.new_ones(len(rows)))
    state["total"].index_add_(0, classes, rows)
    return state


def _means(state: State) -> Means:
    count = state["count"].clone()
    return Means(count, state["total"] / count.clamp_min(1)[:, None])


class CorrectMeans(Statistic):
    """The mean embedding of each class's correctly classified rows."""

    kind = "correct_means"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def init(self, shape: Shape) -> State:
        zeros = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {"count": zeros.new_zeros(shape.K), "total": zeros}

    def update(self, state: State, features: Features) -> State:
        classes = assigned(features)
        correct = classes == features.predicted
        return _add_rows(
            state, required(features.embeddings, "embeddings")[correct], classes[correct]
        )

    def merge(self, a: State, b: State) -> State:
        return {name: total + b[name] for name, total in a.items()}

    def view(self, state: State) -> Means:
        return _means(state)
