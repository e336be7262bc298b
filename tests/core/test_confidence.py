"""Confidence is judged as by its naive definitions, ties by the mean over their orders."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import confidence, metrics
from oodcore.errors import ConfigurationError, DataError

judged = st.lists(st.tuples(st.integers(-2, 2).map(float), st.booleans()), min_size=1, max_size=30)
few = st.lists(st.tuples(st.integers(0, 1).map(float), st.booleans()), min_size=1, max_size=5)


def apart(pairs):
    scores, correct = zip(*pairs, strict=True)
    return np.array(scores), np.array(correct)


def by_hand(scores, correct):
    """Error rates among the first i rows, as the mean over all orders that sort the scores."""
    orders = [
        order
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    every = []
    for order in orders:
        wrong = [not correct[row] for row in order]
        every.append([sum(wrong[:i]) / i for i in range(1, len(wrong) + 1)])
    return np.mean(every, axis=0)


@settings(max_examples=60, deadline=None)
@given(few)
def test_risks_are_means_over_the_orders_of_ties(pairs):
    scores, correct = apart(pairs)
    risks = by_hand(scores, correct)
    assert confidence.risks(scores, correct) == pytest.approx(risks, abs=1e-12)
    assert confidence.aurc(scores, correct) == pytest.approx(risks.mean(), abs=1e-12)
    for kept in range(1, len(pairs) + 1):
        found = confidence.accuracy_at(kept / len(pairs), scores, correct)
        assert found == pytest.approx(1 - risks[kept - 1], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(few)
def test_the_excess_is_over_the_best_of_all_scores(pairs):
    scores, correct = apart(pairs)
    best = min(
        by_hand(np.arange(len(scores))[::-1], list(order)).mean()
        for order in set(permutations(correct.tolist()))
    )
    found = confidence.eaurc(scores, correct)
    assert found == pytest.approx(confidence.aurc(scores, correct) - best, abs=1e-12)


@settings(deadline=None)
@given(judged)
def test_the_excess_is_zero_for_a_perfect_score_and_never_below(pairs):
    scores, correct = apart(pairs)
    assert 0 <= confidence.eaurc(scores, correct) <= confidence.aurc(scores, correct) + 1e-12
    assert confidence.eaurc(correct.astype(float), correct) == pytest.approx(0, abs=1e-12)


def test_the_excess_has_the_papers_limit():
    rng = np.random.default_rng(0)
    rate, rows = 0.2, 100_000
    correct = np.arange(rows) >= rate * rows
    scores = rng.random(rows)
    limit = rate + (1 - rate) * np.log(1 - rate)
    found = confidence.aurc(scores, correct) - confidence.eaurc(scores, correct)
    assert found == pytest.approx(limit, abs=1e-4)


def test_accuracy_at_a_coverage():
    scores, correct = np.arange(10.0), np.array([0] * 2 + [1] * 8)
    assert confidence.accuracy_at(0.8, scores, correct) == 1
    # 0.9 times 10 is 9 rows, though a little more in binary; 0.91 takes a tenth
    assert confidence.accuracy_at(0.9, scores, correct) == pytest.approx(8 / 9)
    assert confidence.accuracy_at(0.91, scores, correct) == pytest.approx(0.8)
    assert confidence.accuracy_at(0.01, scores, correct) == 1
    assert confidence.accuracy_at(1, scores, correct) == metrics.accuracy(correct, np.ones(10, int))
    for wrong in (0, -0.1, 1.01):
        with pytest.raises(ConfigurationError, match="coverage must be above 0 and at most 1"):
            confidence.accuracy_at(wrong, scores, correct)


def test_what_is_given_is_checked_and_not_modified():
    scores, correct = np.array([3.0, 1.0, 2.0]), np.array([True, False, True])
    for array in (scores, correct):
        array.flags.writeable = False
    for measure in (confidence.aurc, confidence.eaurc, confidence.risks):
        measure(scores, correct)
        with pytest.raises(DataError, match=r"correct must be \[3\]"):
            measure(scores, correct[:2])
        with pytest.raises(DataError, match="row 1 is nan"):
            measure([0.0, np.nan], [True, True])
    assert scores.tolist() == [3, 1, 2]
