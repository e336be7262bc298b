"""t2fnorm: embeddings of unit norm while training, plain ones afterwards."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat
from torch import Tensor, nn

import oodcore
from oodcore.discovery import head_of
from oodcore.regularizer import TrainModel


class T2FNorm(oodcore.Regularizer):
    """While training, the head gets ``h / (t ||h||_2)`` in place of the embeddings ``h``.

    At test time it gets ``h`` itself: a norm that training could not use to lower its loss then
    tells how familiar an input is. Score such a network with what reads logits or norms.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        temperature: t, without unit; 0.1 is the paper's.
        weight: 0 switches it off.

    Raises a ConfigurationError if the head it wraps is not a plain linear one.
    """

    kind = "t2fnorm"
    replaces_head = True
    paper = oodcore.Paper(
        title="T2FNorm: Extremely Simple Scaled Train-time Feature Normalization for OOD Detection",
        authors="Sudarshan Regmi, Bibek Panthi, Sakar Dotel, Prashnna K. Gyawali, Danail Stoyanov, "
        "Binod Bhattarai",
        venue="CVPR Workshops",
        year=2024,
        url="https://arxiv.org/abs/2305.17797",
    )

    temperature: PositiveFloat = 0.1

    def prepare_model(self, model: TrainModel, run: oodcore.Run) -> TrainModel:
        if isinstance(model.head, Normalizing):  # the run starts from one that had it already
            return model
        model.head = Normalizing(head_of(model.head), self.temperature)
        return model


class Normalizing(nn.Module):
    """A linear head that normalises what it gets in training mode only.

    Args:
        plain: what to start from.
        temperature: the norm of its inputs is 1 / temperature.
    """

    def __init__(self, plain: oodcore.Head, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(plain.weight.detach().clone())
        self.bias = None if plain.bias is None else nn.Parameter(plain.bias.detach().clone())

    @property
    def head(self) -> oodcore.Head:
        scale = 1 / self.temperature if self.training else 1.0
        return oodcore.Head(self.weight, self.bias, normalize_features=self.training, scale=scale)

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.head(embeddings)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(T2FNorm)
