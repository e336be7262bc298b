from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from oodcore.data import Stream
from oodcore_plugins.noise import Noise

DISTRIBUTIONS = ("gaussian", "rademacher", "bernoulli", "blobs", "uniform")


def drawn(**fields: Any) -> np.ndarray:
    return torch.cat([batch.inputs for batch in Stream(Noise(**fields))]).numpy()


def normal_cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("standardised", [False, True])
def test_rows_have_the_shape_and_the_range_they_claim(
    distribution: str, standardised: bool
) -> None:
    source = Noise(distribution=distribution, rows=20, shape=(3, 9, 7), standardised=standardised)
    rows = source.open()
    assert len(rows) == 20
    image, label, number = rows[19]
    assert (image.dtype, image.shape, label, number) == (torch.float32, (3, 9, 7), -1, 19)
    lowest = -1 if standardised or distribution == "rademacher" else 0
    images = torch.stack([rows[row][0] for row in range(20)])
    assert lowest <= float(images.min())
    assert float(images.max()) <= 1
    assert float(images.std()) > 0.1


def test_gaussian_for_plain_inputs_is_clipped_at_one_deviation() -> None:
    values = drawn(distribution="gaussian", rows=200, shape=(1, 32, 32))
    share = normal_cdf(-1)  # 0.1587
    assert abs((values == 0).mean() - share) < 0.005
    assert abs((values == 1).mean() - share) < 0.005
    inside = values[(values > 0) & (values < 1)]
    for level in (0.2, 0.5, 0.8):
        expected = (normal_cdf((level - 0.5) / 0.5) - share) / (1 - 2 * share)
        assert abs((inside < level).mean() - expected) < 0.005


def test_gaussian_for_standardised_inputs_is_clipped_at_two_deviations() -> None:
    values = drawn(distribution="gaussian", rows=200, shape=(1, 32, 32), standardised=True)
    assert abs((np.abs(values) == 1).mean() - 2 * normal_cdf(-2)) < 0.002  # 4.55 %
    assert abs((np.abs(values) < 0.25).mean() - (1 - 2 * normal_cdf(-0.5))) < 0.005
    assert abs(values.mean()) < 0.005


@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        ({"distribution": "bernoulli"}, (0, 1)),
        ({"distribution": "bernoulli", "standardised": True}, (-1, 1)),
        ({"distribution": "rademacher"}, (-1, 1)),
        ({"distribution": "rademacher", "standardised": True}, (-1, 1)),
    ],
)
def test_coins_are_fair_and_have_two_sides(fields: dict[str, Any], levels: tuple[int, int]) -> None:
    values = drawn(rows=100, **fields)
    assert set(np.unique(values)) == set(levels)
    assert abs((values == 1).mean() - 0.5) < 0.005


def test_uniform_is_flat() -> None:
    counts, _ = np.histogram(drawn(distribution="uniform", rows=100), bins=10, range=(0, 1))
    assert np.abs(counts / counts.sum() - 0.1).max() < 0.005
    standardised = drawn(distribution="uniform", rows=100, standardised=True)
    assert np.abs(standardised.mean()) < 0.01
    assert standardised.min() < -0.99


def test_blobs_of_32_pixels_have_the_published_statistics() -> None:
    values = drawn(distribution="blobs", rows=150)
    assert abs((values > 0).mean() - 0.206) < 0.01
    assert ((values == 0) | (values >= 0.75)).all()
    channels = values.transpose(1, 0, 2, 3).reshape(3, -1)
    neighbours = np.diag(np.corrcoef(channels), 1)  # red and green, green and blue
    assert np.abs(neighbours - 0.64).max() < 0.03
    standardised = drawn(distribution="blobs", rows=150, standardised=True)
    assert np.allclose(standardised, 2 * values - 1)


def naive_blur(field: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(4 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in range(3):
        length = field.shape[axis]
        blurred = np.zeros_like(field)
        for offset, weight in zip(range(-radius, radius + 1), weights, strict=True):
            places = np.clip(np.arange(length) + offset, 0, length - 1)
            blurred += weight * field.take(places, axis=axis)
        field = blurred
    return field


@pytest.mark.parametrize("sigma", [1.5, 2.0])
def test_blobs_are_a_thresholded_blur_over_all_three_axes(sigma: float) -> None:
    source = Noise(distribution="blobs", rows=5, shape=(3, 16, 12), seed=4, sigma=sigma)
    for row in range(5):
        random = np.random.default_rng(np.random.SeedSequence(4, spawn_key=(row,)))
        expected = naive_blur((random.random((3, 16, 12)) < 0.7).astype(float), sigma)
        expected[expected < 0.75] = 0
        assert np.allclose(source.open()[row][0].numpy(), expected, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    distribution=st.sampled_from(DISTRIBUTIONS),
    order=st.lists(st.integers(0, 11), min_size=1, max_size=12),
    seed=st.integers(0, 2**70),
    rows=st.integers(12, 10**9),
)
def test_a_row_depends_on_seed_and_number_alone(
    distribution: str, order: list[int], seed: int, rows: int
) -> None:
    few = Noise(distribution=distribution, rows=12, shape=(3, 5, 4), seed=seed).open()
    many = Noise(distribution=distribution, rows=rows, shape=(3, 5, 4), seed=seed).open()
    for (image, _, number), row in zip(many.__getitems__(order), order, strict=True):
        assert number == row
        assert torch.equal(image, few[row][0])


def test_rows_and_seeds_differ_from_one_another() -> None:
    # Seed and row must not run into each other: (1, 2) is not (2, 1), nor (2**32, 0) (0, 1).
    pairs = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (2**32, 0), (0, 2), (2**64, 1)]
    rows = [Noise(seed=seed).open()[row][0] for seed, row in pairs]
    for first in range(len(rows)):
        for second in range(first):
            assert not torch.equal(rows[first], rows[second]), (pairs[first], pairs[second])


def test_what_the_extractor_standardises_comes_out_as_the_noise() -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    plain = drawn(distribution="rademacher", rows=3)
    given = drawn(distribution="rademacher", rows=3, mean=mean, std=std)
    for channel in range(3):
        restored = (given[:, channel] - mean[channel]) / std[channel]
        assert np.allclose(restored, plain[:, channel], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (0.5, 0.5, 0.5)}, "set standardised"),
        ({"standardised": True, "std": (0.5,)}, "std has 1 numbers and the shape 3 channels"),
        ({"standardised": True, "std": (0.5, 0.0, 0.5)}, "greater than 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"shape": (3, 32)}, "shape"),
        ({"sigma": 0}, "sigma"),
        ({"distribution": "perlin"}, "distribution"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Noise(**fields)


def test_a_row_that_is_not_there_is_an_index_error() -> None:
    rows = Noise(rows=3).open()
    for row in (3, -1):
        with pytest.raises(IndexError):
            rows[row]
    assert len(list(iter(rows))) == 3


def test_workers_and_pickle_give_the_same_rows_and_leave_global_generators_alone() -> None:
    source = Noise(distribution="blobs", rows=20, shape=(1, 8, 8))
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    alone = list(Stream(source, batch_size=6))
    together = list(Stream(source, batch_size=6, num_workers=2))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [batch.ids.tolist() for batch in alone] == [batch.ids.tolist() for batch in together]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(pickle.loads(pickle.dumps(source.open()))[7][0], alone[1].inputs[1])
    assert Noise.model_validate(source.dump()) == source
