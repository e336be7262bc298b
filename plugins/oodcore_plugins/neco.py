"""NECO: how much of a row lies in the principal components of the training rows."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import ConfigurationError
from oodcore.features import EPS, required
from oodcore.hookspecs import Register
from oodcore.space import Range, spaces
from oodcore.statistics import ClassMoments, State

CONSTANT = 1e-10
"""A unit that varies by less than this share of its mean is not divided by its deviation."""


class NECO(Scorer):
    """``||P' s||_2 / ||s||_2 * max_k z_k``, in logits; the quotient is in [0, 1].

    s is the embedding standardised by mean and deviation (population) of each unit over the
    training rows, where a constant unit is only centred; P ``[D, dim]`` are the first principal
    components of the standardised training rows. A row at the training mean scores 0. A negative
    largest logit reverses what the quotient says of a row. Labels are not used.

    The authors' code multiplies by the largest logit for all networks but ResNets. It
    divides by the norm of the embedding as it is for two families of transformers (Swin, DeiT);
    there a zero embedding scores 0.

    Args:
        dim: how many components, below D; left out, the number of classes. The authors tune it.
        max_logit: multiply by the largest logit.
        denominator: ``scaled`` for the norm of s, ``raw`` for that of the embedding.
    """

    kind = "neco"
    paper = Paper(
        "NECO: NEural Collapse Based Out-of-distribution detection",
        "Mouïn Ben Ammar, Nacim Belkhir, Sebastian Popescu, Antoine Manzanera, Gianni Franchi",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2310.06823",
    )
    search = spaces(
        dim=Range(
            5, 500, "the authors tune it for each network, around the number of classes", log=True
        )
    )
    dim: PositiveInt | None = None
    max_logit: bool = True
    denominator: Literal["scaled", "raw"] = "scaled"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"} if self.max_logit else {"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMoments(),)

    def fit(self, store: FeatureStore) -> State:
        moments = store[ClassMoments()]
        size, classes = moments.scatter.shape[0], len(moments.count)
        dim = classes if self.dim is None else self.dim
        if dim >= size:
            raise ConfigurationError(
                f"neco: all {size} components would be used (dim is {dim}), so that every row lies "
                f"in them; give a dim below {size}"
            )
        centre, covariance = moments.total_mean, moments.total_covariance
        spread = covariance.diagonal().sqrt()
        spread = spread.masked_fill(spread <= CONSTANT * centre.abs(), 1.0)
        components = torch.linalg.eigh(covariance / spread / spread[:, None]).eigenvectors
        return {"centre": centre, "spread": spread, "components": components[:, -dim:].contiguous()}

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        scaled = (rows - state["centre"]) / state["spread"]
        inside = torch.linalg.vector_norm(scaled @ state["components"], dim=1)
        whole = torch.linalg.vector_norm(scaled if self.denominator == "scaled" else rows, dim=1)
        empty = whole <= EPS
        share = torch.where(empty, 0.0, inside / whole.masked_fill(empty, 1.0))
        if not self.max_logit:
            return share
        return share * required(features.logits, "logits").amax(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(NECO)
