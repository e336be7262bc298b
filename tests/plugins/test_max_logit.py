"""max_logit: the definition and its corners."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from logit_oracles import logit_arrays, score

from oodcore_plugins.max_logit import MaxLogit


@given(logits=logit_arrays, shift=st.floats(-100, 100))
def test_the_definition_and_what_a_constant_adds(logits, shift):
    assert score(MaxLogit(), logits).tolist() == [max(row) for row in logits.tolist()]
    np.testing.assert_array_equal(score(MaxLogit(), logits + shift), (logits + shift).max(axis=1))


def test_negative_logits_ties_and_a_single_class():
    assert score(MaxLogit(), [[-5.0, -2.0], [-3.0, -3.0]]).tolist() == [-2, -3]
    assert score(MaxLogit(), [[-4.0], [4.0]]).tolist() == [-4, 4]
