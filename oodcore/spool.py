"""Spool: features set aside while detectors learn in stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from oodcore.features import Features
from oodcore.index import Rows
from oodcore.store import packed_head, unpacked_head


class Spool:
    """Features set aside for later stages, in memory up to a limit and memory-mapped past it."""

    def __init__(self) -> None:
        self.columns: dict[str, Rows] = {}
        self.head: Any = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def append(self, features: Features) -> None:
        """Set a batch aside: everything but inputs."""
        values: dict[str, Tensor | None] = {
            name: getattr(features, name) for name in ("embeddings", "logits", "labels", "ids")
        }
        values.update({f"layers.{name}": value for name, value in features.layers.items()})
        self.head = features.head
        for name, value in values.items():
            if value is not None:
                rows = self.columns.setdefault(name, Rows(tuple(value.shape[1:]), value.dtype))
                rows.append(value)

    def batches(self, device: torch.device, size: int = 2048) -> Iterator[Features]:
        """The rows in order."""
        for first in range(0, len(self), size):
            columns = {
                name: rows.between(first, first + size).to(device)
                for name, rows in self.columns.items()
            }
            plain = {name: columns.get(name) for name in ("embeddings", "logits", "labels", "ids")}
            layers = {
                name.partition(".")[2]: value
                for name, value in columns.items()
                if name.startswith("layers.")
            }
            yield Features(**plain, layers=layers, head=self.head).double()  # type: ignore[arg-type]

    def copy(self) -> Spool:
        """A spool that goes on apart from this one."""
        other = Spool()
        other.columns = {name: rows.copy() for name, rows in self.columns.items()}
        other.head = self.head
        return other

    def packed(self) -> dict[str, Any]:
        """The spool as plain values and rows, in the form that artifacts hold."""
        return {"columns": dict(self.columns), "head": packed_head(self.head)}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> Spool:
        """The spool that ``packed`` described."""
        spool = cls()
        spool.columns, spool.head = dict(packed["columns"]), unpacked_head(packed["head"])
        return spool
