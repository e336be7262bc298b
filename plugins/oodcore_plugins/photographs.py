"""photographs: random patches of the two photographs that come with scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

import oodcore
from oodcore.errors import ConfigurationError, ExtraError
from oodcore.images import Colour, coloured, squared

NAMES = ("china.jpg", "flower.jpg")


class Photographs(oodcore.Source):
    """Square patches of two photographs, a temple and a flower, 427 x 640 pixels each.

    A patch is cut from one of the two at random, with a side between ``size`` and 427 pixels
    (uniform in its logarithm) at a place that is uniform too, and shrunk to ``size`` (bilinear,
    antialiased). Real images of no class, for networks that know other things: an embedded far-OOD
    set.

    Row i depends on nothing but (seed, i). Rows are float32 ``[1 or 3, size, size]`` in [0, 1];
    labels are -1.

    Args:
        rows: how many patches there are.
        size: side of a patch, in pixels.
        colour: "grey" or "rgb".
        seed: of the places and sides.

    Needs Pillow to decode them (``pip install pillow``), else ``open`` raises an ExtraError; it
    raises a ConfigurationError for a size larger than the photographs.
    """

    kind = "photographs"

    rows: PositiveInt = 1000
    size: PositiveInt = 32
    colour: Colour = "rgb"
    seed: NonNegativeInt = 0

    def open(self) -> Dataset[Any]:
        photographs = [_photograph(name) for name in NAMES]
        side = min(min(photograph.shape[1:]) for photograph in photographs)
        if self.size > side:
            raise ConfigurationError(
                f"photographs: size is {self.size}, and the photographs are {side} pixels high"
            )
        return _Rows(self, photographs)


class _Rows(Dataset[Any]):
    def __init__(self, source: Photographs, photographs: list[Tensor]) -> None:
        self._source, self._photographs = source, photographs

    def __len__(self) -> int:
        return self._source.rows

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = self._source
        random = np.random.default_rng(np.random.SeedSequence(source.seed, spawn_key=(index,)))
        photograph = self._photographs[random.integers(len(self._photographs))]
        height, width = photograph.shape[1:]
        side = round(math.exp(random.uniform(math.log(source.size), math.log(min(height, width)))))
        top = int(random.integers(height - side + 1))
        left = int(random.integers(width - side + 1))
        patch = photograph[None, :, top : top + side, left : left + side].float() / 255
        return squared(coloured(patch, source.colour), source.size)[0], -1, index


def _photograph(name: str) -> Tensor:
    """A photograph as uint8 ``[3, H, W]``."""
    from sklearn.datasets import load_sample_image

    try:
        pixels = load_sample_image(name)
    except ImportError:
        raise ExtraError("the photographs need Pillow: pip install pillow") from None
    return torch.from_numpy(np.array(pixels)).movedim(-1, 0)


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(Photographs)
