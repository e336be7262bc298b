"""augmentations: every operation against an image library or a naive loop, draws, and the laws."""

from __future__ import annotations

import colorsys
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from pydantic import ValidationError

from oodcore import registry
from oodcore.errors import DataError
from oodcore.preprocess import Preprocess
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore_plugins.augmentations import ColorJitter, CropFlip, RandAugment, RandomErasing
from oodcore_plugins.augmentations import pixels as colors
from oodcore_plugins.augmentations.rand_augment import OPERATIONS

PREPROCESS = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
ALL = [
    CropFlip(),
    CropFlip(border="reflect", padding=2),
    ColorJitter(hue=0.2),
    RandomErasing(probability=1),
    RandAugment(),
]


def step(part, seed: int = 0, preprocess: Preprocess | None = None) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    run = SimpleNamespace(preprocess=preprocess)
    return SimpleNamespace(kind=part.kind, run=run, generator=generator)


def images(rows: int = 6, channels: int = 3, height: int = 9, width: int = 8, seed: int = 1):
    """Images of bytes, as float64 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(256, (rows, channels, height, width), generator=generator)
    return drawn.double() / 255


def pictures(rows: torch.Tensor) -> list[Image.Image]:
    found = (255 * rows).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(row) for row in found]


def back(found: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(row) for row in found])).permute(
        0, 3, 1, 2
    ) / torch.tensor(255.0, dtype=torch.float64)


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.kind)
def test_the_inputs_are_left_as_they_are_and_the_views_differ(part):
    rows = images(height=10, width=12).float()
    before = rows.clone()
    given = part.augment(rows, step(part))
    assert torch.equal(rows, before)
    assert given.shape == rows.shape
    assert given.dtype == rows.dtype
    assert not torch.equal(given, rows)
    assert given.min() >= 0
    assert given.max() <= 1
    assert torch.equal(given, part.augment(rows, step(part)))
    assert not torch.equal(given, part.augment(rows, step(part, seed=1)))


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.kind)
def test_each_row_is_drawn_for_by_itself(part):
    rows = images(1, height=10, width=12).expand(24, -1, -1, -1)
    given = part.augment(rows, step(part))
    assert len({row.numpy().tobytes() for row in given}) > 6


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.kind)
def test_preprocessed_inputs_become_what_preprocessed_views_are(part):
    rows = images(height=10, width=12)
    plain = part.augment(rows, step(part))
    given = part.augment(PREPROCESS(rows), step(part, preprocess=PREPROCESS))
    torch.testing.assert_close(given, PREPROCESS(plain), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.kind)
def test_gray_images(part):
    rows = images(channels=1, height=10, width=12)
    given = part.augment(rows, step(part))
    assert given.shape == rows.shape
    assert torch.isfinite(given).all()


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.kind)
@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"ids": torch.zeros(2)}],
)
def test_inputs_that_are_no_float_images_are_refused(part, inputs):
    with pytest.raises(DataError, match=f"{part.kind} augments float images"):
        part.augment(inputs, step(part))


@pytest.mark.parametrize("part", [ColorJitter(), RandAugment()], ids=lambda part: part.kind)
def test_pixels_out_of_range_and_other_channels_are_refused(part):
    with pytest.raises(DataError, match=r"images in \[0, 1\], and these lie in \[-2.5, "):
        part.augment(PREPROCESS(images()), step(part))
    with pytest.raises(DataError, match="1 or 3 channels, and these have 4"):
        part.augment(images(channels=4), step(part))


def test_without_preprocess_of_the_std_the_mean_is_taken_off_alone():
    rows, part = images(), ColorJitter(brightness=0, contrast=0, saturation=0)
    only = Preprocess(mean=(0.5, 0.4, 0.3))
    given = part.augment(only(rows), step(part, preprocess=only))
    torch.testing.assert_close(given, only(rows), atol=1e-9, rtol=0)


# crop_flip


@given(
    seed=st.integers(0, 100),
    border=st.sampled_from(["black", "reflect"]),
    padding=st.integers(0, 4),
)
def test_crops_are_windows_of_the_padded_image_mirrored_or_not(seed, border, padding):
    part, rows = CropFlip(padding=padding, border=border), images(4, height=6, width=7)
    given = part.augment(rows, step(part, seed)).numpy()
    mode = {"mode": "constant"} if border == "black" else {"mode": "reflect"}
    for row, view in zip(rows.numpy(), given, strict=True):
        padded = np.pad(row, ((0, 0), (padding, padding), (padding, padding)), **mode)
        windows = [
            padded[:, i : i + 6, j : j + 7]
            for i in range(2 * padding + 1)
            for j in range(2 * padding + 1)
        ]
        assert any(
            np.array_equal(view, window) or np.array_equal(view, window[:, :, ::-1])
            for window in windows
        )


def test_every_place_and_both_sides_are_drawn_alike():
    part, rows = (
        CropFlip(padding=1),
        torch.arange(1.0, 10).view(1, 1, 3, 3).expand(4500, -1, -1, -1),
    )
    given = part.augment(rows, step(part))
    counts = np.unique(given.flatten(1).numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 180
    assert counts.max() < 320


def test_without_padding_and_flip_nothing_happens():
    part, rows = CropFlip(padding=0, flip=0), images()
    assert torch.equal(part.augment(rows, step(part)), rows)
    part = CropFlip(padding=0, flip=1)
    assert torch.equal(part.augment(rows, step(part)), rows.flip(3))


def test_a_black_border_is_what_preprocessing_makes_of_black():
    part, rows = CropFlip(padding=8, flip=0), PREPROCESS(images(8, height=8, width=8))
    given = part.augment(rows, step(part, preprocess=PREPROCESS))
    black = PREPROCESS(torch.zeros(1, 3, 1, 1, dtype=torch.float64))
    known = torch.cat([rows.flatten(2), black.flatten(2).expand(8, -1, -1)], dim=2)
    for view, values in zip(given, known, strict=True):
        for channel, allowed in zip(view, values, strict=True):
            assert torch.isin(channel, allowed).all()


def test_a_border_wider_than_the_image_cannot_be_reflected():
    part = CropFlip(border="reflect", padding=8)
    with pytest.raises(DataError, match="8 x 9 cannot be reflected by 8 pixels"):
        part.augment(images(height=8, width=9), step(part))


# colours


FACTORS = torch.tensor([0.0, 0.3, 1.0, 1.4, 1.9, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (colors.brightened, ImageEnhance.Brightness),
        (colors.contrasted, ImageEnhance.Contrast),
        (colors.saturated, ImageEnhance.Color),
        (colors.sharpened, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_those_of_an_image_library(operation, enhance):
    rows = images()
    given = operation(rows, FACTORS)
    wanted = back(
        [enhance(p).enhance(float(f)) for p, f in zip(pictures(rows), FACTORS, strict=True)]
    )
    # The library rounds what it blends with to bytes first, and then once more.
    torch.testing.assert_close(given, wanted, atol=2.1 / 255, rtol=0)


def test_smoothing_weighs_the_middle_by_5():
    rows = images(1)
    given = colors.sharpened(rows, torch.zeros(1).double())
    wanted = back([p.filter(ImageFilter.SMOOTH) for p in pictures(rows)])
    torch.testing.assert_close(given, wanted, atol=1.1 / 255, rtol=0)
    small = images(2, height=2, width=5)
    assert torch.equal(colors.sharpened(small, torch.zeros(2).double()), small)


@given(
    rgb=st.tuples(*[st.integers(0, 255)] * 3),
    angle=st.floats(-0.5, 0.5),
)
def test_the_hue_is_turned(rgb, angle):
    red, green, blue = (value / 255 for value in rgb)
    rows = torch.tensor([red, green, blue], dtype=torch.float64).view(1, 3, 1, 1)
    given = colors.turned(rows, torch.tensor([angle], dtype=torch.float64)).flatten()
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    wanted = colorsys.hsv_to_rgb((hue + angle) % 1, saturation, value)
    np.testing.assert_allclose(given.numpy(), wanted, atol=1e-9)


def test_jitter_of_brightness_alone_is_uniform_in_its_range():
    part = ColorJitter(brightness=0.4, contrast=0, saturation=0)
    rows = torch.full((2000, 3, 2, 2), 0.5)
    factors = part.augment(rows, step(part))[:, 0, 0, 0] / 0.5
    assert factors.min() == pytest.approx(0.6, abs=0.005)
    assert factors.max() == pytest.approx(1.4, abs=0.005)
    assert factors.mean() == pytest.approx(1, abs=0.02)
    assert factors.std() == pytest.approx(0.8 / math.sqrt(12), rel=0.05)


def test_a_strength_above_1_never_inverts():
    part = ColorJitter(brightness=3, contrast=0, saturation=0)
    given = part.augment(torch.full((500, 1, 2, 2), 0.5), step(part))
    assert given.min() >= 0


def test_jitter_comes_in_any_order():
    """Contrast after brightness is another image than before it."""
    part = ColorJitter(brightness=0.9, contrast=0.9, saturation=0)
    rows = images(1, channels=1, height=2, width=2).expand(300, -1, -1, -1)
    given = part.augment(rows, step(part))
    keys = torch.rand((2, 300, 4), generator=torch.Generator().manual_seed(0))
    factors = (0.1 + 1.8 * keys[0][:, :2]).double()
    first = colors.contrasted(colors.brightened(rows, factors[:, 0]), factors[:, 1])
    second = colors.brightened(colors.contrasted(rows, factors[:, 1]), factors[:, 0])
    one, two = (torch.isclose(given, w, atol=1e-6).flatten(1).all(dim=1) for w in (first, second))
    assert (one | two).all()
    assert (one & ~two).sum() > 50
    assert (two & ~one).sum() > 50


def test_no_strength_changes_nothing():
    part = ColorJitter(brightness=0, contrast=0, saturation=0)
    assert torch.equal(part.augment(images(), step(part)), images())


# random_erasing


def rectangles(part: RandomErasing, rows: torch.Tensor, seed: int = 0) -> list[tuple[int, int]]:
    """Height and width of what was erased of each image; (0, 0) for none."""
    given = part.augment(rows, step(part, seed))
    sizes = []
    for row, view in zip(rows, given, strict=True):
        erased = (row != view).any(dim=0)
        i, j = erased.any(dim=1).nonzero().flatten(), erased.any(dim=0).nonzero().flatten()
        if not len(i):
            sizes.append((0, 0))
            continue
        assert erased[i[0] : i[-1] + 1, j[0] : j[-1] + 1].all()
        assert erased.sum() == (i[-1] - i[0] + 1) * (j[-1] - j[0] + 1)
        sizes.append((int(i[-1] - i[0]) + 1, int(j[-1] - j[0]) + 1))
    return sizes


def test_what_is_erased_is_a_rectangle_of_the_area_and_ratio_asked_for():
    part = RandomErasing(probability=1, area=(0.05, 0.2), ratio=(0.5, 2))
    sizes = rectangles(part, torch.full((400, 2, 40, 30), 2.0))
    areas = np.array([h * w / 1200 for h, w in sizes])
    ratios = np.array([h / w for h, w in sizes])
    assert 0.04 < areas.min() < 0.06
    assert 0.18 < areas.max() < 0.22
    assert areas.mean() == pytest.approx(0.125, abs=0.01)
    assert 0.4 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.4
    assert abs(np.log(ratios).mean()) < 0.07


def test_it_lies_anywhere_in_the_image():
    part = RandomErasing(probability=1, area=(0.04, 0.04), ratio=(1, 1))
    rows = torch.full((3000, 1, 10, 10), 2.0)
    given = part.augment(rows, step(part))
    share = (given != rows).double().mean(dim=0)[0]
    corner = 1 / 81
    assert share[0, 0] == pytest.approx(corner, abs=0.008)
    assert share[9, 9] == pytest.approx(corner, abs=0.008)
    assert share[4, 4] == pytest.approx(4 * corner, abs=0.012)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_as_many_images_lose_something_as_asked_for(probability):
    part = RandomErasing(probability=probability)
    sizes = rectangles(part, torch.full((800, 1, 12, 12), 2.0))
    share = np.mean([size != (0, 0) for size in sizes])
    assert share == pytest.approx(probability, abs=0.05)


def test_the_fill_is_noise_of_pixels_or_black():
    rows = PREPROCESS(images(200, height=16, width=16))
    part = RandomErasing(probability=1, fill="black")
    given = part.augment(rows, step(part, preprocess=PREPROCESS))
    black = PREPROCESS(torch.zeros_like(rows))
    assert ((given == rows) | (given == black)).all()
    part = RandomErasing(probability=1)
    given = part.augment(rows, step(part, preprocess=PREPROCESS))
    std = torch.tensor(PREPROCESS.std)[:, None, None]
    noise = (given * std + torch.tensor(PREPROCESS.mean)[:, None, None])[given != rows]
    assert noise.min() >= -1e-9
    assert noise.max() <= 1 + 1e-9
    assert noise.mean() == pytest.approx(0.5, abs=0.02)


def test_where_no_rectangle_fits_the_image_stays():
    part = RandomErasing(probability=1, area=(1, 1), ratio=(1, 1))
    assert torch.equal(part.augment(images(), step(part)), images())


# rand_augment


def applied(name: str, rows: torch.Tensor, level: float, fill: float = 0.5) -> torch.Tensor:
    return OPERATIONS[name](rows, rows.new_full((len(rows),), level), fill)


@pytest.mark.parametrize("level", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("identity", lambda p, level: p),
        ("autocontrast", lambda p, level: ImageOps.autocontrast(p)),
        ("equalize", lambda p, level: ImageOps.equalize(p)),
        ("posterize", lambda p, level: ImageOps.posterize(p, 8 - round(4 * level))),
        ("solarize", lambda p, level: ImageOps.solarize(p, 256 - 256 * level)),
        ("color", lambda p, level: ImageEnhance.Color(p).enhance(1 + 0.9 * level)),
        ("contrast", lambda p, level: ImageEnhance.Contrast(p).enhance(1 + 0.9 * level)),
        ("brightness", lambda p, level: ImageEnhance.Brightness(p).enhance(1 + 0.9 * level)),
        ("sharpness", lambda p, level: ImageEnhance.Sharpness(p).enhance(1 + 0.9 * level)),
    ],
)
def test_operations_are_those_of_an_image_library(name, wanted, level):
    rows = images(4, height=40, width=30)
    rows[1] = (rows[1] * 0.4 + 0.3).mul(255).round().div(255)
    given = applied(name, rows, level)
    expected = back([wanted(p, level) for p in pictures(rows)])
    torch.testing.assert_close(given, expected, atol=2.6 / 255, rtol=0)
    exact = ("identity", "equalize", "posterize", "solarize")
    if name in exact:
        torch.testing.assert_close(given, expected, atol=1e-9, rtol=0)


def test_images_of_one_brightness_are_neither_stretched_nor_equalized():
    rows = torch.full((2, 3, 20, 20), 0.3, dtype=torch.float64)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(applied(name, rows, 0.9), rows)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("rotate", lambda level: [math.cos(t := math.radians(30 * level)), -math.sin(t), 0,
                              math.sin(t), math.cos(t), 0]),
        ("shear_x", lambda level: [1, 0.3 * level, 0, 0, 1, 0]),
        ("shear_y", lambda level: [1, 0, 0, 0.3 * level, 1, 0]),
        ("translate_x", lambda level: [1, 0, 0.45 * 11 * level, 0, 1, 0]),
        ("translate_y", lambda level: [1, 0, 0, 0, 1, 0.45 * 14 * level]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("level", [0.0, 0.4, -1.0])
def test_movements_are_bilinear_reads_of_another_place(name, matrix, level):
    rows, fill = images(2, height=14, width=11), 0.25
    given = applied(name, rows, level, fill).numpy()
    a, b, c, d, e, f = matrix(level)

    def pixel(row, i, j):
        return row[:, i, j] if 0 <= i < 14 and 0 <= j < 11 else np.full(3, fill)

    for row, view in zip(rows.numpy(), given, strict=True):
        for i in range(14):
            for j in range(11):
                y, x = i - 6.5, j - 5.0
                down, across = d * x + e * y + f + 6.5, a * x + b * y + c + 5.0
                top, left = math.floor(down), math.floor(across)
                v, u = down - top, across - left
                wanted = (1 - v) * (1 - u) * pixel(row, top, left)
                wanted += (1 - v) * u * pixel(row, top, left + 1)
                wanted += v * (1 - u) * pixel(row, top + 1, left)
                wanted += v * u * pixel(row, top + 1, left + 1)
                np.testing.assert_allclose(view[:, i, j], wanted, atol=1e-9)


def test_every_operation_is_drawn_alike_with_either_sign():
    part, rows = (
        RandAugment(n=1, magnitude=5),
        images(1, height=20, width=20).expand(4200, -1, -1, -1),
    )
    given = part.augment(rows, step(part))
    kinds = {}
    for name in OPERATIONS:
        for sign in (1, -1):
            view = applied(name, rows[:1], 0.5 * sign)
            kinds.setdefault(view.numpy().round(9).tobytes(), []).append((name, sign))
    counts = dict.fromkeys(kinds, 0)
    for view in given:
        counts[view.numpy().round(9).tobytes()] += 1
    assert sum(counts.values()) == 4200
    for key, members in kinds.items():
        assert counts[key] == pytest.approx(150 * len(members), abs=60 * math.sqrt(len(members)))


def test_operations_follow_each_other():
    part, rows = RandAugment(n=2, magnitude=10), images(30, height=12, width=12)
    given = part.augment(rows, step(part))
    draw = torch.Generator().manual_seed(0)
    which = torch.randint(14, (2, 30), generator=draw)
    signs = 2 * torch.randint(2, (2, 30), generator=draw) - 1
    names = list(OPERATIONS)
    for row, view, own, sign in zip(rows, given, which.T, signs.T, strict=True):
        wanted = row[None]
        for number, turn in zip(own, sign, strict=True):
            wanted = applied(names[int(number)], wanted, float(turn))
        torch.testing.assert_close(view, wanted[0], atol=1e-9, rtol=0)


def test_magnitude_0_is_nothing_but_rounding_and_the_histogram():
    part, rows = RandAugment(n=1, magnitude=0), images(60, height=5, width=5)
    given = part.augment(rows, step(part))
    which = torch.randint(14, (1, 60), generator=torch.Generator().manual_seed(0))[0]
    names = np.array(list(OPERATIONS))[which.numpy()]
    still = torch.from_numpy(~np.isin(names, ["autocontrast", "equalize"]))
    torch.testing.assert_close(given[still], rows[still], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (CropFlip, {"padding": -1}),
        (CropFlip, {"flip": 1.1}),
        (CropFlip, {"border": "white"}),
        (ColorJitter, {"hue": 0.6}),
        (ColorJitter, {"brightness": -0.1}),
        (RandomErasing, {"area": [0.5, 0.2]}),
        (RandomErasing, {"area": [0, 0.2]}),
        (RandomErasing, {"ratio": [2, 1]}),
        (RandomErasing, {"probability": 2}),
        (RandAugment, {"n": 0}),
        (RandAugment, {"magnitude": 11}),
        (RandAugment, {"fill": 2}),
    ],
)
def test_fields_out_of_range_are_refused(cls, fields):
    with pytest.raises(ValidationError):
        cls(**fields)


def test_what_mixes_rows_mixes_augmented_ones():
    flip = CropFlip(padding=0, flip=1)
    exercise = Exercise([flip, registry.build("regularizer", "regmixup")])
    exercise.begin()
    steps = exercise.engine._steps
    given = exercise.inputs[exercise._numbers(0)].flip(3)
    for one in steps.values():
        assert torch.equal(one.inputs, given)
    memo = steps["regmixup"].memo
    share, order = memo["share"], memo["order"]
    torch.testing.assert_close(memo["rows"], share * given + (1 - share) * given[order])


@pytest.mark.parametrize("check", regularizer_checks(*ALL), ids=str)
def test_the_laws_of_regularizers(check):
    check()


@pytest.mark.parametrize("kind", ["crop_flip", "color_jitter", "random_erasing", "rand_augment"])
def test_they_are_found_by_their_kinds(kind):
    assert registry.build("regularizer", kind).weight == 1
