from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from oodcore.data import Stream
from oodcore.errors import DataError
from oodcore_plugins.digits import SHARES, Digits

SPLITS = ("train", "held_out", "calibrate", "test")


def ids(source: Digits) -> list[int]:
    return [number for batch in Stream(source) for number in batch.ids.tolist()]


def test_rows_are_those_of_scikit_learn() -> None:
    reference = load_digits()
    rows = Digits().open()
    assert len(rows) == 1797
    for number in (0, 1, 900, 1796):
        image, label, row = rows[number]
        assert image.dtype == torch.float32
        assert image.shape == (1, 8, 8)
        assert torch.equal(image[0], torch.from_numpy(reference.images[number] / 16).float())
        assert (label, row) == (reference.target[number], number)
    assert sum(image.max() == 1 for image, _, _ in rows) > 1000


def test_splits_divide_every_class_without_a_row_in_common() -> None:
    target = load_digits().target
    members = {split: ids(Digits(split=split)) for split in SPLITS}
    assert sorted(row for rows in members.values() for row in rows) == list(range(1797))
    for split, rows in members.items():
        for digit, count in Counter(target[rows].tolist()).items():
            assert abs(count - SHARES[split] * (target == digit).sum()) <= 1
        assert rows == sorted(rows)


def test_a_split_is_not_a_stretch_of_the_file() -> None:
    # Neighbouring rows were written by the same hand.
    gaps = np.diff(ids(Digits(split="test")))
    assert len(set(gaps.tolist())) > 5
    assert gaps.max() < 60


def test_six_known_classes_leave_enough_to_calibrate_and_test() -> None:
    sizes = {split: len(Digits(split=split, classes=tuple(range(6))).open()) for split in SPLITS}
    assert sum(sizes.values()) == 1083
    assert sizes["calibrate"] >= 150
    assert sizes["test"] >= 250
    assert sizes["train"] >= 500


def test_a_split_does_not_depend_on_the_classes() -> None:
    whole = ids(Digits(split="calibrate"))
    target = load_digits().target
    assert ids(Digits(split="calibrate", classes=(7, 2))) == [
        row for row in whole if target[row] in (2, 7)
    ]


def test_labels_are_positions_among_the_classes_and_ids_stay() -> None:
    target = load_digits().target
    for image, label, row in Digits(split="test", classes=(9, 0)).open():
        assert target[row] == (9, 0)[label]
        assert torch.equal(image, Digits().open()[row][0])
        break
    labels = {label for _, label, _ in Digits(split="test", classes=(9, 0)).open()}
    assert labels == {0, 1}


def test_another_seed_is_another_split_and_the_same_seed_the_same() -> None:
    assert ids(Digits(split="test", seed=1)) == ids(Digits(split="test", seed=1))
    common = set(ids(Digits(split="test", seed=1))) & set(ids(Digits(split="test", seed=2)))
    assert 60 < len(common) < 170  # a quarter of a quarter of 1797 is 112


def test_larger_images() -> None:
    small, large = Digits().open()[3][0], Digits(size=16).open()[3][0]
    assert large.shape == (1, 16, 16)
    assert float(large.mean()) == pytest.approx(float(small.mean()), abs=0.03)
    assert float(large.max()) <= 1


def test_workers_read_the_same_rows() -> None:
    source = Digits(split="test", classes=(3, 4))
    alone = list(Stream(source, batch_size=32))
    together = list(Stream(source, batch_size=32, num_workers=2))
    assert len(alone) == len(together)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.ids, other.ids)


def test_rows_can_be_pickled_and_the_source_written_down() -> None:
    source = Digits(split="test", classes=(3, 4), size=10)
    assert Digits.model_validate(source.dump()) == source
    rows = source.open()
    again = pickle.loads(pickle.dumps(rows))
    assert torch.equal(again[5][0], rows[5][0])
    assert again[5][1:] == rows[5][1:]


def test_classes_that_are_no_digits() -> None:
    with pytest.raises(DataError, match="no row"):
        Digits(classes=(10, 11)).open()
    with pytest.raises(ValidationError):
        Digits(split="validate")
