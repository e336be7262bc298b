"""msp: the definition, its range and its corners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logit_oracles import logit_arrays, score, softmax

from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore_plugins.msp import MSP


@given(logits=logit_arrays, temperature=st.floats(0.5, 100))
def test_the_definition(logits, temperature):
    wanted = [max(softmax(row / temperature)) for row in logits]
    np.testing.assert_allclose(score(MSP(temperature=temperature), logits), wanted, rtol=1e-12)


@given(logits=logit_arrays, shift=st.floats(-100, 100))
def test_its_range_and_what_does_not_matter(logits, shift):
    scores = score(MSP(), logits)
    assert (scores <= 1).all()
    assert (scores >= 1 / logits.shape[1] * (1 - 1e-12)).all()
    np.testing.assert_allclose(score(MSP(), logits + shift), scores, rtol=1e-11)
    np.testing.assert_allclose(score(MSP(), logits[:, ::-1].copy()), scores, rtol=1e-12)


def test_equal_logits_and_a_single_class():
    np.testing.assert_allclose(score(MSP(), np.full((2, 5), 3.0)), 0.2)
    assert score(MSP(), [[-7.0], [700.0]]).tolist() == [1, 1]


def test_float32_would_have_tied_what_float64_tells_apart():
    scores = score(MSP(), [[18.0, 0.0], [20.0, 0.0], [30.0, 0.0]])
    assert scores[0] < scores[1] < scores[2] < 1
    assert (scores.astype(np.float32) == 1).all()


def test_logits_beyond_the_exponential():
    assert score(MSP(), [[1e4, 0.0], [-1e4, -1e4], [1e308, 0.0]]).tolist() == [1, 0.5, 1]


@pytest.mark.parametrize("temperature", [0, -1.0, "1", True])
def test_temperatures_that_cannot_be(temperature):
    with pytest.raises(ConfigurationError, match="temperature"):
        registry.build("scorer", {"kind": "msp", "temperature": temperature})
