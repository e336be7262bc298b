"""crop_flip: images moved by a few pixels and mirrored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor
from torch.nn.functional import pad

import oodcore
from oodcore.errors import DataError
from oodcore_plugins.augmentations.pixels import from_pixels, images


class CropFlip(oodcore.Regularizer):
    """Each image is padded on all sides and cut to its size at a random place, then mirrored left
    to right with a probability:

        x'[c, i, j] = padded[c, i + a, j + b],    a, b uniform in 0, ..., 2 padding

    It acts on the rows of the batch, ahead of whatever else a step does with them, and draws for
    each row by itself. Inputs are as the network gets them; pixels keep their values exactly.

    Args:
        padding: pixels on each side; 4 is usual for images of 32 x 32.
        border: what is padded with: "black", or "reflect", the image mirrored at its rim.
        flip: the probability of mirroring; 0 for digits and other writing.
        weight: 0 switches it off.

    Raises a DataError if the inputs are no float images ``[N, C, H, W]``, or no larger than
    ``padding`` where they are reflected.
    """

    kind = "crop_flip"
    paper = oodcore.Paper(
        title="Deeply-Supervised Nets",
        authors="Chen-Yu Lee, Saining Xie, Patrick Gallagher, Zhengyou Zhang, Zhuowen Tu",
        venue="AISTATS",
        year=2015,
        url="https://arxiv.org/abs/1409.5185",
    )

    padding: NonNegativeInt = 4
    border: Literal["black", "reflect"] = "black"
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5

    def augment(self, inputs: Any, step: oodcore.Step) -> Tensor:
        rows = images(inputs, self.kind)
        count, (height, width) = len(rows), rows.shape[2:]
        draw, device = step.generator, rows.device
        places = 2 * self.padding + 1
        top, left = torch.randint(places, (2, count), generator=draw, device=device)
        mirrored = torch.rand(count, generator=draw, device=device) < self.flip
        i = top[:, None] + torch.arange(height, device=device)
        j = torch.arange(width, device=device).expand(count, width)
        j = left[:, None] + torch.where(mirrored[:, None], width - 1 - j, j)
        number = torch.arange(count, device=device)[:, None, None]
        cut = self._padded(rows, step)[number, :, i[:, :, None], j[:, None]]
        return cut.permute(0, 3, 1, 2).contiguous()

    def _padded(self, rows: Tensor, step: oodcore.Step) -> Tensor:
        sides = [self.padding] * 4
        if self.border == "black":
            black = from_pixels(torch.zeros_like(rows[:1, :, :1, :1]), step)
            larger = [rows.shape[2] + 2 * self.padding, rows.shape[3] + 2 * self.padding]
            padded = black.expand(*rows.shape[:2], *larger).clone()
            inner = slice(self.padding, larger[0] - self.padding)
            padded[:, :, inner, self.padding : larger[1] - self.padding] = rows
            return padded
        if self.padding >= min(rows.shape[2:]):
            raise DataError(
                f"crop_flip: images of {rows.shape[2]} x {rows.shape[3]} cannot be reflected by "
                f"{self.padding} pixels; lower padding, or set border: black"
            )
        return pad(rows, sides, mode="reflect")
