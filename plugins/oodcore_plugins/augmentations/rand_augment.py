"""rand_augment: a few operations on each image, any of fourteen, all of one strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn.functional import grid_sample

import oodcore
from oodcore_plugins.augmentations.pixels import (
    brightened,
    check_colors,
    contrasted,
    from_pixels,
    images,
    saturated,
    sharpened,
    to_pixels,
)

Operation = Callable[[Tensor, Tensor, float], Tensor]
"""Pixels ``[N, C, H, W]``, a level ``[N]`` in [-1, 1] of random sign, and the fill."""

LARGEST = 10
"""The largest magnitude."""
ENHANCE, SHEAR, TRANSLATE, ROTATE, BITS = 0.9, 0.3, 0.45, math.radians(30), 4
"""What the largest magnitude does: added to or taken from a factor of 1; as a slope; as a share of
the image; as an angle; bits of 8 that are lost."""


class RandAugment(oodcore.Regularizer):
    """``n`` operations on each image, one after another, each drawn from the fourteen alike. With
    the level l = magnitude / 10, and a random sign for those with +-:

        identity, equalize (flat histogram), autocontrast (each channel stretched to [0, 1])
        rotate +-30 l degrees    shear_x, shear_y: slope +-0.3 l
        translate_x, translate_y: +-0.45 l of the width or height
        brightness, contrast, color, sharpness: factor 1 +- 0.9 l
        posterize: the first 8 - round(4 l) bits    solarize: inverted from byte 256 (1 - l) on

    Operations and their largest ranges are those of the paper and of AutoAugment. The paper leaves
    open how the others grow with the magnitude; here all do, from nothing at 0. Images are turned
    and moved with bilinear interpolation.

    It acts on the rows of the batch, ahead of whatever else a step does with them, and draws for
    each row by itself. Inputs are as the network gets them; the run's ``preprocess`` says how they
    become pixels in [0, 1] and back.

    Args:
        n: operations on each image.
        magnitude: from 0 to 10.
        fill: the gray beyond the rim of images that are moved, in [0, 1].
        weight: 0 switches it off.

    Raises a DataError if the inputs are no float images ``[N, C, H, W]`` of 1 or 3 channels, or
    their pixels do not lie in [0, 1].
    """

    kind = "rand_augment"
    paper = oodcore.Paper(
        title="RandAugment: Practical Automated Data Augmentation with a Reduced Search Space",
        authors="Ekin D. Cubuk, Barret Zoph, Jonathon Shlens, Quoc V. Le",
        venue="NeurIPS",
        year=2020,
        url="https://arxiv.org/abs/1909.13719",
    )

    n: PositiveInt = 2
    magnitude: Annotated[float, Field(ge=0, le=LARGEST)] = 9.0
    fill: Annotated[float, Field(ge=0, le=1)] = 0.5

    def augment(self, inputs: Any, step: oodcore.Step) -> Tensor:
        rows = images(inputs, self.kind)
        check_colors(rows, self.kind)
        pixels = to_pixels(rows, step)
        draw, shape = step.generator, (self.n, len(rows))
        which = torch.randint(len(OPERATIONS), shape, generator=draw, device=rows.device)
        signs = 2 * torch.randint(2, shape, generator=draw, device=rows.device) - 1
        levels = signs.to(pixels) * (self.magnitude / LARGEST)
        for turn, level in zip(which, levels, strict=True):
            for number, operation in enumerate(OPERATIONS.values()):
                chosen = turn == number
                pixels[chosen] = operation(pixels[chosen], level[chosen], self.fill)
        return from_pixels(pixels, step)


def _enhanced(change: Callable[[Tensor, Tensor], Tensor]) -> Operation:
    return lambda pixels, level, fill: change(pixels, 1 + ENHANCE * level)


def _identity(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    return pixels


def _autocontrast(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    least, most = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    span = torch.where(most > least, most - least, torch.ones_like(most))
    return torch.where(most > least, (pixels - least) / span, pixels)


def _equalize(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    values = _bytes(pixels).flatten(2).flatten(0, 1)
    channels = torch.arange(len(values), device=values.device)[:, None]
    counts = (256 * channels + values).flatten().bincount(minlength=256 * len(values))
    counts = counts.view(-1, 256)
    brightest = counts.gather(1, values.amax(dim=1, keepdim=True))
    size = (values.shape[1] - brightest) // 255
    before = counts.cumsum(dim=1) - counts
    table = ((before + size // 2) // size.clamp_min(1)).clamp_max(255)
    # Too few pixels, or one brightness alone, make no histogram to flatten.
    return torch.where(
        (size > 0).view(*pixels.shape[:2], 1, 1),
        (table.gather(1, values).to(pixels) / 255).view_as(pixels),
        pixels,
    )


def _posterize(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    lost = 2 ** (BITS * level.abs()).round().long()[:, None, None, None]
    return (_bytes(pixels) // lost * lost).to(pixels) / 255


def _solarize(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    threshold = 256 * (1 - level.abs())[:, None, None, None]
    return torch.where(255 * pixels >= threshold, 1 - pixels, pixels)


def _rotate(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    angle = ROTATE * level
    cos, sin = angle.cos(), angle.sin()
    return _sampled(pixels, fill, x=(cos, -sin, None), y=(sin, cos, None))


def _shear_x(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    return _sampled(pixels, fill, x=(None, SHEAR * level, None))


def _shear_y(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    return _sampled(pixels, fill, y=(SHEAR * level, None, None))


def _translate_x(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    return _sampled(pixels, fill, x=(None, None, TRANSLATE * pixels.shape[3] * level))


def _translate_y(pixels: Tensor, level: Tensor, fill: float) -> Tensor:
    return _sampled(pixels, fill, y=(None, None, TRANSLATE * pixels.shape[2] * level))


Line = tuple[Tensor | None, Tensor | None, Tensor | None]


def _sampled(
    pixels: Tensor, fill: float, x: Line = (None, None, None), y: Line = (None, None, None)
) -> Tensor:
    """Images read at ``a x + b y + c``, in pixels from their middle; a or b of the own axis is 1
    where it is left out, everything else 0."""
    count, _, height, width = pixels.shape
    down = (torch.arange(height) - (height - 1) / 2).to(pixels)[:, None]
    across = (torch.arange(width) - (width - 1) / 2).to(pixels)
    one, zero = pixels.new_ones(count), pixels.new_zeros(count)

    def read(line: Line, usual: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        a, b, c = (
            (given if given is not None else default)[:, None, None]
            for given, default in zip(line, usual, strict=True)
        )
        return a * across + b * down + c

    # From -1 to 1 between the outer rims of the first and the last pixel.
    column = read(x, (one, zero, zero)) * (2 / width)
    row = read(y, (zero, one, zero)) * (2 / height)
    grid = torch.stack([column, row], dim=3)
    # What lies outside is taken for 0.
    return fill + grid_sample(pixels - fill, grid, align_corners=False)


def _bytes(pixels: Tensor) -> Tensor:
    return (255 * pixels).round().long()


OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "rotate": _rotate,
    "solarize": _solarize,
    "color": _enhanced(saturated),
    "posterize": _posterize,
    "contrast": _enhanced(contrasted),
    "brightness": _enhanced(brightened),
    "sharpness": _enhanced(sharpened),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
