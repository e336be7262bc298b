"""DOCTOR: the chance that a label drawn from the softmax twice is not the same."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.gen import log_variance


class Doctor(Scorer):
    """``-(1 - sum_k p_k^2)`` with ``p = softmax(z / T)``, in [1/K - 1, 0].

    The paper's D_alpha is ``(1 - g) / g`` with ``g = sum_k p_k^2``, compared with a threshold; this
    is its Gini form, which ranks the same and is bounded. It is computed as
    ``-sum_k p_k (1 - p_k)``, which loses nothing where p is near 1. With one class it is 0 for
    every row, with two it ranks like ``msp``. The paper's step of the input is ``perturbed``.

    Args:
        temperature: T, which the logits are divided by.
    """

    kind = "doctor"
    paper = Paper(
        "DOCTOR: A Simple Method for Detecting Misclassification Errors",
        "Federica Granese, Marco Romanelli, Daniele Gorla, Catuscia Palamidessi, Pablo Piantanida",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2106.02395",
    )
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits") / self.temperature
        return -log_variance(logits).exp().sum(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Doctor)
