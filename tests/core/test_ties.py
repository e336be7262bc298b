"""Ties: what belongs together, and that nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oodcore.calibration import Calibration
from oodcore.ties import Ties

numbers = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, 1.0 + 1e-12, 2.0])


@pytest.mark.parametrize("draw", ["normal", "uniform", "exponential", "standard_cauchy"])
@pytest.mark.parametrize("size", [20, 300, 5000])
def test_scores_of_different_rows_are_what_they_are(draw, size):
    generator = np.random.default_rng(0)
    known, asked = (np.sort(getattr(generator, draw)(size=size)) for _ in range(2))
    ties = Ties(known)
    np.testing.assert_array_equal(ties.scores, known)
    np.testing.assert_array_equal(ties.settled(asked), asked)
    defined = [(1 + sum(known <= one)) / (size + 1) for one in asked[:50]]
    np.testing.assert_array_equal(Calibration(known).p_values(asked[:50]), defined)


def test_one_score_in_many_rows_is_the_largest_of_its_copies():
    generator = np.random.default_rng(0)
    copies = 2 + 1e-6 * np.arange(30)
    known = np.sort(np.concatenate([generator.normal(size=300), copies]))
    ties = Ties(known)
    asked = np.array([2 - 1e-6, 2.0, 2 + 31e-6, 1.99, 2.01])
    np.testing.assert_array_equal(ties.settled(asked), [*3 * [copies[-1]], 1.99, 2.01])
    assert (ties.scores == copies[-1]).sum() == 30


def test_two_of_a_score_are_no_group():
    known = np.array([0.0, 1.0, 1.0, 2.0, 3.0, 4.0])
    assert Ties(known).settled(np.array([1 - 1e-9]))[0] == 1 - 1e-9


@given(
    known=arrays(np.float64, st.integers(1, 40), elements=numbers),
    asked=arrays(np.float64, st.integers(1, 40), elements=numbers),
)
def test_the_order_stays_and_known_scores_settle_as_any_other(known, asked):
    known, asked = np.sort(known), np.sort(asked)
    ties = Ties(known)
    assert (np.diff(ties.settled(asked)) >= 0).all()
    assert (np.diff(ties.scores) >= 0).all()
    np.testing.assert_array_equal(ties.settled(known), ties.scores)
