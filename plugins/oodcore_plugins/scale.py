"""SCALE: each row multiplied by how much of it lies in its largest activations."""

from __future__ import annotations

from oodcore import Features, Paper, Shaper, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import State
from oodcore_plugins.ash import Percentile, growth, largest


class SCALE(Shaper):
    """``h' = h exp(s1 / s2)``, with s1 the sum of a row's activations and s2 that of the k largest.

    ``k = D - round(D percentile / 100)``, at least 1, half to even. It is ``ash`` with variant
    ``s`` that removes nothing.

    Made for activations after a ReLU: the sums are those of the positive parts. Then s1 / s2 is
    between 1 and D / k; a row without a positive activation has ratio 1, and a zero row stays zero.

    Args:
        percentile: how many activations of a row do not count in s2, in percent; the paper uses 85.
    """

    kind = "scale"
    paper = Paper(
        "Scaling for Training Time and Post-hoc Out-of-distribution Detection Enhancement",
        "Kai Xu, Rongyu Chen, Gianni Franchi, Angela Yao",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2310.00227",
    )
    search = spaces(
        percentile=Choice((65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0), "OpenOOD's sweep")
    )
    percentile: Percentile = 85.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        kept = largest(rows, self.percentile)
        return features.with_embeddings(rows * growth(rows, kept, self.percentile, self.kind))


@hookimpl
def register_shapers(register: Register) -> None:
    register(SCALE)
