"""entropy: the definition, its range and its corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from logit_oracles import logit_arrays, score, softmax

from oodcore_plugins.entropy import Entropy


@given(logits=logit_arrays)
def test_the_definition(logits):
    wanted = [sum(p * math.log(p) for p in softmax(row)) for row in logits]
    np.testing.assert_allclose(score(Entropy(), logits), wanted, rtol=1e-9, atol=1e-12)


@given(logits=logit_arrays)
def test_its_range(logits):
    scores = score(Entropy(), logits)
    assert (scores <= 1e-12).all()
    assert (scores >= -math.log(logits.shape[1]) - 1e-12).all()


def test_equal_logits_are_as_uncertain_as_can_be():
    assert score(Entropy(), [[3.0] * 5])[0] == pytest.approx(-math.log(5))


def test_the_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0, 4.0]])
    assert score(Entropy(temperature=2), logits) == pytest.approx(score(Entropy(), logits / 2))


def test_probabilities_that_underflow_add_nothing():
    assert score(Entropy(), [[0.0, -2000.0, -3000.0]])[0] == 0


def test_a_constant_added_to_all_logits_changes_nothing():
    logits = np.array([[0.5, -1.0, 2.0], [3.0, 3.0, 0.0]])
    np.testing.assert_allclose(score(Entropy(), logits + 7), score(Entropy(), logits), rtol=1e-12)


def test_confident_rows_do_not_tie():
    scores = score(Entropy(), [[40.0, 0.0, 0.0], [60.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
    assert scores[0] < scores[1] < scores[2] < 0
