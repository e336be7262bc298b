"""LTS: logits scaled by how much of a row lies in its largest activations."""

from __future__ import annotations

from oodcore import Features, Paper, Shaper, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.ash import Percentile, largest, ratio


class LTS(Shaper):
    """``z' = z (s1 / s2)^2``, with s1 the sum of a row's activations and s2 that of the k largest.

    ``k = D - round(D percentile / 100)``, at least 1, half to even. The sums are those of the
    positive parts, so that s1 / s2 is between 1 and D / k; a row without a positive activation has
    ratio 1. Embeddings stay as they are, so it changes only scorers that read logits.

    Args:
        percentile: how many activations of a row do not count in s2, in percent; with 95, k is the
            largest 5 % of them.
    """

    kind = "lts"
    paper = Paper(
        "Logit Scaling for Out-of-Distribution Detection",
        "Andrija Djurisic, Rosanne Liu, Mladen Nikolic",
        "arXiv",
        2024,
        "https://arxiv.org/abs/2409.01175",
    )
    percentile: Percentile = 95.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        scale = ratio(rows, largest(rows, self.percentile)).square()
        return features.with_logits(required(features.logits, "logits") * scale)


@hookimpl
def register_shapers(register: Register) -> None:
    register(LTS)
