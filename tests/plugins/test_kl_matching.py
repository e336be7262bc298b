"""kl_matching: against a naive computation, and classes that are never predicted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from logit_oracles import score, softmax

from oodcore import Features, FeatureStore
from oodcore_plugins.kl_matching import KLMatching

TRAIN, TESTED = (np.random.default_rng(seed).normal(size=(40, 4)) * 4 for seed in (0, 1))


def fitted(logits):
    store = FeatureStore(statistics=KLMatching().statistics())
    return KLMatching().fit(store.update(Features(logits=torch.as_tensor(logits))))


def naive(train, tested) -> list[float]:
    templates = []
    for number in range(train.shape[1]):
        rows = [softmax(row) for row in train if int(np.argmax(row)) == number]
        if rows:
            templates.append([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)])
    scores = []
    for row in tested:
        given = softmax(row)
        divergences = [
            math.fsum(p * math.log(p / d) for p, d in zip(given, template, strict=True))
            for template in templates
        ]
        scores.append(-min(divergences))
    return scores


def test_the_definition():
    np.testing.assert_allclose(
        score(KLMatching(), TESTED, fitted(TRAIN)), naive(TRAIN, TESTED), rtol=1e-9, atol=1e-14
    )


def test_a_class_that_is_never_predicted_is_left_out():
    train = TRAIN[TRAIN.argmax(axis=1) != 2]
    assert len(fitted(train)["templates"]) == 3
    np.testing.assert_allclose(
        score(KLMatching(), TESTED, fitted(train)), naive(train, TESTED), rtol=1e-9, atol=1e-14
    )


def test_labels_are_not_used():
    store = FeatureStore(statistics=KLMatching().statistics())
    labels = torch.zeros(len(TRAIN), dtype=torch.int64)
    store.update(Features(logits=torch.as_tensor(TRAIN), labels=labels))
    templates = KLMatching().fit(store)["templates"]
    torch.testing.assert_close(templates, fitted(TRAIN)["templates"])


def test_a_template_itself_is_at_no_distance():
    state = fitted(TRAIN)
    assert score(KLMatching(), state["templates"], state) == pytest.approx(0, abs=1e-12)


def test_templates_that_underflow_give_a_finite_divergence():
    state = fitted(np.array([[2000.0, 0.0, 0.0], [2000.0, 0.0, 0.0]]))
    scores = score(KLMatching(), [[2000.0, 0.0, 0.0], [0.0, 2000.0, 0.0]], state)
    assert scores[0] == 0
    assert -1000 < scores[1] < -500


def test_one_class_is_at_no_distance():
    assert score(KLMatching(), [[3.0]], fitted(np.array([[1.0], [2.0]]))).tolist() == [0]
