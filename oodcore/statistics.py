"""Statistic and the ones the core ships: mergeable summaries of Features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from oodcore.component import Component, Slot
from oodcore.data import hashed
from oodcore.errors import DataError
from oodcore.features import Features, required
from oodcore.hookspecs import Register, hookimpl
from oodcore.index import Index, Rows

State = Mapping[str, Any]
"""What a component has learnt: ``Tensor | Rows | Index | State`` by name (``[a-z0-9_]+``)."""


@dataclass(frozen=True)
class Shape:
    """Sizes that a statistic needs to begin: K classes, D embedding size, and sizes of layers.

    ``D`` is 0 where there are no embeddings; ``layers`` gives ``(C, ...)`` of one row, by name.
    """

    K: int
    D: int
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")


class Statistic(Component):
    """A summary of features that is updated batch by batch and merged in any order.

    ``update`` owns the state it is given and may reuse its storage. ``merge`` is associative, and
    commutative up to rounding. Floating numbers in a state are float64.
    """

    slot: ClassVar[str] = "statistic"

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The fields of Features that it reads: "embeddings", "logits", "layers.<name>"."""

    @abstractmethod
    def init(self, shape: Shape) -> State:
        """The state before any row."""

    @abstractmethod
    def update(self, state: State, features: Features) -> State:
        """The state after these rows too."""

    @abstractmethod
    def merge(self, a: State, b: State) -> State:
        """The state after the rows of both."""

    def view(self, state: State) -> Any:
        """What scorers see: a small dataclass with named fields."""
        return state


def assigned(features: Features) -> Tensor:
    """Each row's class, ``[N]``: its label, else the predicted class, else 0."""
    if features.labels is not None:
        return features.labels
    if features.logits is not None:
        return features.predicted
    rows = required(features.embeddings, "embeddings")
    return torch.zeros(len(features), dtype=torch.int64, device=rows.device)


def _sums(rows: Tensor, classes: Tensor, count: int) -> Tensor:
    return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, classes, rows)


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
    """Count and mean per class, and the tied scatter, updated as Chan, Golub and LeVeque (1983)."""

    kind = "class_moments"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: Shape) -> State:
        zeros = {"dtype": torch.float64, "device": shape.device}
        return {
            "count": torch.zeros(shape.K, **zeros),  # type: ignore[arg-type]
            "mean": torch.zeros(shape.K, shape.D, **zeros),  # type: ignore[arg-type]
            "scatter": torch.zeros(shape.D, shape.D, **zeros),  # type: ignore[arg-type]
        }

    def update(self, state: State, features: Features) -> State:
        rows, classes = required(features.embeddings, "embeddings"), assigned(features)
        count = _sums(torch.ones_like(rows[:, 0]), classes, len(state["count"]))
        mean = _sums(rows, classes, len(count)) / count.clamp_min(1)[:, None]
        inside = rows - mean[classes]
        return self.merge(state, {"count": count, "mean": mean, "scatter": inside.T @ inside})

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
        return Moments(state["count"], state["mean"], state["scatter"])


