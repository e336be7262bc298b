"""SCALE against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Features
from oodcore.errors import ConfigurationError
from oodcore_plugins.ash import ASH
from oodcore_plugins.scale import SCALE


def shaped(rows, shaper) -> np.ndarray:
    features = Features(embeddings=torch.tensor(np.asarray(rows, dtype=np.float64)))
    return shaper.apply(features, {}).embeddings.numpy()


@pytest.mark.parametrize("percentile", [0, 40, 85, 99])
def test_it_is_its_definition(percentile):
    rows = np.maximum(np.random.default_rng(0).normal(size=(20, 30)), 0)
    k = max(1, 30 - int(np.round(30 * percentile / 100)))
    expected = [row * np.exp(row.sum() / np.sort(row)[-k:].sum()) for row in rows]
    np.testing.assert_allclose(shaped(rows, SCALE(percentile=percentile)), expected, rtol=1e-12)


def test_at_percentile_zero_rows_grow_by_e():
    rows = np.random.default_rng(1).random((4, 6))
    np.testing.assert_allclose(shaped(rows, SCALE(percentile=0)), np.e * rows)


def test_what_ash_keeps_is_the_same():
    rows = np.random.default_rng(2).random((5, 20))
    pruned = shaped(rows, ASH(variant="s", percentile=70))
    whole = shaped(rows, SCALE(percentile=70))
    assert ((pruned == 0).sum(axis=1) == 14).all()
    np.testing.assert_allclose(pruned[pruned > 0], whole[pruned > 0])


def test_zeros_stay_zero_and_negatives_finite():
    assert not shaped(np.zeros((2, 8)), SCALE()).any()
    negative = -np.random.default_rng(3).random((2, 8))
    np.testing.assert_allclose(shaped(negative, SCALE()), np.e * negative)


def test_an_exponent_beyond_all_numbers_is_refused():
    with pytest.raises(ConfigurationError, match="scale: 1 of 2048"):
        shaped(np.ones((1, 2048)), SCALE(percentile=99.99))
