"""ViM and the residual against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features, Head
from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.vim import principal, silent

GENERATOR = np.random.default_rng(0)
WEIGHT, BIAS = GENERATOR.normal(size=(3, 8)), GENERATOR.normal(size=3) + 4


def features(count: int, seed: int, bias: np.ndarray | None = BIAS, **flags) -> Features:
    generator = np.random.default_rng(seed)
    values = np.abs(generator.normal(size=(count, 8)) * np.linspace(0.2, 2, 8)) + 0.5
    given = None if bias is None else torch.tensor(bias)
    return Features(
        embeddings=torch.tensor(values), head=Head(torch.tensor(WEIGHT), given, **flags)
    )


def definition(train: Features, asked: Features, dim: int, origin: str) -> tuple:
    """Residual and ViM of the asked rows, and alpha."""
    fitted, given = train.embeddings.numpy(), asked.embeddings.numpy()
    bias = np.zeros(3) if train.head.bias is None else BIAS
    u = -np.linalg.pinv(WEIGHT) @ bias if origin == "head" else fitted.mean(axis=0)
    values, vectors = np.linalg.eigh((fitted - u).T @ (fitted - u) / len(fitted))
    null = vectors[:, np.argsort(values)[: 8 - dim]]
    residual = np.linalg.norm((given - u) @ null, axis=1)
    scale = np.linalg.norm((fitted - u) @ null, axis=1).mean()
    alpha = train.logits.numpy().max(axis=1).mean() / scale
    energy = np.log(np.exp(asked.logits.numpy()).sum(axis=1))
    return -residual, energy - alpha * residual, alpha


@pytest.mark.parametrize("dim", [1, 4, 7])
@pytest.mark.parametrize("origin", ["head", "mean"])
@pytest.mark.parametrize("bias", [BIAS, None])
def test_both_are_their_definition(dim, origin, bias):
    train, asked = features(50, 1, bias), features(20, 2, bias)
    residual, vim, _ = definition(train, asked, dim, origin)
    for kind, expected in (("residual", residual), ("vim", vim)):
        scorer = {"kind": kind, "dim": dim, "origin": origin}
        scores = Detector(scorer=scorer).fit(train).score(asked)
        np.testing.assert_allclose(scores, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("size", "dim"),
    [(2048, 1000), (4096, 1000), (2047, 512), (768, 512), (767, 383), (8, 4), (1, 0)],
)
def test_the_dimension_follows_from_the_size(size, dim):
    assert principal(size) == dim


def test_the_default_dimension_is_half_of_a_small_size():
    train, asked = features(50, 1), features(20, 2)
    scores = Detector(scorer="vim").fit(train).score(asked)
    expected = Detector(scorer={"kind": "vim", "dim": 4}).fit(train).score(asked)
    np.testing.assert_array_equal(scores, expected)


def test_the_origin_is_where_the_logits_vanish():
    train = features(50, 1)
    origin = torch.tensor(-np.linalg.pinv(WEIGHT) @ BIAS)[None]
    asked = Features(embeddings=origin, head=train.head)
    np.testing.assert_allclose(asked.logits, 0, atol=1e-10)
    scores = Detector(scorer="residual").fit(train).score(asked)
    np.testing.assert_allclose(scores, 0, atol=1e-10)


def test_the_origin_of_a_head_that_normalises_its_weight():
    train = features(50, 1, normalize_weight=True, scale=3.0)
    weight = 3 * WEIGHT / np.linalg.norm(WEIGHT, axis=1, keepdims=True)
    origin = torch.tensor(-np.linalg.pinv(weight) @ BIAS)[None]
    asked = Features(embeddings=origin, head=train.head)
    scores = Detector(scorer="residual").fit(train).score(asked)
    np.testing.assert_allclose(scores, 0, atol=1e-10)


@pytest.mark.parametrize("kind", ["residual", "vim"])
def test_a_dimension_that_leaves_nothing_is_refused(kind):
    with pytest.raises(ConfigurationError, match="give a dim below 8"):
        Detector(scorer={"kind": kind, "dim": 8}).fit(features(50, 1))


def test_rows_within_the_subspace_give_no_alpha():
    with pytest.raises(DataError, match="smaller dim or more rows"):
        Detector(scorer={"kind": "vim", "dim": 4}).fit(features(3, 1))


def test_a_negative_alpha_is_warned_of():
    train = features(50, 1, BIAS - 100)
    with pytest.warns(UserWarning, match="alpha is negative"):
        Detector(scorer={"kind": "vim", "origin": "mean"}).fit(train)


def test_without_a_head_the_origin_is_the_mean():
    train = Features(embeddings=features(50, 1).embeddings)
    with pytest.raises(DataError, match="head"):
        Detector(scorer="residual").fit(train)
    scores = Detector(scorer={"kind": "residual", "origin": "mean"}).fit(train).score(train)
    assert scores.shape == (50,)
    assert (scores < 0).all()


def test_a_head_whose_rank_only_rounding_fills():
    """Ten classes in three dimensions of eight, kept as float32: no direction comes of rounding."""
    generator = np.random.default_rng(5)
    low = torch.tensor(generator.normal(size=(10, 3)) @ generator.normal(size=(3, 8)))
    bias = torch.tensor(generator.normal(size=10))
    exact, rounded = silent(Head(low, bias)), silent(Head(low.float().double(), bias))
    assert float(exact.norm()) < 10
    torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-5)
