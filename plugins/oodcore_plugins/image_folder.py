"""image_folder: image files, in one folder a class or all in one."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.utils.data import Dataset

import oodcore
from oodcore.component import FilePath, Settings
from oodcore.data import Part, select
from oodcore.errors import DataError, ExtraError
from oodcore.images import Colour, coloured, squared

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, struct.error)


class ClassList(Settings):
    """Names of class folders, read from a JSON file such as a benchmark publishes.

    Args:
        path: the file.
        entry: where in it the list of names stands, steps divided by dots:
            ``known_classes``, ``unknown_classes.Easy``; left out, the file is the list.
    """

    path: FilePath
    entry: str | None = None

    def read(self) -> list[str]:
        """The names, in the order of the file.

        Raises:
            DataError: a file that is missing or no JSON, an entry that is not there, or something
                other than different names of folders.
        """
        try:
            found = json.loads(self.path.read_bytes())
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path} is not JSON: {error}") from None
        way: list[str] = []
        for step in self.entry.split(".") if self.entry is not None else ():
            if not isinstance(found, Mapping) or step not in found:
                there = ", ".join(found) if isinstance(found, Mapping) else "no entries"
                where = f"{self.path}: {'.'.join(way)}" if way else f"{self.path}"
                raise DataError(f"{where} has no entry '{step}'; there are: {there:.200}")
            way.append(step)
            found = found[step]
        where = f"{self.path}: {self.entry}" if way else f"{self.path}"
        if not isinstance(found, list) or not found:
            raise DataError(f"{where} is no list of names of folders; set entry to where one is")
        for name in found:
            if not isinstance(name, str) or not name or name != Path(name).name or name[0] == ".":
                raise DataError(f"{where} holds {name!r:.80}, which is not the name of a folder")
        if len(set(found)) != len(found):
            raise DataError(f"{where} holds a name twice")
        return found


class ImageFolder(oodcore.Source):
    """Image files, read one by one as they are asked for.

    With labels, every folder in ``path`` is a class, numbered in the alphabetical order of the
    names (by code point: capitals come first), and every image below it is a row of that class.
    Without, every image below ``path`` is a row. Rows are in alphabetical order of their paths, so
    that an id is the same on every machine.

    Images come out as float32 ``[C, H, W]`` in [0, 1]; of transparent ones the colours, of animated
    ones the first picture. A rotation noted in the file is not applied, as it is not in training.
    Hidden files and folders, and files whose name is not an image's, are left out.

    Args:
        path: the folder.
        labels: whether folders are classes; if not, every label is -1.
        colour: "grey" or "rgb".
        size: makes images squares of this many pixels: the short side is resized (bilinear,
            antialiased) and the middle is cut out. null leaves them, and then all must have one
            size to go in a batch.
        class_list: the class folders to read and no others, from a JSON file: ``{path, entry}``,
            such as the lists of the Semantic Shift Benchmark. A label is the name's position there.
        classes: the labels to keep, which become 0, 1, ... in this order; null keeps all rows.
        part: a share of the rows, such as [0, 0.9] to fit on and [0.9, 1] to calibrate on.
        seed: decides which rows are in a part.

    Needs Pillow (``pip install pillow``), else ``open`` raises an ExtraError. It raises a
    DataError for a folder that is missing or without images, a class without images, a class list
    that cannot be read or names a folder that is not there, and symbolic links, which are not
    followed; reading a row raises one for a damaged file, naming it.
    """

    kind = "image_folder"

    path: FilePath
    labels: bool = True
    colour: Colour = "rgb"
    size: PositiveInt | None = None
    class_list: ClassList | None = None
    classes: tuple[int, ...] | None = None
    part: Part | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check_list(self) -> ImageFolder:
        if self.class_list is not None and not self.labels:
            raise PydanticCustomError(
                "class_list", "class_list chooses among folders that are classes: set labels: true"
            )
        return self

    def open(self) -> Dataset[Any]:
        _pillow()
        if not self.path.is_dir():
            raise DataError(f"there is no folder {self.path}")
        names = None if self.class_list is None else self.class_list.read()
        files, labels = _by_class(self.path, names) if self.labels else _flat(self.path)
        rows = _Rows(self.path, files, labels, self.colour, self.size)
        return select(rows, self.classes, labels, part=self.part, seed=self.seed)


class _Rows(Dataset[Any]):
    def __init__(
        self, root: Path, files: list[str], labels: list[int], colour: Colour, size: int | None
    ) -> None:
        self._root, self._files, self._labels = root, files, np.array(labels)
        self._colour, self._size = colour, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = coloured(_pixels(self._root / self._files[index])[None], self._colour)
        if self._size is not None:
            image = squared(image, self._size)
        return image[0], int(self._labels[index]), index

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int, int]]:
        rows = [self[index] for index in indices]
        for image, _, index in rows:
            first, _, other = rows[0]
            if image.shape != first.shape:
                raise DataError(
                    f"images of one batch differ in size: {self._files[other]} is "
                    f"{_size(first)} and {self._files[index]} is {_size(image)}; set size"
                )
        return rows


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ExtraError("image files need Pillow: pip install pillow") from None
    return Image


def _pixels(path: Path) -> Tensor:
    """One image file as float32 ``[1 or 3, H, W]`` in [0, 1]."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            wide = image.mode == "I" and image.format in ("PNG", "PPM")
            if image.mode.startswith("I;16") or wide:
                return torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
            if image.mode in ("I", "F"):
                raise DataError(
                    f"{path} has numbers of 32 bits, whose white is unknown; save it with 8 or 16"
                )
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            plain = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            pixels = torch.from_numpy(np.array(plain))
    except DataError:
        raise
    except (*_UNREADABLE, pillow.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from None
    channels = pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)
    return channels.float() / 255


def _by_class(root: Path, listed: list[str] | None) -> tuple[list[str], list[int]]:
    names = [entry.name for entry in _entries(root) if entry.is_dir(follow_symlinks=False)]
    if not names:
        raise DataError(
            f"{root} has no folders, one a class; for images without classes, set labels: false"
        )
    label_of = {name: label for label, name in enumerate(names if listed is None else listed)}
    if missing := sorted(label_of.keys() - set(names)):
        raise DataError(
            f"{root} has no folder for {len(missing)} of the {len(label_of)} classes in class_list,"
            f" such as {missing[0]}"
        )
    files: list[str] = []
    labels: list[int] = []
    for name, label in sorted(label_of.items()):
        found = [f"{name}/{file}" for file in _below(root / name)]
        if not found:
            raise DataError(f"the class folder {root / name} has no images ({', '.join(SUFFIXES)})")
        files += found
        labels += [label] * len(found)
    return files, labels


def _flat(root: Path) -> tuple[list[str], list[int]]:
    files = list(_below(root))
    if not files:
        raise DataError(f"{root} has no images ({', '.join(SUFFIXES)})")
    return files, [-1] * len(files)


def _below(folder: Path) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{file}" for file in _below(Path(entry.path)))
        elif entry.is_file(follow_symlinks=False) and entry.name.lower().endswith(SUFFIXES):
            yield entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in entries:
        matters = entry.is_dir() or entry.name.lower().endswith(SUFFIXES)
        if entry.is_symlink() and matters:
            raise DataError(
                f"{entry.path} is a link, and links are not followed; copy what it names"
            )
    return entries


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(ImageFolder)
