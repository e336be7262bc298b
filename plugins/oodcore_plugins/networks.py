"""networks: small classifiers, named in configurations as importable factories."""

from __future__ import annotations

from collections.abc import Sequence

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
