"""dataset: rows of whatever map-style data set a function of yours returns."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

import oodcore
from oodcore.data import Part, fetch, select
from oodcore.errors import DataError
from oodcore.factory import Arguments, Importable, built


class ImportedDataset(oodcore.Source):
    """The data set that ``factory(**arguments)`` returns.

    It may be anything with a length and rows by number. A row is an input, a tuple ``(input,
    label)`` or ``(input, label, id)``, or a mapping with ``input`` and, if there are any, ``label``
    and ``id``. An input is a tensor (an image float32 ``[C, H, W]`` in [0, 1]), a NumPy array, a
    text, or a mapping of these. A label that is missing or None becomes -1, an id that is missing
    the row's number.

    Args:
        factory: ``package.module:function``, importable from where oodcore runs.
        arguments: keyword arguments of the function.
        classes: the labels to keep, which become 0, 1, ... in this order; null keeps all rows.
            To find them, every row is read once.
        part: a share of the rows, such as [0, 0.9] to fit on and [0.9, 1] to calibrate on.
        seed: decides which rows are in a part.

    ``open`` runs the code that ``factory`` names, and raises a ConfigurationError if it cannot be
    imported or called, a DataError if it returns no such data set, or an empty one. Reading a row
    raises a DataError if it is none of the above.
    """

    kind = "dataset"

    factory: Importable
    arguments: Arguments = Arguments()
    classes: tuple[int, ...] | None = None
    part: Part | None = None
    seed: int = 0

    def code(self) -> tuple[str, ...]:
        """The importable names that ``open`` runs."""
        return (self.factory,)

    def open(self) -> Dataset[Any]:
        data = built(self.factory, self.arguments)
        by_number = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        if not by_number or isinstance(data, IterableDataset | Mapping | str | type):
            raise DataError(
                f"'{self.factory}' gave a {type(data).__name__}; a data set with a length and rows "
                f"by number is needed"
            )
        if len(data) == 0:
            raise DataError(f"'{self.factory}' gave a data set without rows")
        rows = _Rows(data, self.factory)
        return select(rows, self.classes, part=self.part, seed=self.seed)


class _Rows(Dataset[Any]):
    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = data, name

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._row(index, self._data[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int, int]]:
        items = fetch(self._data, indices)
        return [self._row(index, item) for index, item in zip(indices, items, strict=True)]

    def _row(self, index: int, item: Any) -> tuple[Any, int, int]:
        where = f"row {index} of '{self._name}'"
        if isinstance(item, Mapping):
            if "input" not in item:
                raise DataError(
                    f"{where} has the keys {', '.join(map(str, item))}; it needs 'input' (and "
                    f"'label', 'id')"
                )
            parts = (item["input"], item.get("label"), item.get("id"))
        elif isinstance(item, tuple | list):
            if not 1 <= len(item) <= 3:
                raise DataError(f"{where} has {len(item)} parts; (input, label[, id]) is needed")
            parts = (*item, None, None)[:3]
        else:
            parts = (item, None, None)
        inputs, label, number = parts
        return (
            _input(inputs, where),
            -1 if label is None else _integer(label, f"the label of {where}"),
            index if number is None else _integer(number, f"the id of {where}"),
        )


def _input(value: Any, where: str) -> Any:
    if isinstance(value, Tensor | str):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    if isinstance(value, Mapping):
        return {name: _input(part, where) for name, part in value.items()}
    raise DataError(
        f"the input of {where} is a {type(value).__name__}; return a tensor (an image float32 "
        f"[C, H, W] in [0, 1]) or a text"
    )


def _integer(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"{what} must be an integer, not {value!r:.80}") from None


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(ImportedDataset)
