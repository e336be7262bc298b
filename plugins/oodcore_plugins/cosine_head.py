"""cosine_head: a classifier head of directions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

import oodcore
from oodcore.discovery import head_of
from oodcore.regularizer import TrainModel

DEFAULT_SCALE = 8.0


class CosineHead(oodcore.Regularizer):
    """Replaces the head by one without bias, whose logits are ``s <h, w_k>`` with unit vectors:

        s h / ||h|| . w_k / ||w_k||     (normalize: both)
        s h . w_k / ||w_k||             (normalize: weight)
        s h / ||h|| . w_k               (normalize: features)

    Norms below 1e-12 count as 1e-12. It starts from the directions of the head that it replaces.

    Dynamic Few-Shot Visual Learning's classifier is that of SURE (both, s = 8, or 16 for Tiny
    ImageNet) and of the focal network of DML+ (both, s = 40); the center network of DML+ takes
    ``normalize: weight``, which leaves the norm of the embeddings to tell something. Logits of
    ``both`` lie in [-s, s], and with K classes spread like a simplex no probability exceeds
    ``1 / (1 + (K - 1) exp(-s K / (K - 1)))``: thresholds of linear heads do not carry over.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        normalize: what has unit norm first: "both", "weight" or "features".
        scale: s, without unit; left out, 8 where embeddings are normalised, else 1.
        learn_scale: train s with the network, from ``scale``.
        weight: 0 switches it off.
    """

    kind = "cosine_head"
    replaces_head = True
    paper = oodcore.Paper(
        title="Dynamic Few-Shot Visual Learning without Forgetting",
        authors="Spyros Gidaris, Nikos Komodakis",
        venue="CVPR",
        year=2018,
        url="https://arxiv.org/abs/1804.09458",
    )

    normalize: Literal["both", "weight", "features"] = "both"
    scale: PositiveFloat | None = None
    learn_scale: bool = False

    def prepare_model(self, model: TrainModel, run: oodcore.Run) -> TrainModel:
        head, scale = model.head, self.scale
        if scale is None:
            scale = 1.0 if self.normalize == "weight" else DEFAULT_SCALE
        if self.learn_scale and isinstance(head, Directions):
            scale = float(head.scale.detach())  # the run starts from one that has learnt it
        model.head = Directions(
            head_of(head).weight,
            normalize=self.normalize,
            scale=scale,
            learn_scale=self.learn_scale,
        )
        return model


class Directions(nn.Module):
    """The head itself.

    Args:
        weight: ``[K, D]`` to start from.
        normalize: "both", "weight" or "features".
        scale: what the product is multiplied by.
        learn_scale: whether that is a parameter.
    """

    def __init__(self, weight: Tensor, *, normalize: str, scale: float, learn_scale: bool) -> None:
        super().__init__()
        self.normalize = normalize
        self.weight = nn.Parameter(weight.detach().clone())
        factor = torch.tensor(scale, dtype=weight.dtype, device=weight.device)
        self.scale = nn.Parameter(factor, requires_grad=learn_scale)

    @property
    def head(self) -> oodcore.Head:
        return oodcore.Head(
            self.weight,
            normalize_weight=self.normalize != "features",
            normalize_features=self.normalize != "weight",
            scale=float(self.scale.detach()),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        rows, weight = embeddings, self.weight
        if self.normalize != "weight":
            rows = nn.functional.normalize(rows, dim=1)
        if self.normalize != "features":
            weight = nn.functional.normalize(weight, dim=1)
        return self.scale * (rows @ weight.T)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(CosineHead)
