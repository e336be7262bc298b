"""Small networks and classifiers that configurations of extractors name, and data for them."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from oodcore import Head

CLASSES, SIDE = 3, 8


class Network(nn.Module):
    """Convolution, batch normalisation, dropout in the middle and before the head."""

    def __init__(self, seed: int = 0, cosine: bool = False, act: str = "ReLU") -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.act = getattr(nn, act)()
        self.spatial, self.dropout = nn.Dropout2d(0.3), nn.Dropout(0.5)
        self.hidden = nn.Linear(5, 7)
        self.fc = Cosine(7) if cosine else nn.Linear(7, CLASSES)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6
        self.bn.running_mean.copy_(torch.randn(5, generator=generator) * 0.1)
        self.bn.running_var.copy_(torch.rand(5, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.spatial(self.act(self.bn(self.conv(x)))).mean(dim=(2, 3))
        return self.fc(self.dropout(self.act(self.hidden(h))))


class Cosine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, width))

    @property
    def head(self) -> Head:
        return Head(self.weight, normalize_weight=True, normalize_features=True, scale=7.0)

    def forward(self, h: Tensor) -> Tensor:
        return self.head(h)


class Sequences(nn.Module):
    """A transformer as torch makes it by default: the rows are the second axis within."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.4)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(x.transpose(0, 1))[0])


def network(seed: int = 0, cosine: bool = False, act: str = "ReLU") -> nn.Module:
    return Network(seed, cosine, act)


def without_dropout() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))


def spec(**arguments: object) -> dict[str, object]:
    """A configuration of the network."""
    return {"kind": "torch", "factory": "extractor_models:network", "arguments": arguments}


def images(rows: int, side: int = SIDE, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, side, side + 2, generator=torch.Generator().manual_seed(seed))


def table(rows: int = 60, classes: int = CLASSES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four numbers around a mean for each class, and their labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    means = 2 * np.random.default_rng(7).standard_normal((classes, 4))
    return means[labels] + generator.standard_normal((rows, 4)), labels


def logistic(C: float = 1.0) -> LogisticRegression:
    return LogisticRegression(C=C).fit(*table())
