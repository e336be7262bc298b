"""A calibration keeps its promises: false-alarm rate and false discovery rate, to the last tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crepes.base import p_values_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import false_discovery_control

from oodcore import Detector
from oodcore.calibration import Calibration, check_rows
from oodcore.errors import ConfigurationError, DataError

tied = st.integers(-4, 4).map(float)
scores = st.integers(1, 60).flatmap(lambda n: arrays(np.float64, n, elements=tied))
rates = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.29, 1 - 0.9, 0.5, 0.9, 0.99]) | st.floats(
    0.001, 0.999
)


@settings(deadline=None)
@given(scores, scores)
def test_p_values_equal_their_definition_and_crepes(calibration, new):
    p = Calibration(calibration).p_values(new)
    counted = (1 + (calibration[None, :] <= new[:, None]).sum(1)) / (len(calibration) + 1)
    np.testing.assert_array_equal(p, counted)
    # crepes takes non-conformity scores: high is strange
    np.testing.assert_array_equal(p, p_values_batch(-calibration, -new, smoothing=False))
    assert p.dtype == np.float64
    assert ((p > 0) & (p <= 1)).all()


@settings(deadline=None, max_examples=200)
@given(scores, scores, rates)
def test_flagged_means_a_p_value_of_at_most_the_rate(known, new, rate):
    calibration = Calibration(known)
    rank = math.floor(rate * (len(known) + 1) + 1e-9)
    if rank < 1:
        with pytest.raises(ConfigurationError, match="needs at least"):
            calibration.flagged(new, rate)
        return
    flagged = calibration.flagged(new, rate)
    assert flagged.dtype == np.bool_
    p = calibration.p_values(new)
    np.testing.assert_array_equal(flagged, p <= rate + 1e-9 / (len(known) + 1))
    assert calibration.threshold(rate) == sorted(known)[min(rank, len(known)) - 1]
    np.testing.assert_array_equal(flagged, new < calibration.threshold(rate))


def test_a_rate_off_by_one_rounding_keeps_its_rank():
    calibration = Calibration(np.arange(99.0))
    assert 1 - 0.9 < 0.1
    assert calibration.threshold(1 - 0.9) == calibration.threshold(0.1) == 9.0
    assert Calibration(np.arange(99.0)).threshold(0.29) == 28.0  # 0.29 * 100 is 28.999999999999996
    assert Calibration([1.0, 2.0]).threshold(1 - 1e-16 * 2) == 2.0


@settings(deadline=None)
@given(rates, st.integers(1, 400))
def test_too_few_scores_say_how_many_are_needed(rate, rows):
    def enough(count):
        return math.floor(rate * (count + 1) + 1e-9) >= 1

    calibration = Calibration(np.zeros(rows))
    if enough(rows):
        assert calibration.threshold(rate) == 0
        check_rows(rows, rate)
        return
    needed = next(count for count in range(1, 2000) if enough(count))
    with pytest.raises(
        ConfigurationError, match=f"at least {needed} calibration scores and there "
    ):
        calibration.threshold(rate)
    with pytest.raises(ConfigurationError, match=f"at least {needed} calibration scores and there"):
        check_rows(rows, rate)
    Calibration(np.zeros(needed)).threshold(rate)


@pytest.mark.parametrize("rows", [1, 2, 6, 18, 19, 50, 99, 998, 12345])
def test_the_rate_that_the_message_offers_works(rows):
    calibration = Calibration(np.arange(float(rows)))
    with pytest.raises(ConfigurationError, match=f"there are {rows}:") as caught:
        calibration.threshold(0.9 / (rows + 1))
    offered = float(str(caught.value).rsplit(" ", 1)[1])
    assert calibration.threshold(offered) == 0
    assert offered <= 1.01 / (rows + 1)


def test_a_tiny_rate_still_gets_its_answer():
    with pytest.raises(ConfigurationError, match="at least 999999 calibration"):
        Calibration([0.0]).threshold(1e-6)
    with pytest.raises(ConfigurationError, match="calibration scores"):
        Calibration([0.0]).threshold(5e-324)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, 5, math.nan, math.inf, True, "0.05", None, 1j])
def test_what_is_no_rate_is_refused(rate):
    calibration = Calibration(np.arange(100.0))
    for ask in (calibration.threshold, lambda r: calibration.flagged([0.0], r)):
        with pytest.raises(ConfigurationError, match="false-alarm rate must be"):
            ask(rate)
    with pytest.raises(ConfigurationError, match="fdr must be"):
        calibration.discoveries([0.0], rate)


def test_what_is_no_score_is_refused():
    for wrong in ([], [math.nan], [0.0, -math.inf], np.zeros((2, 2))):
        with pytest.raises(DataError, match="calibration scores"):
            Calibration(wrong)
    calibration = Calibration(np.arange(100.0))
    for ask in (
        calibration.p_values,
        lambda s: calibration.flagged(s, 0.1),
        lambda s: calibration.discoveries(s, 0.1),
    ):
        with pytest.raises(DataError, match="row 1 is inf"):
            ask([0.0, math.inf])
        assert ask(np.empty(0)).shape == (0,)


def test_the_scores_are_a_sorted_copy_that_nothing_changes():
    given_ = np.array([3.0, 1.0, 2.0])
    calibration = Calibration(given_)
    given_[0] = -100
    assert list(calibration.scores) == [1.0, 2.0, 3.0]
    assert len(calibration) == 3
    with pytest.raises(ValueError, match="read-only"):
        calibration.scores[0] = 9.0
    assert Calibration(np.float32([3, 1, 2])).scores.dtype == np.float64
    new = np.array([2.0, 0.0])
    new.flags.writeable = False
    calibration.p_values(new)
    calibration.flagged(new, 0.5)
    calibration.discoveries(new, 0.5)


def test_equal_scores_make_equal_calibrations():
    one, other = Calibration([1.0, -0.0]), Calibration([0.0, 1.0])
    assert one == other
    assert hash(one) == hash(other)
    assert one != Calibration([0.0, 2.0])
    assert one != "calibration"


@settings(deadline=None, max_examples=200)
@given(scores, scores, st.sampled_from([0.013, 0.051, 0.103, 0.307, 0.501]))
def test_discoveries_equal_scipy(known, new, fdr):
    calibration = Calibration(known)
    adjusted = false_discovery_control(calibration.p_values(new))
    np.testing.assert_array_equal(calibration.discoveries(new, fdr), adjusted <= fdr)


def test_discoveries_equal_scipy_without_ties():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        calibration = Calibration(rng.normal(size=rng.integers(1, 60)))
        new = rng.normal(rng.choice([0, -1, -2], size=rng.integers(1, 30)))
        adjusted = false_discovery_control(calibration.p_values(new))
        flagged = calibration.discoveries(new, 0.2037)
        np.testing.assert_array_equal(flagged, adjusted <= 0.2037)
        found += 0 < flagged.sum() < len(new)
    assert found > 50


def test_discoveries_find_what_is_far_away():
    calibration = Calibration(np.random.default_rng(0).normal(size=999))
    far, near = np.full(50, -10.0), np.zeros(50)
    found = calibration.discoveries(np.r_[far, near], 0.1)
    assert found[:50].all()
    assert not found[50:].any()
    assert not calibration.discoveries(near, 0.1).any()


@pytest.mark.parametrize("levels", [None, 40, 5, 2, 1])
@pytest.mark.parametrize("rows", [19, 100, 333])
def test_false_alarms_stay_within_the_rate_over_many_draws(levels, rows):
    """Marginally over calibration and new rows, from no ties to nothing but ties."""
    rng = np.random.default_rng([rows, levels or 0])

    def draw(*shape):
        values = rng.normal(size=shape)
        return values if levels is None else np.digitize(values, np.linspace(-2, 2, levels))

    draws, new = 1500, 40
    for rate in (0.053, 0.1, 0.3):
        shares = [Calibration(draw(rows)).flagged(draw(new), rate).mean() for _ in range(draws)]
        error = np.std(shares) / math.sqrt(draws)
        assert np.mean(shares) <= rate + 4 * error
        if levels is None:
            assert np.mean(shares) >= math.floor(rate * (rows + 1)) / (rows + 1) - 4 * error


def test_false_discoveries_stay_within_their_rate():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(600):
        inside, outside = rng.normal(0, 1, 80), rng.normal(-3, 1, 20)
        found = Calibration(rng.normal(0, 1, 300)).discoveries(np.r_[inside, outside], 0.2)
        shares.append(found[:80].sum() / max(found.sum(), 1))
    error = np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) <= 0.2 * 0.8 + 4 * error
    assert np.mean(shares) >= 0.1


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1.0, 1e12, 1e300])
def test_what_is_below_by_rounding_counts_as_equal(scale):
    # A third of all rows are one and the same, far below the others.
    generator = np.random.default_rng(0)
    known = np.where(np.arange(300) % 3 == 0, -1000.0, generator.normal(size=300) - 5) * scale
    calibration = Calibration(known)
    same = -1000.0 * scale * (1 + 1e-5 * generator.uniform(-1, 1, 50))
    assert not calibration.flagged(same, 0.05).any()
    np.testing.assert_array_equal(calibration.p_values(same), 101 / 301)
    assert not calibration.discoveries(same, 0.05).any()
    assert calibration.flagged(np.array([-1001.0 * scale]), 0.05).all()


def test_scores_that_are_all_equal_and_the_largest_there_are():
    top = np.finfo(np.float64).max
    for value in (0.0, 3.0, -top, top):
        calibration = Calibration(np.full(40, value))
        np.testing.assert_array_equal(calibration.p_values([value, value * (1 - 1e-12)]), 1.0)
    np.testing.assert_array_equal(Calibration([-top, top] * 20).p_values([-top, top]), [21 / 41, 1])


def test_the_rate_holds_for_copies_of_a_row_whatever_the_batches():
    generator = np.random.default_rng(0)
    train, labels = generator.normal(size=(300, 24)), generator.integers(0, 3, 300)

    def drawn(count):
        rows = generator.normal(size=(count, 24))
        rows[generator.random(count) < 0.3] = 4.0  # one blank image, as often as that
        return rows

    detector = Detector(scorer="mahalanobis").fit((train, labels)).calibrate(drawn(400), 0.05)
    tested = drawn(300)
    decisions = []
    for size in (256, 7, 1):
        detector.batch_size = size
        decisions.append(detector.predict(tested))
    assert (decisions[0] == -1).mean() <= 0.05
    np.testing.assert_array_equal(decisions[1], decisions[0])
    np.testing.assert_array_equal(decisions[2], decisions[0])
