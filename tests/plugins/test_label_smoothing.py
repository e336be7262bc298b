"""label_smoothing: the formula, its corners and its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from training_runs import drawn, plain

from oodcore import Features, registry
from oodcore.errors import DataError
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore_plugins.label_smoothing import LabelSmoothing
from oodcore_plugins.regmixup import RegMixup


def never(rows, labels):
    raise AssertionError("what is further in is replaced")


def losses(logits, labels, smoothing=0.1) -> torch.Tensor:
    part = LabelSmoothing(smoothing=smoothing)
    return part.criterion(Features(logits=logits), labels, never, None, None)


def naive(logits: np.ndarray, label: int, smoothing: float) -> float:
    top = max(logits)
    lse = top + math.log(sum(math.exp(z - top) for z in logits))
    share = smoothing / len(logits)
    target = [share + (1 - smoothing) * (k == label) for k in range(len(logits))]
    return sum(t * (lse - z) for t, z in zip(target, logits, strict=True))


@given(
    logits=arrays(np.float64, (4, 3), elements=st.floats(-50, 50)),
    smoothing=st.sampled_from([0, 0.1, 0.5, 0.99]),
)
def test_the_formula(logits, smoothing):
    labels = torch.tensor([0, 1, 2, 0])
    given = losses(torch.from_numpy(logits), labels, smoothing)
    wanted = [naive(row, int(label), smoothing) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_nothing_smoothed_is_cross_entropy():
    logits, labels = drawn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(losses(logits, labels, 0), plain(Features(logits=logits), labels))


def test_the_best_probabilities_are_the_smoothed_label():
    target = torch.tensor([[0.9 + 0.1 / 4, *[0.1 / 4] * 3]], dtype=torch.float64)
    logits = target.log().requires_grad_()
    losses(logits, torch.tensor([0])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(target), rtol=0, atol=1e-12)


def test_the_gradient_is_that_of_the_formula():
    labels = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda z: losses(z, labels), [drawn(3, 4).requires_grad_()])


def test_saturated_rows_and_one_class():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    given = losses(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(given.detach(), torch.tensor([10.0, 190.0]))
    given.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert float(losses(torch.tensor([[3.0]]), torch.tensor([0]))) == 0


def test_mixed_rows_are_smoothed_too():
    exercise = Exercise([LabelSmoothing(smoothing=0.3), RegMixup(weight=1, joint=True)])
    exercise.begin()
    exercise.total()
    step = exercise.engine._steps["regmixup"]
    share, order = step.memo["share"], step.memo["order"]
    logits = step.extra.logits.detach()
    wanted = share * losses(logits, step.labels, 0.3).mean()
    wanted += (1 - share) * losses(logits, step.labels[order], 0.3).mean()
    torch.testing.assert_close(RegMixup(joint=True).loss(step, None).detach(), wanted)


def test_features_without_logits_are_refused():
    with pytest.raises(DataError, match="logits are needed"):
        LabelSmoothing().criterion(Features(embeddings=torch.ones(1, 2)), None, never, None, None)


@pytest.mark.parametrize("smoothing", [-0.1, 1, math.nan, "0.1"])
def test_a_share_is_in_0_to_1(smoothing):
    with pytest.raises(ValidationError):
        LabelSmoothing(smoothing=smoothing)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "label_smoothing") == LabelSmoothing(smoothing=0.1)
    assert LabelSmoothing.replaces_loss


@pytest.mark.parametrize("check", regularizer_checks(LabelSmoothing(smoothing=0.5)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
