"""pNML against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, Head
from oodcore.errors import DataError


def features(seed: int, count: int = 50, size: float = 1.0, classes: int = 3) -> Features:
    rows = np.random.default_rng(seed).normal(size=(count, 6)) + 0.5
    weight = np.random.default_rng(7).normal(size=(classes, 6)) * size
    head = Head(torch.tensor(weight), torch.linspace(-0.2, 0.2, classes).double())
    return Features(embeddings=torch.tensor(rows), head=head)


def definition(train: Features, asked: Features) -> list[float]:
    def unit(rows):
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    known, rows = unit(train.embeddings.numpy()), unit(asked.embeddings.numpy())
    inverse = np.linalg.pinv(known.T @ known, rcond=1e-10)
    scores = []
    for row in rows:
        logits = asked.head.weight.numpy() @ row + asked.head.bias.numpy()
        p = np.exp(logits) / np.exp(logits).sum()
        q = row @ inverse @ row
        scores.append(-np.log((p / (p + (1 - p) * p ** (q / (1 + q)))).sum()) / np.log(len(p)))
    return scores


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_it_is_its_definition(size, classes):
    train, asked = features(0, 50, size, classes), features(1, 20, size, classes)
    scores = Detector(scorer="pnml").fit(train).score(asked)
    np.testing.assert_allclose(scores, definition(train, asked), rtol=1e-9, atol=1e-13)
    assert ((scores >= -1) & (scores <= 0)).all()


def test_certain_predictions_give_finite_scores_and_gradients():
    train, asked = features(0, size=1e4), features(1, 20, size=1e4)
    detector = Detector(scorer="pnml").fit(train)
    scores = detector.score(asked)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores, 0, atol=1e-6)


def test_the_norm_has_no_part_in_it():
    train, asked = features(0), features(1, 20)
    detector = Detector(scorer="pnml").fit(train)
    larger = Features(embeddings=9 * asked.embeddings, head=asked.head)
    np.testing.assert_allclose(detector.score(larger), detector.score(asked), rtol=1e-10)


def test_a_zero_row_and_a_single_class_score_zero():
    detector = Detector(scorer="pnml").fit(features(0))
    zero = Features(embeddings=torch.zeros(1, 6).double(), head=features(0).head)
    assert detector.score(zero)[0] == pytest.approx(0, abs=1e-15)
    one = features(0, classes=1)
    assert not Detector(scorer="pnml").fit(one).score(one).any()


def test_nothing_but_zeros_is_an_error():
    zeros = Features(embeddings=torch.zeros(5, 6).double(), head=features(0).head)
    with pytest.raises(DataError, match="every training embedding is zero"):
        Detector(scorer="pnml").fit(zeros)
