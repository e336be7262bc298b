"""t2fnorm: embeddings of unit norm while training, plain ones afterwards."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveFloat
from torch import Tensor, nn

import oodcore
from oodcore.discovery import head_of
from oodcore.errors import ConfigurationError
from oodcore.regularizer import TrainModel


class T2FNorm(oodcore.Regularizer):
    """What the head gets in place of the embeddings ``h``:

        h / (t ||h||_2)     while training
        h / t               afterwards

    A norm that training could not use to lower its loss tells how familiar an input is, so the
    embeddings are not normalised when they are scored. The division by t remains, as in the
    published code. Score such a network with what reads logits or norms. Norms below 1e-12 count
    as 1e-12.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        temperature: t, without unit; 0.1 is the paper's.
        weight: 0 switches it off.

    Raises a ConfigurationError if the head that it replaces is not a plain linear one.
    """

    kind = "t2fnorm"
    replaces_head = True
    paper = oodcore.Paper(
        title="T2FNorm: Train-time Feature Normalization for OOD Detection in Image Classification",
        authors="Sudarshan Regmi, Bibek Panthi, Sakar Dotel, Prashnna K. Gyawali, Danail Stoyanov, "
        "Binod Bhattarai",
        venue="CVPR Workshops",
        year=2024,
        url="https://arxiv.org/abs/2305.17797",
    )

    temperature: PositiveFloat = 0.1

    def prepare_model(self, model: TrainModel, run: oodcore.Run) -> TrainModel:
        head = head_of(model.head)
        # The run may start from one that had such a head already.
        linear = not head.normalize_weight and not head.normalize_features and head.scale == 1
        if not linear and not isinstance(model.head, Normalizing):
            raise ConfigurationError(
                f"t2fnorm: the network's head is a {type(model.head).__name__}, which normalises "
                "or scales by itself; a plain linear head is needed"
            )
        model.head = Normalizing(head, self.temperature)
        return model


class Normalizing(nn.Module):
    """A linear head of embeddings divided by a temperature, and in training mode by their norm.

    Args:
        start: weight ``[K, D]`` and bias to start from.
        temperature: what embeddings are divided by.
    """

    def __init__(self, start: oodcore.Head, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(start.weight.detach().clone())
        self.bias = None if start.bias is None else nn.Parameter(start.bias.detach().clone())

    @property
    def head(self) -> oodcore.Head:
        return oodcore.Head(
            self.weight,
            self.bias,
            normalize_features=self.training,
            scale=1 / self.temperature,
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.head(embeddings)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(T2FNorm)
