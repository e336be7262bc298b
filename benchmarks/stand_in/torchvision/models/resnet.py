"""What pytorch-ood imports from ``torchvision.models.resnet``."""

from __future__ import annotations


class BasicBlock:
    """Stands for the class of that name."""


class Bottleneck:
    """Stands for the class of that name."""


class ResNet:
    """Stands for the class of that name."""
