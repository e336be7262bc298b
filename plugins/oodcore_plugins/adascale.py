"""AdaSCALE: SCALE with a percentile for each row, from how far a small perturbation moves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Rows, Shape, Shaper, Statistic, hookimpl
from oodcore.component import Settings
from oodcore.errors import ConfigurationError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.ash import LARGEST_EXPONENT, Percentile, kept_of
from oodcore_plugins.max_logit import MaxLogit
from oodcore_plugins.perturbed import moveable, slope

Share = Annotated[float, Field(gt=0, le=100)]

ROUNDING = 1e-6
"""Shifts that differ by less, relative, are equal: the batch decides their last digits."""


@dataclass(frozen=True)
class Shifts:
    """``values``: Q' of each training row."""

    values: Rows


class Perturbation(Settings):
    """How far a perturbation moves the embedding of a row.

    Args:
        k1: how many of the largest activations count by their perturbed value, in percent of D.
        k2: how many of the largest activations count by how far they move, in percent of D.
        lam: lambda, the weight of the latter.
        pixels: o, how many numbers of the input are perturbed, in percent.
        step: by how much, in the model's input space.
    """

    k1: Share = 5.0
    k2: Share = 1.0
    lam: NonNegativeFloat = 10.0
    pixels: Share = 5.0
    step: NonNegativeFloat = 0.5

    def shift(self, features: Features) -> Tensor:
        """``Q'`` of each row, ``[N]``, without a gradient."""
        rows = required(features.embeddings, "embeddings").detach()
        with torch.no_grad():
            moved = self.moved(features).to(rows)
        order = rows.argsort(dim=1, descending=True, stable=True)
        first, second = (order[:, : _share_of(rows.shape[1], k)] for k in (self.k1, self.k2))
        correction = moved.clamp_min(0).gather(1, first).sum(dim=1)
        return correction + self.lam * (moved - rows).abs().gather(1, second).sum(dim=1)

    def moved(self, features: Features) -> Tensor:
        """The embeddings of perturbed inputs, ``[N, D]``."""
        inputs, rerun = moveable(features)
        gradient = slope(MaxLogit(), features, {}).flatten(1)
        least = gradient.abs().argsort(dim=1, stable=True)
        least = least[:, : _share_of(gradient.shape[1], self.pixels)]
        signs = torch.zeros_like(gradient).scatter(1, least, gradient.gather(1, least).sign())
        moved = inputs.detach() + self.step * signs.reshape(inputs.shape)
        return required(rerun(moved).embeddings, "embeddings")


class ActivationShifts(Statistic):
    """How far a perturbation moves each training row; one number a row is kept. See ``adascale``.

    Args:
        perturbation: what is done, with ``k1``, ``k2``, ``lam``, ``pixels`` and ``step``.
    """

    kind = "activation_shifts"
    perturbation: Perturbation = Perturbation()

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "inputs"})

    def init(self, shape: Shape) -> State:
        return {"values": Rows()}

    def update(self, state: State, features: Features) -> State:
        if len(features):
            state["values"].append(self.perturbation.shift(features))
        return state

    def merge(self, a: State, b: State) -> State:
        return {"values": a["values"].joined(b["values"])}

    def view(self, state: State) -> Shifts:
        return Shifts(state["values"].copy())


class AdaSCALE(Shaper):
    """``h' = h exp(s1 / s2)`` (variant ``a``) or ``z' = z (s1 / s2)^2`` (``l``), with a percentile
    of its own for each row.

    s1 is the sum of a row's activations and s2 that of its ``D - round(D p / 100)`` largest, at
    least 1, as in ``scale`` and ``lts``. The percentile is ``p = low + (1 - F(Q')) (high - low)``,
    with F the share of training rows whose Q' is at most the row's, so that rows that move far get
    a lower percentile and are scaled less. Q' is found by adding ``step`` times the sign of the
    gradient of the largest logit to those numbers of the input where that gradient is smallest:

        Q' = sum_{k1} max(h~, 0) + lam sum_{k2} |h~ - h|

    over the k1 % and the k2 % largest activations of h, at least one, where h~ is the embedding of
    the perturbed input. Rows that differ in Q' by rounding count as equal.

    The sums of s1 and s2 are those of the positive parts; a row without a positive activation has
    ratio 1. Labels are not used. The model sees each row twice more, once with a gradient, when
    fitting and when scoring. One number a training row is kept; the authors take 5000 of them. The
    scale has no gradient through the percentile, which is piecewise constant.

    Args:
        variant: ``a`` scales activations, ``l`` logits.
        percentiles: low and high, in percent.
        perturbation: ``k1``, ``k2``, ``lam``, ``pixels`` and ``step``; the defaults are the
            authors'. ``step`` is in the model's input space, after preprocessing.
    """

    kind = "adascale"
    paper = Paper(
        "AdaSCALE: Adaptive Scaling for OOD Detection",
        "Sudarshan Regmi",
        "arXiv",
        2025,
        "https://arxiv.org/abs/2503.08023",
    )
    variant: Literal["a", "l"] = "a"
    percentiles: tuple[Percentile, Percentile] = (75.0, 85.0)
    perturbation: Perturbation = Perturbation()

    @model_validator(mode="after")
    def _ascending(self) -> AdaSCALE:
        low, high = self.percentiles
        if low > high:
            raise ValueError(f"percentiles go from low to high, not from {low:g} to {high:g}")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits", "inputs"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ActivationShifts(perturbation=self.perturbation),)

    def fit(self, store: FeatureStore) -> State:
        return {"shifts": store[self.statistics()[0]].values.tensor().double().sort().values}

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        scale = growth(rows, self.percentile(features, state))
        if self.variant == "l":
            return features.with_logits(required(features.logits, "logits") * scale.square())
        size, least = rows.shape[1], kept_of(rows.shape[1], self.percentiles[1])
        if size > LARGEST_EXPONENT * least:
            raise ConfigurationError(
                f"adascale: as few as {least} of {size} activations count, and exp(s1 / s2) can "
                "leave the range of numbers; give lower percentiles"
            )
        return features.with_embeddings(rows * scale.exp())

    def percentile(self, features: Features, state: State) -> Tensor:
        """p of each row, ``[N]``."""
        asked = self.perturbation.shift(features) * (1 + ROUNDING)
        known = state["shifts"].to(asked)
        below = torch.searchsorted(known, asked, right=True).to(asked)
        low, high = self.percentiles
        return low + (1 - below / len(known)) * (high - low)


def growth(rows: Tensor, percentile: Tensor) -> Tensor:
    """``s1 / s2`` of rows ``[N, D]`` with a percentile each ``[N]``: ``[N, 1]``, 1 for 0 / 0."""
    size = rows.shape[1]
    kept = (size - (size * percentile / 100).round()).clamp_min(1).long()
    sums = rows.clamp_min(0).sort(dim=1, descending=True).values.cumsum(dim=1)
    part, whole = sums.gather(1, kept[:, None] - 1), sums[:, -1:]
    empty = part <= 0
    return torch.where(empty, 1.0, whole / part.masked_fill(empty, 1.0))


def _share_of(size: int, percent: float) -> int:
    """How many a percentage of a size is, at least 1."""
    return max(1, int(size * percent / 100))


@hookimpl
def register_statistics(register: Register) -> None:
    register(ActivationShifts)


@hookimpl
def register_shapers(register: Register) -> None:
    register(AdaSCALE)
