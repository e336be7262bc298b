"""Inputs: their form in messages, casts, and copies that were written to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore.errors import DataError
from oodcore.inputs import cast, each, form, readable, written


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (torch.zeros(2, 3), "[2, 3] (float32)"),
        ({"a": torch.zeros(1).int(), "b": torch.zeros(1, 2)}, "a [1] (int32), b [1, 2] (float32)"),
        (["x", "y"], "2 texts"),
    ],
)
def test_the_form_of_inputs(inputs, told):
    assert form(inputs) == told


def test_only_floating_numbers_are_cast():
    inputs = {"ids": torch.ones(2, dtype=torch.int64), "mask": torch.ones(2, dtype=torch.float64)}
    given = cast(inputs, torch.float16)
    assert (given["ids"].dtype, given["mask"].dtype) == (torch.int64, torch.float16)
    assert cast(inputs, None) == inputs
    assert each(["a"], torch.neg) == ["a"]


def test_arrays_become_tensors_that_do_not_share_what_cannot_be_written():
    array = np.arange(4.0)[::-1]
    array.flags.writeable = False
    tensor = readable(array)
    tensor += 1
    assert array.tolist() == [3.0, 2.0, 1.0, 0.0]
    with pytest.raises(DataError, match="not a mapping of x: list"):
        readable({"x": [1]})


def test_what_was_written_to_shows():
    copies = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert written(copies) is False
    copies["b"].add_(1)
    assert written(copies) is True
    with torch.inference_mode():
        assert written(torch.zeros(2)) is None
