"""Proposals of nearest neighbours in float32, on faiss or torch, and how far to trust them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oodcore.errors import ConfigurationError

if TYPE_CHECKING:
    from oodcore.index import Index

SPARE = 8
"""Candidates beyond k: room for neighbours that rounding to float32 swaps."""

MORE = 256
"""Candidates beyond k where that room was too small."""

BLOCK = 2**16
"""Rows that a product takes at once."""

STEP = 2**10
"""Rows that are centred and scaled at once: their float64 copies are small beside the index."""

LARGEST_SIZE = 4096
"""Up to which sizes in a factory string need not be compared with the number of rows."""

EFFORT = {"nprobe": 16, "efSearch": 256}
"""How far approximate indexes look; with faiss's own 1 and 16 they miss many neighbours."""

ROUNDING = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""The rounding of a product of float32 matrices, by torch's global setting."""


@dataclass(frozen=True)
class Proposal:
    """Candidates for the nearest rows of N queries.

    Args:
        found: ``[N, m]`` row numbers, nearest first; -1 where there is none.
        closeness: ``[N, m]``, minus a squared distance or a product, in units of the proposer's.
        slack: ``[N, 1]``: two rows whose closeness differs by less may be swapped.
        doubtful: ``[N]``, the queries of which a near row may be missing.
    """

    found: Tensor
    closeness: Tensor
    slack: Tensor
    doubtful: Tensor


