"""kNN against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from oodcore import Detector


def rows(seed: int, count: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5))


def definition(train, asked, k, normalize, metric, reduce) -> list[float]:
    if normalize:
        train, asked = (
            x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, asked)
        )
    scores = []
    for row in asked:
        near = -np.linalg.norm(train - row, axis=1) if metric == "l2" else train @ row
        nearest = np.sort(near)[-k:]
        scores.append(nearest[0] if reduce == "kth" else nearest.mean())
    return scores


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("metric", ["l2", "inner_product"])
@pytest.mark.parametrize("reduce", ["kth", "mean"])
def test_it_is_its_definition(k, normalize, metric, reduce):
    train, asked = rows(0), np.concatenate([rows(1, 20), np.zeros((1, 5))])
    scorer = {"kind": "knn", "k": k, "normalize": normalize, "metric": metric, "reduce": reduce}
    scores = Detector(scorer=scorer).fit(train).score(asked)
    expected = definition(train, asked, k, normalize, metric, reduce)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)


def test_of_normalised_rows_the_product_is_one_minus_half_the_squared_distance():
    train, asked = rows(0), rows(1, 20)
    distance = Detector(scorer={"kind": "knn", "k": 5}).fit(train).score(asked)
    cosine = {"kind": "knn", "k": 5, "metric": "inner_product"}
    np.testing.assert_allclose(
        Detector(scorer=cosine).fit(train).score(asked), 1 - distance**2 / 2, rtol=1e-9
    )


def test_a_training_row_is_its_own_neighbour():
    train = rows(0)
    scores = Detector(scorer={"kind": "knn", "k": 1}).fit(train).score(train)
    np.testing.assert_allclose(scores, 0, atol=1e-12)


@pytest.mark.parametrize("reduce", ["kth", "mean"])
def test_fewer_rows_than_neighbours_are_warned_of(reduce):
    scorer = {"kind": "knn", "reduce": reduce}
    with pytest.warns(UserWarning, match="k is 50, and there are 8 training rows"):
        detector = Detector(scorer=scorer).fit(rows(0, 8))
    expected = definition(rows(0, 8), rows(1, 5), 8, True, "l2", reduce)
    np.testing.assert_allclose(detector.score(rows(1, 5)), expected)
