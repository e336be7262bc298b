"""A toy network with a branch of weights, as the regularizer vos leaves it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oodcore.testing.toy import ToyNetwork


class Weights(nn.Module):
    """One weight a class, the same for every row."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.2, 2, classes, dtype=torch.float64).flip(0))

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.weight.relu().expand(len(embeddings), -1)


class WeightedNetwork(ToyNetwork):
    """The toy network, whose embeddings a branch ``vos`` sees too."""

    def __init__(self, classes: int, width: int, layers: Sequence[str] = ()) -> None:
        super().__init__(classes, width)
        self.vos = Weights(classes)

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings = self.get_submodule("stage")(inputs).mean(dim=(2, 3))
        self.vos(embeddings)
        logits: Tensor = self.get_submodule(self.head_name)(embeddings)
        return logits
