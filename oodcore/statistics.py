"""The statistics that the core ships, and how one is taken of other than the embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch

from oodcore.bank import Bank, Kept, Sample
from oodcore.component import Slot
from oodcore.features import Features
from oodcore.hookspecs import Register, hookimpl
from oodcore.moments import (
    ClassMeans,
    ClassMoments,
    CorrectMeans,
    LogitMoments,
    Logits,
    Means,
    Moments,
    NormMoments,
    Norms,
)
from oodcore.statistic import Shape, State, Statistic, assigned, copy_state, map_state

__all__ = [
    "AtLayer",
    "Bank",
    "ClassMeans",
    "ClassMoments",
    "CorrectMeans",
    "Kept",
    "LogitMoments",
    "Logits",
    "Means",
    "Moments",
    "NormMoments",
    "Normalized",
    "Norms",
    "Sample",
    "Shape",
    "State",
    "Statistic",
    "assigned",
    "copy_state",
    "map_state",
]


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


@hookimpl
def register_statistics(register: Register) -> None:
    for statistic in (
        ClassMoments,
        ClassMeans,
        NormMoments,
        LogitMoments,
        CorrectMeans,
        Bank,
        Sample,
        Normalized,
        AtLayer,
    ):
        register(statistic)
