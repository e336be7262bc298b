"""A statistic: where the embeddings of each class point, whatever their length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import oodcore
from oodcore.features import required, unit
from oodcore.statistics import State, assigned


@dataclass(frozen=True)
class Directions:
    """What a scorer sees: ``count [K]`` rows of each class, and ``mean [K, D]``, the mean of their
    embeddings of unit norm; zero for a class without rows."""

    count: Tensor
    mean: Tensor


class ClassDirections(oodcore.Statistic):
    """The sum of the embeddings of unit norm, and the number of rows, of each class.

    Sums can be added, so batches may have any size, and states merge in any order.
    """

    kind = "class_directions"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def init(self, shape: oodcore.Shape) -> State:
        total = torch.zeros(shape.K, shape.D, dtype=torch.float64, device=shape.device)
        return {"count": total.new_zeros(shape.K), "total": total}

    def update(self, state: State, features: oodcore.Features) -> State:
        rows, classes = unit(required(features.embeddings, "embeddings")), assigned(features)
        ones = torch.ones_like(rows[:, 0])
        return {
            "count": state["count"].index_add(0, classes, ones),
            "total": state["total"].index_add(0, classes, rows),
        }

    def merge(self, a: State, b: State) -> State:
        return {name: a[name] + b[name] for name in a}

    def view(self, state: State) -> Directions:
        return Directions(state["count"], state["total"] / state["count"].clamp_min(1)[:, None])
