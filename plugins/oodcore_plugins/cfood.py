"""CF-OOD: how wide the neighbourhoods of known rows must be before some of them hold a row."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import Normalized, Sample, State

PAIRS = 2**22
"""Pairs of a row and a reference row that are looked at together."""
ALIKE = 1e-12
"""Squared distances of rows of unit norm that differ by less are the same, but for rounding."""


class CFOOD(Scorer):
    """``-min{c : #{i : d(h, r_i) <= d_c(r_i)} >= k n}``, in [-1, 0).

    r_i are n reference rows, a uniform sample of the training rows, ``d_c(r_i)`` is the distance
    from r_i to its (c n)-th nearest reference row, itself not counted, and d the Euclidean distance
    of embeddings of unit norm (a zero row stays zero). The score is thus minus the share of
    neighbours that reference rows must look at until a share k of them counts h among its
    neighbours: the concentration-free outlier factor. Labels are not used.

    c is one of 230 numbers from 0.001 to 0.99, denser near 0, as in the authors' code, and 1 where
    h is farther than all; numbers that give the same neighbour are one. So there are many ties,
    and no gradient. Fitting costs n^2 distances, and a row n; 8 n (D + 230) bytes are kept.

    Args:
        fraction: of the training rows that are references; the authors take a tenth.
        k: the share of the reference rows that must count h among their neighbours.
        seed: of the sample.
    """

    kind = "cfood"
    paper = Paper(
        "CF-OOD: Concentration-Free Density Estimation for Reliable Out-of-Distribution Detection",
        "Fabrizio Angiulli, Fabio Fassetti, Maria Pia Zupi",
        "SISAP",
        2025,
        "https://doi.org/10.1007/978-3-032-06069-3_5",
    )
    differentiable: ClassVar[bool] = False
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    k: Annotated[float, Field(gt=0, le=1)] = 0.01
    seed: int = 0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Normalized(statistic=Sample(fraction=self.fraction, seed=self.seed)),)

    def fit(self, store: FeatureStore) -> State:
        references = store[self.statistics()[0]].embeddings.tensor().double()
        count = len(references)
        if count < 2:
            raise DataError(
                f"cfood: a share {self.fraction:g} of the training rows makes {count} reference "
                "rows, and there must be 2; give a larger fraction or more rows"
            )
        shares, places = neighbourhoods(count)
        radii = [
            squares(some, references).sort(dim=1).values[:, places]
            for some in torch.split(references, max(1, PAIRS // count))
        ]
        return {"references": references, "radii": torch.cat(radii), "shares": shares}

    def score(self, features: Features, state: State) -> Tensor:
        rows = unit(required(features.embeddings, "embeddings"))
        references = state["references"].to(rows)
        reach = (state["radii"] + ALIKE).to(rows)
        shares = torch.cat([state["shares"].to(rows), rows.new_ones(1)])
        enough = max(1, math.ceil(self.k * len(references) - 1e-9))
        found = []
        for some in torch.split(rows.detach(), max(1, PAIRS // len(references))):
            # The narrowest neighbourhood of each reference row that holds each row, [n, N].
            first = torch.searchsorted(reach, squares(references, some).contiguous())
            found.append(shares[first.kthvalue(enough, dim=0).values])
        return -torch.cat(found) if found else rows.new_zeros(0)


def neighbourhoods(count: int) -> tuple[Tensor, Tensor]:
    """Which shares of ``count`` rows are looked at, and which neighbour each reaches to.

    The row itself is neighbour 0.
    """
    shares = np.concatenate(
        [np.linspace(0.001, 0.1, 100), np.linspace(0.105, 0.5, 81), np.linspace(0.51, 0.99, 49)]
    )
    places = (shares * count - 1).astype(np.int64)
    kept = np.concatenate([[True], places[1:] > places[:-1]])
    return torch.from_numpy(shares[kept]), torch.from_numpy(places[kept] + 1)


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances ``[N, M]`` of rows of norm 1 or 0."""
    norms = a.square().sum(dim=1, keepdim=True) + b.square().sum(dim=1)
    return torch.addmm(norms, a, b.T, alpha=-2)


@hookimpl
def register_scorers(register: Register) -> None:
    register(CFOOD)