@dataclass(frozen=True)
class Norms:
    """Norms of embeddings per class: ``count``, ``mean``, ``variance`` (divided by the count),
    ``minimum`` and ``maximum``, each ``[K]``; an absent class has count 0, and infinite extremes."""

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
        count, absent = state["count"], state["count"] == 0
        return Norms(
            count,
            state["mean"],
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
        one = torch.zeros(shape.K, dtype=torch.float64, device=shape.device)
        square = torch.zeros(shape.K, shape.K, dtype=torch.float64, device=shape.device)
        return {
            "count": one,
            "predicted_count": one.clone(),
            "by_class": square,
            "by_predicted": square.clone(),
        }

    def update(self, state: State, features: Features) -> State:
        softmax = required(features.logits, "logits").softmax(dim=1)
        batch = {}
        for names, classes in (
            (("count", "by_class"), assigned(features)),
            (("predicted_count", "by_predicted"), features.predicted),
        ):
            count = _sums(torch.ones_like(softmax[:, 0]), classes, len(state["count"]))
            batch[names[0]] = count
            batch[names[1]] = _sums(softmax, classes, len(count)) / count.clamp_min(1)[:, None]
        return self.merge(state, batch)

    def merge(self, a: State, b: State) -> State:
        merged = {}
        for name, mean in (("count", "by_class"), ("predicted_count", "by_predicted")):
            merged[name] = a[name] + b[name]
            share = (b[name] / merged[name].clamp_min(1))[:, None]
            merged[mean] = a[mean] + (b[mean] - a[mean]) * share
        return merged

    def view(self, state: State) -> Logits:
        return Logits(
            state["count"], state["predicted_count"], state["by_class"], state["by_predicted"]
        )


@dataclass(frozen=True)
class Means:
    """``count [K]`` and ``mean [K, D]``, zero where there was no row."""

    count: Tensor
    mean: Tensor


class CorrectMeans(Statistic):
    """The mean embedding of each class's correctly classified rows."""

    kind = "correct_means"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def init(self, shape: Shape) -> State:
        zeros = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {"count": zeros.new_zeros(shape.K), "mean": zeros}

    def update(self, state: State, features: Features) -> State:
        classes = assigned(features)
        correct = classes == features.predicted
        rows, classes = required(features.embeddings, "embeddings")[correct], classes[correct]
        count = _sums(rows.new_ones(len(rows)), classes, len(state["count"]))
        mean = _sums(rows, classes, len(count)) / count.clamp_min(1)[:, None]
        return self.merge(state, {"count": count, "mean": mean})

    def merge(self, a: State, b: State) -> State:
        count = a["count"] + b["count"]
        share = (b["count"] / count.clamp_min(1))[:, None]
        return {"count": count, "mean": a["mean"] + (b["mean"] - a["mean"]) * share}

    def view(self, state: State) -> Means:
        return Means(state["count"], state["mean"])


@dataclass(frozen=True)
class Kept:
    """Rows that were kept: each field is Rows or None; ``classes`` and ``ids`` are ``[N]``."""

    classes: Rows
    ids: Rows
    embeddings: Rows | None = None
    logits: Rows | None = None

    def __len__(self) -> int:
        return len(self.ids)


Keepable = Literal["embeddings", "logits"]


def _kept(state: State) -> Kept:
    """A view that does not grow when the state does."""
    rows = {name: value.copy() for name, value in state.items() if name != "hashes"}
    return Kept(**rows)


class _Keeping(Statistic):
    """What Bank and Sample share: rows of some fields, with class and id."""

    fields: tuple[Keepable, ...] = ("embeddings",)

    def needs(self) -> frozenset[str]:
        return frozenset(self.fields)

    def init(self, shape: Shape) -> State:
        width = {"embeddings": (shape.D,), "logits": (shape.K,)}
        empty = {name: Rows(width[name]) for name in self.fields}
        return {
            "classes": Rows(dtype=torch.int64),
            "ids": Rows(dtype=torch.int64),
            **empty,
        }

    def _columns(self, features: Features) -> dict[str, Tensor]:
        columns = {name: required(getattr(features, name), name) for name in self.fields}
        return {
            "classes": assigned(features),
            "ids": required(features.ids, "ids"),
            **columns,
        }

    def view(self, state: State) -> Kept:
        return _kept(state)


class Bank(_Keeping):
    """All rows, memory-mapped past a limit.

    Args:
        fields: what to keep of a row, besides its class and id.
    """

    kind = "bank"

    def update(self, state: State, features: Features) -> State:
        for name, values in self._columns(features).items():
            state[name].append(values)
        return state

    def merge(self, a: State, b: State) -> State:
        return {name: rows.joined(b[name]) for name, rows in a.items()}


class Sample(_Keeping):
    """A uniform sample of rows: those with the smallest hash of seed and id.

    The same rows are kept whatever the order of the data and however it is divided, and the view
    has them in the order of their hash.

    Args:
        capacity: how many rows to keep (of each class, with ``per_class``).
        fraction: keep each row with this probability instead.
        per_class: count the capacity for each class apart.
        seed: of the hash.
        fields: what to keep of a row, besides its class and id.
    """

    kind = "sample"
    capacity: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    per_class: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _one_size(self) -> Sample:
        if (self.capacity is None) == (self.fraction is None):
            raise ValueError("give either a capacity or a fraction")
        if self.per_class and self.capacity is None:
            raise ValueError("per_class counts a capacity; a fraction is the same for each class")
        return self

    def init(self, shape: Shape) -> State:
        return {**super().init(shape), "hashes": Rows(dtype=torch.int64)}

    def update(self, state: State, features: Features) -> State:
        columns = self._columns(features)
        columns["hashes"] = hashed(columns["ids"], self.seed, "sample").to(columns["ids"].device)
        if self.fraction is not None and self.fraction < 1:
            taken = columns["hashes"] < int(self.fraction * 2**63)
            columns = {name: values[taken] for name, values in columns.items()}
        for name, values in columns.items():
            state[name].append(values)
        return self._trimmed(state, slack=2)

    def merge(self, a: State, b: State) -> State:
        a, b = self._trimmed(a), self._trimmed(b)
        if bool(torch.isin(a["ids"].tensor(), b["ids"].tensor()).any()):
            raise DataError("samples that share ids cannot be merged: a row would count twice")
        return self._trimmed({name: rows.joined(b[name]) for name, rows in a.items()})

    def view(self, state: State) -> Kept:
        trimmed = self._trimmed(state)
        order = trimmed["hashes"].tensor().argsort()
        return _kept({name: Rows.of(rows[order]) for name, rows in trimmed.items()})

    def _trimmed(self, state: State, slack: int = 1) -> State:
        """The state with no more rows than it may keep; nothing is done below ``slack`` times that."""
        if self.capacity is None or len(state["ids"]) <= slack * self.capacity:
            return state
        hashes, classes = state["hashes"].tensor(), state["classes"].tensor()
        if not self.per_class:
            keep = hashes.argsort()[: self.capacity]
        else:
            order = hashes.argsort()
            order = order[classes[order].argsort(stable=True)]
            first = torch.searchsorted(classes[order], classes[order])
            keep = order[torch.arange(len(order)) - first < self.capacity]
            if slack > 1 and len(keep) * slack > len(order):
                return state
        return {name: Rows.of(rows[keep]) for name, rows in state.items()}


class Normalized(Statistic):
    """A statistic of embeddings of unit norm (a zero row stays zero).

    Args:
        statistic: what is taken of them.
    """

    kind = "normalized"
    statistic: Annotated[Statistic, Slot("statistic")]

    def needs(self) -> frozenset[str]:
        return self.statistic.needs()

    def init(self, shape: Shape) -> State:
        return self.statistic.init(shape)

    def update(self, state: State, features: Features) -> State:
        return self.statistic.update(state, features.normalized())

    def merge(self, a: State, b: State) -> State:
        return self.statistic.merge(a, b)

    def view(self, state: State) -> Any:
        return self.statistic.view(state)


class AtLayer(Statistic):
    """A statistic of a layer's activations in place of the embeddings.

    Args:
        layer: the module's name.
        statistic: what is taken of them.
        pool: what becomes of axes after the second.
    """

    kind = "at_layer"
    layer: str
    statistic: Annotated[Statistic, Slot("statistic")]
    pool: Literal["mean", "max", "flatten"] = "mean"

    def needs(self) -> frozenset[str]:
        inner = self.statistic.needs() - {"embeddings"}
        return inner | {f"layers.{self.layer}"}

    def init(self, shape: Shape) -> State:
        channels, *rest = shape.layers[self.layer] or (1,)
        width = channels * torch.Size(rest).numel() if self.pool == "flatten" else channels
        return self.statistic.init(Shape(shape.K, width, shape.layers, shape.device))

    def update(self, state: State, features: Features) -> State:
        return self.statistic.update(state, features.at(self.layer, self.pool))

    def merge(self, a: State, b: State) -> State:
        return self.statistic.merge(a, b)

    def view(self, state: State) -> Any:
        return self.statistic.view(state)


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A state with every tensor changed; rows and indexes stay as they are."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, Rows | Index):
        return state
    return {name: map_state(value, change) for name, value in state.items()}


def copy_state(state: Any) -> Any:
    """A state that can be updated without changing the original."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, Rows):
        return state.copy()
    if isinstance(state, Index):
        return state
    return {name: copy_state(value) for name, value in state.items()}


@hookimpl
def register_statistics(register: Register) -> None:
    for statistic in (
        ClassMoments,
        NormMoments,
        LogitMoments,
        CorrectMeans,
        Bank,
        Sample,
        Normalized,
        AtLayer,
    ):
        register(statistic)
