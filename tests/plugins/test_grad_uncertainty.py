"""grad_uncertainty: its closed forms are the squared gradients that autograd finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from oodcore import Features, Head
from oodcore.errors import DataError
from oodcore_plugins.grad_uncertainty import GradUncertainty

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


WEIGHT, BIAS, ROWS = drawn(4, 6), drawn(4), 3 * drawn(9, 6)


def squared_gradients(head: Head) -> list[float]:
    """By autograd, one row at a time, from the cross-entropy against all classes."""
    found = []
    for row in ROWS:
        leaves = [head.weight.clone().requires_grad_()]
        if head.bias is not None:
            leaves.append(head.bias.clone().requires_grad_())
        moved = Head(
            leaves[0],
            leaves[1] if head.bias is not None else None,
            head.normalize_weight,
            head.normalize_features,
            head.scale,
        )
        # torch's binary_cross_entropy has another gradient where a probability is below 1e-12.
        loss = -moved(row[None]).log_softmax(dim=1).sum()
        gradients = torch.autograd.grad(loss, leaves)
        found.append(sum(float(g.square().sum()) for g in gradients))
    return found


def score(features: Features) -> np.ndarray:
    return GradUncertainty().score(features, {}).numpy()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("weight", "rows"), list(itertools.product([True, False], [True, False])))
def test_against_autograd(weight, rows, biased):
    head = Head(WEIGHT, BIAS if biased else None, weight, rows, 3.0 if weight or rows else 1.0)
    given = score(Features(embeddings=ROWS, head=head))
    np.testing.assert_allclose(given, squared_gradients(head), rtol=1e-9)


def test_uniform_and_single_predictions_give_nothing():
    uniform = Features(embeddings=ROWS, logits=torch.ones(9, 4).double(), head=Head(WEIGHT, BIAS))
    assert score(uniform).tolist() == [0] * 9
    assert score(Features(embeddings=ROWS, head=Head(WEIGHT[:1], BIAS[:1]))).tolist() == [0] * 9


def test_a_zero_embedding_has_the_gradient_of_the_bias_alone():
    zero = torch.zeros(1, 6).double()
    assert score(Features(embeddings=zero, head=Head(WEIGHT))).tolist() == [0]
    softmax = BIAS.softmax(0)
    wanted = float((4 * softmax - 1).square().sum())
    assert score(Features(embeddings=zero, head=Head(WEIGHT, BIAS)))[0] == pytest.approx(wanted)


def test_a_certain_prediction_has_the_largest_gradient_and_no_overflow():
    logits = torch.tensor([[1e4, 0, 0, 0], [3.0, 0, 0, 0], [0.0, 0, 0, 0]], dtype=torch.float64)
    given = score(Features(embeddings=ROWS[:1].expand(3, 6), logits=logits, head=Head(WEIGHT)))
    norm = float(ROWS[0].square().sum())
    np.testing.assert_allclose(given[0], (3**2 + 3) * norm)
    assert (np.diff(given) < 0).all()


def test_a_class_without_a_weight_has_no_part_in_a_head_that_normalises_it():
    weight = torch.cat([WEIGHT, torch.zeros(1, 6).double()])
    head = Head(weight, normalize_weight=True)
    given = score(Features(embeddings=ROWS, head=head))
    softmax = head(ROWS).softmax(dim=1)
    assert np.isfinite(given).all()
    squares = (5 * softmax[:, :4] - 1).square()
    sines = 1 - torch.nn.functional.cosine_similarity(ROWS[:, None], WEIGHT, dim=2).square()
    lengths = ROWS.square().sum(1, keepdim=True) / WEIGHT.square().sum(1)
    np.testing.assert_allclose(given, (squares * sines * lengths).sum(1), rtol=1e-9)


def test_it_needs_a_head():
    with pytest.raises(DataError, match="no head"):
        score(Features(embeddings=ROWS, logits=ROWS[:, :4]))
