"""focal: the formula, its corners and its gradient."""

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
from oodcore_plugins.focal import Focal
from oodcore_plugins.logitnorm import LogitNorm


def never(rows, labels):
    raise AssertionError("what is further in is replaced")


def losses(logits, labels, **fields) -> torch.Tensor:
    return Focal(**fields).criterion(Features(logits=logits), labels, never, None, None)


def naive(logits: np.ndarray, label: int, gamma: float) -> float:
    top = max(logits)
    exponentials = [math.exp(z - top) for z in logits]
    others = sum(value for k, value in enumerate(exponentials) if k != label)
    log_p = logits[label] - top - math.log(sum(exponentials))
    return -((others / sum(exponentials)) ** gamma) * log_p


@given(
    logits=arrays(np.float64, (4, 3), elements=st.floats(-15, 15)),
    gamma=st.sampled_from([0, 0.5, 1, 2, 5]),
    detach=st.booleans(),
)
def test_the_formula(logits, gamma, detach):
    labels = torch.tensor([0, 1, 2, 0])
    given = losses(torch.from_numpy(logits), labels, gamma=gamma, detach_pt=detach)
    wanted = [naive(row, int(label), gamma) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-6, atol=1e-12)


def test_a_value_worked_out_by_hand():
    given = losses(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]))
    assert float(given) == pytest.approx(0.25 * math.log(2), rel=1e-12)


def test_gamma_0_is_cross_entropy_with_its_gradient():
    one, two = (drawn(5, 4).requires_grad_() for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3, 0])
    given, wanted = losses(one, labels, gamma=0), plain(Features(logits=two), labels)
    torch.testing.assert_close(given, wanted)
    given.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 3.5])
def test_the_gradient_is_that_of_the_formula(gamma):
    labels = torch.tensor([0, 3, 1])
    logits = [drawn(3, 4).requires_grad_()]
    assert torch.autograd.gradcheck(lambda z: losses(z, labels, gamma=gamma), logits)


def test_without_a_gradient_through_the_factor_it_is_a_weight():
    logits, labels = drawn(3, 4).requires_grad_(), torch.tensor([0, 3, 1])
    (given,) = torch.autograd.grad(losses(logits, labels, detach_pt=True).sum(), logits)
    (whole,) = torch.autograd.grad(losses(logits, labels).sum(), logits)
    p = logits.detach().softmax(dim=1)
    factor = (1 - p.gather(1, labels[:, None])).square()
    wanted = factor * (p - torch.nn.functional.one_hot(labels, 4))
    torch.testing.assert_close(given, wanted)
    assert not torch.allclose(whole, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 2])
def test_saturated_rows_have_a_loss_and_a_gradient(dtype, gamma):
    logits = torch.tensor([[90.0, 0.0], [0.0, 90.0], [9.0, 0.0]], dtype=dtype).requires_grad_()
    given = losses(logits, torch.tensor([0, 0, 0]), gamma=gamma)
    given.sum().backward()
    assert given[0].abs() < 1e-3
    assert float(given[1].detach()) == pytest.approx(90)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().max() < 1e-3


def test_one_row_and_one_class():
    assert float(losses(torch.tensor([[3.0]]), torch.tensor([0]))) == 0
    assert losses(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_logitnorm_scales_what_it_gets():
    exercise = Exercise([LogitNorm(temperature=0.1), Focal(gamma=3)])
    exercise.begin()
    exercise.total()
    step = exercise.engine._steps["focal"]
    logits = step.features.logits.detach().double()
    scaled = logits / (0.1 * logits.norm(dim=1, keepdim=True))
    wanted = losses(scaled, step.labels, gamma=3)
    given = exercise.engine.criterion(step.features, step.labels).detach()
    torch.testing.assert_close(given.double(), wanted, rtol=1e-4, atol=1e-6)


def test_features_without_logits_are_refused():
    with pytest.raises(DataError, match="logits are needed"):
        Focal().criterion(Features(embeddings=torch.ones(1, 2)), None, never, None, None)


@pytest.mark.parametrize("fields", [{"gamma": -1}, {"gamma": math.inf}, {"detach_pt": 1}])
def test_fields_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        Focal(**fields)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "focal") == Focal(gamma=2, detach_pt=False, weight=1)
    assert Focal.replaces_loss


@pytest.mark.parametrize("check", regularizer_checks(Focal(gamma=0.5, detach_pt=True)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
