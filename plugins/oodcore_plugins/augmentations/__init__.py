"""augmentations: other views of the same rows, drawn anew in every step."""

from __future__ import annotations

from typing import Any

import oodcore
from oodcore_plugins.augmentations.color_jitter import ColorJitter
from oodcore_plugins.augmentations.crop_flip import CropFlip
from oodcore_plugins.augmentations.rand_augment import RandAugment
from oodcore_plugins.augmentations.random_erasing import RandomErasing

__all__ = ["ColorJitter", "CropFlip", "RandAugment", "RandomErasing"]


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(ColorJitter)
    register(CropFlip)
    register(RandAugment)
    register(RandomErasing)
