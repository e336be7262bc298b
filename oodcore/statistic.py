"""Statistic: a mergeable summary of Features, and the state that it is kept in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from oodcore.component import Component
from oodcore.features import Features, required
from oodcore.index import Index
from oodcore.rows import Rows

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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Statistic(Component):
    """A summary of features that is updated batch by batch and merged in any order.

    ``update`` owns the state it is given and may reuse its storage. ``merge`` is associative, and
    commutative up to rounding. Floating numbers in a state are float64.
    """

    slot: ClassVar[str] = "statistic"

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The fields of Features that it reads: "embeddings", "logits", "head", "layers.<name>";
        "inputs" marks one that passes through the model again."""

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
