"""What pytorch-ood imports from ``torchvision.transforms``."""

from __future__ import annotations


class Compose:
    """Stands for the class of that name."""
