"""gradnorm: its closed forms are the L1 norms of gradients that autograd and differences find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from oodcore import Features, Head
from oodcore.errors import DataError
from oodcore_plugins import gradnorm
from oodcore_plugins.gradnorm import GradNorm

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


WEIGHT, BIAS, ROWS = drawn(4, 6), drawn(4), drawn(9, 6)


def gradient_norms(head: Head, temperature: float, step: float | None = None) -> np.ndarray:
    """L1 norms of the gradients of KL(u || softmax(z / T)), by autograd or by differences."""
    norms = []
    for row in ROWS:

        def divergence(weight: torch.Tensor, row: torch.Tensor = row) -> torch.Tensor:
            logits = replace(head, weight=weight)(row[None])[0]
            return -(logits / temperature).log_softmax(0).mean()

        if step is None:
            leaf = head.weight.clone().requires_grad_()
            (found,) = torch.autograd.grad(divergence(leaf), leaf)
        else:
            found = torch.zeros_like(head.weight)
            for place in np.ndindex(*head.weight.shape):
                moved = torch.zeros_like(head.weight)
                moved[place] = step
                ahead, behind = divergence(head.weight + moved), divergence(head.weight - moved)
                found[place] = (ahead - behind) / (2 * step)
        norms.append(float(found.abs().sum()))
    return np.array(norms)


def score(scorer: GradNorm, head: Head, rows: torch.Tensor = ROWS) -> np.ndarray:
    return scorer.score(Features(embeddings=rows, head=head), {}).numpy()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_linear_against_finite_differences(temperature):
    head = Head(WEIGHT, BIAS)
    wanted = gradient_norms(head, temperature, step=1e-6)
    np.testing.assert_allclose(score(GradNorm(temperature=temperature), head), wanted, rtol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("normalize_features", [True, False])
def test_cosine_against_autograd(temperature, normalize_features):
    head = Head(
        WEIGHT, BIAS, normalize_weight=True, normalize_features=normalize_features, scale=8.0
    )
    wanted = gradient_norms(head, temperature)
    scorer = GradNorm(head="cosine", temperature=temperature)
    np.testing.assert_allclose(score(scorer, head), wanted, rtol=1e-10)


def test_in_small_pieces_it_is_the_same(monkeypatch):
    head = Head(WEIGHT, normalize_weight=True, normalize_features=True, scale=8.0)
    whole = score(GradNorm(head="cosine"), head)
    monkeypatch.setattr(gradnorm, "CHUNK", 1)
    np.testing.assert_allclose(score(GradNorm(head="cosine"), head), whole, rtol=1e-12)


def test_under_cosine_the_norm_of_an_embedding_does_not_matter():
    head = Head(WEIGHT, normalize_weight=True, normalize_features=True, scale=8.0)
    scorer = GradNorm(head="cosine")
    np.testing.assert_allclose(score(scorer, head, 100 * ROWS), score(scorer, head), rtol=1e-10)


@pytest.mark.parametrize("form", ["linear", "cosine"])
def test_zero_embeddings_uniform_softmaxes_and_one_class_give_nothing(form):
    scorer = GradNorm(head=form)
    assert score(scorer, Head(WEIGHT), torch.zeros_like(ROWS)).tolist() == [0] * len(ROWS)
    assert score(scorer, Head(WEIGHT[:1])).tolist() == [0] * len(ROWS)
    uniform = Features(embeddings=ROWS, logits=torch.ones(9, 4).double(), head=Head(WEIGHT))
    assert scorer.score(uniform, {}).tolist() == [0] * len(ROWS)


def test_a_class_without_a_weight_has_no_part_under_cosine():
    weight = torch.cat([WEIGHT, torch.zeros(1, 6, dtype=torch.float64)])
    given = score(GradNorm(head="cosine"), Head(weight))
    assert np.isfinite(given).all()
    assert given.max() < 1e3


def test_cosine_needs_a_head():
    with pytest.raises(DataError, match="cosine head"):
        GradNorm(head="cosine").score(Features(embeddings=ROWS, logits=ROWS[:, :4]), {})
