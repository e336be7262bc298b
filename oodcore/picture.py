"""Pictures: the embeddings of a model in two dimensions, gathered as rows pass by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from oodcore.features import Features, required
from oodcore.figures import bin_edges
from oodcore.selection import hashed

ROWS = 1000
"""How many rows of a set are drawn at most."""
GRID = 1000
"""Steps along a side of the picture."""
_LARGEST = 1e100
"""Rows beyond that many times the largest training number are far off in any picture."""

Point = tuple[int, int]
Points = tuple[Point, ...]
Group = tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """Where rows lie in the plane along which a model's training embeddings vary most.

    The plane is spanned by the first two principal directions of a uniform sample of training rows.
    Both coordinates are in standard deviations of that sample along the first direction, from its
    mean. ``variance`` is the share of the sample's variance along each of the two. The picture is a
    square with the lower left ``corner`` and the same ``side`` along both; what lies outside is on
    its border. ``train`` and ``points``, by data set, are up to 1000 rows each, a uniform sample,
    counted from the corner in thousandths of the side.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    variance: tuple[float, float]
    corner: tuple[float, float]
    side: float
    train: Points
    points: Mapping[str, Points]

    def sound(self) -> bool:
        """Whether it is small enough, and everything is within its frame."""
        sets = (self.train, *self.points.values())
        return (
            all(isfinite(number) for number in (*self.corner, self.side))
            and self.side > 0
            and all(0 <= share <= 1 for share in self.variance)
            and all(len(points) <= ROWS for points in sets)
            and all(0 <= place <= GRID for place in chain.from_iterable(chain(*sets)))
        )


class Album:
    """Gathers the pictures of several models while passes over data go by.

    Memory is bounded: at most ``2 * ROWS`` training embeddings of a model are held at a time, and
    two numbers for as many rows of each other set. Which rows those are depends on seed and ids
    alone, as in ``oodcore.statistics.Sample``.

    Args:
        seed: of the hash that chooses rows.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._training: dict[Group, _Chosen] = {}
        self._planes: dict[Group, _Plane] = {}
        self._sets: dict[Group, dict[str, _Chosen]] = {}

    def training(self, detectors: Sequence[str], features: Features) -> None:
        """Look at training rows of the model that these detectors share."""
        if features.embeddings is not None:
            chosen = self._training.setdefault(tuple(detectors), _Chosen(self._seed))
            chosen.add(features, lambda rows: rows)

    def of(self, title: str) -> Callable[[Sequence[str], Features], None]:
        """What looks at the rows of a data set, once all training rows have gone by."""

        def look(detectors: Sequence[str], features: Features) -> None:
            group = tuple(detectors)
            if features.embeddings is None or group not in self._training:
                return
            if group not in self._planes:
                self._planes[group] = _Plane(self._training[group].rows())
            sets = self._sets.setdefault(group, {})
            chosen = sets.setdefault(title, _Chosen(self._seed))
            chosen.add(features, self._planes[group].project)

        return look

    def pictures(self, models: Mapping[str, str], titles: Sequence[str]) -> dict[str, Picture]:
        """The picture of each model that gave embeddings of all data sets, by its name.

        Args:
            models: the name of each detector's model.
            titles: of the data sets, the in-distribution one first.
        """
        found: dict[str, Picture] = {}
        for group, sets in self._sets.items():
            if set(sets) != set(titles) or not all(one.any for one in sets.values()):
                continue
            plane = self._planes[group]
            train = plane.project(self._training[group].rows())
            rows = {title: sets[title].rows() for title in titles}
            drawn = _drawn(plane, train, rows, titles[0])
            found |= dict.fromkeys((models[name] for name in group), drawn)
        return found


class _Chosen:
    """Those rows of a stream whose hash is smallest, and what is kept of them."""

    def __init__(self, seed: int) -> None:
        self._seed, self._limit = seed, 2**63 - 1
        self._hashes: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._held = 0

    def add(self, features: Features, kept: Callable[[Tensor], Tensor]) -> None:
        """Take in a batch; ``kept`` makes of embeddings ``[N, D]`` what is to be held of them."""
        hashes = hashed(required(features.ids, "ids"), self._seed, "picture")
        taken = hashes <= self._limit
        if not bool(taken.any()):
            return
        rows = required(features.embeddings, "embeddings")
        self._hashes.append(hashes[taken])
        self._rows.append(kept(rows.detach()[taken.to(rows.device)].cpu().double()))
        self._held += len(self._hashes[-1])
        if self._held > 2 * ROWS:
            self._trim()

    @property
    def any(self) -> bool:
        """Whether a row was chosen."""
        return self._held > 0

    def rows(self) -> Tensor:
        """What is held of the chosen rows, by their hash."""
        self._trim()
        return self._rows[0]

    def _trim(self) -> None:
        hashes, order = torch.cat(self._hashes).sort(stable=True)
        rows = torch.cat(self._rows)[order[:ROWS]]
        self._hashes, self._rows, self._held = [hashes[:ROWS]], [rows], len(rows)
        if len(rows) == ROWS:
            self._limit = int(hashes[ROWS - 1])


class _Plane:
    """The two directions of most variance of training embeddings ``[N, D]``."""

    def __init__(self, rows: Tensor) -> None:
        # Scaled first: squares of numbers beyond 1e154 are no float64.
        self._scale = float(rows.abs().max()) or 1.0
        scaled = rows / self._scale
        self._mean = scaled.mean(dim=0)
        centred = scaled - self._mean
        wide = centred.shape[1] > centred.shape[0]
        products = centred @ centred.T if wide else centred.T @ centred
        values, vectors = torch.linalg.eigh(products)
        size = min(2, len(values))
        values, vectors = values.flip(0)[:size].clamp_min(0), vectors.flip(1)[:, :size]
        directions = centred.T @ vectors if wide else vectors
        # A direction without variance is no direction but rounding.
        real = values > 1e-12 * centred.square().sum()
        directions = directions / directions.norm(dim=0).clamp_min(1e-300) * real
        signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        self._directions = directions.new_zeros(len(directions), 2)
        self._directions[:, :size] = directions * signs
        total = float(centred.square().sum())
        shares = [min(float(value) / total, 1.0) if total else 0.0 for value in values * real]
        self.variance = (shares[0], shares[1] if size == 2 else 0.0)
        self._unit = float(values[0] / len(rows)) ** 0.5 if bool(real[0]) else 1.0

    def project(self, rows: Tensor) -> Tensor:
        """Where rows ``[N, D]`` lie in the plane, ``[N, 2]``."""
        scaled = (rows / self._scale).clamp(-_LARGEST, _LARGEST)
        placed: Tensor = (scaled - self._mean) @ self._directions / self._unit
        return placed


def _drawn(plane: _Plane, train: Tensor, sets: Mapping[str, Tensor], id_name: str) -> Picture:
    """The picture of rows in the plane, ``[N, 2]`` each."""
    everything = {"": train, **sets}
    spans = []
    for axis in (0, 1):
        edges = bin_edges({name: v[:, axis].numpy() for name, v in everything.items()}, id_name)
        spans.append((float(edges[0]), float(edges[-1])))
    side = max(high - low for low, high in spans)
    corner = torch.tensor([(low + high - side) / 2 for low, high in spans], dtype=torch.float64)

    def counted(rows: Tensor) -> Points:
        steps = ((rows - corner) / side).clamp(0, 1).mul(GRID).round().long()
        return tuple((x, y) for x, y in steps.tolist())

    points = {name: counted(rows) for name, rows in sets.items()}
    left, bottom = corner.tolist()
    return Picture(plane.variance, (left, bottom), side, counted(train), points)
