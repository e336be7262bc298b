"""adascale: against its definition in NumPy on a linear network, alone and among other parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oodcore import Detector, Features, Head, load
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import check_statistic
from oodcore_plugins.adascale import ActivationShifts, Perturbation, growth

GENERATOR = np.random.default_rng(0)
INNER, OUTER = GENERATOR.normal(size=(10, 8)), GENERATOR.normal(size=(3, 10))
BIAS = np.array([0.3, -0.2, 0.1])
X = GENERATOR.normal(size=(70, 2, 4))
LABELS = torch.arange(70) % 3
TRAIN, ASKED = X[:50], np.concatenate([X[45:], 3 * X[45:], np.zeros((1, 2, 4))])
HEAD = Head(torch.tensor(OUTER), torch.tensor(BIAS))
FIELDS = {"k1": 40, "k2": 20, "lam": 3, "pixels": 30, "step": 0.7}


class Network(nn.Module):
    """``z = W relu(V x) + b``, of which every gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 10, bias=False)
        self.head = nn.Linear(10, 3)
        self.inner.weight = nn.Parameter(torch.tensor(INNER))
        self.head.weight = nn.Parameter(torch.tensor(OUTER))
        self.head.bias = nn.Parameter(torch.tensor(BIAS))

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(inputs.flatten(1)).relu())
        return logits


def embed(inputs: np.ndarray) -> np.ndarray:
    return np.maximum(inputs.reshape(len(inputs), 8) @ INNER.T, 0)


def naive_shift(row: np.ndarray, limit: float = np.inf) -> float:
    """Q' of one input; ``limit`` is where activations are clipped."""
    h = np.minimum(embed(row[None])[0], limit)
    best = (h @ OUTER.T + BIAS).argmax()
    gradient = (OUTER[best] * (h > 0) * (h < limit)) @ INNER
    least = np.argsort(np.abs(gradient), kind="stable")[: int(8 * 0.3)]
    moved = row.reshape(8).copy()
    moved[least] += 0.7 * np.sign(gradient[least])
    after = np.minimum(embed(moved[None])[0], limit)
    order = np.argsort(-h, kind="stable")
    return after[order[:4]].sum() + 3 * np.abs(after - h)[order[:2]].sum()


def naive_percentiles(asked, low, high, limit=np.inf) -> np.ndarray:
    known = np.array([naive_shift(row, limit) for row in TRAIN])
    shares = np.array([(known <= naive_shift(row, limit) * (1 + 1e-6)).mean() for row in asked])
    return low + (1 - shares) * (high - low)


def naive_ratio(row: np.ndarray, percentile: float) -> float:
    kept = np.sort(row)[::-1][: max(1, len(row) - round(len(row) * percentile / 100))]
    return row.sum() / kept.sum() if kept.sum() > 0 else 1.0


def naive_logits(asked, variant, low, high, limit=np.inf) -> np.ndarray:
    found = []
    for row, percentile in zip(
        np.minimum(embed(asked), limit), naive_percentiles(asked, low, high, limit), strict=True
    ):
        ratio = naive_ratio(row, percentile)
        scaled = row * np.exp(ratio) if variant == "a" else row
        found.append((OUTER @ scaled + BIAS) * (ratio**2 if variant == "l" else 1))
    return np.array(found)


