"""Small classifiers: digits, MNIST, and vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Two blocks of convolution, batch normalisation, ReLU and pooling, then a hidden layer.

    Layers worth naming: ``block1`` ``[N, width, 4, 4]``, ``block2`` ``[N, 2 width, 2, 2]``,
    ``hidden`` ``[N, 4 width]`` (the embeddings), ``head`` (the logits).
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.block1 = _block(1, width)
        self.block2 = _block(width, 2 * width)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(8 * width, 4 * width), nn.ReLU())
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 1, 8, 8]``."""
        logits: Tensor = self.head(self.hidden(self.block2(self.block1(images))))
        return logits


def digits_cnn(classes: int = 10, width: int = 32) -> nn.Module:
    """A convolutional classifier of images ``[N, 1, 8, 8]``; see ``DigitsCNN`` for its layers.

    Args:
        classes: K.
        width: channels of the first block.
    """
    return DigitsCNN(classes, width)


class SigmoidGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, which approximates GELU and is not monotone either."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.sigmoid(1.702 * values)


class MnistConvNet(nn.Module):
    """Two convolutions, each pooled before its activation, and a hidden layer of 50.

    Its activation is not monotone, so that pooling after it would be another function. Layers worth
    naming, of images of 28 pixels: ``act1`` ``[N, 10, 12, 12]``, ``act2`` ``[N, 20, 4, 4]``,
    ``act3`` ``[N, 50]`` (the embeddings), ``fc2`` (the logits).
    """

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.act1 = SigmoidGELU()
        self.conv2 = nn.Conv2d(10, 20, 5)
        self.drop = nn.Dropout2d(dropout)
        self.pool2 = nn.MaxPool2d(2)
        self.act2 = SigmoidGELU()
        self.fc1 = nn.Linear(320, 50)
        self.act3 = SigmoidGELU()
        self.fc2 = nn.Linear(50, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 1, 28, 28]``."""
        maps = self.act1(self.pool1(self.conv1(images)))
        maps = self.act2(self.pool2(self.drop(self.conv2(maps))))
        logits: Tensor = self.fc2(self.act3(self.fc1(maps.flatten(1))))
        return logits


def mnist_convnet(classes: int = 10, dropout: float = 0.5) -> nn.Module:
    """The network that Outlier Exposure uses on MNIST; see ``MnistConvNet`` for its layers.

    Images are ``[N, 1, 28, 28]`` in [0, 1], not normalised. The parameters, 21,840 for ten classes,
    have the names of the weights that its authors published. Source: the code of Hendrycks,
    Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019.

    Args:
        classes: K.
        dropout: the chance that a channel of the second convolution is left out in training.
    """
    return MnistConvNet(classes, dropout)


def mlp(inputs: int, classes: int, hidden: Sequence[int] = (64, 32)) -> nn.Module:
    """A perceptron with ReLU; inputs of any shape are flattened.

    Its layers are ``flatten``, ``hidden1``, ``relu1``, ... and ``head``.

    Args:
        inputs: numbers in a row.
        classes: K.
        hidden: the width of each hidden layer; the last is the size of the embeddings.
    """
    layers = nn.Sequential()
    layers.add_module("flatten", nn.Flatten())
    width = inputs
    for number, size in enumerate(hidden, start=1):
        layers.add_module(f"hidden{number}", nn.Linear(width, size))
        layers.add_module(f"relu{number}", nn.ReLU())
        width = size
    layers.add_module("head", nn.Linear(width, classes))
    return layers


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
