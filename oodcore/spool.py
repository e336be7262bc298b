"""Spool: features set aside while detectors learn in stages."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import Features
from oodcore.rows import Rows
from oodcore.store import packed_head, unpacked_head


class Spool:
    """Features set aside for later stages, in memory up to a limit and memory-mapped past it."""

    def __init__(self) -> None:
        self.columns: dict[str, Rows] = {}
        self.types: dict[str, torch.dtype] = {}
        self.head: Any = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def append(self, features: Features) -> None:
        """Set a batch aside: everything but inputs.

        Raises:
            DataError: a field that the rows before have, or have not.
        """
        values: dict[str, Tensor | None] = {
            name: getattr(features, name) for name in ("embeddings", "logits", "labels", "ids")
        }
        values.update({f"layers.{name}": value for name, value in features.layers.items()})
        self.head = features.head
        given = {name for name, value in values.items() if value is not None}
        if self.columns and (odd := sorted(given ^ self.columns.keys())):
            raise DataError(f"some batches have {odd[0]}, and others have none")
        for name, value in values.items():
            if value is not None:
                rows = self.columns.setdefault(name, Rows(tuple(value.shape[1:]), value.dtype))
                rows.append(value)
                self.types.setdefault(name, value.dtype)

    def batches(self, device: torch.device, size: int = 1024) -> Iterator[Features]:
        """The rows in order."""
        readers = {name: rows.read(size) for name, rows in self.columns.items()}
        for _ in range(0, len(self), size):
            columns = {
                name: next(reader).to(device, self.types[name]) for name, reader in readers.items()
            }
            plain = {name: columns.get(name) for name in ("embeddings", "logits", "labels", "ids")}
            layers = {
                name.partition(".")[2]: value
                for name, value in columns.items()
                if name.startswith("layers.")
            }
            yield Features(**plain, layers=layers, head=self.head).double()  # type: ignore[arg-type]

    def copy(self, layers: Container[str]) -> Spool:
        """A spool that goes on apart from this one, with some of its layers."""
        other = Spool()
        for name, rows in self.columns.items():
            prefix, _, layer = name.partition(".")
            if prefix != "layers" or layer in layers:
                other.columns[name], other.types[name] = rows.copy(), self.types[name]
        other.head = self.head
        return other

    def packed(self) -> dict[str, Any]:
        """The spool as plain values and rows, in the form that artifacts hold."""
        types = {name: str(dtype).removeprefix("torch.") for name, dtype in self.types.items()}
        return {"columns": dict(self.columns), "types": types, "head": packed_head(self.head)}

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any]) -> Spool:
        """The spool that ``packed`` described.

        Raises:
            DataError: columns of different lengths, or of types that are none.
        """
        spool = cls()
        spool.columns, spool.head = dict(packed["columns"]), unpacked_head(packed["head"])
        if len({len(rows) for rows in spool.columns.values()}) > 1:
            raise DataError("the rows set aside have columns of different lengths")
        for name in spool.columns:
            spool.types[name] = dtype_of(packed["types"].get(name))
        return spool


def dtype_of(name: Any) -> torch.dtype:
    """The type of tensors that has this name.

    Raises:
        DataError: there is none.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise DataError(f"there is no type of tensors '{name}'")
    return dtype
