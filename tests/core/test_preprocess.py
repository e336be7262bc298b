"""Preprocess: against Pillow, against arithmetic, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from oodcore.errors import DataError
from oodcore.preprocess import Preprocess

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# For "nearest", sizes at which no centre lies between two pixels: there, either is the nearest.
@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width", "size"), [(48, 80, 16), (33, 21, 10), (8, 12, 16)])
def test_resizing_is_what_pillow_does(interpolation, height, width, size):
    given = images(2, 1, height, width)
    resized = Preprocess(size=size, interpolation=interpolation)(given)
    short = min(height, width)
    assert resized.shape[-2:] == (size * height // short, size * width // short)
    for row, want in zip(resized, given, strict=True):
        picture = Image.fromarray(want[0].numpy()).resize(
            (resized.shape[3], resized.shape[2]), FILTERS[interpolation]
        )
        expected = np.asarray(picture)
        if interpolation == "bicubic":
            expected = expected.clip(0, 1)
        np.testing.assert_allclose(row[0].numpy(), expected, atol=2e-6)


def test_bicubic_overshoot_is_clipped():
    edge = torch.cat([torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4)], dim=3)
    free = torch.nn.functional.interpolate(edge, (16, 16), mode="bicubic", antialias=True)
    assert float(free.max()) > 1 > 0 > float(free.min())
    torch.testing.assert_close(Preprocess(size=16, interpolation="bicubic")(edge), free.clamp(0, 1))


def test_the_order_is_resize_then_crop_then_normalise():
    given = images(2, 3, 10, 16)
    whole = Preprocess(size=8, crop=6, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))(given)
    resized = Preprocess(size=8)(given)
    assert resized.shape == (2, 3, 8, 12)
    cropped = resized[:, :, 1:7, 3:9]
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    torch.testing.assert_close(whole, (cropped - mean.view(3, 1, 1)) / std.view(3, 1, 1))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=60)
def test_a_crop_is_in_the_middle(height, width, data):
    crop = data.draw(st.integers(1, min(height, width)))
    rows = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    cut = Preprocess(crop=crop)(rows)
    assert cut.shape == (1, 1, crop, crop)
    top, left = int(cut[0, 0, 0, 0]) // width, int(cut[0, 0, 0, 0]) % width
    assert abs(top - (height - crop - top)) <= 1
    assert abs(left - (width - crop - left)) <= 1
    torch.testing.assert_close(cut, rows[:, :, top : top + crop, left : left + crop])


def test_nothing_set_changes_nothing():
    given = images(2, 3, 5, 7)
    assert torch.equal(Preprocess()(given), given)
    assert torch.equal(Preprocess(size=5)(given), given)


@pytest.mark.parametrize("fields", [{"size": 4}, {"crop": 3}, {"mean": (0.5,)}, {"std": (0.5,)}])
def test_inputs_stay_as_they_are(fields):
    given = images(2, 1, 6, 8)
    before = given.clone()
    Preprocess(**fields)(given)
    assert torch.equal(given, before)


def test_a_row_does_not_depend_on_its_batch():
    step = Preprocess(size=7, crop=5, interpolation="bicubic", mean=(0.5,), std=(0.25,))
    given = images(5, 1, 11, 13)
    torch.testing.assert_close(step(given), torch.cat([step(row[None]) for row in given]))


def test_gradients_go_through():
    given = images(1, 2, 6, 6).requires_grad_()
    Preprocess(size=4, crop=2, mean=(0.0, 0.0), std=(2.0, 2.0))(given).sum().backward()
    assert given.grad is not None
    assert float(given.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_types(given, made):
    assert Preprocess(size=3, mean=(0.5,))(images(1, 1, 6, 6).to(given)).dtype == made


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"mean": (0.5,)}, torch.zeros(1, 3, 4, 4), "mean has 1 numbers, and the images have 3"),
        ({"std": (1.0, 1.0)}, torch.zeros(1, 3, 4, 4), "std has 2 numbers"),
        (
            {"crop": 5},
            torch.zeros(1, 3, 4, 9),
            "crop of 5 pixels does not fit into images of 4 x 9",
        ),
        ({"size": 4, "crop": 5}, torch.zeros(1, 1, 8, 8), "does not fit into images of 4 x 4"),
        ({"size": 4}, torch.zeros(3, 4, 4), r"not \[3, 4, 4\]"),
        ({"size": 4}, torch.zeros(2, 10), r"not \[2, 10\]"),
        ({"size": 4}, torch.zeros(2, 3, 0, 4), r"not \[2, 3, 0, 4\]"),
        ({"size": 4}, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "not uint8; divide bytes by 255"),
        ({"size": 4}, {"pixels": torch.zeros(1, 3, 4, 4)}, "not a mapping; leave preprocess out"),
        ({"size": 4}, ["a text"], "not texts; leave preprocess out"),
        ({"size": 4}, np.zeros((1, 3, 4, 4)), "not a ndarray"),
    ],
)
def test_what_it_cannot_do_is_said(fields, given, message):
    with pytest.raises(DataError, match=message):
        Preprocess(**fields)(given)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"size": True},
        {"size": "32"},
        {"crop": -1},
        {"interpolation": "lanczos"},
        {"mean": []},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"mean": [float("nan")]},
        {"mean": [0.5], "std": [0.5, 0.5]},
        {"mean": 0.5},
        {"resize": 32},
    ],
)
def test_fields_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValidationError):
        Preprocess.model_validate(fields)


def test_it_is_a_value():
    written = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}
    step = Preprocess.model_validate(written)
    assert step == Preprocess(size=32, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
    assert hash(step) == hash(Preprocess.model_validate(step.model_dump(mode="json")))
    with pytest.raises(ValidationError):
        step.size = 3
