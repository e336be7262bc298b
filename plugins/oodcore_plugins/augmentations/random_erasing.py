"""random_erasing: images with a rectangle of noise."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

import oodcore
from oodcore_plugins.augmentations.pixels import from_pixels, images

TRIES = 10
"""Rectangles that are drawn until one fits."""

Share = Annotated[float, Field(gt=0, le=1)]


class RandomErasing(oodcore.Regularizer):
    """With a probability, a rectangle in an image of H x W pixels is overwritten. Its area is
    uniform in ``area`` and its ratio of height to width log-uniform in ``ratio``,

        h = round(sqrt(area H W ratio)),    w = round(sqrt(area H W / ratio)),

    and it lies anywhere in the image. Of ten such draws the first that is smaller than the image
    counts; if none is, the image stays.

    It acts on the rows of the batch, ahead of whatever else a step does with them, and draws for
    each row by itself; of the augmentations it comes last. The paper draws the ratio uniformly,
    which makes more rectangles tall than wide, and tries until one fits.

    Args:
        probability: of a rectangle, for each image.
        area: its least and largest share of the image.
        ratio: its least and largest height over width.
        fill: "random", pixels uniform in [0, 1], each channel by itself, as the paper prefers; or
            "black".
        weight: 0 switches it off.

    Raises a DataError if the inputs are no float images ``[N, C, H, W]``.
    """

    kind = "random_erasing"
    paper = oodcore.Paper(
        title="Random Erasing Data Augmentation",
        authors="Zhun Zhong, Liang Zheng, Guoliang Kang, Shaozi Li, Yi Yang",
        venue="AAAI",
        year=2020,
        url="https://arxiv.org/abs/1708.04896",
    )

    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    area: tuple[Share, Share] = (0.02, 0.4)
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 3.3333)
    fill: Literal["random", "black"] = "random"

    @model_validator(mode="after")
    def _ascending(self) -> RandomErasing:
        for name, (low, high) in (("area", self.area), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} goes from the least to the largest, not {low} to {high}")
        return self

    def augment(self, inputs: Any, step: oodcore.Step) -> Tensor:
        rows = images(inputs, self.kind)
        count, (height, width) = len(rows), rows.shape[2:]
        draw, device = step.generator, rows.device
        erased = torch.rand(count, generator=draw, device=device) < self.probability
        sizes = torch.rand((2, count, TRIES), generator=draw, device=device, dtype=torch.float64)
        area = height * width * _between(sizes[0], *self.area)
        ratio = _between(sizes[1], *(math.log(end) for end in self.ratio)).exp()
        tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (tall < height) & (wide < width) & (tall > 0) & (wide > 0)
        erased &= fits.any(dim=1)
        first = fits.int().argmax(dim=1, keepdim=True)
        tall, wide = tall.gather(1, first), wide.gather(1, first)
        corner = torch.rand((2, count, 1), generator=draw, device=device, dtype=torch.float64)
        top = (corner[0] * (height - tall + 1)).long()
        left = (corner[1] * (width - wide + 1)).long()
        i, j = torch.arange(height, device=device), torch.arange(width, device=device)
        inside = ((i >= top) & (i < top + tall))[:, :, None] & ((j >= left) & (j < left + wide))[
            :, None
        ]
        inside &= erased[:, None, None]
        if self.fill == "black":
            other = torch.zeros_like(rows)
        else:
            other = torch.rand(rows.shape, generator=draw, device=device, dtype=rows.dtype)
        return torch.where(inside[:, None], from_pixels(other, step), rows)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * share
