"""gen: the definition, over all and over the largest probabilities, and confident rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from logit_oracles import logit_arrays, score, softmax
from pydantic import ValidationError

from oodcore_plugins.gen import GEN, log_variance


def naive(row, gamma: float, top: int) -> float:
    total = 0.0
    probabilities = softmax(row)
    for number in sorted(range(len(row)), key=lambda k: -row[k])[:top]:
        others = math.fsum(p for k, p in enumerate(probabilities) if k != number)
        total -= probabilities[number] ** gamma * others**gamma
    return total


@given(
    logits=logit_arrays,
    gamma=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    top=st.sampled_from([1, 2, 3, 100]),
)
def test_the_definition(logits, gamma, top):
    wanted = [naive(row, gamma, top) for row in logits]
    given = score(GEN(gamma=gamma, top=top), logits)
    np.testing.assert_allclose(given, wanted, rtol=1e-9, atol=1e-12)


def test_equal_logits():
    wanted = -5 * (1 / 5 * 4 / 5) ** 0.1
    assert score(GEN(), [[2.0] * 5])[0] == pytest.approx(wanted)


def test_one_class_is_certain():
    assert score(GEN(), [[3.0], [-2.0]]).tolist() == [0, 0]


def test_confident_rows_do_not_tie():
    scores = score(GEN(top=1), [[40.0, 0.0], [60.0, 0.0], [80.0, 0.0]])
    wanted = [-math.exp(-4), -math.exp(-6), -math.exp(-8)]
    np.testing.assert_allclose(scores, wanted, rtol=1e-9)


def test_a_tie_of_the_two_largest():
    assert score(GEN(), [[50.0, 50.0, -50.0]])[0] == pytest.approx(
        -2 * 0.25**0.1 - math.exp(-10) * 2**-0.1, rel=1e-9
    )


@pytest.mark.parametrize("gamma", [0, -0.1, 1.5])
def test_exponents_outside_its_range_are_refused(gamma):
    with pytest.raises(ValidationError, match="gamma"):
        GEN(gamma=gamma)


def test_the_gradient_is_finite_where_a_probability_is_one():
    logits = torch.tensor([[900.0, 0.0, -900.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad((0.1 * log_variance(leaf)).exp().sum(), leaf)
    assert torch.isfinite(gradient).all()
