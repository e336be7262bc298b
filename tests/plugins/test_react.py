"""react: the percentile of all activations, and what is clipped there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from oodcore import Detector, Features, Head
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry
from oodcore_plugins import react
from oodcore_plugins.react import percentile

HEAD = Head(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double())


def features(seed: int, count: int = 40) -> Features:
    rows = np.abs(np.random.default_rng(seed).normal(size=(count, 5)))
    return Features(embeddings=torch.from_numpy(rows), head=HEAD)


def energy(rows: np.ndarray) -> np.ndarray:
    return np.log(np.exp(rows @ HEAD.weight.numpy().T).sum(axis=1))


@given(
    values=arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6)),
    percent=st.floats(0.1, 100),
)
def test_the_percentile_is_numpys(values, percent):
    wanted = np.percentile(values, percent)
    assert percentile(torch.from_numpy(values), percent) == pytest.approx(
        wanted, rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize("percent", [0.001, 50, 90, 99.999, 100])
@pytest.mark.parametrize("kind", ["dense", "many zeros", "sorted", "columns", "constant"])
def test_the_percentile_of_more_numbers_than_are_looked_at_together(kind, percent, monkeypatch):
    monkeypatch.setattr(react, "SAMPLE", 64)
    values = np.random.default_rng(0).normal(size=(500, 16))
    if kind == "many zeros":
        values = values.clip(0)
    elif kind == "sorted":
        values = np.sort(values.ravel()).reshape(500, 16)
    elif kind == "columns":
        values += 100 * np.arange(16)
    elif kind == "constant":
        values[:] = 3.0
    wanted = np.percentile(values, percent)
    assert percentile(torch.from_numpy(values), percent) == pytest.approx(wanted, rel=1e-9)


@given(value=st.floats(-1e6, 1e6), count=st.integers(1, 50), percent=st.floats(0.1, 100))
def test_a_percentile_of_equal_numbers_is_that_number(value, count, percent):
    # DICE and VRA compare with it numbers that are equal to it.
    assert percentile(torch.full((count,), value, dtype=torch.float64), percent) == value


def test_a_guess_that_holds_looks_at_few_numbers():
    values = torch.from_numpy(np.random.default_rng(0).random(1_000_000))
    below, around = react._around(values, 900_000, 900_001)
    assert 0 < below <= 900_000
    assert len(around) < 100_000
    ordered = values.sort().values
    assert float(around.sort().values[900_000 - below]) == float(ordered[900_000])


@pytest.mark.parametrize("percent", [1, 50, 90, 99.5, 100])
def test_the_definition(percent):
    train, asked = features(0), features(1)
    shaper = {"kind": "react", "percentile": percent}
    scores = Detector(scorer="energy", shapers=[shaper]).fit(train).score(asked)
    clipped = np.minimum(asked.embeddings.numpy(), np.percentile(train.embeddings, percent))
    np.testing.assert_allclose(scores, energy(clipped), rtol=1e-12)


def test_nothing_is_clipped_below_the_largest_activation():
    train = features(0)
    shaped = Detector(scorer="energy", shapers=[{"kind": "react", "percentile": 100}]).fit(train)
    np.testing.assert_array_equal(shaped.score(train), Detector(scorer="energy").score(train))


def test_beyond_its_sample_the_percentile_is_of_a_part_whatever_the_batches():
    train, asked = features(0, 300), features(1)
    shaper = {"kind": "react", "sample": 50}
    scores = [
        Detector(scorer="energy", shapers=[shaper], batch_size=size).fit(train).score(asked)
        for size in (7, 300)
    ]
    np.testing.assert_array_equal(*scores)
    exact = Detector(scorer="energy", shapers=["react"]).fit(train).score(asked)
    assert not np.array_equal(scores[0], exact)
    np.testing.assert_allclose(scores[0], exact, atol=0.5)


def test_a_negative_threshold_is_refused():
    rows = Features(embeddings=-features(0).embeddings, head=HEAD)
    with pytest.raises(DataError, match="90th percentile of the activations is -"):
        Detector(scorer="energy", shapers=["react"]).fit(rows)


def test_rows_of_zeros_stay():
    zeros = Features(embeddings=torch.zeros(4, 5).double(), head=HEAD)
    scores = Detector(scorer="energy", shapers=["react"]).fit(zeros).score(zeros)
    np.testing.assert_allclose(scores, np.log(3))


def test_scorers_fitted_behind_it_see_clipped_rows():
    train, asked = features(0), features(1)
    scorer = {"kind": "knn", "k": 1, "normalize": False}
    shaper = {"kind": "react", "percentile": 60}
    scores = Detector(scorer=scorer, shapers=[shaper]).fit(train).score(asked)
    limit = np.percentile(train.embeddings, 60)
    one, other = (np.minimum(rows.embeddings.numpy(), limit) for rows in (train, asked))
    wanted = -np.linalg.norm(other[:, None] - one, axis=2).min(axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-9)


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_percentiles_that_cannot_be(percent):
    with pytest.raises(ConfigurationError, match="percentile"):
        registry.build("shaper", {"kind": "react", "percentile": percent})
