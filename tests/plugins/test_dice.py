"""DICE against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, FeatureStore, Head
from oodcore.errors import DataError
from oodcore_plugins.dice import DICE

GENERATOR = np.random.default_rng(0)
WEIGHT, BIAS = GENERATOR.normal(size=(4, 7)), GENERATOR.normal(size=4)


def features(seed: int, count: int = 30, **flags) -> Features:
    values = np.maximum(np.random.default_rng(seed).normal(size=(count, 7)), 0)
    head = Head(torch.tensor(WEIGHT), torch.tensor(BIAS), **flags)
    return Features(embeddings=torch.tensor(values), head=head)


def shaped(shaper: DICE, train: Features, asked: Features) -> Features:
    store = FeatureStore(statistics=shaper.statistics()).update(train)
    return shaper.apply(asked, shaper.fit(store))


@pytest.mark.parametrize("percentile", [30, 70, 90, 99])
def test_it_is_its_definition(percentile):
    train, asked = features(1), features(2)
    contribution = train.embeddings.numpy().mean(axis=0) * WEIGHT
    mask = contribution > np.percentile(contribution, percentile)
    expected = np.array([[(m * w) @ h for m, w in zip(mask, WEIGHT, strict=True)] + BIAS
                         for h in asked.embeddings.numpy()])  # fmt: skip
    out = shaped(DICE(percentile=percentile), train, asked)
    np.testing.assert_allclose(out.logits, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(out.embeddings, asked.embeddings)
    assert torch.equal(asked.head.weight, torch.tensor(WEIGHT))


def test_percentile_zero_keeps_every_weight():
    train, asked = features(1), features(2)
    np.testing.assert_allclose(shaped(DICE(percentile=0), train, asked).logits, asked.logits)


def test_a_row_of_zeros_has_the_bias_as_logits():
    zeros = Features(embeddings=torch.zeros(1, 7, dtype=torch.float64), head=features(1).head)
    np.testing.assert_allclose(shaped(DICE(), features(1), zeros).logits[0], BIAS)


def test_a_head_that_normalises_and_scales():
    flags = {"normalize_weight": True, "normalize_features": True, "scale": 5.0}
    train, asked = features(1, **flags), features(2, **flags)
    unit = WEIGHT / np.linalg.norm(WEIGHT, axis=1, keepdims=True)
    contribution = train.embeddings.numpy().mean(axis=0) * unit
    kept = np.where(contribution > np.percentile(contribution, 50), unit, 0)
    rows = asked.embeddings.numpy()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    out = shaped(DICE(percentile=50), train, asked)
    np.testing.assert_allclose(out.logits, 5 * rows @ kept.T + BIAS, rtol=1e-10, atol=1e-12)


def test_without_a_head_it_says_so():
    with pytest.raises(DataError, match="head"):
        Detector(scorer="mahalanobis", shapers=["dice"]).fit(features(1).embeddings.numpy())
