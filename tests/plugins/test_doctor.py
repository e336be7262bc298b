"""doctor: the definition, the paper's form of it, and no loss where it is near 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from logit_oracles import logit_arrays, score, softmax

from oodcore_plugins.doctor import Doctor


@given(logits=logit_arrays)
def test_the_definition(logits):
    wanted = [-(1 - math.fsum(p * p for p in softmax(row))) for row in logits]
    np.testing.assert_allclose(score(Doctor(), logits), wanted, rtol=1e-6, atol=1e-13)


def test_it_ranks_like_the_papers_ratio():
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 3
    squares = np.array([math.fsum(p * p for p in softmax(row)) for row in logits])
    ratio = (1 - squares) / squares
    assert (np.argsort(score(Doctor(), logits)) == np.argsort(-ratio)).all()


def test_its_range():
    scores = score(Doctor(), [[1.0] * 4, [100.0, 0.0, 0.0, 0.0]])
    assert scores[0] == pytest.approx(1 / 4 - 1)
    assert scores[1] == pytest.approx(-6 * math.exp(-100), rel=1e-9)


def test_one_class_is_certain():
    assert score(Doctor(), [[3.0], [-2.0]]).tolist() == [0, 0]


def test_confident_rows_do_not_tie():
    scores = score(Doctor(), [[40.0, 0.0], [60.0, 0.0], [80.0, 0.0]])
    assert scores[0] < scores[1] < scores[2] < 0


def test_the_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0, 4.0]])
    assert score(Doctor(temperature=2), logits) == pytest.approx(score(Doctor(), logits / 2))
