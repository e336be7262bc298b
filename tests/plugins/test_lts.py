"""LTS against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, Head
from oodcore_plugins.lts import LTS


def features(rows) -> Features:
    weight = torch.tensor(np.random.default_rng(9).normal(size=(3, rows.shape[1])))
    return Features(embeddings=torch.tensor(rows), head=Head(weight))


@pytest.mark.parametrize("percentile", [0, 35, 65, 95])
def test_it_is_its_definition(percentile):
    given = features(np.random.default_rng(0).normal(size=(20, 30)))
    out = LTS(percentile=percentile).apply(given, {})
    k = max(1, 30 - int(np.round(30 * percentile / 100)))
    positive = np.maximum(given.embeddings.numpy(), 0)
    scale = positive.sum(axis=1) / np.sort(positive, axis=1)[:, -k:].sum(axis=1)
    expected = given.logits.numpy() * scale[:, None] ** 2
    np.testing.assert_allclose(out.logits, expected, rtol=1e-12)
    assert torch.equal(out.embeddings, given.embeddings)


def test_rows_without_a_positive_activation_keep_their_logits():
    given = features(np.stack([np.zeros(8), -np.ones(8)]))
    assert torch.equal(LTS().apply(given, {}).logits, given.logits)


def test_it_changes_the_energy_and_not_the_distance():
    given = features(np.random.default_rng(1).random((40, 10)))

    def scores(scorer, shapers=()):
        return Detector(scorer=scorer, shapers=shapers).fit(given).score(given)

    assert not np.allclose(scores("energy", ["lts"]), scores("energy"))
    np.testing.assert_array_equal(scores("mahalanobis", ["lts"]), scores("mahalanobis"))
