"""Batches: which rows a step of a training run sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from oodcore.data import Batch, hashed
from oodcore.errors import DataError
from oodcore.regularizer import place

Prepare = Callable[[Any], Any]
"""Inputs as a source gives them, to inputs as the network takes them."""


@dataclass(frozen=True)
class Rows:
    """A map-style data set of ``(input, label[, id])``, read many rows at a time.

    Args:
        data: the data set.
        name: what messages call it.
        prepare: applied to the inputs of a batch.
        classes: K, where the labels are to be checked; None leaves them be.
    """

    data: Dataset[Any]
    name: str
    prepare: Prepare | None = None
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def read(self, rows: Sequence[int]) -> Batch:
        """These rows; their ids are their positions in the data set.

        Raises:
            DataError: a label that is not among the classes; names the row.
        """
        many = getattr(self.data, "__getitems__", None)
        items = many(list(rows)) if many else [self.data[row] for row in rows]
        inputs = self._inputs([item[0] for item in items])
        labels = torch.tensor([_label(item, self.name) for item in items])
        if self.classes is not None:
            for row, label in zip(rows, labels.tolist(), strict=True):
                if not 0 <= label < self.classes:
                    raise DataError(
                        f"row {row} of {self.name} has label {label}, and there are "
                        f"{self.classes} classes, 0 to {self.classes - 1}; keep the rows of known "
                        "classes with oodcore.data.select(...)"
                    )
        return Batch(inputs, labels, torch.as_tensor(rows))

    def _inputs(self, rows: list[Any]) -> Any:
        if self.prepare is None:
            return default_collate(rows)
        if len({getattr(row, "shape", None) for row in rows}) == 1:
            return self.prepare(default_collate(rows))
        return torch.cat([self.prepare(default_collate([row])) for row in rows])

    def parts(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """This process's share of all rows, in their order."""
        for first in range(0, len(self), batch_size * world):
            numbers = range(first, min(first + batch_size * world, len(self)))[rank::world]
            if numbers:
                yield self.read(numbers)

    def count_classes(self) -> int:
        """The largest label plus one; reads every row, unless the data set has ``labels``.

        Raises:
            DataError: a label below 0, or fewer than two classes.
        """
        values = np.asarray(getattr(self.data, "labels", ()))
        if values.shape != (len(self),) or values.dtype.kind not in "iu":
            values = np.array([_label(self.data[row], self.name) for row in range(len(self))])
        if values.min() < 0:
            row = int(values.argmin())
            raise DataError(
                f"row {row} of {self.name} has label {values[row]}; to train on, labels are 0, 1, "
                "...: keep the rows of known classes with oodcore.data.select(...)"
            )
        if values.max() < 1:
            raise DataError(f"{self.name} has one class alone; there is nothing to tell apart")
        return int(values.max()) + 1


class Batches(Dataset[Any]):
    """The batch of every step, a pure function of (seed, step, rank).

    An epoch sees each row once. Its batches are as equal in size as can be, at most
    ``batch_size`` rows over all processes, so that none is too small for batch normalisation.
    Outliers are read through again and again, reordered each time.

    Args:
        rows: the training data.
        outliers: further rows that come beside every batch, or None.
        batch_size: most rows of a step, over all processes.
        outlier_batch_size: outliers of a step, over all processes.
        seed: of the order.
        rank: of this process among ``world``.

    Raises:
        DataError: no rows, or fewer than there are processes.
    """

    def __init__(
        self,
        rows: Rows,
        outliers: Rows | None,
        *,
        batch_size: int,
        outlier_batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for part in (rows, outliers):
            if part is not None and len(part) < world:
                raise DataError(f"{part.name} has {len(part)} rows for {world} process(es)")
        self.rows, self.outliers = rows, outliers
        self.steps_per_epoch = -(-len(rows) // batch_size)
        if min(len(rows) // self.steps_per_epoch, outlier_batch_size) < world:
            raise DataError(
                f"a batch_size of {batch_size} and an outlier_batch_size of {outlier_batch_size} "
                f"leave some of {world} processes without a row"
            )
        self._outlier_batch = outlier_batch_size
        self._seed, self._rank, self._world = seed, rank, world
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def __getitem__(self, step: int) -> tuple[Any, Tensor, Tensor, Any]:
        """Inputs, labels, ids and outliers of a step of the run, on the CPU."""
        batch = self.rows.read(self.numbers(step)[self._rank :: self._world])
        return batch.inputs, batch.labels, batch.ids, self._outliers(step)  # type: ignore[return-value]

    def loader(self, first: int, last: int, num_workers: int = 0) -> DataLoader[Any]:
        """The steps from ``first`` to before ``last``, one after another."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=num_workers,
            generator=torch.Generator().manual_seed(first),
        )

    def numbers(self, step: int) -> list[int]:
        """The rows of a step, over all processes."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = self._order("rows", len(self.rows), epoch)
        first = batch * len(order) // self.steps_per_epoch
        last = (batch + 1) * len(order) // self.steps_per_epoch
        numbers: list[int] = order[first:last].tolist()
        return numbers

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """All the rows in the order of an epoch, the same in every process, on the CPU."""
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            yield self.rows.read(self.numbers(step))

    def _outliers(self, step: int) -> Any:
        if self.outliers is None:
            return None
        first = step * self._outlier_batch
        numbers = []
        for position in range(first + self._rank, first + self._outlier_batch, self._world):
            turn, place_in_turn = divmod(position, len(self.outliers))
            order = self._order("outliers", len(self.outliers), turn)
            numbers.append(int(order[place_in_turn]))
        return self.outliers.read(numbers).inputs

    def _order(self, name: str, rows: int, turn: int) -> np.ndarray:
        known = self._orders.get(name)
        if known is None or known[0] != turn:
            keys = hashed(torch.arange(rows), place(self._seed, name, turn))
            known = self._orders[name] = (turn, np.argsort(keys.numpy(), kind="stable"))
        return known[1]


def joined(parts: Iterable[Any]) -> Any:
    """Batches of inputs one after another: tensors, or mappings of tensors.

    Raises:
        DataError: parts that cannot be put together.
    """
    batches = list(parts)
    if len(batches) == 1:
        return batches[0]
    if all(isinstance(batch, Tensor) for batch in batches):
        return torch.cat(batches)
    if all(isinstance(batch, Mapping) and batch.keys() == batches[0].keys() for batch in batches):
        return {name: joined(batch[name] for batch in batches) for name in batches[0]}
    kinds = ", ".join(type(batch).__name__ for batch in batches)
    raise DataError(f"rows cannot join the forward: the inputs are of types {kinds}")


def length(inputs: Any) -> int:
    """How many rows a batch of inputs has."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def _label(item: Any, name: str) -> int:
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"{name} gives no (input, label) pairs; labels are needed to train on")
    return int(item[1])