def energy(logits: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(logits, axis=1)


def shaper(variant="a", low=20.0, high=90.0) -> dict:
    return {
        "kind": "adascale",
        "variant": variant,
        "percentiles": [low, high],
        "perturbation": FIELDS,
    }


@pytest.mark.parametrize("variant", ["a", "l"])
@pytest.mark.parametrize(("low", "high"), [(20.0, 90.0), (60.0, 60.0), (0.0, 99.0)])
def test_is_its_definition(variant, low, high):
    detector = Detector(Network(), scorer="energy", shapers=[shaper(variant, low, high)])
    given = detector.fit((TRAIN, LABELS[:50])).score(ASKED)
    np.testing.assert_allclose(given, energy(naive_logits(ASKED, variant, low, high)), rtol=1e-9)
    assert len(set(naive_percentiles(ASKED, low, high))) > (1 if low < high else 0)


def test_of_clipped_activations():
    """The perturbed input takes the road with the shapers before: its statistics are read anew."""
    react = {"kind": "react", "percentile": 80}
    limit = np.percentile(embed(TRAIN), 80)
    detector = Detector(Network(), scorer="energy", shapers=[react, shaper()])
    given = detector.fit((TRAIN, LABELS[:50])).score(ASKED)
    wanted = energy(naive_logits(ASKED, "a", 20.0, 90.0, limit))
    np.testing.assert_allclose(given, wanted, rtol=1e-9)


def naive_shaped(asked: np.ndarray) -> Features:
    rows, percentiles = embed(asked), naive_percentiles(asked, 20.0, 90.0)
    ratios = [naive_ratio(row, p) for row, p in zip(rows, percentiles, strict=True)]
    scaled = rows * np.exp(ratios)[:, None]
    return Features(embeddings=torch.tensor(scaled), head=HEAD)


def test_a_bank_of_what_is_shaped():
    scorer = {"kind": "knn", "k": 2}
    detector = Detector(Network(), scorer=scorer, shapers=[shaper()])
    given = detector.fit((TRAIN, LABELS[:50])).score(ASKED)
    plain = Detector(scorer=scorer).fit(naive_shaped(TRAIN)).score(naive_shaped(ASKED))
    np.testing.assert_allclose(given, plain, rtol=1e-9)


def test_measured_behind_it():
    """ViM measures its alpha on shaped rows: the data is read again, and given in one call."""
    scorer = {"kind": "vim", "dim": 4}
    detector = Detector(Network(), scorer=scorer, shapers=[shaper()])
    given = detector.fit((TRAIN, LABELS[:50])).score(ASKED)
    plain = Detector(scorer=scorer).fit(naive_shaped(TRAIN)).score(naive_shaped(ASKED))
    np.testing.assert_allclose(given, plain, rtol=1e-8)
    with pytest.raises(ConfigurationError, match="one call of fit"):
        detector.partial_fit((TRAIN, LABELS[:50]))


def test_fitted_in_parts_saved_and_loaded(tmp_path):
    model, expected = Network(), energy(naive_logits(ASKED, "a", 20.0, 90.0))
    detector = Detector(model, scorer="energy", shapers=[shaper()])
    detector.partial_fit((TRAIN[:20], LABELS[:20])).save(tmp_path / "detector", store=True)
    loaded = load(tmp_path / "detector", model=model)
    loaded.partial_fit((TRAIN[20:], LABELS[20:50]))
    np.testing.assert_allclose(loaded.score(ASKED), expected, rtol=1e-9)


def test_the_input_is_moved_through_it():
    scorer = {"kind": "perturbed", "scorer": "energy", "epsilon": 1e-6}
    shapers = [shaper()]
    plain = Detector(Network(), scorer="energy", shapers=shapers).fit((TRAIN, LABELS[:50]))
    moved = Detector(Network(), scorer=scorer, shapers=shapers).fit((TRAIN, LABELS[:50]))
    raised = moved.score(ASKED[:-1]) - plain.score(ASKED[:-1])
    # Where the percentile jumps within the step the score may fall.
    assert (raised > 0).mean() > 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(-6, 6), st.integers(0, 2**16))
def test_growth_is_that_of_each_row_alone(size, exponent, seed):
    generator = np.random.default_rng(seed)
    rows = np.maximum(generator.normal(size=(6, size)), 0) * 10.0**exponent
    rows[0] = 0
    percentiles = generator.uniform(0, 99.9, 6)
    found = growth(torch.tensor(rows), torch.tensor(percentiles))[:, 0]
    wanted = [naive_ratio(row, p) for row, p in zip(rows, percentiles, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_shift_is_at_least_one_activation_and_one_pixel():
    model = Network()
    tiny = {"k1": 1, "k2": 1, "pixels": 1, "step": 0.0, "lam": 1.0}
    detector = Detector(
        model, scorer="energy", shapers=[{"kind": "adascale", "perturbation": tiny}]
    )
    detector.fit((TRAIN, LABELS[:50]))
    shifts = detector.learnt.shapers[0]["shifts"]
    np.testing.assert_allclose(shifts, np.sort(embed(TRAIN).max(axis=1)), rtol=1e-12)


def test_the_statistic_keeps_the_laws():
    check_statistic(ActivationShifts(perturbation=Perturbation(k1=50, k2=25, pixels=10)))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match="from low to high"):
        Detector(scorer="energy", shapers=[shaper(low=80.0, high=60.0)])
    with pytest.raises(ConfigurationError, match="k3"):
        Detector(scorer="energy", shapers=[{"kind": "adascale", "perturbation": {"k3": 1}}])
    stored = Features(embeddings=torch.tensor(embed(TRAIN)), head=HEAD)
    with pytest.raises(DataError, match="needs inputs"):
        Detector(scorer="energy", shapers=[shaper()]).fit(stored)
