"""pNML: the regret of the last layer, had it been trained on the row as well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import ClassMoments, Normalized, State
from oodcore_plugins.gen import log_variance
from oodcore_plugins.mahalanobis import CUT_OFF
from oodcore_plugins.vim import second_moment

MOMENTS = Normalized(statistic=ClassMoments())


class PNML(Scorer):
    """``-log_K sum_k p_k / (p_k + (1 - p_k) p_k^g)``, the regret's negative, in [-1, 0].

    ``g = q / (1 + q)`` with ``q = h' (H' H)^+ h``, where h is the embedding of unit norm and H
    ``[N, D]`` holds the training embeddings of unit norm; p is the softmax of the head's logits of
    h, as in the authors' code: the embedding's norm has no part in it. The pseudo-inverse ignores
    directions with less than 1e-10 of the largest eigenvalue. A zero embedding has q = 0, and
    scores 0, the largest score there is; so does every row where there is one class.
    """

    kind = "pnml"
    paper = Paper(
        "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection",
        "Koby Bibas, Meir Feder, Tal Hassner",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2110.09246",
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (MOMENTS,)

    def fit(self, store: FeatureStore) -> State:
        moments = store[MOMENTS]
        products = moments.rows * second_moment(moments, torch.zeros_like(moments.total_mean))
        values, directions = torch.linalg.eigh(products)
        if values[-1] <= 0:
            raise DataError("pnml: every training embedding is zero; there is nothing to learn")
        kept = values > CUT_OFF * values[-1]
        return {"whitening": directions[:, kept] / values[kept].sqrt()}

    def score(self, features: Features, state: State) -> Tensor:
        head = features.head
        if head is None:
            raise DataError("pnml: the head is applied again, and these features have none")
        rows = unit(required(features.embeddings, "embeddings"))
        logits = head(rows)
        if logits.shape[1] == 1:
            return 0.0 * logits[:, 0]
        spread = (rows @ state["whitening"]).square().sum(dim=1, keepdim=True)
        power = spread / (1 + spread)
        # p / (p + (1 - p) p^g) as a logistic function of log((1 - p) p^(g - 1)).
        odds = log_variance(logits) + (power - 2) * logits.log_softmax(dim=1)
        return -torch.sigmoid(-odds).sum(dim=1).log() / math.log(logits.shape[1])


@hookimpl
def register_scorers(register: Register) -> None:
    register(PNML)
