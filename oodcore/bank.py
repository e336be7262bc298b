"""Bank and Sample: rows of the training data that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import Features, required
from oodcore.index import Rows
from oodcore.selection import hashed
from oodcore.statistic import Shape, State, Statistic, assigned


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
        state = {"classes": Rows(dtype=torch.int64), "ids": Rows(dtype=torch.int64)}
        return {**state, **{str(name): Rows(width[name]) for name in self.fields}}

    def _columns(self, features: Features) -> dict[str, Tensor]:
        columns = {"classes": assigned(features), "ids": required(features.ids, "ids")}
        return {**columns, **{str(n): required(getattr(features, n), n) for n in self.fields}}

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
        """The state with no more rows than it may keep; below ``slack`` times that, as it is."""
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
