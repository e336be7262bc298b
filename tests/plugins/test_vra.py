"""VRA against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, FeatureStore, registry
from oodcore.errors import ConfigurationError
from oodcore_plugins.vra import VRA


def rows(seed: int, count: int = 50) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.maximum(generator.normal(size=(count, 6)) * np.linspace(0, 2, 6), 0)


def shaped(shaper: VRA, train: np.ndarray, asked: np.ndarray) -> np.ndarray:
    given = Features(embeddings=torch.tensor(train), ids=torch.arange(len(train)))
    state = shaper.fit(FeatureStore(statistics=shaper.statistics()).update(given))
    return shaper.apply(Features(embeddings=torch.tensor(asked)), state).embeddings.numpy()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("below", ["zero", "raise"])
@pytest.mark.parametrize("gain", [0.0, 0.25])
def test_it_is_its_definition(pooled, below, gain):
    train, asked = rows(0), rows(1, 40)
    low, high = np.percentile(train, [60, 95], axis=None if pooled else 0)
    low, high = (np.broadcast_to(limit, 6) for limit in (low, high))
    expected = asked.copy()
    for row in expected:
        for unit, value in enumerate(row):
            if value < low[unit]:
                row[unit] = 0 if below == "zero" else low[unit]
            elif value > high[unit]:
                row[unit] = high[unit]
            else:
                row[unit] = value + gain
    given = shaped(VRA(pooled=pooled, below=below, gain=gain), train, asked)
    np.testing.assert_allclose(given, expected, rtol=1e-12)


def test_with_pooled_percentiles_from_zero_it_is_react():
    train = rows(2)
    labels = np.arange(50) % 2

    def scores(shaper):
        return Detector(scorer="mahalanobis", shapers=[shaper]).fit((train, labels)).score(rows(3))

    vra = {"kind": "vra", "low": 0, "high": 90, "pooled": True}
    np.testing.assert_allclose(scores(vra), scores("react"))


def test_one_row_is_enough_and_a_dead_unit_stays_dead():
    train = np.array([[1.0, 0.0]])
    out = shaped(VRA(), train, np.array([[3.0, 5.0], [0.5, 0.0]]))
    np.testing.assert_array_equal(out, [[1, 0], [0, 0]])


@pytest.mark.parametrize("count", [30, 37, 50])
def test_a_unit_that_is_always_the_same_is_at_its_percentiles(count):
    # The mean of two equal numbers, weighted by the place between them, may be another number.
    constants = np.random.default_rng(3).uniform(0, 3, 100)
    train = np.tile(constants, (count, 1))
    np.testing.assert_array_equal(shaped(VRA(gain=0.5), train, train), train + 0.5)


def test_low_above_high_is_refused():
    with pytest.raises(ConfigurationError, match="low is 90, which is above high, 10"):
        registry.build("shaper", {"kind": "vra", "low": 90, "high": 10})
