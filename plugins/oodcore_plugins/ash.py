"""ASH: most activations of a row removed, and the others kept, levelled or scaled."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from oodcore import Features, Paper, Shaper, hookimpl
from oodcore.errors import ConfigurationError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import State

Percentile = Annotated[float, Field(ge=0, lt=100)]

LARGEST_EXPONENT = 600
"""Beyond it, exp of a ratio of sums may leave no room in float64."""


class ASH(Shaper):
    """The k largest activations of each row are kept, and the others become 0.

    ``k = D - round(D percentile / 100)``, at least 1, half to even. What is kept is left as it is
    (variant ``p``), set to ``s1 / k`` (``b``), or multiplied by ``exp(s1 / s2)`` (``s``), where s1
    is the sum of the row's activations before and s2 after. Of equal activations the first are
    kept.

    Made for activations after a ReLU: the sums are those of the positive parts. Then s1 / s2 is
    between 1 and D / k; a row without a positive activation has ratio 1, and a zero row stays zero.

    Args:
        variant: ``s`` for scaling, ``b`` for binarising, ``p`` for pruning alone. The authors'
            configuration for ImageNet is ``s`` with 90.
        percentile: how many activations of a row are removed, in percent.
    """

    kind = "ash"
    paper = Paper(
        "Extremely Simple Activation Shaping for Out-of-Distribution Detection",
        "Andrija Djurisic, Nebojsa Bozanic, Arjun Ashok, Rosanne Liu",
        "ICLR",
        2023,
        "https://arxiv.org/abs/2209.09858",
    )
    search = spaces(
        percentile=Choice((65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0), "OpenOOD's sweep")
    )
    variant: Literal["p", "b", "s"] = "s"
    percentile: Percentile = 90.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def apply(self, features: Features, state: State) -> Features:
        rows = required(features.embeddings, "embeddings")
        kept = largest(rows, self.percentile)
        if self.variant == "b":
            level = rows.clamp_min(0).sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True)
            return features.with_embeddings(torch.where(kept, level, 0.0))
        pruned = torch.where(kept, rows, 0.0)
        if self.variant == "s":
            pruned = pruned * growth(rows, kept, self.percentile, self.kind)
        return features.with_embeddings(pruned)


def kept_of(size: int, percentile: float) -> int:
    """k, how many of D activations are kept."""
    return max(1, size - round(size * percentile / 100))


def largest(rows: Tensor, percentile: float) -> Tensor:
    """Which activations of each row ``[N, D]`` are its k largest, the first among equals."""
    k = kept_of(rows.shape[1], percentile)
    limit = rows.detach().topk(k, dim=1).values[:, -1:]
    above, equal = rows > limit, rows == limit
    room = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= room))


def ratio(rows: Tensor, kept: Tensor) -> Tensor:
    """The sum of each row's positive parts over that of the kept ones, ``[N, 1]``; 1 for 0 / 0."""
    positive = rows.clamp_min(0)
    whole = positive.sum(dim=1, keepdim=True)
    part = (positive * kept).sum(dim=1, keepdim=True)
    empty = part <= 0
    return torch.where(empty, 1.0, whole / part.masked_fill(empty, 1.0))


def growth(rows: Tensor, kept: Tensor, percentile: float, who: str) -> Tensor:
    """``exp(s1 / s2)`` of each row, ``[N, 1]``.

    Raises:
        ConfigurationError: so few activations are kept that it can overflow.
    """
    size = rows.shape[1]
    count = kept_of(size, percentile)
    if size > LARGEST_EXPONENT * count:
        raise ConfigurationError(
            f"{who}: {count} of {size} activations are kept, and exp(s1 / s2) can leave the range "
            "of numbers; give a lower percentile"
        )
    return ratio(rows, kept).exp()


@hookimpl
def register_shapers(register: Register) -> None:
    register(ASH)
