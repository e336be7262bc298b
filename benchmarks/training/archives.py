"""Images from an archive that the user names, few and small enough to train on with two cores."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oodcore.images import squared

Array = np.ndarray
PARTS = ("train", "held_out", "test")


@dataclass(frozen=True)
class Amount:
    """How much of an archive is kept.

    Args:
        train: images of each class to train on.
        held_out: images of each class, from the same part of the archive, to choose by.
        test: images of each class to test on; None keeps all.
        size: pixels on a side; None leaves the images as they are.
    """

    train: int
    held_out: int
    test: int | None = None
    size: int | None = None


def prepared(path: Path, folder: Path, amount: Amount, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Write the parts as archives of their own; gives a source of each, without classes.

    The archive holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``, with images of bytes; or
    in place of each ``x_PART`` the bytes of its JPEG files one after another, ``jpeg_PART``, and
    where each begins and the last ends, ``offsets_PART``.

    Raises:
        SystemExit: there is no such file, or something else in it.
    """
    if not path.is_file():
        raise SystemExit(f"there is no archive {path}")
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with np.load(path) as archive:
        known = _rows(archive["y_train"], generator, amount.train + amount.held_out)
        rows = {
            "train": [some[: amount.train] for some in known],
            "held_out": [some[amount.train :] for some in known],
            "test": _rows(archive["y_test"], generator, amount.test),
        }
        for part, chosen in rows.items():
            of = "test" if part == "test" else "train"
            numbers = np.sort(np.concatenate(chosen))
            images = _images(archive, of, numbers)
            if amount.size is not None:
                images = _smaller(images, amount.size)
            np.savez(folder / f"{part}.npz", x=images, y=archive[f"y_{of}"][numbers])
    return sources(folder)


def sources(folder: Path) -> dict[str, dict[str, Any]]:
    """A source of each part that ``prepared`` wrote."""
    return {part: {"kind": "npz", "path": str(folder / f"{part}.npz")} for part in PARTS}


def _rows(labels: Array, generator: np.random.Generator, count: int | None) -> list[Array]:
    """So many rows of each class, drawn."""
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if count is not None and len(rows) < count:
            raise SystemExit(f"{count} images of class {label} are asked for, of {len(rows)}")
        found.append(generator.permutation(rows)[:count])
    return found


def _images(archive: Mapping[str, Array], part: str, rows: Array) -> Array:
    if f"x_{part}" in archive:
        return archive[f"x_{part}"][rows]
    if f"jpeg_{part}" not in archive:
        raise SystemExit(f"the archive has neither x_{part} nor jpeg_{part}")
    from PIL import Image

    data, places = archive[f"jpeg_{part}"], archive[f"offsets_{part}"]
    files = (data[places[row] : places[row + 1]].tobytes() for row in rows)
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def _smaller(images: Array, size: int) -> Array:
    values = torch.from_numpy(images).float() / 255
    values = values[:, None] if values.ndim == 3 else values.movedim(-1, 1)
    bytes_ = (255 * squared(values, size)).round().byte()
    return (bytes_[:, 0] if images.ndim == 3 else bytes_.movedim(1, -1)).numpy()
