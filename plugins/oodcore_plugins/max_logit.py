"""MaxLogit: the largest logit."""

from __future__ import annotations

from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class MaxLogit(Scorer):
    """Maximum logit: ``max_k z_k``.

    Adding a constant to all logits shifts it, so values of two models cannot be compared.
    """

    kind = "max_logit"
    paper = Paper(
        "Scaling Out-of-Distribution Detection for Real-World Settings",
        "Dan Hendrycks, Steven Basart, Mantas Mazeika, Andy Zou, Joe Kwon, Mohammadreza Mostajabi, "
        "Jacob Steinhardt, Dawn Song",
        "ICML",
        2022,
        "https://arxiv.org/abs/1911.11132",
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        return required(features.logits, "logits").amax(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(MaxLogit)
