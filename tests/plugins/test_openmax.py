"""openmax: against a naive computation, the Weibull fit against scipy, and short tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import weibull_min

from oodcore import Detector, Features
from oodcore_plugins.openmax import OpenMax, weibull

DRAWN = np.random.default_rng(0)
LABELS = DRAWN.integers(0, 4, 400)
LOGITS = DRAWN.normal(size=(400, 4)) + 3 * np.eye(4)[LABELS]
TESTED = DRAWN.normal(size=(30, 4)) * 2 + 1


def features(logits, labels=None) -> Features:
    numbers = None if labels is None else torch.as_tensor(labels)
    values = torch.as_tensor(np.asarray(logits, dtype=np.float64))
    return Features(logits=values, labels=numbers, ids=torch.arange(len(values)))


def scores(scorer=None, logits=LOGITS, labels=LABELS, tested=TESTED) -> np.ndarray:
    detector = Detector(scorer=scorer or OpenMax()).fit(features(logits, labels))
    return detector.score(features(tested))


def naive(logits, labels, tested, tail: int, alpha: int) -> list[float]:
    models = {}
    for number in range(logits.shape[1]):
        right = logits[(labels == number) & (logits.argmax(axis=1) == number)]
        if len(right) == 0:
            continue
        mean = right.mean(axis=0)
        largest = np.sort([math.dist(row, mean) for row in right])[-tail:]
        shape, _, scale = weibull_min.fit(largest - largest[0] + 1, floc=0)
        models[number] = mean, largest[0], shape, scale
    found = []
    for row in tested:
        revised, unknown = list(row), 0.0
        ranked = sorted(range(len(row)), key=lambda k: -row[k])
        for rank, number in enumerate(ranked[:alpha], start=1):
            if number not in models:
                continue
            mean, start, shape, scale = models[number]
            beyond = math.dist(row, mean) - start + 1
            outside = weibull_min.cdf(beyond, shape, scale=scale)
            revised[number] = row[number] * (1 - outside * (alpha + 1 - rank) / alpha)
            unknown += row[number] - revised[number]
        total = math.exp(unknown) + sum(map(math.exp, revised))
        found.append(-math.exp(unknown) / total)
    return found


@pytest.mark.parametrize(("tail", "alpha"), [(20, 3), (5, 1), (30, 4)])
def test_the_definition(tail, alpha):
    wanted = naive(LOGITS, LABELS, TESTED, tail, alpha)
    # scipy's optimiser stops at about this precision; the fit itself is tested below.
    np.testing.assert_allclose(scores(OpenMax(tail=tail, alpha=alpha)), wanted, rtol=1e-3)


@pytest.mark.parametrize("shape", [0.7, 2.0, 30.0])
def test_the_fit_is_the_most_likely_one(shape):
    values = torch.as_tensor(DRAWN.weibull(shape, 500) * 3)
    found, scale = weibull(values)

    def likelihood(shape: float, scale: float) -> float:
        return float(weibull_min.logpdf(values.numpy(), shape, scale=scale).sum())

    best = likelihood(found, scale)
    for factor in (1 - 1e-3, 1 + 1e-3):
        assert likelihood(found * factor, scale) < best
        assert likelihood(found, scale * factor) < best
    assert found == pytest.approx(shape, rel=0.2)


def test_more_classes_asked_for_than_there_are():
    np.testing.assert_allclose(scores(OpenMax(alpha=50)), scores(OpenMax(alpha=4)), rtol=1e-12)


def test_a_class_without_correct_rows_is_not_revised():
    kept = (LABELS != 2) | (LOGITS.argmax(axis=1) != 2)
    wanted = naive(LOGITS[kept], LABELS[kept], TESTED, 20, 3)
    given = scores(logits=LOGITS[kept], labels=LABELS[kept])
    np.testing.assert_allclose(given, wanted, rtol=1e-3)


def test_beyond_a_tail_that_does_not_vary_everything_is_outside():
    logits = np.repeat(5 * np.eye(3), 4, axis=0)
    labels = np.repeat(np.arange(3), 4)
    far = [[5.0, 0.5, 0.0]]
    given = scores(OpenMax(alpha=1), logits, labels, far)
    powers = [math.exp(5), math.exp(0), math.exp(0.5), math.exp(0)]
    assert given[0] == pytest.approx(-powers[0] / sum(powers))


def test_large_logits_do_not_overflow():
    given = scores(tested=[[3000.0, 0, 0, 0], [-3000.0, -2000, -4000, -9000]])
    assert np.isfinite(given).all()
    assert given[0] == -1


def test_one_class():
    given = scores(logits=LOGITS[:, :1], labels=LABELS * 0, tested=[[3.0], [50.0]])
    assert (given <= 0).all()
    assert (given >= -1).all()
