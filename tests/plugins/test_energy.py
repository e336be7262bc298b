"""energy: the definition, its bounds and its corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_oracles import logit_arrays, score

from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore_plugins.energy import Energy


@given(logits=logit_arrays, temperature=st.floats(0.5, 100))
def test_the_definition(logits, temperature):
    wanted = [
        temperature * math.log(math.fsum(math.exp(z / temperature) for z in row))
        for row in logits.tolist()
    ]
    scores = score(Energy(temperature=temperature), logits)
    np.testing.assert_allclose(scores, wanted, rtol=1e-10, atol=1e-10)


@given(logits=logit_arrays, shift=st.floats(-100, 100))
def test_its_bounds_and_what_a_constant_adds(logits, shift):
    scores = score(Energy(), logits)
    assert (scores >= logits.max(axis=1) - 1e-12).all()
    assert (scores <= logits.max(axis=1) + math.log(logits.shape[1]) + 1e-12).all()
    np.testing.assert_allclose(score(Energy(), logits + shift), scores + shift, atol=1e-10)


def test_equal_logits_and_a_single_class():
    np.testing.assert_allclose(score(Energy(), [[3.0] * 4]), 3 + math.log(4))
    np.testing.assert_allclose(score(Energy(temperature=2), [[3.0] * 4]), 3 + 2 * math.log(4))
    assert score(Energy(temperature=5), [[-7.0]])[0] == pytest.approx(-7)


def test_logits_beyond_the_exponential():
    np.testing.assert_allclose(
        score(Energy(), [[1e4, 0.0], [-1e4, -1e4]]), [1e4, -1e4 + math.log(2)]
    )


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperatures_that_cannot_be(temperature):
    with pytest.raises(ConfigurationError, match="temperature"):
        registry.build("scorer", {"kind": "energy", "temperature": temperature})
