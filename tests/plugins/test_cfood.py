"""cfood: reverse neighbourhoods counted one by one, ties, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from oodcore import Detector
from oodcore.errors import DataError
from oodcore_plugins import cfood

SHARES = [*np.linspace(0.001, 0.1, 100), *np.linspace(0.105, 0.5, 81), *np.linspace(0.51, 0.99, 49)]


def rows(seed: int, count: int = 60, width: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)) + 1


def scores(train, asked, **fields) -> np.ndarray:
    scorer = {"kind": "cfood", "fraction": 1, **fields}
    return Detector(scorer=scorer).fit(train).score(asked)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def definition(train, asked, k: float) -> list[float]:
    known, count = unit(train), len(train)
    found = []
    for row in unit(asked):
        score = 1.0
        for share in SHARES:
            neighbour = max(int(share * count - 1), 0) + 1
            inside = 0
            for reference in known:
                others = sorted(np.sum((reference - known) ** 2, axis=1))
                inside += np.sum((reference - row) ** 2) <= others[neighbour] + 1e-12
            if inside / count >= k:
                score = share
                break
        found.append(-score)
    return found


@pytest.mark.parametrize("k", [0.01, 0.2, 1.0])
def test_it_is_its_definition(k):
    train, asked = rows(0, 25), np.concatenate([rows(1, 6), -rows(2, 3), np.zeros((1, 4))])
    given = scores(train, asked, k=k)
    wanted = definition(train, asked, k)
    # Shares that reach the same neighbour are one, of which the smallest is given.
    np.testing.assert_allclose(given, wanted, rtol=1e-12)


def test_in_small_pieces_it_is_the_same(monkeypatch):
    train, asked = rows(0), rows(1, 20)
    whole = scores(train, asked, k=0.1)
    monkeypatch.setattr(cfood, "PAIRS", 1)
    np.testing.assert_array_equal(scores(train, asked, k=0.1), whole)


def test_the_norm_of_an_embedding_does_not_matter():
    train, asked = rows(0), rows(1, 20)
    np.testing.assert_array_equal(scores(7 * train, asked), scores(train, 0.01 * asked))


def test_rows_that_nobody_counts_score_minus_one():
    assert scores(rows(0) + 9, -rows(1, 3) - 9).tolist() == [-1] * 3


def test_copies_of_training_rows_are_inside_whatever_rounding_does():
    train = np.repeat(rows(0, 4, 7), 25, axis=0)
    assert (scores(train, 3 * train[::5], k=0.25) == -SHARES[0]).all()


def test_the_sample_is_a_share_of_the_rows_and_depends_on_the_seed():
    train, asked = rows(0, 400), rows(1, 40)
    sizes = []
    for seed in (0, 1):
        detector = Detector(scorer={"kind": "cfood", "fraction": 0.2, "seed": seed}).fit(train)
        sizes.append(len(detector.ready().scorer["references"]))
    assert all(50 < size < 110 for size in sizes)
    one, other = (scores(train, asked, fraction=0.2, seed=seed) for seed in (0, 1))
    assert (one != other).any()


@pytest.mark.parametrize(("train", "fraction"), [(rows(0, 1), 1), (rows(0, 30), 1e-6)])
def test_too_few_references_are_an_error(train, fraction):
    with pytest.raises(DataError, match="reference rows, and there must be 2"):
        scores(train, train, fraction=fraction)


def test_one_dimension_and_two_rows():
    given = scores(np.array([[2.0], [-3.0]]), np.array([[1.0], [-1.0], [0.0]]))
    np.testing.assert_array_equal(given, [-SHARES[0]] * 3)


def test_the_neighbourhoods_never_leave_the_rows():
    for count in (2, 3, 7, 100, 650, 4321):
        shares, places = cfood.neighbourhoods(count)
        assert len(shares) == len(places) <= 230
        assert int(places[0]) == max(1, count // 1000)
        assert int(places[-1]) < count
        assert bool((places.diff() > 0).all())
