"""color_jitter: images of other brightness, contrast, saturation and hue."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

import oodcore
from oodcore_plugins.augmentations.pixels import (
    brightened,
    check_colors,
    contrasted,
    from_pixels,
    images,
    saturated,
    to_pixels,
    turned,
)

OPERATIONS = (brightened, contrasted, saturated, turned)


class ColorJitter(oodcore.Regularizer):
    """Brightness, contrast, saturation and hue of each image change, in a random order:

        x' = other + f (x - other), clipped to [0, 1],    f uniform in [max(0, 1 - s), 1 + s]

    where ``other`` is black for brightness, the image's mean gray for contrast, and the image in
    gray for saturation; s is the strength of each. The hue is turned by a share of the circle that
    is uniform in [-hue, hue]. Gray images have neither saturation nor hue, and keep what they have.

    It acts on the rows of the batch, ahead of whatever else a step does with them, and draws for
    each row by itself. Inputs are as the network gets them; the run's ``preprocess`` says how they
    become pixels in [0, 1] and back. It comes before ``crop_flip``, whose border stays black.

    Args:
        brightness: its strength; 0 leaves brightness as it is, as for the other three.
        contrast: its strength.
        saturation: its strength.
        hue: at most so far round the circle, in [0, 0.5].
        weight: 0 switches it off.

    Raises a DataError if the inputs are no float images ``[N, C, H, W]`` of 1 or 3 channels, or
    their pixels do not lie in [0, 1].
    """

    kind = "color_jitter"
    paper = oodcore.Paper(
        title="Some Improvements on Deep Convolutional Neural Network Based Image Classification",
        authors="Andrew G. Howard",
        venue="arXiv",
        year=2013,
        url="https://arxiv.org/abs/1312.5402",
    )

    brightness: NonNegativeFloat = 0.3
    contrast: NonNegativeFloat = 0.3
    saturation: NonNegativeFloat = 0.3
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0

    def augment(self, inputs: Any, step: oodcore.Step) -> Tensor:
        rows = images(inputs, self.kind)
        check_colors(rows, self.kind)
        pixels = to_pixels(rows, step)
        shape = (len(rows), len(OPERATIONS))
        drawn, keys = torch.rand((2, *shape), generator=step.generator, device=rows.device)
        strengths = (self.brightness, self.contrast, self.saturation)
        low = drawn.new_tensor([max(0.0, 1 - s) for s in strengths] + [-self.hue])
        high = drawn.new_tensor([1 + s for s in strengths] + [self.hue])
        factors = (low + (high - low) * drawn).to(pixels)
        for turn in keys.argsort(dim=1).unbind(dim=1):
            for number, (operation, strength) in enumerate(
                zip(OPERATIONS, (*strengths, self.hue), strict=True)
            ):
                chosen = turn == number
                if strength:
                    pixels[chosen] = operation(pixels[chosen], factors[chosen, number])
        return from_pixels(pixels, step)
