"""ReAct: activations clipped at a percentile of the training rows'."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Shaper, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import Sample, State

SAMPLE = 2**16
"""Numbers from which it is guessed where a percentile of many more must be."""

BLOCK = 2**17
"""Numbers that are compared at once: they fit a processor's cache."""


class ReAct(Shaper):
    """``h' = min(h, c)``, with c a percentile of all activations of the training rows, pooled.

    Made for activations after a ReLU: a negative c is refused. The percentile interpolates linearly
    between the two nearest values.

    Args:
        percentile: of the activations, in percent; the paper uses 90.
        sample: how many training rows the percentile is taken over; it is exact up to as many, and
            that of a uniform sample of them beyond.
    """

    kind = "react"
    paper = Paper(
        "ReAct: Out-of-distribution Detection With Rectified Activations",
        "Yiyou Sun, Chuan Guo, Yixuan Li",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2111.12797",
    )
    search = spaces(percentile=Choice((85.0, 90.0, 95.0, 99.0), "OpenOOD's sweep"))
    percentile: Annotated[float, Field(gt=0, le=100)] = 90.0
    sample: PositiveInt = 50_000

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Sample(capacity=self.sample),)

    def fit(self, store: FeatureStore) -> State:
        rows = store[Sample(capacity=self.sample)].embeddings.tensor()
        threshold = percentile(rows, self.percentile)
        if threshold < 0:
            raise DataError(
                f"react: the {self.percentile:g}th percentile of the activations is "
                f"{threshold:.4g}; clipping there makes sense only for activations of at least 0"
            )
        return {"threshold": torch.tensor(threshold, dtype=torch.float64)}

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        return features.with_embeddings(rows.clamp_max(state["threshold"].to(rows)))


def percentile(values: Tensor, percent: float) -> float:
    """A percentile of all numbers of a tensor, linear between the nearest two."""
    flat = values.flatten()
    place = (len(flat) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(flat) - 1)
    below, around = _around(flat, low, high)
    ordered = np.partition(around.numpy(), [low - below, high - below])
    first, second = float(ordered[low - below]), float(ordered[high - below])
    # Between equal numbers it must be that number: rows that have it are compared with it.
    return first + (second - first) * (place - low)


def _around(flat: Tensor, low: int, high: int) -> tuple[int, Tensor]:
    """Few numbers of many, among them those of two ranks, and how many others are smaller.

    A sample says between which two they must be; where it is wrong all numbers are taken.
    """
    if len(flat) <= 4 * SAMPLE:
        return 0, flat
    # An odd step does not stay within some columns of a matrix whose width is a power of two.
    some = flat[:: len(flat) // SAMPLE | 1].sort().values
    rank = low * len(some) // len(flat)
    least = some[max(0, rank - SAMPLE // 64)]
    most = some[min(len(some) - 1, rank + SAMPLE // 64)]
    below, around = 0, []
    for part in torch.split(flat, BLOCK):
        less = part < least
        below += int(torch.count_nonzero(less))
        around.append(part[less ^ (part <= most)])
    inside = torch.cat(around)
    found = below <= low and high < below + len(inside)
    return (below, inside) if found else (0, flat)


@hookimpl
def register_shapers(register: Register) -> None:
    register(ReAct)
