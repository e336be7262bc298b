"""KL matching: the divergence from the typical softmax of the nearest class."""

from __future__ import annotations

import torch
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import LogitMoments, State


class KLMatching(Scorer):
    """``-min_k KL(p || d_k)`` with ``p = softmax(z)``, in nats, at most 0 up to rounding.

    ``d_k`` is the mean softmax of the training rows that are predicted as class k; their labels are
    not used. A class that is never predicted has no template and is left out. Probabilities of a
    template that underflow to 0 count as the smallest positive number, so that no divergence is
    infinite. With one class it is 0 for every row.

    The paper takes the templates from validation rows: a network that is certain of all its
    training rows has templates that are too sharp, and fitting on other rows is then better.
    """

    kind = "kl_matching"
    paper = Paper(
        "Scaling Out-of-Distribution Detection for Real-World Settings",
        "Dan Hendrycks, Steven Basart, Mantas Mazeika, Andy Zou, Joe Kwon, Mohammadreza "
        "Mostajabi, Jacob Steinhardt, Dawn Song",
        "ICML",
        2022,
        "https://arxiv.org/abs/1911.11132",
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (LogitMoments(),)

    def fit(self, store: FeatureStore) -> State:
        moments = store[LogitMoments()]
        templates = moments.mean_by_predicted[moments.predicted_count > 0]
        return {"templates": templates.clamp_min(torch.finfo(templates.dtype).tiny).log()}

    def score(self, features: Features, state: State) -> Tensor:
        logs = required(features.logits, "logits").log_softmax(dim=1)
        softmax, templates = logs.exp(), state["templates"]
        # The entropy is the same for all templates, and the cross-entropy is one product.
        nearest = (softmax.detach() @ templates.T).argmax(dim=1)
        divergence: Tensor = (softmax * (templates[nearest] - logs)).sum(dim=1)
        return divergence


@hookimpl
def register_scorers(register: Register) -> None:
    register(KLMatching)
