"""The mean score over several views of an input: crops and mirror images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, Slot, hookimpl
from oodcore.errors import DataError
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.perturbed import moveable


class Views(Scorer):
    """``mean_v s(x_v)`` over views x_v of an image: crops, mirror images, or both.

    ``flips`` are the image and its mirror image (left and right change sides), ``five_crop`` the
    four corners and the middle as squares of ``crop`` pixels, ``ten_crop`` these and their mirror
    images. The model sees each row again once for every view (but the image itself). The score's
    own numbers are averaged: not logits and not probabilities. The paper averages the softmax over
    ten crops to classify; as a score it is the mean of s.

    The score s is fitted on whole images, and views are cut out of what the preprocessing made of
    an image. With ``resize`` each crop is brought back to the image's size (bilinear, antialiased),
    so that a model that takes one size only can see it: a crop of 0.875 of the side is what a
    larger image and a crop of the model's size would be, but for resizing twice. Without it crops
    go to the model as they are; then the preprocessing may make images larger than the model was
    trained on (``size`` without ``crop``) and the crops have its size, where the model takes both.

    Args:
        scorer: the score s.
        views: ``flips``, ``five_crop`` or ``ten_crop``.
        crop: side of the squares in pixels; needed for crops, and refused for flips alone.
        resize: whether crops are brought back to the size of the image.
    """

    kind = "views"
    paper = Paper(
        "ImageNet Classification with Deep Convolutional Neural Networks",
        "Alex Krizhevsky, Ilya Sutskever, Geoffrey E. Hinton",
        "NeurIPS",
        2012,
        "https://doi.org/10.1145/3065386",
    )
    scorer: Annotated[Scorer, Slot("scorer")]
    views: Literal["flips", "five_crop", "ten_crop"] = "flips"
    crop: PositiveInt | None = None
    resize: bool = True

    @model_validator(mode="after")
    def _crop_where_there_are_crops(self) -> Views:
        if (self.views == "flips") != (self.crop is None):
            given = "takes no crop" if self.views == "flips" else "needs a crop, in pixels"
            raise ValueError(f"'{self.views}' {given}")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    def score(self, features: Features, state: State) -> Tensor:
        inputs, rerun = moveable(features)
        if inputs.ndim != 4:
            raise DataError(f"views are of images [N, C, H, W], not {list(inputs.shape)}")
        inner = state.get("scorer", {})
        scores = [self.scorer.score(features, inner)] if self.crop is None else []
        scores += [self.scorer.score(rerun(view), inner) for view in self._seen_again(inputs)]
        return sum(scores[1:], scores[0]) / len(scores)

    def _seen_again(self, images: Tensor) -> Iterator[Tensor]:
        """The views of images ``[N, C, H, W]``, but for the images themselves."""
        if self.crop is None:
            yield images.flip(3)
            return
        for part in crops(images, self.crop):
            if self.resize and part.shape != images.shape:
                part = F.interpolate(
                    part, images.shape[2:], mode="bilinear", align_corners=False, antialias=True
                )
            yield part
            if self.views == "ten_crop":
                yield part.flip(3)


def crops(images: Tensor, side: int) -> Iterator[Tensor]:
    """The four corners and the middle of images ``[N, C, H, W]``, as squares.

    Raises:
        DataError: images smaller than the squares.
    """
    height, width = images.shape[2:]
    if side > min(height, width):
        raise DataError(
            f"views: a crop of {side} pixels does not fit into images of {height} x {width}; give "
            "a smaller crop"
        )
    low, right = height - side, width - side
    middle = (round(low / 2), round(right / 2))
    for top, left in ((0, 0), (0, right), (low, 0), (low, right), middle):
        yield images[:, :, top : top + side, left : left + side]


@hookimpl
def register_scorers(register: Register) -> None:
    register(Views)
