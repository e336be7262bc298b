"""cop and corp: reconstruction errors by singular vectors in NumPy, and the kernel they mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features
from oodcore.errors import DataError
from oodcore.statistics import Shape
from oodcore.testing import check_statistic
from oodcore_plugins.corp import FourierMoments, fourier


def rows(seed: int, count: int = 70, width: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(count, width)) * np.arange(1, width + 1) + 1


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def errors(train: np.ndarray, asked: np.ndarray, explained: float) -> np.ndarray:
    """By a singular value decomposition of the mapped training rows."""
    mean = train.mean(axis=0)
    _, lengths, directions = np.linalg.svd(train - mean, full_matrices=False)
    held = np.cumsum(lengths**2) / np.sum(lengths**2)
    axes = directions[: np.argmax(held >= explained) + 1]
    apart = asked - mean
    return np.linalg.norm(apart - apart @ axes.T @ axes, axis=1)


@pytest.mark.parametrize("explained", [0.3, 0.85, 0.97])
def test_cop_is_its_definition(explained):
    train, asked = rows(0), np.concatenate([rows(1, 20), np.zeros((1, 6))])
    scores = Detector(scorer={"kind": "cop", "explained": explained}).fit(train).score(asked)
    np.testing.assert_allclose(scores, -errors(unit(train), unit(asked), explained), rtol=1e-8)


@pytest.mark.parametrize(("dims", "explained"), [(30, 0.5), (150, 0.9)])
def test_corp_is_its_definition(dims, explained):
    train, asked = rows(0), np.concatenate([rows(1, 20), np.zeros((1, 6))])
    scorer = {"kind": "corp", "dims": dims, "explained": explained, "gamma": 0.7, "seed": 3}
    detector = Detector(scorer=scorer).fit(train)
    state = detector.ready().scorer
    weight, phase = state["frequencies"].numpy(), state["phases"].numpy()

    def mapped(values: np.ndarray) -> np.ndarray:
        return np.sqrt(2 / dims) * np.cos(unit(values) @ weight + phase)

    wanted = -errors(mapped(train), mapped(asked), explained)
    np.testing.assert_allclose(detector.score(asked), wanted, rtol=1e-8)


def test_the_features_approximate_the_kernel():
    statistic = FourierMoments(dims=2000, gamma=1.5)
    drawn = statistic.init(Shape(1, 6))
    values = unit(rows(0, 12))
    features = Features(embeddings=torch.from_numpy(5 * values))
    mapped = fourier(features, drawn["frequencies"], drawn["phases"]).numpy()
    kernel = np.exp(-1.5 * np.sum((values[:, None] - values) ** 2, axis=2))
    np.testing.assert_allclose(mapped @ mapped.T, kernel, atol=5 / np.sqrt(2000))


def test_the_norm_of_an_embedding_does_not_matter():
    train, asked = rows(0), rows(1, 20)
    for kind in ({"kind": "cop"}, {"kind": "corp", "dims": 50}):
        one = Detector(scorer=kind).fit(train).score(asked)
        other = Detector(scorer=kind).fit(9 * train).score(0.2 * asked)
        np.testing.assert_allclose(one, other, rtol=1e-8)


def test_the_seed_decides_the_features():
    train, asked = rows(0), rows(1, 20)

    def scores(seed: int) -> np.ndarray:
        return Detector(scorer={"kind": "corp", "dims": 50, "seed": seed}).fit(train).score(asked)

    np.testing.assert_array_equal(scores(0), scores(0))
    assert (scores(0) != scores(1)).all()


@pytest.mark.parametrize("scorer", [{"kind": "cop"}, {"kind": "corp", "dims": 20}])
def test_rows_of_one_direction_are_refused(scorer):
    train = np.outer(np.arange(1, 30), np.ones(4))
    with pytest.raises(DataError, match="do not vary in direction"):
        Detector(scorer=scorer).fit(train)


def test_a_share_that_takes_all_directions_is_refused():
    circle = np.random.default_rng(0).normal(size=(50, 2))
    with pytest.raises(DataError, match="takes all 2 directions"):
        Detector(scorer={"kind": "cop", "explained": 0.99}).fit(circle)


def test_rows_within_the_subspace_score_zero():
    flat = np.hstack([rows(0, 50, 2), np.zeros((50, 3))])
    detector = Detector(scorer={"kind": "cop", "explained": 0.999999}).fit(flat)
    np.testing.assert_allclose(detector.score(flat), 0, atol=1e-12)
    outside = np.array([[0.0, 0, 1, 0, 0]])
    assert detector.score(outside)[0] == pytest.approx(-1)


def test_the_statistic_keeps_the_laws():
    check_statistic(FourierMoments(dims=9))
