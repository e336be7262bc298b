from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oodcore.errors import DataError
from oodcore.images import coloured, padded, squared


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_grey_is_the_luma_of_each_pixel() -> None:
    rgb = images(2, 3, 4, 5)
    grey = coloured(rgb, "grey")
    assert grey.shape == (2, 1, 4, 5)
    for row, y, x in np.ndindex(2, 4, 5):
        red, green, blue = rgb[row, :, y, x].tolist()
        expected = 0.299 * red + 0.587 * green + 0.114 * blue
        assert float(grey[row, 0, y, x]) == pytest.approx(expected, abs=1e-6)


def test_white_stays_white_and_within_the_unit_interval() -> None:
    white = coloured(torch.ones(1, 3, 2, 2), "grey")
    assert float(white.max()) <= 1
    assert torch.allclose(white, torch.ones(1, 1, 2, 2))


def test_a_grey_image_has_its_grey_in_three_channels() -> None:
    grey = images(2, 1, 3, 3)
    assert torch.equal(coloured(grey, "rgb"), torch.cat([grey] * 3, dim=1))
    assert torch.equal(coloured(grey, "grey"), grey)
    rgb = images(2, 3, 3, 3)
    assert torch.equal(coloured(rgb, "rgb"), rgb)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(DataError, match=f"{channels} channels"):
        coloured(torch.zeros(1, channels, 2, 2), "grey")


@pytest.mark.parametrize(("height", "width"), [(30, 20), (20, 30), (41, 17), (8, 8)])
def test_squares_are_those_of_an_image_library(height: int, width: int) -> None:
    image = images(1, 1, height, width)
    short = min(height, width)
    shape = (8 * height // short, 8 * width // short)
    plain = Image.fromarray(image[0, 0].numpy()).resize(shape[::-1], Image.Resampling.BILINEAR)
    resized = torch.from_numpy(np.array(plain))
    top, left = (round((side - 8) / 2) for side in shape)
    expected = resized[top : top + 8, left : left + 8]
    assert torch.allclose(squared(image, 8)[0, 0], expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    size=st.integers(1, 24),
    c=st.integers(1, 3),
)
def test_squares_have_their_size_and_stay_in_range(
    height: int, width: int, size: int, c: int
) -> None:
    given = images(2, c, height, width)
    before = given.clone()
    square = squared(given, size)
    assert square.shape == (2, c, size, size)
    assert float(square.min()) >= 0
    assert float(square.max()) <= 1
    assert torch.equal(given, before)
    assert torch.allclose(squared(torch.ones(1, c, height, width), size), torch.ones(()))


def test_padding_puts_an_image_in_the_middle_of_black() -> None:
    given = images(1, 1, 3, 4)
    square = padded(given, 6)
    assert square.shape == (1, 1, 6, 6)
    assert torch.equal(square[..., 1:4, 1:5], given)
    assert float(square.sum()) == pytest.approx(float(given.sum()), rel=1e-6)
    with pytest.raises(DataError, match="3 x 4 pixels cannot be padded to 3"):
        padded(given, 3)
