"""MSP: the largest softmax probability."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class MSP(Scorer):
    """Maximum softmax probability: ``max_k softmax(z / T)_k``, in [1/K, 1].

    The paper has T = 1. With one class it is 1 for every row. Where the largest logit leads by more
    than about 37, it is exactly 1 in float64 and rows tie.

    Args:
        temperature: T, which the logits are divided by.
    """

    kind = "msp"
    paper = Paper(
        "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural "
        "Networks",
        "Dan Hendrycks, Kevin Gimpel",
        "ICLR",
        2017,
        "https://arxiv.org/abs/1610.02136",
    )
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        return (logits / self.temperature).softmax(dim=1).amax(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(MSP)
