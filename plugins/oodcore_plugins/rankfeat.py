"""RankFeat: the energy that is left without the largest singular component of a feature map."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.errors import DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State

NUMBERS = 2**22
"""Numbers of a layer that are taken apart together."""


class RankFeat(Scorer):
    """``T log sum_k exp(z'_k / T)``, in logits, with ``z' = mean_l z(F_l - s_1 u_1 v_1')``.

    The activation of a layer l is a matrix F_l, channels by places ``[C, S]``; its largest singular
    value s_1 with its vectors u_1 and v_1 is taken out, and what is left goes on through the
    network to logits, one vector a layer. Out-of-distribution inputs have more of their energy in
    that component. Nothing is fitted, and labels are not used.

    The component is exact, from the eigenvectors of the smaller of F F' and F' F in float64; the
    authors offer power iteration from a random start as well. Where the two largest singular values
    are equal the component is not unique, and any one is taken. The model sees each row once more
    for each layer. A map with one place would be removed altogether and is refused.

    Args:
        layers: names of the layers, ``[N, C, ...]`` with at least two places. The paper averages
            the last two blocks of a ResNet; the last alone is its variant with one.
        temperature: T; the paper uses 1.
    """

    kind = "rankfeat"
    paper = Paper(
        "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection",
        "Yue Song, Nicu Sebe, Wei Wang",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2209.08590",
    )
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    temperature: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _each_once(self) -> RankFeat:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"a layer is named twice: {', '.join(self.layers)}")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    def score(self, features: Features, state: State) -> Tensor:
        inputs, rerun = features.inputs, features.rerun
        if inputs is None or rerun is None:
            raise DataError("rankfeat passes through the model again; stored features do not do")
        total = torch.zeros((), dtype=torch.float64)
        for name in self.layers:
            changed = rerun(inputs, edit={name: partial(without_first, name=name)})
            logits = required(changed.logits, "logits")
            total = total.to(logits.device) + logits.double() / len(self.layers)
        return self.temperature * (total / self.temperature).logsumexp(dim=1)


def without_first(maps: Tensor, name: str = "") -> Tensor:
    """Maps ``[N, C, ...]`` less their largest singular component, in the same type.

    Args:
        maps: each row is a matrix of channels by places.
        name: of the layer, for messages.

    Raises:
        DataError: there are not two places.
    """
    if maps.ndim < 3 or maps.shape[2:].numel() < 2:
        raise DataError(
            f"rankfeat: a row of layer '{name}' is {list(maps.shape[1:])}, channels without "
            "places; name a layer before the pooling"
        )
    step = max(1, NUMBERS // maps.shape[1:].numel())
    rest = torch.cat([_rest(some.flatten(2).double()).to(maps) for some in maps.split(step)])
    return rest.reshape(maps.shape)


def _rest(matrices: Tensor) -> Tensor:
    wide = matrices.shape[1] <= matrices.shape[2]
    sides = matrices if wide else matrices.mT
    direction = leading(sides @ sides.mT)[:, :, None]
    rest = sides - direction @ (direction.mT @ sides)
    return rest if wide else rest.mT


def leading(matrices: Tensor) -> Tensor:
    """The unit eigenvector ``[N, m]`` of the largest eigenvalue of symmetric ``[N, m, m]``.

    It has a gradient where that eigenvalue is the only one of its size, whatever the others are.
    """
    values, vectors = torch.linalg.eigh(matrices.detach())
    first, others = vectors[:, :, -1], vectors[:, :, :-1]
    gaps = values[:, -1:] - values[:, :-1]
    alone = gaps > 1e-10 * values[:, -1:].abs()
    inverse = torch.where(alone, 1 / gaps.masked_fill(~alone, 1.0), 0.0)
    # One step of perturbation theory: it is zero at an eigenvector, and its slope is that of one.
    moved = (matrices @ first[:, :, None]).mT @ others
    step: Tensor = (others @ (inverse[:, :, None] * moved.mT))[:, :, 0]
    return first + (step - step.detach())


@hookimpl
def register_scorers(register: Register) -> None:
    register(RankFeat)
