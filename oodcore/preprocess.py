"""Preprocess: what stands between the images of a source and what a model was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from oodcore.component import Settings
from oodcore.errors import DataError

_MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest-exact"}


class Preprocess(Settings):
    """Images of a source, float ``[N, C, H, W]`` in [0, 1], as a model wants them.

    In this order, each step only where its field is given: the short side is resized to ``size``
    pixels (the long one in proportion, rounded down), the central ``crop`` x ``crop`` square is
    cut out, and channels become ``(x - mean) / std``.

    Bilinear and bicubic resizing are antialiased, as image libraries do it and plain torch does
    not. Bicubic overshoot is clipped to [0, 1], as it is in images of bytes.

    Args:
        size: of the short side, in pixels.
        crop: side of the central square, in pixels.
        interpolation: "bilinear", "bicubic" or "nearest" (the pixel whose centre is nearest).
        mean: one number a channel.
        std: one positive number a channel.
    """

    size: PositiveInt | None = None
    crop: PositiveInt | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _check_channels(self) -> Preprocess:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values == ():
                raise PydanticCustomError(
                    "no_channels", "{name} needs one number a channel", {"name": name}
                )
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise PydanticCustomError(
                "channels_differ",
                "mean has {mean} channels and std has {std}",
                {"mean": len(self.mean), "std": len(self.std)},
            )
        return self

    def __call__(self, inputs: Any) -> Tensor:
        """Preprocessed images ``[N, C, height, width]``; differentiable, the inputs stay.

        Half precision comes out as float32, float64 stays.

        Raises:
            DataError: texts or a mapping, no float images ``[N, C, H, W]``, another number of
                channels than ``mean`` and ``std``, an image smaller than ``crop``.
        """
        images = _images(inputs)
        if self.size is not None:
            images = self._resized(images, self.size)
        if self.crop is not None:
            images = _cropped(images, self.crop)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != images.shape[1]:
                raise DataError(
                    f"preprocess: {name} has {len(values)} numbers, and the images have "
                    f"{images.shape[1]} channels; give one number a channel"
                )
        if self.mean is not None:
            images = images - images.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            images = images / images.new_tensor(self.std)[:, None, None]
        return images

    def _resized(self, images: Tensor, size: int) -> Tensor:
        height, width = images.shape[-2:]
        short = min(height, width)
        if short == size:
            return images
        shape = (size * height // short, size * width // short)
        smooth = self.interpolation != "nearest"
        resized = F.interpolate(
            images,
            shape,
            mode=_MODES[self.interpolation],
            align_corners=False if smooth else None,
            antialias=smooth,
        )
        return resized.clamp(0, 1) if self.interpolation == "bicubic" else resized


def _images(inputs: Any) -> Tensor:
    if not isinstance(inputs, Tensor):
        given = "a mapping" if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        if isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str):
            given = "texts"
        raise DataError(
            f"preprocess takes a tensor of images [N, C, H, W], not {given}; leave preprocess out"
        )
    if inputs.ndim != 4 or 0 in inputs.shape[1:]:
        raise DataError(f"preprocess takes images [N, C, H, W], not {list(inputs.shape)}")
    if not inputs.is_floating_point():
        raise DataError(
            f"preprocess takes float images in [0, 1], not {str(inputs.dtype)[6:]}; divide bytes "
            "by 255"
        )
    return inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs


def _cropped(images: Tensor, crop: int) -> Tensor:
    height, width = images.shape[-2:]
    if crop > min(height, width):
        raise DataError(
            f"preprocess: a crop of {crop} pixels does not fit into images of {height} x {width}; "
            "give a size of at least the crop"
        )
    top, left = round((height - crop) / 2), round((width - crop) / 2)
    return images[..., top : top + crop, left : left + crop]
