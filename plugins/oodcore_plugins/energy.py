"""Energy: the free energy of the logits, negated."""

from __future__ import annotations

from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State


class Energy(Scorer):
    """Negative free energy: ``T * log sum_k exp(z_k / T)``.

    The paper's energy is its negative, which is lower for in-distribution inputs.

    Args:
        temperature: T; the paper recommends 1.
    """

    kind = "energy"
    paper = Paper(
        "Energy-based Out-of-distribution Detection",
        "Weitang Liu, Xiaoyun Wang, John D. Owens, Yixuan Li",
        "NeurIPS",
        2020,
        "https://arxiv.org/abs/2010.03759",
    )
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        return self.temperature * (logits / self.temperature).logsumexp(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Energy)
