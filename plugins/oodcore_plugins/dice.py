"""DICE: only the head's weights that contribute most on the training rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from oodcore import Features, FeatureStore, Paper, Shaper, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import ClassMeans, State
from oodcore_plugins.react import percentile


class DICE(Shaper):
    """``z' = (M * W) h + b``, with the head's weight W ``[K, D]`` and the mask M of its best parts.

    A weight is kept where its contribution, ``W_kd`` times the mean of ``h_d`` over the training
    rows, is above the given percentile of all K times D contributions; the percentile interpolates
    linearly, and 0 keeps every weight. Embeddings stay, the head changes. A class may lose all its
    weights: its logit is its bias then. Where the head normalises its weight, W is the normalised
    one.

    Args:
        percentile: how many weights are left out, in percent; OpenOOD and the paper's code use 90.
    """

    kind = "dice"
    paper = Paper(
        "DICE: Leveraging Sparsification for Out-of-Distribution Detection",
        "Yiyou Sun, Yixuan Li",
        "ECCV",
        2022,
        "https://arxiv.org/abs/2111.09805",
    )
    search = spaces(
        percentile=Choice(
            (10.0, 30.0, 50.0, 70.0, 90.0, 99.0), "around the 90 of the paper's code and OpenOOD"
        )
    )
    percentile: Annotated[float, Field(ge=0, lt=100)] = 90.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMeans(),)

    def fit(self, store: FeatureStore) -> State:
        head = store.head
        if head is None:
            raise DataError("dice: it leaves out weights of the head, and these features have none")
        mean = store[ClassMeans()].total_mean
        weight = (unit(head.weight) if head.normalize_weight else head.weight).to(mean)
        if self.percentile == 0:
            return {"weight": weight.clone()}
        contribution = weight * mean
        threshold = percentile(contribution.cpu(), self.percentile)
        return {"weight": weight.masked_fill(contribution <= threshold, 0.0)}

    def apply(self, features: Features, state: State) -> Features:
        head = features.head
        if head is None:
            raise DataError("dice: it leaves out weights of the head, and these features have none")
        return features.with_head(replace(head, weight=state["weight"], normalize_weight=False))


@hookimpl
def register_shapers(register: Register) -> None:
    register(DICE)
