"""tta: what a model says of an image, averaged over crops and mirror images of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import PositiveInt, model_validator
from torch import Tensor

from oodcore import Extractor, FeatureModel, Features, Slot, hookimpl
from oodcore.composite import Repeated
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import Edit, PreprocessInside
from oodcore.hookspecs import Register
from oodcore_plugins.views import crops

Choice = Literal["flips", "five_crop", "ten_crop"]


class AveragedViews(Repeated):
    """A model's features of views of an image, averaged; ``TTA`` says how.

    Args:
        model: any FeatureModel that takes images.
        views: "flips", "five_crop" or "ten_crop".
        size: side of the crops in pixels; None for flips.

    Raises:
        ConfigurationError: crops without a size, or flips with one.
    """

    def __init__(self, model: FeatureModel, views: Choice, size: int | None = None) -> None:
        if fault := _misfit(views, size):
            raise ConfigurationError(fault)
        super().__init__("tta", model, {"views": views, "size": size})
        self.views = views
        self.size = size

    def ready(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            given = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DataError(f"tta: views are of images [N, C, H, W], not {given}")
        return inputs

    def runs(self, inputs: Tensor, edit: Edit | None) -> Iterator[Features]:
        for view in self._seen(inputs):
            yield self.model.rerun(view, edit)

    def _seen(self, images: Tensor) -> Iterator[Tensor]:
        for part in [images] if self.size is None else crops(images, self.size):
            yield part
            if self.views != "five_crop":
                yield part.flip(3)


class TTA(Extractor):
    """``h = mean_v h(x_v)`` and ``z = mean_v z(x_v)`` over views x_v of an image (test time
    augmentation), of embeddings h and logits z.

    ``flips`` are the image and its mirror image (left and right change sides), ``five_crop`` the
    four corners and the middle as squares of ``size`` pixels, ``ten_crop`` these and their mirror
    images. Views are cut out of what the preprocessing of the extractor inside made of an image,
    and go to the model as they are, without any resizing. So a preprocessing with ``size: 548`` and
    no ``crop``, and views of ``size: 480``, are the five crops of a resized image.

    Everything is fitted on such averages, and the model sees a row once for every view. Layers are
    averaged position by position, which is the average of pooled activations where they are pooled
    by their mean. With a plain head the mean logits are what it makes of the mean embeddings. With
    a cosine head they are not: shapers, and scorers that apply the head, work with what it makes of
    the mean embeddings. The scorer ``views`` averages scores instead.

    Args:
        extractor: the model.
        views: ``flips``, ``five_crop`` or ``ten_crop``.
        size: side of the crops in pixels; needed for crops, and refused for flips.
        preprocess: none: it is the inner extractor's.

    ``load`` raises a ConfigurationError if the model is not where or what the configuration says;
    inputs that are no images, or smaller than the crops, are a DataError.
    """

    kind = "tta"

    extractor: Annotated[Extractor, Slot("extractor")]
    views: Choice = "flips"
    size: PositiveInt | None = None
    preprocess: PreprocessInside = None

    @model_validator(mode="after")
    def _size_where_there_are_crops(self) -> TTA:
        if fault := _misfit(self.views, self.size):
            raise ValueError(fault)
        return self

    def load(self) -> AveragedViews:
        return AveragedViews(self.extractor.load(), self.views, self.size)

    def code(self) -> tuple[str, ...]:
        return self.extractor.code()


def _misfit(views: str, size: int | None) -> str | None:
    if (views == "flips") == (size is None):
        return None
    return f"'{views}' " + ("needs a size, in pixels" if size is None else "takes no size")


@hookimpl
def register_extractors(register: Register) -> None:
    register(TTA)
