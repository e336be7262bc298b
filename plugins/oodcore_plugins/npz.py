"""npz: images or other arrays in a NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.utils.data import Dataset

import oodcore
from oodcore.component import FilePath
from oodcore.data import Part, select
from oodcore.errors import DataError
from oodcore.images import Colour, coloured, padded, squared

Array = np.ndarray[Any, Any]
Layout = Literal["hw", "hwc", "chw", "plain"]
_UNREADABLE = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, KeyError)


class Npz(oodcore.Source):
    """Rows of an array in an ``.npz`` archive.

    They come out as float32, images as ``[C, H, W]`` in [0, 1]: the stored numbers divided by
    ``scale``. The array stays in memory as it is stored, and rows are converted as they are read.
    Nothing is ever unpickled.

    Args:
        path: of the archive.
        inputs: name of the array of inputs, ``[N, ...]``; or a list of names, and an input is a
            mapping of these to plain numbers, as stored embeddings and logits are.
        labels: name of the array of labels, integers ``[N]``; null where there are none, and every
            label is -1.
        layout: what an input is: "hw" a grey image, "hwc" and "chw" an image of one or three
            channels, "plain" any numbers, which need not be in [0, 1]. "auto" tells from the
            shape: ``[N, D]`` is plain, ``[N, H, W]`` is hw, and of four axes the one of length 1
            or 3 has the channels.
        scale: what stored numbers are divided by; unless given, 255 for images of bytes and 1 for
            anything else.
        colour: "grey" or "rgb" converts images that are not; null leaves them.
        size: makes images squares of this many pixels; null leaves them.
        resize: how: "crop" resizes the short side and cuts out the middle, "pad" puts the image in
            the middle of a black square.
        classes: the labels to keep, which become 0, 1, ... in this order; null keeps all rows.
        part: a share of the rows, such as [0, 0.9] to fit on and [0.9, 1] to calibrate on.
        seed: decides which rows are in a part.

    ``open`` raises a DataError for a file that is missing or damaged, an array that is missing or
    holds objects or texts, a shape that does not fit the layout, a label that is no integer, a
    number that is not finite, and pixels outside of [0, 1].
    """

    kind = "npz"

    path: FilePath
    inputs: str | tuple[str, ...] = "x"
    labels: str | None = "y"
    layout: Literal["auto", "hw", "hwc", "chw", "plain"] = "auto"
    scale: PositiveFloat | None = None
    colour: Colour | None = None
    size: PositiveInt | None = None
    resize: Literal["crop", "pad"] = "crop"
    classes: tuple[int, ...] | None = None
    part: Part | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _check_inputs(self) -> Npz:
        if isinstance(self.inputs, str):
            return self
        if not self.inputs or len(set(self.inputs)) < len(self.inputs):
            raise PydanticCustomError("inputs", "inputs are one name, or several different ones")
        if self.layout not in ("auto", "plain") or self.colour or self.size:
            raise PydanticCustomError(
                "not_plain", "several inputs are plain numbers: no layout, colour or size"
            )
        return self

    @model_validator(mode="after")
    def _check_resize(self) -> Npz:
        if self.resize == "pad" and self.size is None:
            raise PydanticCustomError("no_size", "resize: pad needs a size to pad to")
        return self

    def open(self) -> Dataset[Any]:
        names = (self.inputs,) if isinstance(self.inputs, str) else self.inputs
        arrays, labels = self._read(names)
        columns = {name: self._column(name, arrays[name], labels) for name in names}
        rows = columns[self.inputs] if isinstance(self.inputs, str) else _Columns(columns)
        return select(rows, self.classes, labels, part=self.part, seed=self.seed)

    def _column(self, name: str, inputs: Array, labels: Array) -> _Rows:
        where = f"{self.path}: array '{name}'"
        layout = self.layout if isinstance(self.inputs, str) else "plain"
        layout = _layout(inputs, where) if layout == "auto" else layout
        _check_shape(inputs, layout, where)
        if layout == "plain" and (self.colour or self.size):
            raise DataError(f"{where} holds no images (layout: plain); leave out colour and size")
        scale = self._scale(inputs, layout, where)
        _check_values(inputs, layout, scale, where)
        return _Rows(inputs, labels, layout, scale, self)

    def _read(self, names: Sequence[str]) -> tuple[dict[str, Array], Array]:
        """The arrays of inputs and the labels, all of one length."""
        if not self.path.is_file():
            raise DataError(f"there is no file {self.path}")
        with open(self.path, "rb") as file:
            try:
                archive = np.load(file, allow_pickle=False)
            except _UNREADABLE:
                raise DataError(f"{self.path} is damaged, or no .npz archive") from None
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(
                    f"{self.path} is one array; save it with np.savez(path, {names[0]}=array)"
                )
            inputs = {name: _array(archive, name, self.path) for name in names}
            rows = len(inputs[names[0]])
            for name, array in inputs.items():
                if len(array) != rows:
                    raise DataError(
                        f"{self.path}: array '{name}' has {len(array)} rows, and '{names[0]}' has "
                        f"{rows}"
                    )
            if self.labels is None:
                return inputs, np.full(rows, -1)
            if self.labels not in archive.files:
                raise DataError(
                    f"{self.path} has no array '{self.labels}'; it has: "
                    f"{', '.join(archive.files)}; where there are no labels, set labels: null"
                )
            labels = _array(archive, self.labels, self.path)
        if labels.dtype.kind not in "iu" or labels.shape != (rows,):
            raise DataError(
                f"{self.path}: array '{self.labels}' must hold {rows} integers, one a row; "
                f"it is {labels.dtype} of shape {list(labels.shape)}"
            )
        return inputs, labels.astype(np.int64)

    def _scale(self, inputs: Array, layout: Layout, where: str) -> float:
        if self.scale is not None:
            return self.scale
        if layout == "plain" or inputs.dtype.kind in "fb":
            return 1.0
        if inputs.dtype == np.uint8:
            return 255.0
        raise DataError(
            f"{where} holds images of {inputs.dtype}; set scale to the number that stands for white"
        )


class _Rows(Dataset[Any]):
    def __init__(
        self, inputs: Array, labels: Array, layout: Layout, scale: float, source: Npz
    ) -> None:
        self._inputs, self._labels = inputs, labels
        self._layout, self._scale = layout, scale
        self._colour, self._size, self._resize = source.colour, source.size, source.resize

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int, int]]:
        rows = np.asarray(indices)
        values = self._converted(self._inputs[rows])  # this indexing copies
        return list(zip(values.unbind(), self._labels[rows].tolist(), rows.tolist(), strict=True))

    def _converted(self, stored: Array) -> Tensor:
        values = torch.from_numpy(stored.astype(np.float32, copy=False))
        if self._scale != 1:
            values /= self._scale
        if self._layout == "plain":
            return values
        if self._layout == "hw":
            values = values[:, None]
        elif self._layout == "hwc":
            values = values.movedim(-1, 1).contiguous()
        if self._colour:
            values = coloured(values, self._colour)
        if self._size:
            values = (padded if self._resize == "pad" else squared)(values, self._size)
        return values


class _Columns(Dataset[Any]):
    """Several arrays side by side: an input is a mapping with a row of each."""

    def __init__(self, columns: Mapping[str, _Rows]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[dict[str, Tensor], int, int]]:
        parts = {name: column.__getitems__(indices) for name, column in self._columns.items()}
        first = next(iter(parts.values()))
        return [
            ({name: rows[place][0] for name, rows in parts.items()}, label, number)
            for place, (_, label, number) in enumerate(first)
        ]


def _array(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> Array:
    if name not in archive.files:
        raise DataError(f"{path} has no array '{name}'; it has: {', '.join(archive.files)}")
    try:
        array: Array = archive[name]
    except _UNREADABLE as error:
        if "Object arrays" in str(error):
            raise DataError(
                f"{path}: array '{name}' holds Python objects, which are not read; save numbers"
            ) from None
        raise DataError(f"{path}: array '{name}' is damaged: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        shown = getattr(array, "dtype", "no array")
        raise DataError(f"{path}: array '{name}' is {shown}; numbers are needed")
    if array.ndim == 0:
        raise DataError(f"{path}: array '{name}' is a single number; rows are needed")
    return array


def _layout(inputs: Array, where: str) -> Layout:
    if inputs.ndim == 2:
        return "plain"
    if inputs.ndim == 3:
        return "hw"
    if inputs.ndim == 4:
        last, second = inputs.shape[3] in (1, 3), inputs.shape[1] in (1, 3)
        if last != second:
            return "hwc" if last else "chw"
    raise DataError(
        f"the layout of {where} cannot be told from its shape {list(inputs.shape)}; set layout to "
        f"hwc, chw or plain"
    )


def _check_shape(inputs: Array, layout: Layout, where: str) -> None:
    wanted = {"hw": "[N, H, W]", "hwc": "[N, H, W, C]", "chw": "[N, C, H, W]"}.get(layout)
    if wanted is None:
        return
    channels = {"hw": 1, "hwc": inputs.shape[-1], "chw": inputs.shape[min(1, inputs.ndim - 1)]}
    if inputs.ndim != wanted.count(",") + 1 or channels[layout] not in (1, 3):
        raise DataError(
            f"{where} has the shape {list(inputs.shape)}; layout '{layout}' is {wanted}, of one or "
            f"three channels"
        )
    if 0 in inputs.shape[1:]:
        raise DataError(f"{where} has the shape {list(inputs.shape)}: images without pixels")


def _check_values(inputs: Array, layout: Layout, scale: float, where: str) -> None:
    if inputs.size == 0:
        raise DataError(f"{where} has no rows: its shape is {list(inputs.shape)}")
    lowest, highest = float(inputs.min()), float(inputs.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        row = next(row for row in range(len(inputs)) if not np.isfinite(inputs[row]).all())
        raise DataError(f"{where}: row {row} has numbers that are not finite")
    largest = max(-lowest, highest)
    if largest / min(scale, 1.0) > float(np.finfo(np.float32).max):
        raise DataError(f"{where} holds {largest:g}, too large for float32 (scale: {scale:g})")
    if layout != "plain" and (lowest < 0 or highest > scale):
        raise DataError(
            f"{where} holds numbers from {lowest:g} to {highest:g}, and pixels are in [0, 1] "
            f"after division by scale, {scale:g}; set scale to the number that stands for white, "
            f"or layout: plain for numbers that are no pixels"
        )


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(Npz)
