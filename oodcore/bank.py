"""Bank and Sample: rows of the training data that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import Features, required
from oodcore.rows import Rows
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
    return Kept(**{name: rows.copy() for name, rows in state.items() if name != "hashes"})


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
        limit = 2**63 if self.fraction is None else int(self.fraction * 2**63)
        return {
            **super().init(shape),
            "hashes": Rows(dtype=torch.int64),
            "limits": torch.full((shape.K if self.per_class else 1,), limit - 1),
            "checked": torch.tensor(0),
        }

    def update(self, state: State, features: Features) -> State:
        columns = {name: values.cpu() for name, values in self._columns(features).items()}
        columns["hashes"] = hashed(columns["ids"], self.seed, "sample")
        groups = columns["classes"] if self.per_class else torch.zeros_like(columns["ids"])
        taken = columns["hashes"] <= state["limits"][groups]
        if not bool(taken.all()):
            numbers = taken.nonzero().flatten()
            columns = {name: values[numbers] for name, values in columns.items()}
        for name, values in columns.items():
            state[name].append(values)
        if self.capacity is None or len(state["ids"]) <= 2 * max(state["checked"], self.capacity):
            return state
        return self._trimmed(state)

    def merge(self, a: State, b: State) -> State:
        a, b = self._trimmed(a), self._trimmed(b)
        if bool(torch.isin(a["ids"].tensor(), b["ids"].tensor()).any()):
            raise DataError("samples that share ids cannot be merged: a row would count twice")
        rows = {name: a[name].joined(b[name]) for name in a if isinstance(a[name], Rows)}
        limits = torch.minimum(a["limits"], b["limits"])
        return self._trimmed({**rows, "limits": limits, "checked": a["checked"]})

    def view(self, state: State) -> Kept:
        trimmed = self._trimmed(state)
        order = trimmed["hashes"].tensor().argsort(stable=True)
        rows = {n: v.picked(order) for n, v in trimmed.items() if isinstance(v, Rows)}
        return _kept(rows)

    def _trimmed(self, state: State) -> State:
        """The state with no more rows than it may keep.

        Its limits are the largest hashes kept, so that most later rows need not be looked at.
        """
        if self.capacity is None or len(state["ids"]) <= self.capacity:
            return state
        hashes, limits = state["hashes"].tensor(), state["limits"].clone()
        groups = state["classes"].tensor() if self.per_class else torch.zeros_like(hashes)
        order = hashes.argsort(stable=True)
        order = order[groups[order].argsort(stable=True)]
        first = torch.searchsorted(groups[order], groups[order])
        rank = torch.arange(len(order)) - first
        last, keep = order[rank == self.capacity - 1], order[rank < self.capacity]
        limits[groups[last]] = hashes[last]
        rows = {n: v.picked(keep) for n, v in state.items() if isinstance(v, Rows)}
        return {**rows, "limits": limits, "checked": torch.tensor(len(keep))}
