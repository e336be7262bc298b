"""Entropy of the softmax, negated."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class Entropy(Scorer):
    """Negative Shannon entropy: ``sum_k p_k log p_k`` with ``p = softmax(z / T)``, in nats.

    In [-log K, 0]: -log K for a uniform softmax, 0 for a certain one. With one class it is 0 for
    every row, with two it ranks like ``msp``. A probability that underflows to 0 adds nothing.

    Args:
        temperature: T, which the logits are divided by.
    """

    kind = "entropy"
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logs = (required(features.logits, "logits") / self.temperature).log_softmax(dim=1)
        return (logs.exp() * logs).sum(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Entropy)
