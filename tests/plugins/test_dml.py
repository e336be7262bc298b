"""MaxCosine, MaxNorm and DML against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, Head
from oodcore.errors import DataError

WEIGHT = np.random.default_rng(5).normal(size=(4, 6))


def features(seed: int, count: int = 40, labels: bool = False) -> Features:
    values = np.random.default_rng(seed).normal(size=(count, 6)) + 0.5
    given = torch.arange(count) % 3 if labels else None
    head = Head(torch.tensor(WEIGHT), torch.ones(4).double())
    return Features(embeddings=torch.tensor(values), labels=given, head=head)


def cosine(rows: np.ndarray, directions: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(directions, axis=1)
    return (rows @ directions.T / norms).max(axis=1)


def test_the_cosine_with_the_head_needs_no_fitting():
    asked = features(0)
    expected = cosine(asked.embeddings.numpy(), WEIGHT)
    np.testing.assert_allclose(Detector(scorer="max_cosine").score(asked), expected)


def test_the_cosine_with_the_means_of_the_classes_that_occur():
    train, asked = features(0, labels=True), features(1)
    rows, labels = train.embeddings.numpy(), train.labels.numpy()
    means = np.stack([rows[labels == k].mean(axis=0) for k in range(3)])
    detector = Detector(scorer={"kind": "max_cosine", "source": "means"}).fit(train)
    np.testing.assert_allclose(detector.score(asked), cosine(asked.embeddings.numpy(), means))


@pytest.mark.parametrize("source", ["head", "means"])
def test_a_zero_row_has_cosine_zero(source):
    zero = Features(embeddings=torch.zeros(1, 6).double(), head=features(0).head)
    detector = Detector(scorer={"kind": "max_cosine", "source": source})
    assert detector.fit(features(0, labels=True)).score(zero)[0] == 0


def test_with_auto_the_terms_weigh_the_same_on_the_training_rows():
    train, asked = features(0), features(1)
    rows, known = asked.embeddings.numpy(), train.embeddings.numpy()
    lam = np.linalg.norm(known, axis=1).mean() / cosine(known, WEIGHT).mean()
    expected = lam * cosine(rows, WEIGHT) + np.linalg.norm(rows, axis=1)
    scores = Detector(scorer="dml").fit(train).score(asked)
    np.testing.assert_allclose(scores, expected)
    shares = cosine(rows, WEIGHT) / cosine(known, WEIGHT).sum()
    shares = shares + np.linalg.norm(rows, axis=1) / np.linalg.norm(known, axis=1).sum()
    np.testing.assert_array_equal(np.argsort(scores), np.argsort(shares))


def test_a_given_weight_is_taken():
    asked = features(1)
    rows = asked.embeddings.numpy()
    expected = 3 * cosine(rows, WEIGHT) + np.linalg.norm(rows, axis=1)
    scores = Detector(scorer={"kind": "dml", "lam": 3.0}).fit(features(0)).score(asked)
    np.testing.assert_allclose(scores, expected)


def test_the_norm_scales_and_the_cosine_does_not():
    asked = features(1)
    larger = Features(embeddings=3 * asked.embeddings, head=asked.head)
    norm, angle = Detector(scorer="max_norm"), Detector(scorer="max_cosine")
    np.testing.assert_allclose(norm.score(larger), 3 * norm.score(asked))
    np.testing.assert_allclose(angle.score(larger), angle.score(asked))


def test_a_mean_cosine_of_zero_gives_no_ratio():
    train = Features(embeddings=-torch.tensor(WEIGHT[:1]), head=Head(torch.tensor(WEIGHT[:1])))
    with pytest.raises(DataError, match="give lam a number"):
        Detector(scorer="dml").fit(train)
