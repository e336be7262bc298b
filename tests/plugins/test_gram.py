"""gram: against whole Gram matrices in NumPy, and at the edge of what they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import Detector, Features, FeatureStore
from oodcore.errors import ConfigurationError
from oodcore_plugins.gram import Gram, GramRanges, correlations

POWERS = (1, 2, 5)
LAYERS = ("one", "two")


def features(count: int, seed: int, classes: int = 3, shift: float = 0.0) -> Features:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, classes)) * 2
    means = logits.argmax(axis=1)[:, None, None] / 2 + shift
    maps = {
        "one": np.maximum(generator.normal(size=(count, 4, 6)) + means, 0).reshape(count, 4, 2, 3),
        "two": generator.normal(size=(count, 5)) + means[:, :, 0],
    }
    return Features(
        logits=torch.tensor(logits),
        layers={name: torch.tensor(value) for name, value in maps.items()},
        ids=torch.arange(count),
    )


def naive_correlations(row: np.ndarray, power: int) -> np.ndarray:
    channels = row.reshape(len(row), -1) ** power
    sums = (channels @ channels.T).sum(axis=1)
    return np.sign(sums) * np.abs(sums) ** (1 / power)


def naive_deviations(train: Features, asked: Features) -> np.ndarray:
    known, wanted = train.logits.numpy(), asked.logits.numpy()
    found = np.zeros((len(asked), len(LAYERS)))
    for column, name in enumerate(LAYERS):
        for power in POWERS:
            shown = np.array([naive_correlations(r, power) for r in train.layers[name].numpy()])
            for row, value in enumerate(asked.layers[name].numpy()):
                own = shown[known.argmax(axis=1) == wanted[row].argmax()]
                own = own if len(own) else shown
                low, high = own.min(axis=0), own.max(axis=0)
                g = naive_correlations(value, power)
                found[row, column] += (np.maximum(low - g, 0) / (np.abs(low) + 1e-6)).sum()
                found[row, column] += (np.maximum(g - high, 0) / (np.abs(high) + 1e-6)).sum()
    shares = np.exp(wanted - wanted.max(axis=1, keepdims=True))
    return found / (shares / shares.sum(axis=1, keepdims=True)).max(axis=1)[:, None]


@pytest.mark.parametrize("missing", [None, 1])
def test_is_its_definition(missing):
    train, held, asked = features(60, 0), features(25, 1), features(20, 2, shift=0.4)
    if missing is not None:
        train = train[(train.predicted != missing).nonzero().flatten()]
        assert bool((asked.predicted == missing).any())
    expected = naive_deviations(train, held).mean(axis=0)
    wanted = -(naive_deviations(train, asked) / expected).sum(axis=1)
    scorer = {"kind": "gram", "layers": LAYERS, "powers": POWERS}
    given = Detector(scorer=scorer).fit(train, held).score(asked)
    np.testing.assert_allclose(given, wanted, rtol=1e-9)
    assert (given < 0).any()


def test_embeddings_are_a_map_of_one_place():
    train, asked = features(40, 0), features(10, 1, shift=1.0)
    scorer = {"kind": "gram", "layers": ["two"], "powers": [2, 3]}
    expected = Detector(scorer=scorer).fit(train, train).score(asked)

    def plain(rows):
        return Features(embeddings=rows.layers["two"], logits=rows.logits)

    scorer = {"kind": "gram", "powers": [2, 3]}
    given = Detector(scorer=scorer).fit(plain(train), plain(train)).score(plain(asked))
    np.testing.assert_allclose(given, expected, rtol=1e-12)


def test_training_rows_leave_nothing_and_a_layer_that_none_leaves_is_not_divided_by_nothing():
    train = features(50, 0)
    detector = Detector(scorer={"kind": "gram", "layers": LAYERS}).fit(train, train)
    assert detector.learnt.scorer["expected"].tolist() == [1.0, 1.0]
    assert detector.score(train).tolist() == [0.0] * 50
    assert np.isfinite(detector.score(features(20, 1, shift=3.0))).all()


def test_a_tenth_is_held_out_where_no_rows_are_given():
    detector = Detector(scorer={"kind": "gram", "layers": LAYERS}).fit(features(200, 0))
    assert (detector.learnt.scorer["expected"] > 0).all()
    assert detector.learnt.record["held_out"]["share"] == 0.1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 10),
    st.integers(-8, 8),
    st.integers(0, 2**16),
)
def test_correlations_without_the_matrix(channels, places, power, exponent, seed):
    rows = np.random.default_rng(seed).normal(size=(3, channels, places)) * 10.0**exponent
    found = correlations(torch.tensor(rows), (power,))[:, 0].numpy()
    expected = np.array([naive_correlations(row, power) for row in rows])
    # An odd power of a channel may nearly cancel, and its root shows the rounding.
    scale = np.abs(expected).max(axis=1, keepdims=True)
    exact = np.abs(expected) > 1e-3 * scale
    np.testing.assert_allclose((found / scale)[exact], (expected / scale)[exact], rtol=1e-8)
    assert (np.abs(found) <= 1e-2 * scale)[~exact].all()


def test_correlations_stay_finite_where_powers_do_not():
    rows = torch.tensor([[[1e30], [1e-30], [0.0]], [[0.0], [0.0], [0.0]]], dtype=torch.float64)
    found = correlations(rows.requires_grad_(), (1, 10))
    assert bool(torch.isfinite(found).all())
    np.testing.assert_allclose(found[0, :, 0].detach(), [1e60, 1e60], rtol=1e-12)
    assert found[1].tolist() == [[0.0] * 3] * 2
    (slope,) = torch.autograd.grad(found.sum(), rows)
    assert bool(torch.isfinite(slope).all())


def test_chunks_change_nothing(monkeypatch):
    train, asked = features(30, 0), features(9, 1, shift=0.4)
    scorer = {"kind": "gram", "layers": LAYERS}
    whole = Detector(scorer=scorer).fit(train, train).score(asked)
    monkeypatch.setattr("oodcore_plugins.gram.NUMBERS", 1)
    again = Detector(scorer=scorer).fit(train, train).score(asked)
    np.testing.assert_allclose(again, whole, rtol=1e-12)


def test_the_state_does_not_grow_with_the_rows():
    scorer = Gram(layers=LAYERS, powers=POWERS)
    sizes = []
    for count in (20, 200):
        store = FeatureStore(statistics=scorer.statistics()).update(features(count, 0))
        ranges = store[GramRanges(layers=LAYERS, powers=POWERS)]
        sizes.append([tuple(low.shape) for low in ranges.minimum])
    assert sizes[0] == sizes[1] == [(3, 3, 4), (3, 3, 5)]


@pytest.mark.parametrize(
    "fields", [{"powers": []}, {"powers": [2, 2]}, {"powers": [0]}, {"layers": ["a", "a"]}]
)
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(ConfigurationError):
        Detector(scorer={"kind": "gram", **fields})
