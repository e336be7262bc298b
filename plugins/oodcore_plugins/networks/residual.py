"""Residual classifiers of images of 32 pixels: ResNet-18 and Wide ResNets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from oodcore.errors import ConfigurationError

_conv3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
_conv1 = partial(nn.Conv2d, kernel_size=1, bias=False)


class _Block(nn.Module):
    """``relu(x' + bn(conv(relu(bn(conv(x))))))``; x' is x, or a projection where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = _conv3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(_conv1(inputs, outputs, stride=stride))
            self.shortcut.append(nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, maps: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        total: Tensor = self.relu2(branch + self.shortcut(maps))
        return total


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    further = [_Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(_Block(inputs, outputs, stride), *further)


class ResNet(nn.Module):
    """A stem that keeps the image's size, four stages of blocks, and the mean over all places.

    Layers worth naming, of images of 32 pixels: ``layer1`` ``[N, width, 32, 32]``, ``layer2``
    ``[N, 2 width, 16, 16]``, ``layer3`` ``[N, 4 width, 8, 8]``, ``layer4`` ``[N, 8 width, 4, 4]``,
    ``flatten`` ``[N, 8 width]`` (the embeddings), ``fc`` (the logits).
    """

    def __init__(self, blocks: Sequence[int], classes: int, width: int, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(blocks[0], width, width, 1)
        self.layer2 = _stage(blocks[1], width, 2 * width, 2)
        self.layer3 = _stage(blocks[2], 2 * width, 4 * width, 2)
        self.layer4 = _stage(blocks[3], 4 * width, 8 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, H, W]``."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        logits: Tensor = self.fc(self.flatten(self.pool(maps)))
        return logits


def resnet18(classes: int = 10, width: int = 64, channels: int = 3) -> nn.Module:
    """ResNet-18 for small images: a stem of 3 x 3 and stride 1, no pooling after it.

    He et al., Deep Residual Learning for Image Recognition, CVPR 2016, with the stem that is usual
    at 32 pixels; see ``ResNet`` for its layers. 11,173,962 parameters for ten classes. Convolutions
    are drawn from He's normal distribution (fan out). The parameters have the names of OpenOOD's
    checkpoints for 32 pixels.

    Args:
        classes: K.
        width: channels of the first stage; embeddings have eight times as many numbers.
        channels: of the images.
    """
    return ResNet((2, 2, 2, 2), classes, width, channels)


class _WideBlock(nn.Module):
    """Pre-activation: batch normalisation and ReLU come before each convolution.

    Where shapes differ, the projection sees the activated input; elsewhere the input passes by.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _conv3(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.conv2 = _conv3(outputs, outputs)
        # The name is that of published weights.
        self.convShortcut = None if inputs == outputs else _conv1(inputs, outputs, stride=stride)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.relu1(self.bn1(maps))
        branch = self.conv2(self.drop(self.relu2(self.bn2(self.conv1(active)))))
        total: Tensor = branch + (maps if self.convShortcut is None else self.convShortcut(active))
        return total


class _Stage(nn.Module):
    """Blocks in turn; only the first may change size and channels."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(_WideBlock(inputs, outputs, stride, dropout))
        for _ in range(blocks - 1):
            self.layer.append(_WideBlock(outputs, outputs, 1, dropout))

    def forward(self, maps: Tensor) -> Tensor:
        total: Tensor = self.layer(maps)
        return total


class WideResNet(nn.Module):
    """A stem of 16 channels, three stages of pre-activation blocks, the mean over all places.

    Layers worth naming, of images of 32 pixels and with w = 16 ``widen``: ``block1``
    ``[N, w, 32, 32]``, ``block2`` ``[N, 2 w, 16, 16]``, ``block3`` ``[N, 4 w, 8, 8]``, ``relu``
    (block3 normalised and rectified), ``flatten`` ``[N, 4 w]`` (the embeddings), ``fc`` (the
    logits).
    """

    def __init__(self, depth: int, widen: int, classes: int, dropout: float, channels: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = _conv3(channels, 16)
        self.block1 = _Stage(blocks, 16, widths[0], 1, dropout)
        self.block2 = _Stage(blocks, widths[0], widths[1], 2, dropout)
        self.block3 = _Stage(blocks, widths[1], widths[2], 2, dropout)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(widths[2], classes)
        nn.init.zeros_(self.fc.bias)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, channels, H, W]``."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        logits: Tensor = self.fc(self.flatten(self.pool(self.relu(self.bn1(maps)))))
        return logits


def wide_resnet(
    depth: int = 40, widen: int = 2, classes: int = 10, dropout: float = 0.0, channels: int = 3
) -> nn.Module:
    """WRN-depth-widen: WRN-40-2, WRN-28-10, WRN-16-4, ... for images of 32 pixels.

    Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016; see ``WideResNet`` for its layers.
    For ten classes WRN-40-2 has 2,243,546 parameters and WRN-28-10 36,479,194. Convolutions are
    drawn from He's normal distribution (fan out), biases start at 0. The parameters have the names
    of the checkpoints of Outlier Exposure and OpenOOD.

    Args:
        depth: layers, 6 n + 4: n blocks of two convolutions a stage.
        widen: how many times 16 channels the first stage has; embeddings have 64 times as many
            numbers.
        classes: K.
        dropout: between the two convolutions of a block, in training (Outlier Exposure: 0.3).
        channels: of the images.

    Raises:
        ConfigurationError: a depth that is not 10, 16, 22, 28, ...
    """
    if depth < 10 or (depth - 4) % 6:
        raise ConfigurationError(
            f"a Wide ResNet has a depth of 6 n + 4 (10, 16, 22, 28, 34, 40, ...), not {depth}"
        )
    return WideResNet(depth, widen, classes, dropout, channels)
