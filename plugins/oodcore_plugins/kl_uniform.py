"""The distance of the softmax from the uniform distribution."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class KLUniform(Scorer):
    """Cross-entropy from the uniform distribution u to ``p = softmax(z / T)``, in nats.

    ``-(1/K) sum_k log p_k = log sum_k exp(z_k / T) - mean_k z_k / T``, at least log K. It is
    ``KL(u || p) + log K``; the constant does not change the ranking, and the cross-entropy is what
    the paper uses as an anomaly score (negated) and as a loss. With one class it is 0 for every
    row. It grows without bound with the spread of the logits and never saturates.

    Args:
        temperature: T, which the logits are divided by.
    """

    kind = "kl_uniform"
    paper = Paper(
        "Deep Anomaly Detection with Outlier Exposure",
        "Dan Hendrycks, Mantas Mazeika, Thomas Dietterich",
        "ICLR",
        2019,
        "https://arxiv.org/abs/1812.04606",
    )
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits") / self.temperature
        return -logits.log_softmax(dim=1).mean(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(KLUniform)
