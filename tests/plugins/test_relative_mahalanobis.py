"""Mahalanobis distances, absolute and relative, against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features
from oodcore.errors import DataError


def rows(seed: int, count: int = 60, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    spread = generator.normal(size=(width, width))
    return generator.normal(size=(count, width)) @ spread + 3 * labels[:, None], labels


def definition(train, labels, asked, normalize=False, shrinkage=0.0, relative=True):
    """Loops over classes and rows, with inverses."""
    if normalize:
        train, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, asked))
    size = train.shape[1]

    def inverse(covariance):
        target = np.trace(covariance) / size * np.eye(size)
        return np.linalg.pinv((1 - shrinkage) * covariance + shrinkage * target, rcond=1e-10)

    means = [train[labels == k].mean(axis=0) for k in np.unique(labels)]
    within = sum(
        (train[labels == k] - mean).T @ (train[labels == k] - mean)
        for k, mean in zip(np.unique(labels), means, strict=True)
    )
    tied = inverse(within / len(train))
    total = inverse(np.cov(train.T, bias=True))
    scores = []
    for row in asked:
        near = min((row - mean) @ tied @ (row - mean) for mean in means)
        far = (row - train.mean(axis=0)) @ total @ (row - train.mean(axis=0))
        scores.append(-(near - far) if relative else -near)
    return np.array(scores)


@pytest.mark.parametrize("kind", ["mahalanobis", "relative_mahalanobis"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
def test_it_is_its_definition(kind, normalize, shrinkage):
    train, labels = rows(0)
    asked, _ = rows(1, count=20)
    scorer = {"kind": kind, "normalize": normalize, "shrinkage": shrinkage}
    scores = Detector(scorer=scorer).fit((train, labels)).score(asked)
    relative = kind == "relative_mahalanobis"
    expected = definition(train, labels, asked, normalize, shrinkage, relative)
    np.testing.assert_allclose(scores, expected, rtol=1e-8, atol=1e-8)


def test_with_one_class_nothing_is_relative():
    train, _ = rows(2)
    scores = Detector(scorer="relative_mahalanobis").fit(train).score(10 * rows(3)[0])
    np.testing.assert_allclose(scores, 0, atol=1e-6)


def test_dead_units_are_ignored_by_both_terms():
    train, labels = rows(4)
    asked, _ = rows(5, count=10)
    expected = Detector(scorer="relative_mahalanobis").fit((train, labels)).score(asked)
    dead = np.concatenate([train, np.zeros((len(train), 2))], axis=1)
    alive = np.concatenate([asked, np.ones((len(asked), 2))], axis=1)
    scores = Detector(scorer="relative_mahalanobis").fit((dead, labels)).score(alive)
    np.testing.assert_allclose(scores, expected, rtol=1e-8)


def test_with_shrinkage_a_unit_dead_in_training_counts():
    train, labels = rows(4)
    dead = np.concatenate([train, np.zeros((len(train), 1))], axis=1)
    scorer = {"kind": "mahalanobis", "shrinkage": 0.01}
    detector = Detector(scorer=scorer).fit((dead, labels))
    alive = dead[:5].copy()
    alive[:, -1] = 100.0
    assert (detector.score(alive) < detector.score(dead[:5]) - 1).all()


def test_an_absent_class_is_left_out():
    train, labels = rows(6)
    asked = rows(7, count=10)[0]
    head = np.zeros((4, 5))

    def features(values, classes=None):
        logits = torch.tensor(values) @ torch.tensor(head).T
        given = None if classes is None else torch.tensor(classes)
        return Features(embeddings=torch.tensor(values), logits=logits, labels=given)

    detector = Detector(scorer="relative_mahalanobis").fit(features(train, labels))
    np.testing.assert_allclose(
        detector.score(features(asked)), definition(train, labels, asked), rtol=1e-8
    )


def test_normalised_scores_ignore_the_norm_and_take_a_zero_row():
    train, labels = rows(8)
    detector = Detector(scorer={"kind": "relative_mahalanobis", "normalize": True})
    detector.fit((train, labels))
    np.testing.assert_allclose(detector.score(7 * train), detector.score(train), rtol=1e-8)
    assert np.isfinite(detector.score(np.zeros((1, 5)))).all()


def test_identity_covariance_gives_the_euclidean_distance():
    axes = np.concatenate([np.eye(3), -np.eye(3)]) * np.sqrt(3)
    train = np.concatenate([axes, axes + 20])
    labels = np.repeat([0, 1], 6)
    asked = np.random.default_rng(9).normal(size=(8, 3)) * 3
    expected = -np.minimum((asked**2).sum(axis=1), ((asked - 20) ** 2).sum(axis=1))
    scores = Detector(scorer="mahalanobis").fit((train, labels)).score(asked)
    np.testing.assert_allclose(scores, expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["mahalanobis", "relative_mahalanobis"])
def test_one_row_a_class_is_an_error_that_says_what_to_do(kind):
    with pytest.raises(DataError, match="more than one row a class"):
        Detector(scorer=kind).fit((np.eye(3), np.arange(3)))
