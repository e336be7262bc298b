"""VRA: small activations removed, large ones clipped, those between amplified."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Shaper, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import Sample, State
from oodcore_plugins.react import percentile

Percentile = Annotated[float, Field(ge=0, le=100)]


class VRA(Shaper):
    """``h' = 0 for h < a;  h + gain for a <= h <= b;  b for h > b``, each unit by itself.

    a and b are percentiles of the training rows' activations, of each unit apart as in the authors'
    code for CIFAR, interpolated linearly. With gain 0 it is the paper's VRA, with a positive one
    VRA+. A unit that never fires in training has a = b = 0: whatever it shows later becomes 0.

    OpenOOD takes one pair of percentiles over all units and raises small activations to the lower
    one: ``pooled: true, below: raise, low: 10, high: 90``.

    Args:
        low: the percentile a, in percent. The authors use 60 for CIFAR.
        high: the percentile b, in percent. The authors use 90 to 95 for CIFAR.
        gain: added to activations between a and b.
        pooled: take percentiles over the activations of all units together.
        below: what becomes of activations below a: ``zero``, or ``raise`` for a itself.
        sample: how many training rows the percentiles are taken over; they are exact up to as many,
            and those of a uniform sample of them beyond.
    """

    kind = "vra"
    paper = Paper(
        "VRA: Variational Rectified Activation for Out-of-distribution Detection",
        "Mingyu Xu, Zheng Lian, Bin Liu, Jianhua Tao",
        "NeurIPS",
        2023,
        "https://arxiv.org/abs/2302.11716",
    )
    search = spaces(
        low=Choice((1.0, 5.0, 10.0, 15.0, 60.0), "OpenOOD's sweep, and the authors' 60"),
        high=Choice((85.0, 90.0, 95.0, 99.0), "OpenOOD's sweep"),
    )
    low: Percentile = 60.0
    high: Percentile = 95.0
    gain: NonNegativeFloat = 0.0
    pooled: bool = False
    below: Literal["zero", "raise"] = "zero"
    sample: PositiveInt = 50_000

    @model_validator(mode="after")
    def _in_order(self) -> VRA:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, which is above high, {self.high:g}")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Sample(capacity=self.sample),)

    def fit(self, store: FeatureStore) -> State:
        rows = store[Sample(capacity=self.sample)].embeddings.tensor().double()
        if not self.pooled:
            return {"low": percentiles(rows, self.low), "high": percentiles(rows, self.high)}
        return {
            name: torch.full_like(rows[0], percentile(rows, percent))
            for name, percent in (("low", self.low), ("high", self.high))
        }

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        low, high = state["low"].to(rows), state["high"].to(rows)
        small = low.expand_as(rows) if self.below == "raise" else torch.zeros_like(rows)
        shaped = torch.where(rows < low, small, rows + self.gain)
        return features.with_embeddings(torch.where(rows > high, high, shaped))


def percentiles(rows: Tensor, percent: float) -> Tensor:
    """A percentile of each column of ``[N, D]``, ``[D]``, linear between the nearest two."""
    place = (len(rows) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(rows) - 1)
    ordered = np.partition(rows.numpy(), [low, high], axis=0)
    # Between equal numbers it must be that number: rows that have it are compared with it.
    return torch.from_numpy(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


@hookimpl
def register_shapers(register: Register) -> None:
    register(VRA)
