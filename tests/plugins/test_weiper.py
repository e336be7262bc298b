"""weiper: histograms of activations and of perturbed logits, against a naive computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding_rows import HEAD, ROWS, TESTED, features, fitted, score
from torch import nn

from oodcore import Detector, Head
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore_plugins import weiper
from oodcore_plugins.weiper import WeiPer, smoothed

BIASED = replace(HEAD, bias=torch.tensor([2.0, -1.0, 0.0, 0.5]).double())
SMALL = {"repeats": 4, "bins": 12, "smoothing": 3, "smoothing_perturbed": 4}


def histogram(values, low, high, bins):
    """Shares of the values in bins of equal width; numbers outside count in the whole."""
    counts, _ = np.histogram(values, bins=bins, range=(low, high))
    return counts / len(values)


def running_mean(shares, width):
    before = (width - 1) // 2
    longer = np.pad(shares, (before, width - 1 - before), mode="edge")
    return np.array([longer[i : i + width].mean() for i in range(len(shares))])


def divergence(p, q, floor):
    p, q = (p + floor) / (p + floor).sum(), (q + floor) / (q + floor).sum()
    return (p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()


def naive(scorer, heads, rows=TESTED, train=ROWS):
    bias = BIASED.bias.numpy()

    def logits(row):
        return np.stack([head @ row + bias for head in heads])

    plain = list(train)
    perturbed = [logits(row).ravel() for row in train]
    means, ends = [], []
    for seen in (plain, perturbed):
        low, high = np.min(seen), np.max(seen)
        means.append(np.mean([histogram(v, low, high, scorer.bins) for v in seen], axis=0))
        ends.append((low, high))
    scores = []
    for row in rows:
        z = logits(row)
        powers = np.exp(z - z.max(axis=1, keepdims=True))
        msp = (powers.max(axis=1) / powers.sum(axis=1)).mean()
        one = running_mean(histogram(row, *ends[0], scorer.bins), scorer.smoothing)
        two = histogram(z.ravel(), *ends[1], scorer.bins)
        two = running_mean(two, scorer.smoothing_perturbed)
        apart = divergence(means[0], one, 0.01)
        apart += scorer.lam_kld * divergence(means[1], two, 0.025)
        scores.append(-(apart - scorer.lam_msp * msp))
    return np.array(scores)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        SMALL,
        {**SMALL, "smoothing": 1, "smoothing_perturbed": 1},
        {**SMALL, "smoothing": 40, "smoothing_perturbed": 15},
        {**SMALL, "lam_kld": 0.0, "lam_msp": 3.0},
        {**SMALL, "delta": 0.0},
        {**SMALL, "bins": 1},
        {"repeats": 1, "bins": 200, "seed": 5},
    ],
)
def test_it_is_its_definition(fields):
    scorer = WeiPer(**fields)
    state = fitted(scorer, head=BIASED)
    heads = state["heads"].numpy()
    assert heads.shape == (scorer.repeats, 4, 5)
    for rows in (TESTED, ROWS):
        given = score(scorer, rows, state, BIASED)
        np.testing.assert_allclose(given, naive(scorer, heads, rows), rtol=1e-9)


def test_the_heads_lie_at_a_distance_in_all_directions():
    scorer = WeiPer(repeats=2000, delta=0.7)
    heads = fitted(scorer)["heads"]
    steps = heads - HEAD.weight
    lengths = steps.norm(dim=2) / HEAD.weight.norm(dim=1)
    np.testing.assert_allclose(lengths, 0.7, rtol=1e-12)
    directions = steps / steps.norm(dim=2, keepdim=True)
    spread = torch.einsum("rkd,rke->kde", directions, directions) / 2000
    np.testing.assert_allclose(spread, torch.eye(5).expand(4, 5, 5) / 5, atol=0.03)
    assert float(directions.mean(dim=0).abs().max()) < 0.05


def test_the_seed_decides():
    one, again, other = (fitted(WeiPer(**SMALL, seed=seed))["heads"] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert bool((one != other).all())


def test_heads_that_are_taken_in_parts_give_the_same(monkeypatch):
    scorer = WeiPer(**SMALL)
    state = fitted(scorer)
    expected = score(scorer, state=state)
    monkeypatch.setattr(weiper, "ROOM", 1)
    np.testing.assert_allclose(score(scorer, state=state), expected, rtol=1e-12)
    np.testing.assert_allclose(fitted(scorer)["density"], state["density"], rtol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 15, 40])
def test_smoothing_is_the_convolution_of_the_authors(width):
    shares = torch.rand(6, 12, generator=torch.Generator().manual_seed(0)).double()
    kernel = nn.Conv1d(1, 1, width, padding="same", padding_mode="replicate", bias=False)
    with torch.no_grad():
        kernel = kernel.double()
        kernel.weight.fill_(1 / width)
        wanted = kernel(shares[:, None])[:, 0]
    np.testing.assert_allclose(smoothed(shares, width), wanted, rtol=1e-12)


def test_without_steps_or_histograms_it_is_msp():
    scorer = WeiPer(repeats=3, delta=0.0, lam_kld=0.0, lam_msp=1.0, bins=1)
    np.testing.assert_allclose(
        score(scorer, state=fitted(scorer)),
        Detector(scorer="msp").score(features(TESTED)),
        rtol=1e-12,
    )


def test_the_order_of_activations_does_not_count_for_their_histogram():
    scorer = WeiPer(**{**SMALL, "lam_kld": 0.0, "lam_msp": 0.0})
    state = fitted(scorer)
    np.testing.assert_array_equal(
        score(scorer, TESTED[:, ::-1].copy(), state), score(scorer, state=state)
    )


def test_the_unit_of_the_embeddings_does_not_count_where_there_is_no_bias():
    scorer = WeiPer(**{**SMALL, "lam_msp": 0.0})
    no_bias = replace(HEAD, bias=None)
    one, two = (
        score(scorer, TESTED * size, fitted(scorer, ROWS * size, head=no_bias), no_bias)
        for size in (1.0, 1024.0)
    )
    np.testing.assert_allclose(one, two, rtol=1e-9)


def test_a_cosine_head_stays_one():
    cosine = Head(HEAD.weight, None, normalize_weight=True, normalize_features=True, scale=8.0)
    scorer = WeiPer(**{**SMALL, "lam_kld": 0.0, "lam_msp": 1.0})
    state = fitted(scorer, head=cosine)
    plain = WeiPer(**{**SMALL, "lam_kld": 0.0, "lam_msp": 0.0})
    msp = score(scorer, state=state, head=cosine) - score(plain, state=state, head=cosine)
    rows = TESTED / np.linalg.norm(TESTED, axis=1, keepdims=True)
    heads = state["heads"].numpy()
    heads = heads / np.linalg.norm(heads, axis=2, keepdims=True)
    z = 8 * np.einsum("rkd,nd->rnk", heads, rows)
    powers = np.exp(z)
    np.testing.assert_allclose(
        msp, (powers.max(axis=2) / powers.sum(axis=2)).mean(axis=0), rtol=1e-9
    )


def test_rows_outside_of_everything_and_rows_that_are_all_the_same():
    scorer = WeiPer(**SMALL)
    state = fitted(scorer)
    far = score(scorer, 1e9 * TESTED + 1e6, state)
    assert np.isfinite(far).all()
    assert far.max() < score(scorer, ROWS, state).mean()
    same = fitted(scorer, np.ones((9, 5)), np.zeros(9, dtype=int))
    np.testing.assert_allclose(
        score(scorer, np.ones((2, 5)), same), score(scorer, np.ones((1, 5)), same)[0], rtol=1e-9
    )
    assert score(scorer, np.ones((1, 5)), same) > score(scorer, np.zeros((1, 5)), same)


def test_a_sample_of_the_rows():
    few = WeiPer(**SMALL, rows=10)
    density = fitted(few)["density"]
    assert density.shape == (2, 12)
    np.testing.assert_allclose(density.sum(dim=1), 1, rtol=1e-12)
    assert bool((density != fitted(WeiPer(**SMALL))["density"]).any())


def test_what_is_refused():
    for field in ("repeats", "bins", "smoothing", "smoothing_perturbed", "rows"):
        with pytest.raises(ConfigurationError, match=field):
            registry.build("scorer", {"kind": "weiper", field: 0})
    for field in ("delta", "lam_kld", "lam_msp"):
        with pytest.raises(ConfigurationError, match=field):
            registry.build("scorer", {"kind": "weiper", field: -1})
