"""Source: where batches come from, and how whatever a user has becomes a stream of them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from oodcore.component import Component
from oodcore.errors import DataError
from oodcore.features import Features
from oodcore.selection import (
    HELD_OUT_SHARE,
    Part,
    Selection,
    fetch,
    hashed,
    held_out,
    select,
)

__all__ = [
    "HELD_OUT_SHARE",
    "Adapt",
    "Apart",
    "Batch",
    "Part",
    "Selection",
    "Source",
    "Stream",
    "fetch",
    "hashed",
    "held_out",
    "rows_of",
    "select",
    "to_device",
]

Adapt = Callable[[Any], Any]


class Source(Component):
    """A data set as a component: ``open()`` gives rows ``(input, label, id)``.

    Images are float32 ``[C, H, W]`` in [0, 1], texts are ``str``. Labels are integers, -1 where
    there are none. An id is the row's number in the data set, whatever rows are selected.
    """

    slot: ClassVar[str] = "source"

    @abstractmethod
    def open(self) -> Dataset[Any]:
        """The rows, by number: a map-style data set of ``(input, label, id)``.

        Raises:
            DataError: the data is not where or what the configuration says.
        """


@dataclass(frozen=True)
class Batch:
    """Rows on their way to the model.

    Args:
        inputs: a tensor ``[N, ...]``, a mapping of such, or a list of N texts.
        labels: ``[N]`` int64, or None.
        ids: ``[N]`` int64, or None where the data gives none.
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        return _length(self.inputs)


class Stream:
    """Batches of whatever a user calls data, with an id for every row.

    Data is a ``Features``, a ``Source`` (or its kind or mapping), a loader, a data set, an array of
    inputs, a tuple ``(inputs, labels[, ids])`` or any iterable of batches. A batch is a tensor, a
    tuple ``(x, y[, id])`` or a mapping with ``input``, ``label``, ``id``; ``adapt`` turns anything
    else into one of these. Rows without ids are numbered from ``start``. A source's batch in which
    every label is -1 has none.

    Raises:
        DataError: something that is none of these.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        adapt: Adapt | None = None,
        start: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.start = start
        self._adapt = adapt
        self._workers = num_workers
        data = _source(data)
        self._source = data if isinstance(data, Source) else None
        self._held = None if isinstance(data, Source) else _held(data, adapt)

    @cached_property
    def _data(self) -> Any:
        """What the rows are read from; a source is opened when it is asked for its rows."""
        return self._held if self._source is None else self._source.open()

    @property
    def repeatable(self) -> bool:
        """Whether the same rows come in the same order again."""
        if self._source is not None:
            return True
        if isinstance(self._data, DataLoader):
            return isinstance(_sampler(self._data), SequentialSampler)
        return not isinstance(self._data, Iterator | IterableDataset)

    @property
    def whole(self) -> bool:
        """Whether all rows are here at once: arrays or Features."""
        return isinstance(self._held, Features | Batch)

    @property
    def rows(self) -> int | None:
        """How many rows there are, where that is known before they are read."""
        data = self._data
        if isinstance(data, DataLoader):
            sampler, batches = _sampler(data), data.batch_sampler
            if not isinstance(sampler, Sized) or not isinstance(batches, BatchSampler):
                return None
            dropped = len(sampler) % batches.batch_size if batches.drop_last else 0
            return len(sampler) - dropped
        if isinstance(data, Features | Batch) or (_is_dataset(data) and isinstance(data, Sized)):
            return len(data)
        return None

    def __iter__(self) -> Iterator[Batch | Features]:
        number = self.start
        for batch in self._batches():
            if len(batch) == 0:
                continue
            if batch.ids is None:
                batch = replace(batch, ids=torch.arange(number, number + len(batch)))
            labels = batch.labels if self._source is not None else None
            if labels is not None and bool((labels == -1).all()):
                batch = replace(batch, labels=None)
            number += len(batch)
            yield batch

    def _batches(self) -> Iterator[Batch | Features]:
        data = self._data
        if isinstance(data, Features):
            if data.ids is None:
                data = replace(data, ids=torch.arange(self.start, self.start + len(data)))
            for first in range(0, len(data), self.batch_size):
                yield data[first : first + self.batch_size]
            return
        if isinstance(data, Batch):
            for first in range(0, len(data), self.batch_size):
                yield rows_of(data, slice(first, first + self.batch_size))
            return
        if _is_dataset(data):
            # A loader without a generator of its own draws from the global one.
            data = DataLoader(
                data,
                batch_size=self.batch_size,
                num_workers=self._workers,
                generator=torch.Generator(),
            )
        try:
            iterator = iter(data)
        except TypeError:
            raise DataError(_NOT_DATA.format(type(data).__name__)) from None
        for item in iterator:
            if self._adapt is not None and not isinstance(item, Batch | Features):
                item = self._adapt(item)
            yield _batch(item)


_NOT_DATA = (
    "data of type {} cannot be read: give a loader, a Dataset, a Source, an array, "
    "(inputs, labels) or Features"
)


def _source(data: Any) -> Any:
    """The source that a kind or a mapping with a kind stands for; anything else as it is."""
    if isinstance(data, str) or (isinstance(data, Mapping) and "kind" in data):
        from oodcore.plugins import registry

        return registry.build("source", data)
    return data


def _held(data: Any, adapt: Adapt | None) -> Any:
    """Arrays as one batch; anything else as it is."""
    texts = isinstance(data, list) and len(data) > 0 and _texts(data)
    if texts or _is_array(data) or isinstance(data, tuple | Mapping):
        return _batch(adapt(data) if adapt else data)
    return data


def _sampler(loader: DataLoader[Any]) -> Any:
    """What decides the order of a loader's rows; None where nobody can tell from outside."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    if loader.batch_sampler is None:
        return loader.sampler
    return loader.batch_sampler.sampler if type(loader.batch_sampler) is BatchSampler else None


