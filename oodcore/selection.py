"""Selection: some rows of a data set, chosen by class or by a hash of their number."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.utils.data import Dataset

from oodcore.errors import ConfigurationError, DataError


def _interval(part: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= part[0] < part[1] <= 1:
        raise PydanticCustomError("part", "a part is [from, to] with 0 <= from < to <= 1")
    return part


Part = Annotated[tuple[float, float], AfterValidator(_interval)]
"""A field that holds a share of a data set's rows, for ``select``: ``(0, 0.9)`` and ``(0.9, 1)``
divide it in two."""


class Selection(Dataset[Any]):
    """Some rows of a data set; with ``classes``, labelled by their label's position in it."""

    def __init__(
        self, data: Dataset[Any], rows: np.ndarray[Any, Any], classes: Sequence[int] | None = None
    ) -> None:
        self._data = data
        self._rows = rows
        self._position = None if classes is None else {int(c): p for p, c in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        row = int(self._rows[index])
        return self._labelled(row, self._data[row])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int, int]]:
        rows = [int(self._rows[index]) for index in indices]
        items = fetch(self._data, rows)
        return [self._labelled(row, item) for row, item in zip(rows, items, strict=True)]

    def _labelled(self, row: int, item: Any) -> tuple[Any, int, int]:
        inputs, label, *number = item
        label = int(label)
        if self._position is not None:
            if label not in self._position:
                raise DataError(f"row {row} has the label {label}, and had another before")
            label = self._position[label]
        return inputs, label, int(number[0]) if number else row


def fetch(data: Dataset[Any], rows: Sequence[int]) -> list[Any]:
    """Several rows of a map-style data set, at once where it can (``__getitems__``)."""
    together = getattr(data, "__getitems__", None)
    return list(together(rows)) if together else [data[row] for row in rows]


def select(
    data: Dataset[Any],
    classes: Sequence[int] | None = None,
    labels: Sequence[int] | np.ndarray[Any, Any] | None = None,
    *,
    part: tuple[float, float] | None = None,
    seed: int = 0,
) -> Dataset[Any]:
    """The rows of some classes, or some share of the rows; ids stay.

    Args:
        data: a map-style data set of ``(input, label)`` or ``(input, label, id)``.
        classes: the labels to keep; they become 0, 1, ... in this order. None keeps all, as they
            are.
        labels: the label of every row, if they are known without reading the inputs.
        part: ``(from, to)``, the rows whose hash of seed and row number, a number in [0, 1), is in
            this interval. Intervals that do not overlap share no row, and those that cover [0, 1]
            leave none out; a share holds about ``(to - from) * N`` rows of every class.
        seed: of the hash.

    Raises:
        ConfigurationError: a class is named twice, or the part is no interval within [0, 1].
        DataError: no row is left, or ``labels`` are not one a row.
    """
    if classes is None and part is None:
        return data
    total = len(data)  # type: ignore[arg-type]
    if labels is not None and len(labels) != total:
        raise DataError(f"{len(labels)} labels for {total} rows")
    rows = np.arange(total)
    if part is not None:
        if not 0 <= part[0] < part[1] <= 1:
            raise ConfigurationError(f"a part is (from, to) within [0, 1], not {tuple(part)}")
        place = (hashed(torch.from_numpy(rows), seed) >> 10).numpy() / 2.0**53
        rows = rows[(place >= part[0]) & (place < part[1])]
    if classes is not None:
        if len(set(classes)) != len(classes):
            raise ConfigurationError(f"classes are named twice: {list(classes)}")
        if labels is None:
            known = np.array([int(data[int(row)][1]) for row in rows], dtype=np.int64)
        else:
            known = np.asarray(labels)[rows]
        rows = rows[np.isin(known, list(classes))]
    if len(rows) == 0:
        wanted = f"a label in {list(classes)}" if classes is not None else "its place"
        where = f"; the part was {tuple(part)}" if part is not None else ""
        raise DataError(f"no row of {total} has {wanted}{where}")
    return Selection(data, rows, classes)


@torch.no_grad()
def hashed(ids: Tensor, seed: int, purpose: str = "") -> Tensor:
    """A pseudo-random number in [0, 2^63) for each id, ``[N]`` int64 (splitmix64).

    It depends on nothing but the seed, the id and the purpose, so that samples and splits do not
    depend on the order of rows or on how they are divided among machines. Choices for different
    purposes are independent: a sample of a split is as good as one of everything.
    """
    start = seed * 0xD1342543DE82EF95 + zlib.crc32(purpose.encode()) * 0xA0761D6478BD642F
    with np.errstate(over="ignore"):
        z = ids.cpu().numpy().astype(np.uint64) + np.uint64(start % 2**64)
        z += np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return torch.from_numpy((z >> np.uint64(1)).astype(np.int64))


HELD_OUT_SHARE = 0.1
"""The share of the training rows that is set apart where held-out rows are needed and not given."""


def held_out(ids: Tensor, seed: int) -> Tensor:
    """Which rows belong to the tenth that is set apart, ``[N]`` bool."""
    return hashed(ids, seed, "held out") < int(HELD_OUT_SHARE * 2**63)
