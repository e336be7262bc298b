"""The measures agree with scikit-learn, with naive sums over pairs, and with their own laws."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from oodcore import metrics
from oodcore.errors import ConfigurationError, DataError, OodcoreError
from oodcore.metrics import measures

# A handful of values makes nearly every draw full of ties.
tied = st.integers(-3, 3).map(float)
real = st.floats(-1e300, 1e300, allow_nan=False).map(lambda x: round(x, 3) if abs(x) < 1e9 else x)


def scores(elements=tied, max_size=40):
    return st.integers(1, max_size).flatmap(lambda n: arrays(np.float64, n, elements=elements))


any_scores = scores(tied) | scores(real)


def fpr(negative, positive, level=0.95):
    """The least share of ``negative`` above a threshold that ``level`` of ``positive`` reaches."""
    shares = [
        np.mean(negative >= t) for t in np.unique(positive) if np.mean(positive >= t) >= level
    ]
    return min(shares)


def by_scikit_learn(inside, outside):
    labels = np.r_[np.ones(len(inside)), np.zeros(len(outside))]
    both = np.r_[inside, outside]

    def read(y, s):
        false, true, _ = roc_curve(y, s, drop_intermediate=False)
        return false[np.flatnonzero(true >= 0.95)[0]]

    return {
        "auroc": roc_auc_score(labels, both),
        "aupr_id": average_precision_score(labels, both),
        "aupr_ood": average_precision_score(1 - labels, -both),
        "fpr95_id": read(labels, both),
        "fpr95_ood": read(1 - labels, -both),
    }


@settings(max_examples=150, deadline=None)
@given(any_scores, any_scores)
def test_measures_equal_scikit_learn(inside, outside):
    result = measures(inside, outside)
    assert tuple(result) == metrics.SEPARATION
    assert all(type(value) is float for value in result.values())
    assert result == pytest.approx(by_scikit_learn(inside, outside), rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(any_scores, any_scores)
def test_measures_equal_counts_over_pairs(inside, outside):
    result = measures(inside, outside)
    pairs = inside[:, None] - outside[None, :]
    assert result["auroc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)), rel=1e-12)
    assert result["fpr95_id"] == fpr(outside, inside)
    assert result["fpr95_ood"] == fpr(-inside, -outside)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_many_rows_equal_scikit_learn(seed, dtype):
    rng = np.random.default_rng(seed)
    inside = (rng.normal(1, 2, 3000) * 5).astype(dtype)
    outside = (rng.normal(0, 3, 1234) * 5).astype(dtype)
    assert measures(inside, outside) == pytest.approx(by_scikit_learn(inside, outside), rel=1e-12)


@settings(deadline=None)
@given(any_scores, any_scores, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(inside, outside, random):
    shuffled = list(inside), list(outside)
    for part in shuffled:
        random.shuffle(part)
    assert measures(*shuffled) == measures(inside, outside)


@settings(deadline=None)
@given(scores(tied), scores(tied), st.sampled_from([np.arctan, np.exp, lambda s: 7 * s - 1e6]))
def test_a_monotone_transform_changes_nothing(inside, outside, transform):
    assert measures(transform(inside), transform(outside)) == measures(inside, outside)


@settings(deadline=None)
@given(any_scores, any_scores)
def test_swapping_the_classes_and_the_sign_swaps_the_polarities(inside, outside):
    there, back = measures(inside, outside), measures(-outside, -inside)
    assert back["auroc"] == there["auroc"]
    assert (back["aupr_id"], back["fpr95_id"]) == (there["aupr_ood"], there["fpr95_ood"])
    assert measures(outside, inside)["auroc"] == pytest.approx(1 - there["auroc"], abs=1e-15)


@pytest.mark.parametrize("rows", [(1, 1), (3, 40), (100, 7)])
def test_perfect_separation_and_constant_scores(rows):
    inside, outside = np.linspace(1, 2, rows[0]), np.linspace(-2, 0, rows[1])
    assert list(measures(inside, outside).values()) == pytest.approx([1, 0, 0, 1, 1], rel=1e-15)
    same = measures(np.zeros(rows[0]), np.zeros(rows[1]))
    assert (same["auroc"], same["fpr95_id"], same["fpr95_ood"]) == (0.5, 1, 1)
    assert same["aupr_ood"] == pytest.approx(rows[1] / sum(rows))
    correct = np.arange(rows[0]) % 3 == 0
    assert metrics.oscr(inside, correct, outside) == pytest.approx(correct.mean(), rel=1e-15)


def test_signed_zeros_are_one_score():
    assert metrics.auroc([0.0, 0.0], [-0.0]) == 0.5


def test_random_scores_have_the_base_rate_as_average_precision():
    rng = np.random.default_rng(0)
    inside, outside = rng.random(50_000), rng.random(10_000)
    assert metrics.average_precision(inside, outside, "ood") == pytest.approx(1 / 6, abs=0.005)


def test_the_arrays_are_not_modified():
    rng = np.random.default_rng(0)
    inside, outside = rng.random(50), rng.random(30)
    correct, before = rng.random(50) > 0.3, (inside.copy(), outside.copy())
    for array in (inside, outside, correct):
        array.flags.writeable = False
    measures(inside, outside)
    metrics.detection_error(inside, outside)
    metrics.oscr(inside, correct, outside)
    metrics.aurc(inside, correct)
    metrics.ece(inside, correct)
    np.testing.assert_array_equal(inside, before[0])
    np.testing.assert_array_equal(outside, before[1])


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([1.0, math.nan], [0.0], "id_scores: row 1 is nan; scores must be finite"),
        ([1.0], [0.0, 2.0, -math.inf], "ood_scores: row 2 is -inf"),
        ([], [0.0], "id_scores are empty"),
        ([1.0], np.zeros(0), "ood_scores are empty"),
        ([[1.0], [2.0]], [0.0], r"id_scores must be \[N\], one score a row, not \[2, 1\]"),
        ([[1.0], [2.0, 3.0]], [0.0], r"id_scores must be \[N\]"),
        (3.0, [0.0], r"not \[\]"),
        (["a"], [0.0], "real numbers"),
        ([1.0], np.zeros(2, complex), "ood_scores must be real numbers, not complex128"),
        ([True], [0.0], "real numbers, not bool"),
    ],
)
def test_what_is_no_score_is_refused(inside, outside, message):
    with pytest.raises(DataError, match=message):
        measures(inside, outside)


def test_fpr_at_other_levels_and_rules():
    inside = np.arange(1, 21)  # 5 % each
    outside = np.array([0, 2.5, 3.5, 30])
    assert metrics.fpr_at_tpr(inside, outside) == 0.75  # 19 of 20 reach 0.95 exactly, at score 2
    assert metrics.fpr_at_tpr(inside, outside, 0.96) == 0.75
    assert metrics.fpr_at_tpr(inside, outside, 0.9) == 0.5  # at score 3, above 2.5
    assert metrics.fpr_at_tpr(inside, outside, 1.0) == 0.75
    assert metrics.fpr_at_tpr(inside, outside, 0.05) == 0.25
    # at 0.92 nearest is 0.9, which the scores 3 and 2.5 share; at_least is 0.95
    assert metrics.fpr_at_tpr(inside, outside, 0.92) == 0.75
    assert metrics.fpr_at_tpr(inside, outside, 0.92, rule="nearest") == 0.75
    assert metrics.fpr_at_tpr(inside, outside, 0.86, rule="nearest") == 0.5
    assert metrics.fpr_at_tpr(inside, outside, 0.5, "ood") == 0.1
    for wrong in ({"tpr": 0.0}, {"tpr": 1.5}, {"positive": "in"}, {"rule": "closest"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            metrics.fpr_at_tpr(inside, outside, **wrong)


@settings(deadline=None)
@given(any_scores, any_scores, st.floats(0.01, 1), st.sampled_from(["id", "ood"]))
def test_the_nearest_rule_reads_the_last_threshold_of_the_nearest_recall(a, b, level, positive):
    wanted, other = (a, b) if positive == "id" else (-b, -a)
    points = [
        (np.mean(wanted >= t), np.mean(other >= t), t) for t in np.unique(np.r_[wanted, other])
    ]
    complete = max(t for recall, _, t in points if recall == 1)
    points = [point for point in points if point[2] >= complete]
    best = min(points, key=lambda p: (abs(p[0] - level), -p[0], p[2]))
    assert metrics.fpr_at_tpr(a, b, level, positive, "nearest") == pytest.approx(best[1])


@settings(deadline=None)
@given(any_scores, any_scores)
def test_auin_and_auout_are_trapezoids_through_the_points(inside, outside):
    def area(wanted, other):
        recall, precision = [0.0], [0.0]
        for t in np.unique(np.r_[wanted, other])[::-1]:
            hits, alarms = np.sum(wanted >= t), np.sum(other >= t)
            recall.append(hits / len(wanted))
            precision.append(hits / (hits + alarms))
        steps = zip(pairwise(recall), pairwise(precision), strict=True)
        return sum((r1 - r0) * (p0 + p1) / 2 for (r0, r1), (p0, p1) in steps)

    assert metrics.auin(inside, outside) == pytest.approx(area(inside, outside), abs=1e-12)
    assert metrics.auout(inside, outside) == pytest.approx(area(-outside, -inside), abs=1e-12)
    assert metrics.auout(inside, outside) == metrics.auin(-outside, -inside)


def test_auin_of_a_perfect_detector_misses_half_of_the_first_row():
    assert metrics.auin(np.arange(1, 11), np.zeros(7)) == pytest.approx(1 - 1 / 20)


def test_every_reading_has_a_title_and_every_metric_a_range():
    assert set(metrics.READINGS) < set(metrics.METRICS)
    points = metrics.curve([3.0, 2.0, 2.0], [2.0, 1.0])
    assert all(0 <= read(points) <= 1 for read in metrics.READINGS.values())
    nearest = metrics.fpr_at_tpr([3.0, 2.0, 2.0], [2.0, 1.0], 0.9, "ood", "nearest")
    assert metrics.READINGS["fpr90_ood_nearest"](points) == nearest == pytest.approx(2 / 3)
    assert metrics.READINGS["dterr"](points) == metrics.detection_error([3, 2, 2], [2, 1], "counts")


@settings(deadline=None)
@given(any_scores, any_scores)
def test_detection_error_is_the_best_threshold(inside, outside):
    cuts = [-np.inf, *np.r_[inside, outside]]
    missed = np.array([np.sum(inside <= t) for t in cuts])
    accepted = np.array([np.sum(outside > t) for t in cuts])
    equal = min(missed / len(inside) + accepted / len(outside)) / 2
    counts = min(missed + accepted) / (len(inside) + len(outside))
    assert metrics.detection_error(inside, outside) == pytest.approx(equal)
    assert metrics.detection_error(inside, outside, "counts") == pytest.approx(counts)


def test_detection_error_refuses_unknown_weights():
    with pytest.raises(ConfigurationError, match="'equal' or 'counts'"):
        metrics.detection_error([1.0], [0.0], "rows")


@settings(deadline=None)
@given(any_scores, any_scores, st.data())
def test_oscr_is_the_area_under_its_curve(inside, outside, data):
    correct = data.draw(arrays(np.bool_, len(inside)))
    cuts = [np.inf, *np.unique(np.r_[inside, outside])[::-1], -np.inf]
    ccr = [np.mean(correct & (inside > t)) for t in cuts]
    false = [np.mean(outside > t) for t in cuts]
    area = np.trapezoid(ccr, false) if hasattr(np, "trapezoid") else np.trapz(ccr, false)
    assert metrics.oscr(inside, correct, outside) == pytest.approx(area, abs=1e-12)


@settings(deadline=None)
@given(any_scores, st.data())
def test_aurc_of_distinct_scores_is_the_mean_of_the_risks(values, data):
    values = np.unique(values)
    correct = data.draw(arrays(np.bool_, len(values)))
    risks = [np.mean(~correct[values >= value]) for value in values]
    assert metrics.aurc(values, correct) == pytest.approx(np.mean(risks))


def test_aurc_of_ties_is_the_mean_over_their_orders():
    # one error among two rows that tie: risks (1, 1/2) or (0, 1/2)
    assert metrics.aurc([5.0, 5.0], [True, False]) == 0.5
    rng = np.random.default_rng(0)
    values, correct = rng.integers(0, 4, 60).astype(float), rng.random(60) > 0.4
    drawn = [metrics.aurc(values + rng.random(60) * 1e-6, correct) for _ in range(4000)]
    assert metrics.aurc(values, correct) == pytest.approx(np.mean(drawn), abs=4e-3)
    order = rng.permutation(60)
    assert metrics.aurc(values[order], correct[order]) == metrics.aurc(values, correct)
    assert metrics.aurc(values, np.ones(60)) == 0
    assert metrics.aurc(values, np.zeros(60, int)) == 1


def test_accuracy():
    assert metrics.accuracy([0, 1, 2, 2], np.array([0, 1, 1, 2], np.int32)) == 0.75
    for given_, labels in (([0, 1], [0]), ([], []), ([0.5], [1]), ([[0]], [[0]]), ([True], [1])):
        with pytest.raises(DataError):
            metrics.accuracy(given_, labels)


def test_ece_equals_its_definition():
    rng = np.random.default_rng(0)
    confidence = np.r_[rng.random(500), 0.0, 1.0, 0.2, 3 / 15, 0.6]
    correct = rng.random(len(confidence)) < confidence**2
    edges = [i / 15 for i in range(16)]
    expected = 0.0
    for low, high in pairwise(edges):
        rows = (confidence > low) & (confidence <= high) | ((low == 0) & (confidence == 0))
        if rows.any():
            expected += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    assert metrics.ece(confidence, correct) == pytest.approx(expected, rel=1e-12)
    assert metrics.ece([0.2, 0.3], [True, False], bins=5) == pytest.approx((0.8 + 0.3) / 2)
    assert metrics.ece([1.0, 1.0], [True, True]) == 0
    assert metrics.ece([0.0, 0.0], [True, True], bins=1) == 1


def test_ece_and_correctness_refuse_what_they_cannot_read():
    for confidence, correct, bins, message in (
        ([0.5, 1.2], [True, False], 15, "row 1 is 1.2"),
        ([-0.1], [True], 15, "row 0 is -0.1"),
        ([0.5], [True, False], 15, r"correct must be \[1\]"),
        ([0.5, 0.5], [3, 1], 15, "correct must be booleans"),
        ([0.5], ["yes"], 15, "correct must be booleans"),
        ([0.5], [True], 0, "at least 1, not 0"),
        ([0.5], [True], 2.5, "whole number"),
        ([0.5], [True], True, "whole number"),
        ([math.nan], [True], 15, "row 0 is nan"),
    ):
        with pytest.raises(OodcoreError, match=message):
            metrics.ece(confidence, correct, bins)
