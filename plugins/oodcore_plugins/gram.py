"""Gram matrices: how far a row's channel correlations leave the ranges of its predicted class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State

Powers = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]

NUMBERS = 2**20
"""Numbers of a layer, or of its correlations, that are looked at together."""

LARGEST = torch.finfo(torch.float64).max
"""Stands for an extreme of no rows: what is saved is finite."""

EPS = 1e-6
"""Added to the size of a bound before it is divided by."""

UNUSUAL = 1e-7
"""A smaller expected deviation is rounding."""


@dataclass(frozen=True)
class Ranges:
    """``count [K]`` rows predicted as each class and, a layer, ``minimum`` and ``maximum``
    ``[K, P, C]`` of their correlations; infinite for a class that is never predicted."""

    count: Tensor
    minimum: tuple[Tensor, ...]
    maximum: tuple[Tensor, ...]


class GramRanges(Statistic):
    """The smallest and largest correlation of each channel, by power and predicted class.

    Args:
        layers: names of the layers; the embeddings where left out.
        powers: of the activations.
    """

    kind = "gram_ranges"
    layers: tuple[str, ...] = ()
    powers: Powers = tuple(range(1, 11))

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"}) | places(self.layers)

    def init(self, shape: Shape) -> State:
        state: dict[str, State | Tensor] = {
            "count": torch.zeros(shape.K, dtype=torch.float64, device=shape.device)
        }
        widths = [(shape.layers[name] or (1,))[0] for name in self.layers] or [shape.D]
        for number, width in enumerate(widths):
            size = (shape.K, len(self.powers), width)
            highest = torch.full(size, LARGEST, dtype=torch.float64, device=shape.device)
            state[str(number)] = {"minimum": highest, "maximum": -highest}
        return state

    def update(self, state: State, features: Features) -> State:
        classes = features.predicted
        state["count"].index_add_(0, classes, torch.ones_like(classes, dtype=torch.float64))
        for number, maps in enumerate(activations(features, self.layers)):
            for rows, some in chunks(maps.to(classes.device), len(self.powers)):
                found = correlations(some, self.powers)
                index = classes[rows][:, None, None].expand_as(found)
                state[str(number)]["minimum"].scatter_reduce_(0, index, found, "amin")
                state[str(number)]["maximum"].scatter_reduce_(0, index, found, "amax")
        return state

    def merge(self, a: State, b: State) -> State:
        merged: dict[str, State | Tensor] = {"count": a["count"] + b["count"]}
        for number in a.keys() - {"count"}:
            one, two = a[number], b[number]
            merged[number] = {
                "minimum": torch.minimum(one["minimum"], two["minimum"]),
                "maximum": torch.maximum(one["maximum"], two["maximum"]),
            }
        return merged

    def view(self, state: State) -> Ranges:
        absent = (state["count"] == 0)[:, None, None]
        parts = [state[str(number)] for number in range(len(state) - 1)]
        return Ranges(
            state["count"].clone(),
            tuple(part["minimum"].masked_fill(absent, float("inf")) for part in parts),
            tuple(part["maximum"].masked_fill(absent, float("-inf")) for part in parts),
        )


class Gram(Scorer):
    """``-sum_l d_l / E[d_l]``, by how much the layers l leave what training rows have shown; at
    most 0, without a unit.

    A layer is seen as channels by places, F ``[C, S]``. For each power p its channels' correlations
    are ``g_p = (F^p (F^p)' 1)^(1/p)``, the row sums of the Gram matrix of the powers with a signed
    root, and they should lie between the smallest ``m`` and the largest ``M`` of the training rows
    predicted as the same class:

        d_l = (1 / max softmax(z)) sum_{p, c} relu(m - g_p) / (|m| + 1e-6)
                                            + relu(g_p - M) / (|M| + 1e-6)

    ``E[d_l]`` is the mean over held-out rows; a layer that none of them leaves (a mean up to 1e-7)
    has 1. A class that no training row is predicted as has the range of all classes together. Row
    sums are found without the Gram matrix, so the cost is that of reading a layer once a power; the
    ranges take 2 K P C numbers a layer. Rows within all ranges score 0 and are tied.

    The paper's code divides by |m + 1e-6|, which can be zero where activations are negative, and
    adds 1e-7 to E[d_l].

    Args:
        layers: names of the layers, ``[N, C, ...]``; the embeddings where left out. The paper takes
            every convolution and activation.
        powers: the powers p; the paper takes 1 to 10.
    """

    kind = "gram"
    paper = Paper(
        "Detecting Out-of-Distribution Examples with Gram Matrices",
        "Chandramouli Shama Sastry, Sageev Oore",
        "ICML",
        2020,
        "https://arxiv.org/abs/1912.12510",
    )
    held_out: ClassVar[bool] = True
    layers: tuple[str, ...] = ()
    powers: Powers = tuple(range(1, 11))

    @model_validator(mode="after")
    def _each_once(self) -> Gram:
        for name, given in (("layers", self.layers), ("powers", self.powers)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names one of its own twice: {given}")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"}) | places(self.layers)

    def statistics(self) -> tuple[Statistic, ...]:
        return (GramRanges(layers=self.layers, powers=self.powers),)

    def fit(self, store: FeatureStore) -> State:
        ranges = store[self.statistics()[0]]
        absent = (ranges.count == 0)[:, None, None]
        state: dict[str, State | Tensor] = {}
        for number, (low, high) in enumerate(zip(ranges.minimum, ranges.maximum, strict=True)):
            state[str(number)] = {
                "minimum": torch.where(absent, low.amin(dim=0), low),
                "maximum": torch.where(absent, high.amax(dim=0), high),
            }
        return state

    def measure(self, features: Features, state: State) -> Tensor | None:
        return self.deviations(features, state)

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        mean = rows.mean(dim=0)
        return {**state, "expected": torch.where(mean > UNUSUAL, mean, 1.0)}

    def score(self, features: Features, state: State) -> Tensor:
        return -(self.deviations(features, state) / state["expected"]).sum(dim=1)

    def deviations(self, features: Features, state: State) -> Tensor:
        """``d_l`` of each layer, ``[N, L]``."""
        classes = features.predicted
        columns = []
        for number, maps in enumerate(activations(features, self.layers)):
            low, high = state[str(number)]["minimum"], state[str(number)]["maximum"]
            parts = []
            for rows, some in chunks(maps.to(classes.device), len(self.powers)):
                found = correlations(some, self.powers)
                least, most = low[classes[rows]], high[classes[rows]]
                outside = (least - found).clamp_min(0) / (least.abs() + EPS)
                outside = outside + (found - most).clamp_min(0) / (most.abs() + EPS)
                parts.append(outside.sum(dim=(1, 2)))
            columns.append(torch.cat(parts))
        confidence = required(features.logits, "logits").softmax(dim=1).amax(dim=1, keepdim=True)
        return torch.stack(columns, dim=1) / confidence


def places(layers: tuple[str, ...]) -> frozenset[str]:
    """The fields of Features that these layers are; the embeddings where there are none."""
    return frozenset(f"layers.{name}" for name in layers) or frozenset({"embeddings"})


def activations(features: Features, layers: tuple[str, ...]) -> list[Tensor]:
    """The layers as channels by places, ``[N, C, S]``."""
    given = [features.layers[name] for name in layers]
    given = given or [required(features.embeddings, "embeddings")]
    return [
        rows.flatten(2) if rows.ndim > 2 else rows.reshape(len(rows), rows.shape[1:].numel(), 1)
        for rows in given
    ]


def chunks(maps: Tensor, powers: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows ``[N, C, S]`` in float64, a few at a time."""
    step = max(1, NUMBERS // max(1, maps.shape[1] * max(maps.shape[2], powers)))
    for first in range(0, max(1, len(maps)), step):
        rows = slice(first, first + step)
        yield rows, maps[rows].double()


def correlations(maps: Tensor, powers: tuple[int, ...]) -> Tensor:
    """The row sums of the Gram matrix of each power, with a signed root: ``[N, P, C]``.

    Args:
        maps: ``[N, C, S]``.
        powers: P of them.
    """
    # A high power of anything but numbers near 1 would leave the range of float64.
    largest = maps.detach().abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-150)
    shares = maps / largest
    columns = []
    for power in powers:
        raised = shares**power
        sums = (raised * raised.sum(dim=1, keepdim=True)).sum(dim=2)
        # The root has no finite slope at zero, where a channel that is silent stays.
        silent = sums == 0
        roots = sums.abs().masked_fill(silent, 1.0) ** (1 / power)
        columns.append((sums.sign() * roots).masked_fill(silent, 0.0))
    return torch.stack(columns, dim=1) * largest.square()


@hookimpl
def register_statistics(register: Register) -> None:
    register(GramRanges)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Gram)
