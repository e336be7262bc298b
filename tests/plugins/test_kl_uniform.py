"""kl_uniform: the definition, and that it is the divergence up to a constant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from logit_oracles import logit_arrays, score, softmax

from oodcore_plugins.kl_uniform import KLUniform


@given(logits=logit_arrays)
def test_the_definition(logits):
    wanted = [-sum(map(math.log, softmax(row))) / len(row) for row in logits]
    np.testing.assert_allclose(score(KLUniform(), logits), wanted, rtol=1e-9, atol=1e-9)


@given(logits=logit_arrays)
def test_it_is_the_divergence_from_uniform_and_log_k(logits):
    count = logits.shape[1]
    divergence = [sum(math.log(1 / count / p) / count for p in softmax(row)) for row in logits]
    wanted = np.array(divergence) + math.log(count)
    np.testing.assert_allclose(score(KLUniform(), logits), wanted, rtol=1e-9, atol=1e-9)


def test_equal_logits_give_its_minimum():
    assert score(KLUniform(), [[-2.0] * 7])[0] == pytest.approx(math.log(7))


def test_the_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0, 4.0]])
    assert score(KLUniform(temperature=2), logits) == pytest.approx(score(KLUniform(), logits / 2))


def test_it_stays_finite_where_probabilities_underflow():
    assert score(KLUniform(), [[0.0, -3000.0, -3000.0]])[0] == pytest.approx(2000)
