"""What a folder says of its images, ``preprocessor_config.json``, as a Preprocess."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from oodcore.errors import ConfigurationError
from oodcore.preprocess import Preprocess
from oodcore_plugins.transformers_extractor.models import document

PROCESSOR = "preprocessor_config.json"

_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers for what Preprocess can do."""
_SQUASHED = 384
"""From this size on, images of models with a ``crop_pct`` are resized and not cut."""


def preprocessing(folder: Path, image_size: int | None = None) -> Preprocess | None:
    """The preprocessing that a folder's model was trained with; None if it does not say.

    An image that is no square is resized by its short side and cut in the middle, also where
    transformers would squeeze it. Sizes are scaled where ``image_size`` is another one.

    Args:
        folder: of the model.
        image_size: the side of the squares that the model gets, where it is not the folder's.

    Raises:
        ConfigurationError: something that ``Preprocess`` does not do.
    """
    path = folder / PROCESSOR
    if not path.is_file():
        return None
    said = document(path)
    fields: dict[str, Any] = {}
    try:
        if said.get("do_resize", "size" in said):
            fields["interpolation"] = _FILTERS[said["resample"]]
            fields |= _sizes(said)
        if said.get("do_center_crop", "crop_size" in said):
            fields["crop"] = _square(said["crop_size"])
        if said.get("do_normalize", "image_mean" in said):
            fields["mean"], fields["std"] = said["image_mean"], said["image_std"]
        if image_size is not None:
            fields |= _scaled(fields, image_size)
        return Preprocess(**fields)
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise ConfigurationError(
            f"{path} says something of images that oodcore does not do ({error!r:.200}); give the "
            "extractor a preprocess"
        ) from None


def _sizes(said: Mapping[str, Any]) -> dict[str, int]:
    size = said["size"]
    if isinstance(size, dict) and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        if "crop_pct" not in said:
            return {"size": short}
        share = float(said["crop_pct"]) if short < _SQUASHED else 1.0
        return {"size": int(short / share), "crop": short}
    side = _square(size)
    return {"size": side, "crop": side}


def _square(size: Any) -> int:
    if isinstance(size, dict):
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise ValueError(f"the size {size}")
        size = size["height"]
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"the size {size!r}")
    return size


def _scaled(fields: Mapping[str, Any], side: int) -> dict[str, int]:
    own, size = fields.get("crop"), fields.get("size")
    if own is None or size is None:
        return {"size": side, "crop": side}
    return {"size": round(size * side / own), "crop": side}
