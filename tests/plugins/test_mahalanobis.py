"""mahalanobis: corners that its definition (see test_relative_mahalanobis) does not show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import Detector
from oodcore.errors import DataError


def rows(seed: int, count: int = 60, width: int = 4, classes: int = 3):
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    spread = generator.normal(size=(width, width))
    return generator.normal(size=(count, width)) @ spread + 3 * labels[:, None], labels


def fitted(train, labels=None, **fields) -> Detector:
    scorer = {"kind": "mahalanobis", **fields}
    return Detector(scorer=scorer).fit(train if labels is None else (train, labels))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 6),
    classes=st.integers(1, 5),
)
def test_the_definition_on_any_sizes(seed, width, classes):
    train, labels = rows(seed, 40, width, classes)
    asked, _ = rows(seed + 1, 9, width, classes)
    means = [train[labels == k].mean(axis=0) for k in range(classes)]
    centred = train - np.array(means)[labels]
    precision = np.linalg.inv(centred.T @ centred / len(train))
    wanted = [-min((row - mean) @ precision @ (row - mean) for mean in means) for row in asked]
    np.testing.assert_allclose(fitted(train, labels).score(asked), wanted, rtol=1e-6, atol=1e-9)


def test_with_unit_covariance_it_is_the_squared_distance_to_the_nearest_mean():
    corners = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    train = np.concatenate([corners, corners + 10])
    detector = fitted(train, np.repeat([0, 1], 4))
    asked = np.array([[0.0, 3], [10, 10], [9, 14]])
    np.testing.assert_allclose(detector.score(asked), [-9, 0, -17], atol=1e-12)


def test_no_linear_map_of_the_embeddings_changes_it():
    train, labels = rows(0)
    asked, _ = rows(1)
    change = np.random.default_rng(2).normal(size=(4, 4)) + 2 * np.eye(4)
    one = fitted(train, labels).score(asked)
    other = fitted(train @ change + 50, labels).score(asked @ change + 50)
    np.testing.assert_allclose(other, one, rtol=1e-7)


def test_a_large_offset_costs_no_precision():
    train, labels = rows(0)
    asked, _ = rows(1)
    far = fitted(train + 1e6, labels).score(asked + 1e6)
    np.testing.assert_allclose(far, fitted(train, labels).score(asked), rtol=1e-6)


def test_dead_and_repeated_dimensions_are_ignored():
    train, labels = rows(0)
    asked, _ = rows(1)
    plain = fitted(train, labels).score(asked)
    dead = np.zeros((60, 1))
    wide = fitted(np.hstack([train, dead]), labels)
    np.testing.assert_allclose(wide.score(np.hstack([asked, dead])), plain, rtol=1e-7)
    np.testing.assert_allclose(wide.score(np.hstack([asked, dead + 5])), plain, rtol=1e-7)
    twice = fitted(np.hstack([train, train]), labels).score(np.hstack([asked, asked]))
    np.testing.assert_allclose(twice, plain, rtol=1e-7)


def test_classes_without_rows_are_left_out():
    train, labels = rows(0)
    asked = np.concatenate([rows(1)[0], np.zeros((1, 4))])
    spaced = Detector(scorer="mahalanobis").fit((train, 2 * labels), classes=7)
    np.testing.assert_allclose(spaced.score(asked), fitted(train, labels).score(asked), rtol=1e-9)


def test_a_class_of_one_row_and_duplicate_rows():
    train, labels = rows(0)
    labels[0] = 3
    twice = fitted(np.concatenate([train, train]), np.concatenate([labels, labels]))
    detector = fitted(train, labels)
    asked, _ = rows(1)
    np.testing.assert_allclose(twice.score(asked), detector.score(asked), rtol=1e-9)
    np.testing.assert_allclose(detector.score(train[:1]), 0, atol=1e-9)


@pytest.mark.parametrize("train", [np.ones((1, 3)), np.ones((5, 3)), np.full((9, 2), 1e6 + 0.1)])
def test_rows_that_do_not_vary(train):
    with pytest.raises(DataError, match="do not vary within their classes"):
        fitted(train)


def test_rows_too_large_for_a_covariance():
    with pytest.raises(DataError, match="too large for float64"):
        fitted(rows(0)[0] * 1e200)


def test_rounding_is_no_variance():
    centres = np.random.default_rng(0).uniform(size=(3, 4)) + 1e6
    labels = np.arange(96) % 3
    for size in (7, 256):
        detector = Detector(scorer="mahalanobis", batch_size=size)
        with pytest.raises(DataError, match="do not vary within their classes"):
            detector.fit((centres[labels], labels))
