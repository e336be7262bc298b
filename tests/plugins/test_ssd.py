"""SSD against its definition in NumPy, and against a reference on the golden features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oodcore import Detector
from oodcore.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def distances(part: np.ndarray, asked: np.ndarray) -> np.ndarray:
    inverse = np.linalg.pinv(np.cov(part.T, bias=True), rcond=1e-10)
    return np.array([(row - part.mean(axis=0)) @ inverse @ (row - part.mean(axis=0))
                     for row in asked])  # fmt: skip


def test_with_one_cluster_it_is_its_definition():
    generator = np.random.default_rng(0)
    train, asked = generator.normal(size=(60, 5)) + 1, generator.normal(size=(20, 5))
    scores = Detector(scorer="ssd").fit(train).score(asked)
    np.testing.assert_allclose(scores, -distances(unit(train), unit(asked)), rtol=1e-8)


def test_clusters_that_lie_apart_are_found_without_labels():
    generator = np.random.default_rng(1)
    parts = [generator.normal(size=(40, 4)) * 0.3 + 4 * np.eye(4)[k] for k in range(3)]
    train = np.concatenate(parts)[generator.permutation(120)]
    asked = generator.normal(size=(20, 4))
    scores = Detector(scorer={"kind": "ssd", "clusters": 3}).fit(train).score(asked)
    expected = -np.min([distances(unit(part), unit(asked)) for part in parts], axis=0)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_it_agrees_with_a_reference():
    # The reference gives exp(-d^2 / 4096).
    with np.load(GOLDEN / "inputs.npz") as given, np.load(GOLDEN / "scores.npz") as scores:
        train = given["train_features"]
        sets = ("test_id", "ood_near", "ood_far")
        asked = np.concatenate([given[f"{name}_features"] for name in sets])
        reference = 4096 * np.log(scores["ssd.1cluster_official@ref64"])
    ours = Detector(scorer="ssd").fit(train).score(asked)
    tolerance = 1e-6 * np.maximum(np.abs(reference), np.median(np.abs(reference)))
    assert (np.abs(ours - reference) <= tolerance).all()


def test_the_norm_has_no_part_in_it_and_a_zero_row_is_scored():
    rows = np.random.default_rng(2).normal(size=(50, 4)) + 1
    detector = Detector(scorer="ssd").fit(rows)
    np.testing.assert_allclose(detector.score(5 * rows), detector.score(rows), rtol=1e-8)
    assert np.isfinite(detector.score(np.zeros((1, 4)))).all()


@pytest.mark.parametrize(
    ("rows", "clusters", "match"),
    [
        (np.ones((9, 4)), 1, "all equal"),
        (np.ones((9, 4)), 2, "all equal"),
        (np.eye(4), 5, "4 training rows cannot make 5 clusters"),
    ],
)
def test_too_little_to_make_clusters_of_is_an_error(rows, clusters, match):
    with pytest.raises(DataError, match=match):
        Detector(scorer={"kind": "ssd", "clusters": clusters}).fit(rows)
