"""What the tests of scorers that move the input share: a linear network and rows to score."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """A linear network, of which every gradient is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(inputs)
        return logits


WEIGHT = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)).double()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)