def _is_dataset(data: Any) -> TypeGuard[Dataset[Any]]:
    if isinstance(data, Dataset):
        return True
    return (
        not isinstance(data, DataLoader | Features | Batch | Tensor | np.ndarray | list | Mapping)
        and hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
    )


def _is_array(value: Any) -> TypeGuard[Tensor | np.ndarray]:
    return isinstance(value, Tensor | np.ndarray)


def _batch(item: Any) -> Batch | Features:
    if isinstance(item, Batch | Features):
        return item
    if isinstance(item, Mapping):
        if "input" not in item:
            raise DataError(
                f"a batch that is a mapping needs the key 'input' (and 'label', 'id'), not "
                f"{sorted(map(str, item))}; turn it into one with adapt="
            )
        parts = [item["input"], item.get("label"), item.get("id")]
    elif isinstance(item, tuple | list) and not (item and isinstance(item[0], str)):
        if not 1 <= len(item) <= 3:
            raise DataError(
                f"a batch of {len(item)} parts cannot be read: give (x, y) or (x, y, id), or adapt="
            )
        parts = [*item, None, None][:3]
    elif _is_array(item) or isinstance(item, list | tuple):
        parts = [item, None, None]
    else:
        raise DataError(_NOT_DATA.format(type(item).__name__))
    inputs = _inputs(parts[0])
    rows = _length(inputs)
    return Batch(inputs, _integers(parts[1], rows, "labels"), _integers(parts[2], rows, "ids"))


def _inputs(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise DataError("inputs are an array of objects; give numbers")
        texts = value.dtype.kind == "U" and value.ndim == 1
        return value.tolist() if texts else _tensor(value, "inputs")
    if isinstance(value, Mapping):
        parts = {name: _inputs(part) for name, part in value.items()}
        lengths = {name: _length(part) for name, part in parts.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"a mapping of inputs needs parts of equal length, not {lengths}")
        return parts
    if isinstance(value, Tensor) or (isinstance(value, list | tuple) and _texts(value)):
        return value
    shown = type(value).__name__
    raise DataError(f"inputs of type {shown} cannot be read; give a tensor, or adapt=")


def _tensor(value: np.ndarray[Any, Any], name: str) -> Tensor:
    """The tensor of an array, on the same memory wherever torch can share it."""
    if not value.dtype.isnative or any(stride < 0 for stride in value.strides):
        value = value.astype(value.dtype.newbyteorder("="), order="C")
    try:
        with warnings.catch_warnings():
            # Nothing here writes to what a caller gave, so that a read-only array is no danger.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(value)
    except TypeError:
        raise DataError(f"{name} are an array of {value.dtype}; give numbers") from None


def _texts(value: Sequence[Any]) -> bool:
    return all(isinstance(part, str) for part in value)


def _integers(value: Any, rows: int, name: str) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        tensor = _tensor(value, name)
    else:
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"{name} must be integers, one a row, not {value!r:.80}") from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{name} must be integers, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.shape != (rows,):
        raise DataError(f"{name} must be [{rows}], one number a row, not {list(tensor.shape)}")
    return tensor.to(torch.int64)


def _length(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        return _length(next(iter(inputs.values())))
    if isinstance(inputs, Tensor) and inputs.ndim == 0:
        raise DataError("inputs need an axis of rows; this is a single number")
    return len(inputs)


def rows_of(batch: Batch, rows: slice | Tensor) -> Batch:
    """Some rows of a batch: a slice of them, or those whose numbers a tensor holds."""

    def cut(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {name: cut(part) for name, part in value.items()}
        if isinstance(value, list | tuple) and isinstance(rows, Tensor):
            return [value[int(row)] for row in rows]
        return value[rows]

    return Batch(cut(batch.inputs), cut(batch.labels), cut(batch.ids))


def to_device(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device: tensors move, mappings move by value, texts stay."""
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    return inputs.to(device, non_blocking=True) if isinstance(inputs, Tensor) else inputs


class Apart:
    """The rows of some data that belong to the tenth set apart, or all the others.

    Args:
        data: anything that a Stream reads twice in the same order.
        seed: of the choice.
        inside: whether the tenth, or the rest.
        options: of the Stream.
    """

    def __init__(self, data: Any, seed: int, *, inside: bool, **options: Any) -> None:
        self._data, self._seed, self._inside, self._options = data, seed, inside, options

    def __iter__(self) -> Iterator[Batch | Features]:
        for batch in Stream(self._data, **self._options):
            assert batch.ids is not None
            rows = (held_out(batch.ids, self._seed) == self._inside).nonzero().flatten()
            if isinstance(batch, Features):
                yield batch[rows.to(batch.device)]
            else:
                yield rows_of(batch, rows)
