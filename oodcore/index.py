"""Rows and Index: append-only rows of the training data, and their nearest neighbours on faiss."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import EPS
from oodcore.search import MORE, SPARE, Proposer

MEMORY_LIMIT = 256 * 2**20
"""Bytes of rows kept in memory; what comes after lies in unnamed temporary files."""

CHUNK = 2**16
"""Numbers that a step over pairs of rows holds at once: they fit a processor's cache."""

WIDE_CHUNK = 2**24
"""The same on other devices, which want few and large steps."""

Metric = Literal["l2", "inner_product"]


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


class Index:
    """Nearest neighbours among rows.

    faiss proposes candidates from a float32 index, and whatever rounding may have put in the wrong
    place is computed again in float64. With the factory ``Flat`` the answer is exact: where
    rounding could have hidden a neighbour from the proposal, that query is searched in float64. So
    a row's neighbours do not depend on the batch it comes in. Without faiss, blocked products in
    torch propose. Other factories give what faiss finds, at float64 distances.

    Args:
        rows: ``[N, D]``.
        metric: ``l2`` (Euclidean distance, ascending) or ``inner_product`` (descending).
        factory: a faiss index factory string.
        normalized: give rows and queries unit norm first (a zero row stays zero).

    Raises:
        DataError: rows that are no vectors.
        ConfigurationError: on the first search, a factory that faiss does not know, or that wants
            faiss where there is none.
    """

    def __init__(
        self,
        rows: Rows,
        metric: Metric = "l2",
        factory: str = "Flat",
        normalized: bool = False,
    ) -> None:
        if len(rows.shape) != 1:
            raise DataError(f"an index takes rows [D], not {list(rows.shape)}")
        self.rows = rows
        self.metric = metric
        self.factory = factory
        self.normalized = normalized
        self._norms: Tensor | None = None
        self._proposer: tuple[str, Proposer] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows of each query.

        Args:
            queries: ``[N, D]`` float64.
            k: at most the number of rows.

        Returns:
            Distances (or inner products) ``[N, k]`` float64, nearest first, differentiable in the
            queries; and row numbers ``[N, k]``. Among rows at the same distance the choice is free.

        Raises:
            DataError: more neighbours than rows, or queries of another width.
        """
        queries = self._queries(queries, k)
        found = self._nearest(queries.detach(), k).sort(dim=1).values
        values = self._values(queries, found)
        order = values.detach().sort(dim=1, descending=self.metric != "l2", stable=True).indices
        return values.gather(1, order), found.gather(1, order)

    def kth(self, queries: Tensor, k: int) -> Tensor:
        """The last column of ``search``'s distances, ``[N]``, for much less work.

        Args:
            queries: ``[N, D]`` float64.
            k: at most the number of rows.

        Raises:
            DataError: as ``search``.
        """
        queries = self._queries(queries, k)
        return self._values(queries, self._nearest(queries.detach(), k)[:, -1:])[:, 0]

    def vectors(self, block: Tensor) -> Tensor:
        """Rows as they are compared: float64, and of unit norm where that is asked for."""
        wide = block.double()
        if self.normalized:
            wide = wide / wide.norm(dim=-1, keepdim=True).clamp_min(EPS)
        return wide

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_proposer": None, "_norms": None}

    def _queries(self, queries: Tensor, k: int) -> Tensor:
        if not 1 <= k <= len(self):
            raise DataError(f"{k} neighbours were asked for, and the index has {len(self)} rows")
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[0]:
            raise DataError(f"queries must be [N, {self.rows.shape[0]}], not {list(queries.shape)}")
        return self.vectors(queries)

    @torch.no_grad()
    def _nearest(self, queries: Tensor, k: int, spare: int = SPARE) -> Tensor:
        """The numbers of the ``k`` nearest rows, ``[N, k]``, of which the last is the farthest.

        Candidates whose place among the k rounding cannot have changed are not looked at again.
        """
        proposed = self._proposed(queries.device).propose(queries, k, spare)
        kth = proposed.closeness[:, k - 1 : k]
        sure = proposed.closeness > kth + proposed.slack
        maybe = (proposed.closeness >= kth - proposed.slack) & ~sure & (proposed.found >= 0)
        maybe[proposed.doubtful] = False
        rank = torch.where(sure, torch.inf, -torch.inf).to(queries.dtype)
        asked, place = maybe.nonzero(as_tuple=True)
        rank[asked, place] = self._closeness(queries, asked, proposed.found[asked, place])
        best = rank.sort(dim=1, descending=True, stable=True).indices[:, :k]
        found = proposed.found.gather(1, best)
        doubtful = proposed.doubtful.nonzero().flatten()
        if len(doubtful):
            some = queries[doubtful]
            more = spare == SPARE and len(self) > k + SPARE
            found[doubtful] = self._nearest(some, k, MORE) if more else self._exactly(some, k)
        return found

    def _exactly(self, queries: Tensor, k: int) -> Tensor:
        """The same, from products in float64 with every row.

        Where even these leave open which rows are nearest, by more than a ten-millionth of the
        distance, differences decide: of rows that lie together far from all others.
        """
        proposer = self._proposed(queries.device)
        nearest = []
        for some in torch.split(queries, 1024):
            proposed = proposer.exactly(some, k)
            values = self._values(some, proposed.found)
            best = values.sort(dim=1, descending=self.metric != "l2", stable=True)
            found = proposed.found.gather(1, best.indices[:, :k])
            if self.metric == "l2":
                reach = (best.values[:, k - 1] * proposer.scale).square()
                open_ends = proposed.doubtful & (proposed.slack[:, 0] > 1e-7 * reach) & (reach > 0)
                for number in open_ends.nonzero().flatten():
                    found[number] = self._by_difference(some[number : number + 1], k)
            nearest.append(found)
        return torch.cat(nearest)

    def _by_difference(self, query: Tensor, k: int) -> Tensor:
        """The numbers of the ``k`` nearest rows of one query ``[1, D]``, by distances to all."""
        numbers = torch.arange(len(self), device=query.device)
        distances = [self._values(query, some[None])[0] for some in torch.split(numbers, 4096)]
        return torch.cat(distances).sort(stable=True).indices[:k]

    def _closeness(self, queries: Tensor, asked: Tensor, found: Tensor) -> Tensor:
        """How close some pairs of a query and a row are, ``[P]``: more is closer."""
        pairs = zip(torch.split(asked, 4096), torch.split(found, 4096), strict=True)
        parts = [self._values(queries[some], numbers[:, None])[:, 0] for some, numbers in pairs]
        values = torch.cat(parts)
        return -values if self.metric == "l2" else values

    def _values(self, queries: Tensor, found: Tensor) -> Tensor:
        """Distances or products of each query and its rows ``[N, m]``, ``[N, m]``."""
        room = CHUNK if queries.device.type == "cpu" else WIDE_CHUNK
        chunk = max(1, room // max(1, found.shape[1] * queries.shape[1]))
        pairs = zip(torch.split(queries, chunk), torch.split(found, chunk), strict=True)
        return torch.cat([self._chunk_values(some, numbers) for some, numbers in pairs])

    def _chunk_values(self, queries: Tensor, found: Tensor) -> Tensor:
        numbers = found.cpu()
        near = self.rows[numbers].to(queries.device, queries.dtype)
        if self.normalized:
            near.div_(self._row_norms()[numbers].to(queries)[..., None])
        if self.metric == "l2":
            distances: Tensor = torch.linalg.vector_norm(queries[:, None] - near, dim=2)
            return distances
        return (queries[:, None] * near).sum(2)

    def _row_norms(self) -> Tensor:
        if self._norms is None:
            norms = [b.double().norm(dim=1).clamp_min(EPS) for b in self.rows.blocks(4096)]
            self._norms = torch.cat(norms)
        return self._norms

    def _proposed(self, device: torch.device) -> Proposer:
        if self._proposer is None or self._proposer[0] != str(device):
            self._proposer = (str(device), Proposer(self, device))
        return self._proposer[1]
