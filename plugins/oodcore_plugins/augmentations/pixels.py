"""Pixels: inputs of a network as images in [0, 1], and what is done to their colours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

import oodcore
from oodcore.errors import DataError
from oodcore.preprocess import Preprocess

GRAY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in what the eye takes for brightness (ITU-R BT.601)."""
SLACK = 1e-3
"""How far beyond [0, 1] rounding may take a pixel."""


def images(inputs: Any, kind: str) -> Tensor:
    """The inputs, if they are float images ``[N, C, H, W]``.

    Raises:
        DataError: they are not.
    """
    if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not inputs.is_floating_point():
        given = type(inputs).__name__
        if isinstance(inputs, Tensor):
            given = f"{str(inputs.dtype).removeprefix('torch.')} {list(inputs.shape)}"
        raise DataError(f"{kind} augments float images [N, C, H, W], and the inputs are {given}; "
                        "leave it out of the regularizers")  # fmt: skip
    return inputs


def to_pixels(inputs: Tensor, step: oodcore.Step) -> Tensor:
    """Images in [0, 1] of inputs that went through the run's preprocessing, a copy.

    Raises:
        DataError: they do not lie in [0, 1].
    """
    mean, std = _constants(inputs, step.run.preprocess)
    pixels = inputs * std + mean
    least, most = float(pixels.amin()), float(pixels.amax())
    if least < -SLACK or most > 1 + SLACK:
        raise DataError(
            f"{step.kind} changes the colours of images in [0, 1], and these lie in [{least:.3g}, "
            f"{most:.3g}]; give the data in [0, 1], and mean and std as the run's preprocess"
        )
    return pixels.clamp(0, 1)


def from_pixels(pixels: Tensor, step: oodcore.Step) -> Tensor:
    """Inputs of the network, as the run's preprocessing makes them of images in [0, 1]."""
    mean, std = _constants(pixels, step.run.preprocess)
    return (pixels - mean) / std


def check_colors(inputs: Tensor, kind: str) -> None:
    """Raise a DataError if images are neither gray nor RGB."""
    if inputs.shape[1] not in (1, 3):
        raise DataError(f"{kind} changes the colours of images of 1 or 3 channels, and these have "
                        f"{inputs.shape[1]}; leave it out of the regularizers")  # fmt: skip


def gray(pixels: Tensor) -> Tensor:
    """Brightness ``[N, 1, H, W]`` of images of 1 or 3 channels."""
    if pixels.shape[1] == 1:
        return pixels
    return (pixels * pixels.new_tensor(GRAY)[:, None, None]).sum(dim=1, keepdim=True)


def blended(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """``other + factor (pixels - other)``, clipped to [0, 1]; a factor ``[N]`` of 1 is as before,
    of 0 the other, and above 1 away from it."""
    return (other + factor[:, None, None, None] * (pixels - other)).clamp(0, 1)


def brightened(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blended with black."""
    return blended(pixels, torch.zeros_like(pixels), factor)


def contrasted(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blended with each image's mean brightness."""
    return blended(pixels, gray(pixels).mean(dim=(2, 3), keepdim=True), factor)


def saturated(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blended with gray; gray images stay."""
    return blended(pixels, gray(pixels).expand_as(pixels), factor)


def sharpened(pixels: Tensor, factor: Tensor) -> Tensor:
    """Blended with what a 3 x 3 window smooths (5/13 in the middle); pixels at the rim stay."""
    channels, height, width = pixels.shape[1:]
    if min(height, width) < 3:
        return pixels
    window = pixels.new_full((3, 3), 1 / 13)
    window[1, 1] = 5 / 13
    smooth = pixels.clone()
    kernel = window.expand(channels, 1, 3, 3)
    smooth[:, :, 1:-1, 1:-1] = conv2d(pixels, kernel, groups=channels)
    return blended(pixels, smooth, factor)


def turned(pixels: Tensor, angle: Tensor) -> Tensor:
    """The hue of RGB images turned by a share ``[N]`` of the circle, saturation and value kept."""
    if pixels.shape[1] == 1:
        return pixels
    most, least = pixels.amax(dim=1), pixels.amin(dim=1)
    spread = most - least
    red, green, blue = pixels.unbind(dim=1)
    span = torch.where(spread > 0, spread, torch.ones_like(spread))
    hue = torch.where(
        most == red,
        (green - blue) / span,
        torch.where(most == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    hue = hue + 6 * angle[:, None, None]
    # Each channel is a trapezoid of the hue, a third of the circle from the next one.
    offsets = pixels.new_tensor((5.0, 3.0, 1.0))[:, None, None]
    place = (hue[:, None] + offsets) % 6
    share = torch.minimum(place, 4 - place).clamp(0, 1)
    return (most[:, None] - spread[:, None] * share).clamp(0, 1)


def _constants(inputs: Tensor, preprocess: Preprocess | None) -> tuple[Tensor, Tensor]:
    mean = preprocess.mean if preprocess is not None and preprocess.mean else (0.0,)
    std = preprocess.std if preprocess is not None and preprocess.std else (1.0,)
    return inputs.new_tensor(mean)[:, None, None], inputs.new_tensor(std)[:, None, None]
