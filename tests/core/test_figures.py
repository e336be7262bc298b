"""Figures show ID and OOD together for any finite scores, and hold no score themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oodcore import figures
from oodcore.metrics import curve

finite = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2).map(float)
scores = st.integers(1, 30).flatmap(lambda n: arrays(np.float64, n, elements=finite))


def drawn(inside, outside, threshold=None):
    named = {"id": np.asarray(inside, float), "ood": np.asarray(outside, float)}
    points = {"ood": curve(named["id"], named["ood"])}
    return figures.draw(named, "id", points, threshold)


@settings(deadline=None, max_examples=300)
@given(scores, scores)
def test_a_figure_of_any_finite_scores_is_sound(inside, outside):
    figure = drawn(inside, outside)
    assert figure.sound()
    assert len(figure.edges) == figures.BINS + 1
    assert sum(figure.counts["id"]) == len(inside)
    assert sum(figure.counts["ood"]) == len(outside)
    assert figure.roc["ood"][0] == (0, 0)
    assert figure.roc["ood"][-1] == (1, 1)


@pytest.mark.parametrize(
    "extreme", [0.0, 5e-324, -1e-313, 1e-300, 1.0, -3e7, 1.7e308, np.finfo(float).max]
)
def test_constant_scores_stand_in_the_middle(extreme):
    figure = drawn([extreme] * 3, [extreme])
    assert figure.sound()
    assert figure.edges[0] <= extreme <= figure.edges[-1]


@pytest.mark.parametrize("start", [1.0, -1e8, 1e300])
def test_scores_a_rounding_apart_get_bins_that_differ(start):
    assert drawn([start, np.nextafter(start, np.inf)], [start]).sound()


def test_far_outliers_do_not_squash_the_in_distribution_scores():
    rng = np.random.default_rng(0)
    inside = rng.normal(-50, 5, 2000)
    figure = drawn(inside, np.r_[rng.normal(-80, 5, 500), np.full(500, -1e6)])
    assert sum(count > 0 for count in figure.counts["id"]) >= 5
    assert figure.counts["ood"][0] >= 500
    np.testing.assert_array_less(-200, figure.edges[0])


def test_counts_are_those_of_numpy_within_the_edges():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 500), rng.normal(0, 1, 300)
    figure = drawn(inside, outside)
    clipped = np.clip(inside, figure.edges[0], figure.edges[-1])
    expected, _ = np.histogram(clipped, figure.edges)
    np.testing.assert_array_equal(figure.counts["id"], expected)
    whole = np.arange(figures.BINS + 1.0)
    figure = drawn(whole, [0.0])
    np.testing.assert_allclose(figure.edges, whole, atol=1e-12)
    assert figure.counts["id"][-1] == 2  # a score on an edge is in the bin above it, but the last


def test_a_thinned_curve_stays_near_the_full_one():
    rng = np.random.default_rng(0)
    points = curve(rng.normal(1.5, 1, 5000), rng.normal(0, 1, 7000))
    kept = np.array(figures.thinned(points))
    assert 150 < len(kept) <= figures.ROC_POINTS
    across = points.ood_accepted / points.ood_accepted[-1]
    up = points.id_accepted / points.id_accepted[-1]
    np.testing.assert_allclose(np.interp(across + up, kept.sum(1), kept[:, 0]), across, atol=0.01)
    few = curve([2.0, 1.0], [0.0, 1.0])
    assert figures.thinned(few) == ((0, 0), (0, 0.5), (0.5, 1), (1, 1))


def test_no_score_is_kept():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    figure = drawn(inside, outside)
    assert not np.isin(figure.edges[1:-1], np.r_[inside, outside]).any()


def test_damage_is_noticed():
    figure = drawn([1.0, 2.0, 3.0], [0.0, 1.5])
    counts = dict(figure.counts)
    for harm in (
        {"edges": figure.edges[::-1]},
        {"edges": (0.0,)},
        {"edges": (*figure.edges[:-1], float("inf"))},
        {"counts": {**counts, "id": counts["id"][1:]}},
        {"counts": {**counts, "id": (-1, *counts["id"][1:])}},
        {"counts": {**counts, "id": (0,) * figures.BINS}},
        {"roc": {"ood": ((0.0, 0.0),)}},
        {"roc": {"ood": ((0.0, 0.0), (1.0, 1.5))}},
        {"threshold": float("nan")},
    ):
        assert not replace(figure, **harm).sound(), harm


@pytest.mark.parametrize("rows", [1, 2, 199, 200, 201, 5000])
def test_accuracy_over_coverage_ends_with_all_rows(rows):
    risks = np.linspace(0, 0.5, rows)
    points = figures.covered(risks)
    assert len(points) == min(rows, figures.ROC_POINTS)
    assert points[0] == (pytest.approx(1 / rows, abs=1e-5), pytest.approx(1 - risks[0], abs=1e-5))
    assert points[-1] == (1.0, pytest.approx(1 - risks[-1], abs=1e-5))
    assert all(a < b for (a, _), (b, _) in pairwise(points))
    own = {"id_test": np.arange(float(rows))}
    figure = figures.draw(own, "id_test", {}, risks=risks)
    assert figure.coverage == points
    assert figure.sound()
