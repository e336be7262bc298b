"""digits: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

import oodcore
from oodcore.data import hashed, select
from oodcore.images import squared

SHARES = {"train": 0.5, "held_out": 0.1, "calibrate": 0.15, "test": 0.25}
"""The share of every class that each split has; no row is in two."""


class Digits(oodcore.Source):
    """1797 handwritten digits of 8 x 8 pixels, grey, labelled 0 to 9, embedded in scikit-learn.

    Images are float32 ``[1, 8, 8]`` in [0, 1]: stored numbers from 0 to 16, divided by 16. A split
    has the same share of every class: train 0.5, held_out 0.1, calibrate 0.15, test 0.25, in the
    order of a hash of seed and row number. Which rows it has does not depend on ``classes``.

    Args:
        split: "all", or one of the four disjoint splits.
        classes: the digits to keep, which become 0, 1, ... in this order; null keeps all rows.
        size: makes images squares of this many pixels, bilinearly.
        seed: decides which rows are in a split.

    ``open`` raises a DataError if no row has a label among the classes. The data is part of the
    test set of Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
    """

    kind = "digits"

    split: Literal["all", "train", "held_out", "calibrate", "test"] = "all"
    classes: tuple[int, ...] | None = None
    size: PositiveInt = 8
    seed: int = 0

    def open(self) -> Dataset[Any]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None]
        labels = digits.target.astype(np.int64)
        ids = np.arange(len(labels)) if self.split == "all" else self._split(labels)
        rows = _Rows(squared(images[ids], self.size), labels[ids], ids)
        return select(rows, self.classes, labels[ids])

    def _split(self, labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        order = np.argsort(hashed(torch.arange(len(labels)), self.seed).numpy())
        cuts = pairwise(accumulate(SHARES.values(), initial=0.0))
        begin, end = dict(zip(SHARES, cuts, strict=True))[self.split]
        chosen = []
        for digit in np.unique(labels):
            members = order[labels[order] == digit]
            chosen.append(members[round(begin * len(members)) : round(end * len(members))])
        return np.sort(np.concatenate(chosen))


class _Rows(Dataset[Any]):
    def __init__(
        self, images: Tensor, labels: np.ndarray[Any, Any], ids: np.ndarray[Any, Any]
    ) -> None:
        self._images, self._labels, self._ids = images, labels, ids

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self._images[index], int(self._labels[index]), int(self._ids[index])


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(Digits)
