"""Rows: append-only rows of the training data, in memory and then in files."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodcore.errors import DataError

MEMORY_LIMIT = 256 * 2**20
"""Bytes of rows kept in memory; what comes after lies in unnamed temporary files."""


@dataclass(frozen=True)
class _Segment:
    """Rows one after another, never changed; ``loose`` ones lie in memory of their own."""

    values: Tensor
    loose: bool


class Rows:
    """Append-only rows of one shape, in memory up to a limit and memory-mapped past it.

    Floating rows are kept as float32 while that loses nothing; from the first rows for which it
    would, they are float64. Segments are never changed, so copies share them.

    Args:
        shape: of one row: ``()`` for numbers, ``(D,)`` for embeddings.
        dtype: ``torch.int64``, or a floating type.
    """

    def __init__(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.dtype = torch.float32 if dtype.is_floating_point else dtype
        self._segments: list[_Segment] = []
        self._length = 0
        self._resident = 0

    @classmethod
    def of(cls, values: Tensor) -> Rows:
        """Rows that are the first axis of a tensor; a copy is taken."""
        rows = cls(tuple(values.shape[1:]), values.dtype)
        rows.append(values)
        return rows

    @classmethod
    def mapped(cls, values: Tensor) -> Rows:
        """Rows that are the first axis of a tensor, in its place and as they are."""
        rows = cls(tuple(values.shape[1:]), values.dtype)
        rows.dtype = values.dtype
        if len(values):
            rows._segments = [_Segment(values, loose=False)]
            rows._length = len(values)
        return rows

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for rows of one kind that share all their segments."""
        return self.shape, self.dtype, *(id(segment.values) for segment in self._segments)

    def __len__(self) -> int:
        return self._length

    def append(self, values: Tensor) -> None:
        """Add rows ``[N, *shape]``; a copy is taken.

        Raises:
            DataError: rows of another shape, or of a type that would lose its meaning.
        """
        if tuple(values.shape[1:]) != self.shape:
            raise DataError(
                f"rows of shape {list(self.shape)} cannot take {list(values.shape[1:])}"
            )
        if not torch.can_cast(values.dtype, self.dtype):
            raise DataError(f"rows of {self.dtype} cannot take {values.dtype}")
        if not len(values):
            return
        values = values.detach().cpu()
        if values.dtype == torch.float64:
            narrow = values.to(torch.float32, memory_format=torch.contiguous_format)
            lossless = torch.equal(narrow.double(), values)
            kept = narrow if lossless else values.clone(memory_format=torch.contiguous_format)
        else:
            dtype = torch.float32 if self.dtype.is_floating_point else self.dtype
            kept = values.to(dtype, copy=True).contiguous()
        self.adopt(kept)

    def adopt(self, values: Tensor) -> None:
        """Add rows of a type that rows are kept in, and which nobody else will write to."""
        self.dtype = torch.promote_types(self.dtype, values.dtype)
        if len(values):
            self._add([_Segment(values, loose=True)])

    def copy(self) -> Rows:
        """Rows that share what is here and grow apart from it."""
        self._settle()
        other = Rows(self.shape, self.dtype)
        other.dtype = self.dtype
        other._segments = list(self._segments)
        other._length, other._resident = self._length, self._resident
        return other

    def joined(self, other: Rows) -> Rows:
        """These rows, then the other's.

        Raises:
            DataError: rows of another shape, or numbers of another kind.
        """
        if self.shape != other.shape:
            raise DataError(
                f"rows of shapes {list(self.shape)} and {list(other.shape)} cannot be joined"
            )
        if self.dtype.is_floating_point != other.dtype.is_floating_point:
            raise DataError(f"rows of {self.dtype} and {other.dtype} cannot be joined")
        both, more = self.copy(), other.copy()
        both.dtype = torch.promote_types(self.dtype, other.dtype)
        both._add(more._segments)
        return both

    def tensor(self) -> Tensor:
        """All rows as one tensor ``[N, *shape]`` on the CPU; not to be written to."""
        self._settle()
        if not self._segments:
            return torch.empty((0, *self.shape), dtype=self.dtype)
        parts = [segment.values.to(self.dtype) for segment in self._segments]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def blocks(self, size: int = 65536) -> Iterator[Tensor]:
        """The rows in order, at most ``size`` at a time."""
        self._settle()
        for segment in self._segments:
            for block in torch.split(segment.values, size):
                yield block.to(self.dtype)

    def between(self, first: int, last: int) -> Tensor:
        """The rows from number ``first`` up to, but not including, ``last``."""
        self._settle()
        pieces, start = [], 0
        for segment in self._segments:
            if start < last and start + len(segment.values) > first:
                piece = segment.values[max(0, first - start) : last - start]
                pieces.append(piece.to(self.dtype))
            start += len(segment.values)
        return torch.cat(pieces) if pieces else torch.empty((0, *self.shape), dtype=self.dtype)

    def read(self, size: int) -> Iterator[Tensor]:
        """The rows in order, ``size`` at a time and fewer at the end.

        They are put together as they are read; what is here stays in its pieces.
        """
        waiting: list[Tensor] = []
        count = 0
        for segment in tuple(self._segments):
            values = segment.values
            while count + len(values) >= size:
                taken, values = values[: size - count], values[size - count :]
                yield torch.cat([part.to(self.dtype) for part in (*waiting, taken)])
                waiting, count = [], 0
            if len(values):
                waiting.append(values)
                count += len(values)
        if waiting:
            yield torch.cat([part.to(self.dtype) for part in waiting])

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by number (on the CPU), for numbers of any shape."""
        self._settle()
        flat = rows.flatten()
        if len(self._segments) == 1:
            out = self._segments[0].values.index_select(0, flat).to(self.dtype)
        else:
            out = torch.empty((len(flat), *self.shape), dtype=self.dtype)
            first = 0
            for segment in self._segments:
                last = first + len(segment.values)
                here = ((flat >= first) & (flat < last)).nonzero().flatten()
                if len(here):
                    taken = segment.values.index_select(0, flat[here] - first)
                    out.index_copy_(0, here, taken.to(self.dtype))
                first = last
        return out.reshape(*rows.shape, *self.shape)

    def picked(self, numbers: Tensor) -> Rows:
        """Other rows: some of these by number ``[M]``, each at most once, in this order."""
        other = Rows(self.shape, self.dtype)
        size = self.dtype.itemsize * math.prod(self.shape)
        # Wide rows may be narrow again without those that were left out.
        if self.dtype == torch.float64 or len(numbers) * size > MEMORY_LIMIT:
            for some in torch.split(numbers, 4096):
                other.append(self[some])
            return other
        whole = torch.empty((len(numbers), *self.shape), dtype=self.dtype)
        place = torch.full((len(self),), -1)
        place[numbers] = torch.arange(len(numbers))
        first = 0
        for segment in self._segments:
            values = segment.values
            here = place[first : first + len(values)]
            first += len(values)
            taken = here >= 0
            if not bool(taken.all()):
                here, values = here[taken], values[taken]
            whole.index_copy_(0, here, values)
        other.adopt(whole)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "dtype": self.dtype, "rows": self.tensor()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["shape"], state["dtype"])  # type: ignore[misc]
        self.dtype = state["dtype"]
        if len(state["rows"]):
            self._add([_Segment(state["rows"], loose=True)])

    def _add(self, segments: Iterable[_Segment]) -> None:
        for segment in segments:
            self._segments.append(segment)
            self._length += len(segment.values)
            self._resident += segment.values.nbytes if segment.loose else 0
        if self._resident > MEMORY_LIMIT:
            self._gather(_in_a_file)
            self._resident = 0

    def _settle(self) -> None:
        """Make one segment of those in memory that follow one another: few are read fast."""
        if len(self._segments) > 1 and len(self._segments) > len(self._runs()):
            self._gather(_in_memory)

    def _runs(self) -> list[list[_Segment]]:
        """The segments, those together that can become one."""
        runs: list[list[_Segment]] = []
        kinds = groupby(self._segments, key=lambda segment: (segment.loose, segment.values.dtype))
        for (loose, _), run in kinds:
            runs += [list(run)] if loose else [[segment] for segment in run]
        return runs

    def _gather(self, together: Callable[[list[_Segment]], _Segment]) -> None:
        """Replace runs of loose segments of one type by one segment each."""
        gathered: list[_Segment] = []
        waiting = self._runs()[::-1]
        self._segments = []
        try:
            while waiting:
                if waiting[-1][0].loose:
                    gathered.append(together(waiting[-1]))
                else:
                    gathered += waiting[-1]
                waiting.pop()
        finally:
            self._segments = gathered + [segment for run in waiting[::-1] for segment in run]


def _in_memory(parts: list[_Segment]) -> _Segment:
    """The parts in one tensor; each goes as it is copied, so that rows are hardly there twice."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].values
    whole = first.new_empty((sum(len(part.values) for part in parts), *first.shape[1:]))
    last = len(whole)
    try:
        while parts:
            values = parts[-1].values
            whole[last - len(values) : last] = values
            last -= len(values)
            parts.pop()
            del values
    except BaseException:
        parts.append(_Segment(whole[last:], loose=True))
        raise
    return _Segment(whole, loose=True)


def _in_a_file(parts: list[_Segment]) -> _Segment:
    """The parts in a temporary file, which nobody else can name and the mapping alone keeps."""
    first = parts[0].values.numpy()
    shape = (sum(len(part.values) for part in parts), *first.shape[1:])
    with tempfile.TemporaryFile(prefix="oodcore-") as file:
        for part in parts:
            part.values.numpy().tofile(file)
        file.flush()
        array = np.memmap(file, dtype=first.dtype, mode="r+", shape=shape)
    return _Segment(torch.from_numpy(array), loose=False)
