"""gmm: the mixture's log-density in NumPy, its limits, and its statistic of scatters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import Detector, Features, registry
from oodcore.errors import DataError
from oodcore.statistics import Shape
from oodcore.testing import check_statistic
from oodcore_plugins.gmm import GMM, ClassScatters


def rows(seed: int, count: int = 90, width: int = 4, classes: int = 3):
    generator = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) * np.arange(count) % classes)
    spreads = generator.normal(size=(classes, width, width))
    noise = generator.normal(size=(count, width))
    return np.einsum("nd,nde->ne", noise, spreads[labels]) + 2 * labels[:, None], labels


def fitted(train, labels=None, classes=None, **fields) -> Detector:
    scorer = {"kind": "gmm", **fields}
    data = train if labels is None else (train, labels)
    return Detector(scorer=scorer).fit(data, classes=classes)


def definition(train, labels, asked, *, shared, prior, unbiased, jitter) -> np.ndarray:
    """The log of a sum of normal densities, one class after the other."""
    present, width = sorted(set(labels)), train.shape[1]
    means = {k: train[labels == k].mean(axis=0) for k in present}
    centred = train - np.array([means[k] for k in labels])
    added = jitter * (centred**2).mean() * np.eye(width)
    total = np.full(len(asked), -np.inf)
    for k in present:
        some = centred if shared else centred[labels == k]
        lost = len(present) if shared else 1
        covariance = some.T @ some / (max(len(some) - lost, 1) if unbiased else len(some)) + added
        share = np.mean(labels == k) if prior == "train" else 1 / len(present)
        apart = asked - means[k]
        distance = np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart)
        logs = -0.5 * (distance + np.linalg.slogdet(2 * np.pi * covariance)[1]) + np.log(share)
        total = np.logaddexp(total, logs)
    return total


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.integers(1, 5),
    classes=st.integers(1, 4),
    shared=st.booleans(),
    prior=st.sampled_from(["train", "uniform"]),
    unbiased=st.booleans(),
    jitter=st.sampled_from([1e-6, 1e-2]),
)
def test_it_is_its_definition(seed, width, classes, **fields):
    train, labels = rows(seed, 80, width, classes)
    asked, _ = rows(seed + 1, 12, width, classes)
    wanted = definition(train, labels, asked, **fields)
    given_scores = fitted(train, labels, **fields).score(asked)
    np.testing.assert_allclose(given_scores, wanted, rtol=1e-7, atol=1e-8)


def test_classes_without_rows_are_left_out():
    train, labels = rows(0)
    asked, _ = rows(1)
    for shared in (False, True):
        spaced = fitted(train, 2 * labels, classes=8, shared=shared)
        plain = fitted(train, labels, shared=shared)
        np.testing.assert_allclose(spaced.score(asked), plain.score(asked), rtol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_units_and_origin_of_the_embeddings_move_all_scores_alike(shared):
    train, labels = rows(0)
    asked, _ = rows(1)
    plain = fitted(train, labels, shared=shared).score(asked)
    # A change of units by c divides a density in D dimensions by c^D.
    for factor, offset in ((1e-4, 0.0), (1e5, 0.0), (1.0, 1e5)):
        moved = fitted(factor * train + offset, labels, shared=shared)
        scores = moved.score(factor * asked + offset)
        np.testing.assert_allclose(scores + 4 * np.log(factor), plain, rtol=1e-6, atol=1e-6)


def test_far_away_rows_keep_their_order():
    train, labels = rows(0)
    far = fitted(train, labels).score(np.array([[1e3] * 4, [1e6] * 4, [1e9] * 4]))
    assert np.isfinite(far).all()
    assert (np.diff(far) < 0).all()


def test_dead_dimensions_and_small_classes_are_scored():
    train, labels = rows(0)
    wide = np.hstack([train, np.zeros((90, 2))])
    labels[0] = 3
    detector = fitted(wide, labels)
    on = np.hstack([train, np.zeros((90, 2))])
    off = np.hstack([train, np.full((90, 2), 0.1)])
    assert (detector.score(on) > detector.score(off)).all()
    doubled = fitted(np.concatenate([wide, wide]), np.concatenate([labels, labels]), unbiased=False)
    single = fitted(wide, labels, unbiased=False)
    np.testing.assert_allclose(doubled.score(off), single.score(off), rtol=1e-7)


@pytest.mark.parametrize(("shared", "whose"), [(False, "class 1"), (True, "the shared covariance")])
def test_a_singular_covariance_without_jitter_is_an_error(shared, whose):
    train, labels = rows(0)
    train[labels == 1, 3] = 5 if not shared else 0
    if shared:
        train[:, 3] = 0
    with pytest.raises(DataError, match=f"{whose}.* singular; give a larger jitter"):
        fitted(train, labels, shared=shared, jitter=0)
    assert np.isfinite(fitted(train, labels, shared=shared).score(train)).all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("train", [np.ones((1, 3)), np.ones((5, 3)), np.full((9, 2), 1e6 + 0.1)])
def test_rows_that_do_not_vary(train, shared):
    with pytest.raises(DataError, match="do not vary within their classes"):
        fitted(train, shared=shared)


def test_rows_too_large_for_a_covariance():
    with pytest.raises(DataError, match="too large for float64"):
        fitted(rows(0)[0] * 1e200)


def test_the_gradient_is_that_of_the_mixture():
    train, labels = rows(0)
    state = fitted(train, labels).ready().scorer
    asked = torch.from_numpy(rows(1, 5)[0])
    assert torch.autograd.gradcheck(
        lambda x: GMM().score(Features(embeddings=x), state), (asked.requires_grad_(),)
    )


def test_scatters_are_those_of_each_class_however_the_rows_come():
    train, labels = rows(3, 60, 5, 4)
    statistic = ClassScatters()
    order = np.random.default_rng(0).permutation(60)
    states = []
    for part in np.array_split(order, 3):
        state = statistic.init(Shape(4, 5))
        for some in np.array_split(part, 4):
            given_rows = Features(
                torch.from_numpy(train[some]), None, torch.from_numpy(labels[some])
            )
            state = statistic.update(state, given_rows)
        states.append(state)
    view = statistic.view(statistic.merge(states[2], statistic.merge(states[0], states[1])))
    for k in range(4):
        some = train[labels == k]
        centred = some - some.mean(axis=0) if len(some) else some
        assert int(view.count[k]) == len(some)
        np.testing.assert_allclose(view.scatter[k], centred.T @ centred, rtol=1e-10, atol=1e-10)


def test_the_statistic_keeps_the_laws():
    check_statistic(registry.build("statistic", "class_scatters"))
