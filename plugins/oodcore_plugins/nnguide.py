"""NNGuide: the energy, guided by nearby training rows of high energy."""

from __future__ import annotations

import warnings
from typing import Annotated

from pydantic import Field, PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Index, Paper, Rows, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import Bank, Sample, State

BLOCK = 65536
"""Rows of the bank that are made at once."""


class NNGuide(Scorer):
    """``E(h) * mean of the k largest <h, h_i> E(h_i)`` with ``E = log sum_k exp(z_k)``.

    In squared logits, of either sign; h_i are the training embeddings. With ``normalize`` h and h_i
    have unit norm; a zero row stays zero, and scores 0. Negative energies turn the sign of what
    they multiply. With fewer than k training rows all of them count, and a warning says so. A
    training row that is scored is among its own neighbours.

    The authors' code does not normalise, for its models do; OpenOOD normalises, takes k = 100, and
    the first hundredth of the training rows where this takes a uniform sample.

    Args:
        k: how many neighbours.
        fraction: of the training rows that make the bank, a uniform sample.
        normalize: give embeddings unit norm.
    """

    kind = "nnguide"
    paper = Paper(
        "Nearest Neighbor Guidance for Out-of-Distribution Detection",
        "Jaewoo Park, Yoon Gyo Jung, Andrew Beng Jin Teoh",
        "ICCV",
        2023,
        "https://arxiv.org/abs/2309.14888",
    )
    search = spaces(k=Choice((10, 100), "the authors' code takes 10, OpenOOD 100"))
    k: PositiveInt = 10
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    normalize: bool = True

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (self._bank(),)

    def _bank(self) -> Statistic:
        if self.fraction == 1:
            return Bank(fields=("embeddings", "logits"))
        return Sample(fraction=self.fraction, fields=("embeddings", "logits"))

    def fit(self, store: FeatureStore) -> State:
        kept = store[self._bank()]
        if len(kept) == 0:
            raise DataError(
                f"nnguide: a fraction of {self.fraction:g} of {store.rows} training rows is none; "
                "give a larger one"
            )
        if len(kept) < self.k:
            warnings.warn(
                f"nnguide: k is {self.k}, and the bank has {len(kept)} rows: all of them count",
                stacklevel=2,
            )
        bank = Rows(kept.embeddings.shape)
        for first in range(0, len(kept), BLOCK):
            rows = kept.embeddings.between(first, first + BLOCK).double()
            energy = kept.logits.between(first, first + BLOCK).double().logsumexp(dim=1)
            bank.append(self._compared(rows) * energy[:, None])
        return {"bank": Index(bank, "inner_product")}

    def _compared(self, rows: Tensor) -> Tensor:
        return unit(rows) if self.normalize else rows

    def score(self, features: Features, state: State) -> Tensor:
        bank = state["bank"]
        rows = self._compared(required(features.embeddings, "embeddings"))
        guidance, _ = bank.search(rows, min(self.k, len(bank)))
        return guidance.mean(dim=1) * required(features.logits, "logits").logsumexp(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(NNGuide)