class Proposer:
    """The float32 side of an index: proposes candidates, and knows when it may be wrong.

    Rows are centred (which changes no distance, and makes rounding smaller) and scaled by a power
    of two, so that no square overflows or vanishes.

    Raises:
        ConfigurationError: a factory that faiss does not know or cannot train, or no faiss for it.
    """

    def __init__(self, index: Index, device: torch.device) -> None:
        self.index = index
        self.device = device
        self.flat = index.factory == "Flat"
        self.centre, self.largest = self._extent()
        exponent = np.frexp(self.largest)[1] if self.largest > 0 else 0
        self.scale = 2.0 ** -float(np.clip(exponent, -1000, 1000))
        faiss = faiss_module()
        usable = faiss is not None and (device.type != "cuda" or faiss.get_num_gpus() > 0)
        if not self.flat and faiss is None:
            raise ConfigurationError(
                f"index '{index.factory}' needs faiss: pip install 'oodcore[cpu]' "
                "(or 'oodcore[gpu]')"
            )
        self.engine: Any = None
        self.bank = torch.empty(0)
        if usable or not self.flat:
            self.engine = self._engine()
        else:
            self.bank = torch.cat([block.float().to(device) for block in self._blocks()])
            self.squares = self.bank.square().sum(1)

    def propose(self, queries: Tensor, k: int, spare: int = SPARE) -> Proposal:
        """Candidates for the ``k`` nearest rows of queries ``[N, D]``, ``spare`` more than k."""
        count = min(k + spare, len(self.index))
        narrow = ((queries - self.centre.to(queries)) * self.scale).float()
        closeness, found = self._search(narrow, count)
        kth = closeness[:, k - 1 : k]
        if not self.flat:
            slack = torch.full_like(kth, torch.inf)
            return Proposal(found, closeness, slack, found[:, k - 1] < 0)
        unit = 2.0**-24
        if self.engine is None:
            unit = ROUNDING[torch.get_float32_matmul_precision()]
        slack = 2 * self._rounding(narrow.double(), kth, unit) + narrow.shape[1] * 2.0**-149
        return Proposal(found, closeness, slack, self._doubt(closeness, slack, k))

    def exactly(self, queries: Tensor, k: int) -> Proposal:
        """The same from products in float64, block by block."""
        count = min(k + SPARE, len(self.index))
        queries = (queries - self.centre.to(queries)) * self.scale
        best = queries.new_empty((len(queries), 0))
        found = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        first = 0
        for block in self._blocks(BLOCK // 8):
            rows = block.to(queries.device)
            products = queries @ rows.T
            if self.index.metric == "l2":
                products = products.mul_(2).sub_(rows.square().sum(1))
            numbers = torch.arange(first, first + len(rows), device=queries.device)
            first += len(rows)
            best = torch.cat([best, products], dim=1)
            found = torch.cat([found, numbers.expand(len(queries), -1)], dim=1)
            top = best.topk(min(count, best.shape[1]), dim=1)
            best, found = top.values, found.gather(1, top.indices)
        if self.index.metric == "l2":
            best = best - queries.square().sum(1, keepdim=True)
        kth = best[:, k - 1 : k]
        slack = 2 * self._rounding(queries, kth, 2.0**-53)
        return Proposal(found, best, slack, self._doubt(best, slack, k))

    def _doubt(self, closeness: Tensor, slack: Tensor, k: int) -> Tensor:
        """Whether a row that is no candidate may be nearer than the k-th, ``[N]``."""
        if closeness.shape[1] == len(self.index):
            return ~torch.isfinite(closeness).all(dim=1)
        return ~(closeness[:, -1:] < closeness[:, k - 1 : k] - slack)[:, 0]

    def _extent(self) -> tuple[Tensor, float]:
        """What is subtracted from rows and queries, and the norm of the longest row after that."""
        rows = self.index.rows
        centre = torch.zeros(rows.shape, dtype=torch.float64)
        if self.index.metric == "l2":
            for block in rows.blocks(STEP):
                centre += self.index.vectors(block).sum(0) / len(rows)
        longest = [
            float((self.index.vectors(block) - centre).norm(dim=1).max())
            for block in rows.blocks(STEP)
        ]
        return centre, max(longest, default=0.0)

    def _blocks(self, size: int = STEP) -> Iterator[Tensor]:
        """The rows, centred and scaled."""
        for block in self.index.rows.blocks(size):
            yield (self.index.vectors(block) - self.centre) * self.scale

    def _engine(self) -> Any:
        faiss = faiss_module()
        assert faiss is not None
        index = self.index
        metric = faiss.METRIC_L2 if index.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        _refuse_absurd(index.factory, len(index))
        try:
            engine = faiss.index_factory(index.rows.shape[0], index.factory, metric)
        except (RuntimeError, MemoryError) as error:
            raise ConfigurationError(
                f"faiss knows no index '{index.factory}': {_reason(error)}"
            ) from None
        for name, value in EFFORT.items():
            # An index without that parameter refuses it.
            with suppress(RuntimeError):
                faiss.ParameterSpace().set_index_parameter(engine, name, value)
        if self.device.type == "cuda" and faiss.get_num_gpus() > 0:
            engine = faiss.index_cpu_to_gpu(
                faiss.StandardGpuResources(), self.device.index or 0, engine
            )
        elif self.flat:
            # Room for all rows, or else adding them block by block would copy those before.
            engine.codes.resize(4 * len(index) * index.rows.shape[0])
            engine.codes.resize(0)
        try:
            if not engine.is_trained:
                engine.train(torch.cat([block.float() for block in self._blocks()]).numpy())
            for block in self._blocks():
                engine.add(block.float().numpy())
        except (RuntimeError, MemoryError) as error:
            raise ConfigurationError(
                f"the index '{index.factory}' cannot be built from {len(index)} rows: "
                f"{_reason(error)}"
            ) from None
        return engine

    def _search(self, narrow: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Closeness (descending) and row numbers of the best candidates."""
        if self.engine is None:
            parts = [self._best(part, count) for part in torch.split(narrow, 1024)]
            return torch.cat([p[0] for p in parts]).double(), torch.cat([p[1] for p in parts])
        queries = np.ascontiguousarray(narrow.cpu().numpy())
        with _matrix_products():
            values, numbers = self.engine.search(queries, count)
        found = torch.from_numpy(numbers).to(self.device)
        closeness = torch.from_numpy(values).to(self.device).double()
        if self.index.metric == "l2":
            closeness = -closeness
        return closeness.masked_fill(found < 0, -torch.inf), found

    def _best(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = queries.new_empty((len(queries), 0))
        found = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
        for first in range(0, len(self.bank), BLOCK):
            rows = self.bank[first : first + BLOCK]
            products = queries @ rows.T
            if self.index.metric == "l2":
                products = products.mul_(2).sub_(self.squares[first : first + BLOCK])
            top = products.topk(min(count, len(rows)), dim=1)
            best = torch.cat([best, top.values], dim=1)
            found = torch.cat([found, top.indices + first], dim=1)
            top = best.topk(min(count, best.shape[1]), dim=1)
            best, found = top.values, found.gather(1, top.indices)
        if self.index.metric == "l2":
            best = best - queries.square().sum(1, keepdim=True)
        return best, found

    def _rounding(self, queries: Tensor, kth: Tensor, unit: float) -> Tensor:
        """How far the closeness of a row about as near as the k-th may be off, ``[N, 1]``.

        A sum of D products is wrong by about sqrt(D) roundings of the sum's size; what was
        measured, over many kinds of data and both libraries, is a third of this at most.
        """
        root = queries.shape[1] ** 0.5
        size = queries.norm(dim=1, keepdim=True)
        if self.index.metric == "l2":
            terms = (8 + root) * (2 * size + kth.neg().clamp_min(0).sqrt()).square()
        else:
            terms = (8 + 2 * root) * size * (self.largest * self.scale)
        rounding: Tensor = unit * terms
        return rounding


@cache
def faiss_module() -> ModuleType | None:
    """faiss, or None where it is not installed. torch comes first: both share one OpenMP then."""
    try:
        import faiss
    except ImportError:
        return None
    module: ModuleType = faiss
    return module


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[-1][:200]


def _refuse_absurd(factory: str, rows: int) -> None:
    """Raise a ConfigurationError for numbers that faiss would end the process over, or never end.

    A factory may come from an artifact that somebody else wrote.
    """
    most = max(rows, LARGEST_SIZE)
    if len(factory) > 100:
        told = "it is too long"
    elif any(not 0 < int(digits) <= most for digits in re.findall(r"[0-9]+", factory)):
        told = f"sizes in it go from 1 to {most}"
    elif re.search(r"HNSW1(?![0-9])", factory):
        told = "HNSW takes at least 2 neighbours"
    else:
        return
    raise ConfigurationError(f"faiss knows no index '{factory[:100]}': {told}")


_searching = threading.Lock()
_searches: list[int] = []


@contextmanager
def _matrix_products() -> Iterator[None]:
    """faiss searches with a matrix product from 20 queries on; its own threshold is 128,000.

    The setting is global, so the last search to end puts it back.
    """
    faiss = faiss_module()
    assert faiss is not None
    settings = faiss.cvar
    with _searching:
        _searches.append(settings.distance_compute_blas_threshold)
        settings.distance_compute_blas_threshold = 20
    try:
        yield
    finally:
        with _searching:
            before = _searches[0]
            _searches.pop()
            if not _searches:
                settings.distance_compute_blas_threshold = before
