"""Images as sources give them: float32 ``[C, H, W]`` in [0, 1], of one colour and one size."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oodcore.errors import DataError
from oodcore.preprocess import Preprocess

Colour = Literal["grey", "rgb"]

_LUMA = (0.299, 0.587, 0.114)


def coloured(images: Tensor, colour: Colour) -> Tensor:
    """Images ``[N, C, H, W]`` with one channel ("grey") or three ("rgb").

    Grey is the luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B; a grey image in three channels
    has it in each.

    Raises:
        DataError: images of neither one nor three channels.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise DataError(f"images of {channels} channels are neither grey (1) nor rgb (3)")
    if colour == "rgb":
        return images if channels == 3 else images.expand(-1, 3, -1, -1)
    if channels == 1:
        return images
    weights = torch.tensor(_LUMA, dtype=images.dtype)[:, None, None]
    return (images * weights).sum(dim=1, keepdim=True)


def squared(images: Tensor, size: int) -> Tensor:
    """Images ``[N, C, H, W]`` as squares of ``size`` pixels.

    The short side is resized to ``size``, bilinear and antialiased, and the middle is cut out.
    """
    return Preprocess(size=size, crop=size)(images).clamp(0, 1)


def padded(images: Tensor, size: int) -> Tensor:
    """Images ``[N, C, H, W]`` in the middle of black squares of ``size`` pixels.

    Raises:
        DataError: an image that is larger.
    """
    height, width = images.shape[-2:]
    if max(height, width) > size:
        raise DataError(f"images of {height} x {width} pixels cannot be padded to {size}")
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))
