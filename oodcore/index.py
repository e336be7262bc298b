"""Index: nearest neighbours among rows of the training data, on faiss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import EPS
from oodcore.rows import Rows
from oodcore.search import MORE, SPARE, Proposer

CHUNK = 2**16
"""Numbers that a step over pairs of rows holds at once: they fit a processor's cache."""

WIDE_CHUNK = 2**24
"""The same on other devices, which want few and large steps."""

Metric = Literal["l2", "inner_product"]


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
