"""trust_score: a ratio of distances to classes, against all distances one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from embedding_rows import HEAD, LABELS, ROWS, TESTED, features, fitted, score
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import Features
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore_plugins.trust_score import TrustScore, ratio


def dense(rows, alpha, k):
    """The rows whose k-th neighbour, themselves counted, is not among the farthest."""
    radii = []
    for row in rows:
        distances = sorted(math.dist(row, other) for other in rows)
        radii.append(distances[min(k, len(rows)) - 1])
    smallest = min(
        r for r in radii if sum(other > r for other in radii) <= math.floor(alpha * len(rows))
    )
    return [row for row, radius in zip(rows, radii, strict=True) if radius <= smallest]


def naive(rows, train, labels, predicted, alpha=0.0, k=10, neighbour=1):
    classes = {c: dense(train[labels == c], alpha, k) for c in np.unique(labels)}
    scores = []
    for row, own in zip(rows, predicted, strict=True):
        to = {}
        for c, members in classes.items():
            distances = sorted(math.dist(row, member) for member in members)
            to[c] = distances[min(neighbour, len(distances)) - 1]
        other = min((d for c, d in to.items() if c != own), default=math.inf)
        agreeing = to.get(own, math.inf)
        if agreeing == math.inf:
            scores.append(0.0)
        elif other == agreeing == 0:
            scores.append(1.0)
        else:
            scores.append(min(other / agreeing, 1e12) if agreeing else 1e12)
    return np.array(scores)


def predictions(rows):
    return (np.asarray(rows) @ HEAD.weight.numpy().T + HEAD.bias.numpy()).argmax(axis=1)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("neighbour", [1, 2, 50])
def test_it_is_its_definition(alpha, k, neighbour):
    scorer = TrustScore(alpha=alpha, k=k, neighbour=neighbour)
    wanted = naive(TESTED, ROWS, LABELS, predictions(TESTED), alpha, k, neighbour)
    np.testing.assert_allclose(score(scorer, state=fitted(scorer)), wanted, rtol=1e-9)


def test_density_leaves_out_the_rows_that_lie_alone():
    rows = np.array([[0.0], [0.1], [0.2], [9.0], [5.0], [5.1], [5.2], [-40.0]])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    head = type(HEAD)(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([2.5, -2.5]).double())
    asked = [[8.9], [-39.0]]
    plain = TrustScore()
    state = fitted(plain, rows, labels, head)
    np.testing.assert_allclose(score(plain, asked, state, head), [0.1 / 3.7, 1 / 39.0])
    picky = TrustScore(alpha=0.25, k=2)
    state = fitted(picky, rows, labels, head)
    assert {name: len(index) for name, index in state["classes"].items()} == {
        "class_0": 3,
        "class_1": 3,
    }
    np.testing.assert_allclose(score(picky, asked, state, head), [8.7 / 3.7, 44.0 / 39.0])


def test_rows_that_tie_at_the_limit_stay():
    rows = np.repeat([[0.0, 0.0], [3.0, 4.0]], 4, axis=0)
    scorer = TrustScore(alpha=0.5, k=2)
    state = fitted(scorer, rows, np.zeros(8, dtype=int), None)
    assert len(state["classes"]["class_0"]) == 8


def test_on_training_rows():
    scorer = TrustScore()
    own = predictions(ROWS)
    scores = score(scorer, ROWS, fitted(scorer))
    assert (scores[own == LABELS] == 1e12).all()
    assert (scores[own != LABELS] == 0).all()
    assert (own != LABELS).any()
    both = np.concatenate([ROWS, ROWS])
    twins = fitted(scorer, both, np.concatenate([LABELS, (LABELS + 1) % 4]))
    agrees = (own == LABELS) | (own == (LABELS + 1) % 4)
    np.testing.assert_array_equal(score(scorer, ROWS, twins), np.where(agrees, 1.0, 0.0))


def test_classes_without_rows():
    scorer = TrustScore()
    some = LABELS < 2
    state = fitted(scorer, ROWS[some], LABELS[some])
    own = predictions(TESTED)
    assert (own >= 2).any()
    assert (own < 2).any()
    scores = score(scorer, state=state)
    assert (scores[own >= 2] == 0).all()
    np.testing.assert_allclose(scores, naive(TESTED, ROWS[some], LABELS[some], own), rtol=1e-9)
    alone = fitted(scorer, ROWS[LABELS == 1], LABELS[LABELS == 1])
    np.testing.assert_array_equal(score(scorer, state=alone), np.where(own == 1, 1e12, 0.0))


@settings(max_examples=25, deadline=None)
@given(size=st.floats(1e-6, 1e6), shift=st.floats(-5, 5), turn=st.floats(0, 6))
def test_neither_size_nor_place_nor_direction_counts(size, shift, turn):
    scorer = TrustScore(alpha=0.1, k=3)
    plane = np.eye(5)
    plane[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]

    def changed(rows):
        return size * (rows @ plane + shift)

    def features_of(rows):
        logits = torch.as_tensor(rows @ HEAD.weight.numpy().T)
        return Features(embeddings=torch.as_tensor(changed(rows)), logits=logits)

    plain = features(TESTED).with_logits(features_of(TESTED).logits)
    one = scorer.score(plain, fitted(scorer))
    two = scorer.score(features_of(TESTED), fitted(scorer, changed(ROWS)))
    np.testing.assert_allclose(two, one, rtol=1e-6)


def test_the_ratio_and_its_gradient_are_finite():
    upper = torch.tensor([0.0, 0.0, 2.0, 2.0, torch.inf, torch.inf, 3.0, 1.0]).double()
    lower = torch.tensor([0.0, 1.0, 0.0, torch.inf, 1.0, torch.inf, 4.0, 1e-13]).double()
    upper.requires_grad_()
    lower.requires_grad_()
    given_ratio = ratio(upper, lower)
    assert given_ratio.tolist() == [1.0, 0.0, 1e12, 0.0, 1e12, 0.0, 0.75, 1e12]
    for gradient in torch.autograd.grad(given_ratio.sum(), (upper, lower)):
        assert bool(torch.isfinite(gradient).all())


def test_what_is_refused():
    for field, value in (("alpha", 1.0), ("alpha", -0.1), ("k", 0), ("neighbour", 0)):
        with pytest.raises(ConfigurationError, match=field):
            registry.build("scorer", {"kind": "trust_score", field: value})
