"""Rows and Index: append-only rows of the training data, and their nearest neighbours on faiss."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from oodcore.errors import ConfigurationError, DataError
from oodcore.features import EPS

MEMORY_LIMIT = 256 * 2**20
"""Bytes of rows kept in memory; what comes after lies in unnamed temporary files."""

Metric = Literal["l2", "inner_product"]


class Rows:
    """Append-only rows of one shape, in memory up to a limit and memory-mapped past it.

    Floating rows are kept as float32 while that loses nothing, and as float64 from the first row
    for which it would. Segments are never changed, so copies share them.

    Args:
        shape: of one row: ``()`` for numbers, ``(D,)`` for embeddings.
        dtype: ``torch.int64``, or a floating type.
    """

    def __init__(self, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.dtype = torch.float32 if dtype.is_floating_point else dtype
        self._segments: list[Tensor] = []
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
        rows._segments = [values]
        return rows

    @property
    def identity(self) -> tuple[int, ...]:
        """The same for rows that share all their segments."""
        return tuple(id(segment) for segment in self._segments)

    def __len__(self) -> int:
        return sum(len(segment) for segment in self._segments)

    def append(self, values: Tensor) -> None:
        """Add rows ``[N, *shape]``; a copy is taken.

        Raises:
            DataError: rows of another shape.
        """
        if tuple(values.shape[1:]) != self.shape:
            raise DataError(
                f"rows of shape {list(self.shape)} cannot take {list(values.shape[1:])}"
            )
        values = values.detach().cpu()
        if self.dtype == torch.float32 and values.dtype == torch.float64:
            narrow = values.float()
            if torch.equal(narrow.double(), values):
                values = narrow
            else:
                self.dtype = torch.float64
                self._segments = [segment.double() for segment in self._segments]
        segment = values.to(self.dtype, copy=True).contiguous()
        self._segments.append(segment)
        self._resident += segment.nbytes
        if self._resident > MEMORY_LIMIT:
            self._spill()

    def copy(self) -> Rows:
        """Rows that share what is here and grow apart from it."""
        other = Rows(self.shape, self.dtype)
        other.dtype = self.dtype
        other._segments = list(self._segments)
        other._resident = self._resident
        return other

    def joined(self, other: Rows) -> Rows:
        """These rows, then the other's."""
        if self.shape != other.shape:
            raise DataError(f"rows of shapes {self.shape} and {other.shape} cannot be joined")
        both = self.copy()
        both.dtype = torch.promote_types(self.dtype, other.dtype)
        both._segments = [s.to(both.dtype) for s in (*self._segments, *other._segments)]
        both._resident += other._resident
        return both

    def tensor(self) -> Tensor:
        """All rows as one tensor ``[N, *shape]`` on the CPU; not to be written to."""
        if len(self._segments) == 1:
            return self._segments[0]
        if not self._segments:
            return torch.empty((0, *self.shape), dtype=self.dtype)
        whole = torch.cat(self._segments)
        if whole.nbytes <= MEMORY_LIMIT:
            self._segments = [whole]
        return whole

    def blocks(self, size: int = 65536) -> Iterator[Tensor]:
        """The rows in order, at most ``size`` at a time."""
        for segment in self._segments:
            yield from segment.split(size)

    def between(self, first: int, last: int) -> Tensor:
        """The rows from number ``first`` up to, but not including, ``last``."""
        pieces, start = [], 0
        for segment in self._segments:
            if start < last and start + len(segment) > first:
                pieces.append(segment[max(0, first - start) : last - start])
            start += len(segment)
        return torch.cat(pieces) if pieces else self.tensor()[:0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows by number, for numbers of any shape."""
        if len(self._segments) <= 1:
            return self.tensor()[rows]
        ends = torch.tensor([len(s) for s in self._segments]).cumsum(0)
        where = torch.bucketize(rows, ends, right=True)
        out = torch.empty((*rows.shape, *self.shape), dtype=self.dtype)
        for number, segment in enumerate(self._segments):
            here = where == number
            if bool(here.any()):
                out[here] = segment[rows[here] - (int(ends[number]) - len(segment))]
        return out

    def _spill(self) -> None:
        """Move the segments in memory to a file of their own, unlinked from the start."""
        mapped = [s for s in self._segments if getattr(s, "_oodcore_file", None) is not None]
        loose = self._segments[len(mapped) :]
        count = sum(len(segment) for segment in loose)
        file = tempfile.TemporaryFile(prefix="oodcore-")  # noqa: SIM115 - the mapping owns it
        for segment in loose:
            file.write(memoryview(segment.numpy()).cast("B"))
        file.flush()
        kind: np.dtype[Any] = segment.numpy().dtype
        array = np.memmap(file, dtype=kind, mode="r+", shape=(count, *self.shape))
        whole = torch.from_numpy(array)
        whole._oodcore_file = file  # type: ignore[attr-defined]
        self._segments = [*mapped, whole]
        self._resident = 0


class Index:
    """Nearest neighbours among rows.

    faiss proposes candidates from a float32 index and their distances are computed again, and
    sorted, in float64. With the factory ``Flat`` the answer is exact: where rounding could have
    hidden a neighbour from the proposal, that query is searched in float64. So a row's neighbours
    do not depend on the batch it comes in. Without faiss, blocked products in torch propose.

    Args:
        rows: ``[N, D]``.
        metric: ``l2`` (Euclidean distance, ascending) or ``inner_product`` (descending).
        factory: a faiss index factory string.
        normalized: give rows and queries unit norm first (a zero row stays zero).
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
        self._searcher: tuple[str, _Searcher] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest rows of each query.

        Args:
            queries: ``[N, D]`` float64.
            k: at most the number of rows.

        Returns:
            Distances (or inner products) ``[N, k]`` float64, nearest first, differentiable in the
            queries; and row numbers ``[N, k]``.

        Raises:
            DataError: more neighbours than rows, or queries of another width.
        """
        if not 1 <= k <= len(self):
            raise DataError(f"{k} neighbours were asked for, and the index has {len(self)} rows")
        if queries.ndim != 2 or queries.shape[1] != self.rows.shape[0]:
            raise DataError(f"queries must be [N, {self.rows.shape[0]}], not {list(queries.shape)}")
        if self.normalized:
            norms = queries.norm(dim=1, keepdim=True).clamp_min(EPS)
            queries = queries / norms
        searcher = self._on(queries.device)
        with torch.no_grad():
            found, doubtful = searcher.propose(queries.detach(), k)
            if doubtful is not None:
                for some in doubtful.split(1024):
                    found[some] = searcher.exactly(queries.detach()[some], k)
            found = found.sort(dim=1).values
        distances = torch.cat(
            [
                self._distances(query, near)
                for query, near in zip(
                    queries.split(self._chunk(found)), found.split(self._chunk(found)), strict=True
                )
            ]
        ) if len(queries) else queries.new_empty((0, found.shape[1]))  # fmt: skip
        order = distances.detach().sort(dim=1, descending=self.metric != "l2", stable=True).indices
        order = order[:, :k]
        return distances.gather(1, order), found.gather(1, order)

    def _distances(self, queries: Tensor, found: Tensor) -> Tensor:
        near = self.rows[found.cpu()].to(queries.device, queries.dtype)
        if self.normalized:
            near = near / self._norms()[found.cpu()].to(queries)[..., None]
        if self.metric == "l2":
            return torch.linalg.vector_norm(queries[:, None] - near, dim=2)
        return (queries[:, None] * near).sum(2)

    def _chunk(self, found: Tensor) -> int:
        return max(1, 2**21 // max(1, found.shape[1] * self.rows.shape[0]))

    def _norms(self) -> Tensor:
        if not hasattr(self, "_cached_norms"):
            blocks = [b.double().norm(dim=1).clamp_min(EPS) for b in self.rows.blocks()]
            self._cached_norms = torch.cat(blocks)
        return self._cached_norms

    def _on(self, device: torch.device) -> _Searcher:
        if self._searcher is None or self._searcher[0] != str(device):
            self._searcher = (str(device), _Searcher(self, device))
        return self._searcher[1]


SPARE = 8
"""Candidates beyond k: room for neighbours that rounding to float32 swaps."""


class _Searcher:
    """The float32 side of an index: proposes candidates, and knows when it may be wrong."""

    def __init__(self, index: Index, device: torch.device) -> None:
        self.index = index
        self.device = device
        width = index.rows.shape[0]
        self.centre = self._centre()
        self.largest = 0.0
        self.exact = index.factory == "Flat"
        faiss = faiss_module()
        if faiss is None and not self.exact:
            raise ConfigurationError(
                f"index '{index.factory}' needs faiss: pip install 'oodcore[cpu]' (or 'oodcore[gpu]')"
            )
        self.engine: Any = None
        on_gpu = device.type == "cuda"
        if faiss is not None and (not on_gpu or faiss.get_num_gpus() > 0):
            metric = (
                faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
            )
            try:
                self.engine = faiss.index_factory(width, index.factory, metric)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1][:200]
                raise ConfigurationError(
                    f"faiss knows no index '{index.factory}': {reason}"
                ) from None
            if on_gpu:
                self.engine = faiss.index_cpu_to_gpu(
                    faiss.StandardGpuResources(), device.index or 0, self.engine
                )
            self._fill_engine()
        else:
            self.bank = torch.cat([block.to(device) for block in self._blocks()])
            self._measure(self.bank)

    def _centre(self) -> Tensor:
        """What is subtracted from rows and queries: distances do not change, rounding does."""
        rows = self.index.rows
        if self.index.metric != "l2" or self.index.normalized:
            return torch.zeros(rows.shape, dtype=torch.float64)
        total = sum((b.double().sum(0) for b in rows.blocks()), torch.zeros(rows.shape).double())
        return total / max(1, len(rows))

    def _blocks(self) -> Iterator[Tensor]:
        for block in self.index.rows.blocks():
            wide = block.double()
            if self.index.normalized:
                wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(EPS)
            yield (wide - self.centre).float().contiguous()

    def _measure(self, block: Tensor) -> None:
        self.largest = max(self.largest, float(block.norm(dim=1).max()) if len(block) else 0.0)

    def _fill_engine(self) -> None:
        if not self.engine.is_trained:
            self.engine.train(torch.cat(list(self._blocks())).numpy())
        for block in self._blocks():
            self._measure(block)
            self.engine.add(block.numpy())

    @property
    def norms(self) -> Tensor:
        """Squared norms of the bank that torch searches, ``[N]``."""
        if not hasattr(self, "_squares"):
            self._squares = self.bank.square().sum(1)
        return self._squares

    def propose(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        """Candidates ``[N, m]`` (row numbers), and which queries need an exact search, or None."""
        count = min(k + SPARE, len(self.index))
        narrow = (queries - self.centre.to(queries)).float()
        closeness, found = self._search(narrow, count)
        if bool((found < 0).any()):
            found = torch.where(found < 0, found[:, :1].clamp_min(0), found)
        if not self.exact or count == len(self.index):
            return found, None
        return found, self._doubt(narrow, closeness, k)

    def _search(self, narrow: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Closeness (descending: minus squared distances or products) and row numbers."""
        if self.engine is not None:
            values, found = _faiss_search(self.engine, narrow.cpu().numpy(), count)
            closeness = torch.from_numpy(values).to(self.device)
            sign = -1.0 if self.index.metric == "l2" else 1.0
            return sign * closeness, torch.from_numpy(found).to(self.device)
        parts = [self._topk(part, self.bank, count) for part in narrow.split(1024)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _topk(self, queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
        products = queries @ bank.T
        if self.index.metric == "l2":
            products = 2 * products - self.norms - queries.square().sum(1, keepdim=True)
        top = products.topk(count, dim=1)
        return top.values, top.indices

    def _doubt(self, narrow: Tensor, closeness: Tensor, k: int) -> Tensor | None:
        """Queries whose k-th neighbour is no safer from the last candidate than rounding is large."""
        reach = narrow.norm(dim=1).double() + self.largest
        squared = reach.square() if self.index.metric == "l2" else (reach * self.largest)
        slack = 4 * narrow.shape[1] ** 0.5 * 2.0**-24 * squared
        gap = closeness[:, k - 1].double() - closeness[:, -1].double()
        doubtful = gap <= 2 * slack
        return doubtful.nonzero().flatten() if bool(doubtful.any()) else None

    def exactly(self, queries: Tensor, k: int) -> Tensor:
        """Candidates from products in float64, block by block."""
        count = min(k + SPARE, len(self.index))
        best = queries.new_full((len(queries), 0), 0.0)
        found = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
        centre = self.centre.to(queries)
        first = 0
        for block in self.index.rows.blocks(8192):
            wide = block.to(queries.device, torch.float64)
            if self.index.normalized:
                wide = wide / wide.norm(dim=1, keepdim=True).clamp_min(EPS)
            products = (queries - centre) @ (wide - centre).T
            if self.index.metric == "l2":
                products = 2 * products - (wide - centre).square().sum(1)
            numbers = torch.arange(first, first + len(wide), device=queries.device)
            first += len(wide)
            best = torch.cat([best, products], dim=1)
            found = torch.cat([found, numbers.expand(len(queries), -1)], dim=1)
            top = best.topk(min(count, best.shape[1]), dim=1)
            best, found = top.values, found.gather(1, top.indices)
        return found


@cache
def faiss_module() -> ModuleType | None:
    """faiss, or None where it is not installed. torch comes first: both share one OpenMP then."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss  # type: ignore[no-any-return]


def _faiss_search(engine: Any, queries: np.ndarray, count: int) -> tuple[Any, Any]:
    """faiss's search, with the matrix product used from 20 queries on (its default is 128,000)."""
    faiss = faiss_module()
    assert faiss is not None
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 20
    try:
        return engine.search(np.ascontiguousarray(queries), count)  # type: ignore[no-any-return]
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
