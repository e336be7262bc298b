"""noise: images that no camera took, drawn from a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.utils.data import Dataset

import oodcore
from oodcore.component import Paper

Distribution = Literal["gaussian", "rademacher", "bernoulli", "blobs", "uniform"]
Array = np.ndarray[Any, Any]


class Noise(oodcore.Source):
    """The noise images of the Outlier Exposure benchmarks, drawn as they are read.

    Every number of a row is drawn on its own, from

    - ``gaussian``: Normal(0.5, 0.5) clipped to [0, 1];
    - ``uniform``: the interval [0, 1];
    - ``bernoulli``: 0 or 1 with probability 1/2 each;
    - ``rademacher``: -1 or 1 with probability 1/2 each;
    - ``blobs``: 1 with probability 0.7, else 0; then blurred by a Gaussian of ``sigma`` pixels
      along all three axes, channels too (edges repeated, cut at 4 sigma), and values below 0.75
      set to 0.

    ``standardised`` noise is for networks whose inputs are standardised channel by channel. It lies
    in [-1, 1]: gaussian is Normal(0, 0.5) clipped, the others are 2 x - 1 (rademacher is the same).
    The benchmarks feed it past that standardisation. With the extractor's ``mean`` and ``std``
    given here too, a row is ``x * std + mean``, and what the network gets is the noise itself.

    Row i depends on nothing but the distribution and (seed, i). Rows are float32 ``[C, H, W]``,
    in [0, 1] unless standardised or rademacher; labels are -1.

    Args:
        distribution: of the numbers.
        rows: how many rows there are.
        shape: channels, height and width of a row.
        seed: of the draws.
        standardised: whether the noise lies in [-1, 1].
        mean: of the extractor, one number a channel; only for noise in [-1, 1].
        std: of the extractor, one positive number a channel; only for noise in [-1, 1].
        sigma: of the blur of blobs, in pixels: 1.5 for images of 32, 2 for images of 64.
    """

    kind = "noise"
    paper = Paper(
        title="Deep Anomaly Detection with Outlier Exposure",
        authors="Dan Hendrycks, Mantas Mazeika, Thomas Dietterich",
        venue="ICLR",
        year=2019,
        url="https://arxiv.org/abs/1812.04606",
    )

    distribution: Distribution = "gaussian"
    rows: PositiveInt = 1000
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 32, 32)
    seed: NonNegativeInt = 0
    standardised: bool = False
    mean: tuple[FiniteFloat, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    sigma: PositiveFloat = 1.5

    @model_validator(mode="after")
    def _check_channels(self) -> Noise:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if not self.standardised and self.distribution != "rademacher":
                raise PydanticCustomError(
                    "not_standardised",
                    "{name} is for noise in [-1, 1]; set standardised: true",
                    {"name": name},
                )
            if len(values) != self.shape[0]:
                raise PydanticCustomError(
                    "channels_differ",
                    "{name} has {given} numbers and the shape {channels} channels",
                    {"name": name, "given": len(values), "channels": self.shape[0]},
                )
        return self

    def open(self) -> Dataset[Any]:
        return _Rows(self)


class _Rows(Dataset[Any]):
    def __init__(self, source: Noise) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.rows

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int, int]]:
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(index)
        source = self._source
        noise = _changed(np.stack([_drawn(source, index) for index in indices]), source)
        images = torch.from_numpy(noise.astype(np.float32))
        return [(image, -1, index) for image, index in zip(images, indices, strict=True)]


def _drawn(source: Noise, index: int) -> Array:
    """What is random in a row, ``[C, H, W]`` float64."""
    # Entropy and spawn key of a seed sequence cannot run into each other, as those of a plain
    # list of integers can.
    random = np.random.default_rng(np.random.SeedSequence(source.seed, spawn_key=(index,)))
    if source.distribution == "gaussian":
        return random.normal(0.0 if source.standardised else 0.5, 0.5, source.shape)
    if source.distribution == "uniform":
        return random.random(source.shape)
    if source.distribution == "blobs":
        return (random.random(source.shape) < 0.7).astype(np.float64)
    return random.integers(0, 2, source.shape).astype(np.float64)


def _changed(noise: Array, source: Noise) -> Array:
    """Rows ``[N, C, H, W]`` of the distribution, from what was drawn for them."""
    if source.distribution == "gaussian":
        noise = noise.clip(-1 if source.standardised else 0, 1)
    elif source.distribution == "blobs":
        noise = _blurred(noise, source.sigma)
        noise[noise < 0.75] = 0
    if source.distribution == "rademacher" or (
        source.standardised and source.distribution != "gaussian"
    ):
        noise = 2 * noise - 1
    if source.std is not None:
        noise = noise * np.array(source.std)[:, None, None]
    if source.mean is not None:
        noise = noise + np.array(source.mean)[:, None, None]
    return noise


def _blurred(noise: Array, sigma: float) -> Array:
    from scipy.ndimage import gaussian_filter

    blurred: Array = gaussian_filter(noise, (0, sigma, sigma, sigma), mode="nearest", truncate=4.0)
    return blurred


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(Noise)
