"""cac: the loss and the score against their formulas, corners, and the laws of both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

import oodcore
from oodcore import Features, registry
from oodcore.config import validate
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import regularizer_checks, scorer_checks
from oodcore.testing.exercise import Exercise, Plan
from oodcore.training_config import Blueprint
from oodcore_plugins.cac import AnchorDistance, ClassAnchors


def losses(logits: torch.Tensor, labels: torch.Tensor, **fields) -> torch.Tensor:
    return ClassAnchors(**fields).criterion(Features(logits=logits), labels, None, None, None)


def anchors(alpha: float, classes: int) -> list[list[float]]:
    return [[alpha * (j == k) for j in range(classes)] for k in range(classes)]


def naive_loss(z: np.ndarray, label: int, alpha: float, lam: float) -> float:
    d = [math.dist(z, anchor) for anchor in anchors(alpha, len(z))]
    others = [math.exp(d[label] - d[j]) for j in range(len(z)) if j != label]
    return math.log1p(sum(others)) + lam * d[label]


def naive_score(z: np.ndarray, centers) -> float:
    d = [math.dist(z, center) for center in centers]
    weights = [math.exp(min(d) - value) for value in d]
    rejections = []
    for k, value in enumerate(d):
        others = sum(weight for j, weight in enumerate(weights) if j != k)
        rejections.append(value * others / sum(weights))
    return -min(rejections)


@given(
    logits=arrays(np.float64, (5, 4), elements=st.floats(-20, 20)),
    alpha=st.sampled_from([1.0, 10.0]),
    lam=st.sampled_from([0.0, 0.1, 2.0]),
)
def test_the_loss(logits, alpha, lam):
    labels = torch.tensor([0, 1, 2, 3, 0])
    given = losses(torch.from_numpy(logits), labels, alpha=alpha, lam=lam)
    wanted = [naive_loss(z, int(y), alpha, lam) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_a_loss_worked_out_by_hand():
    # At the anchor of class 0 the distances are 0 and sqrt(2) * 10.
    given = losses(torch.tensor([[10.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert float(given) == pytest.approx(math.log1p(math.exp(-10 * math.sqrt(2))), rel=1e-6)


def test_the_last_class_counts_and_the_own_does_not():
    """What another library has it: its others are the first K - 1 classes, whatever the label."""
    z = torch.tensor([[0.0, 0.0, 9.0]], dtype=torch.float64)
    assert float(losses(z, torch.tensor([2]), lam=0)) < 0.01
    assert float(losses(z, torch.tensor([0]), lam=0)) > 5


def test_huge_logits_do_not_overflow():
    given = losses(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([1]))
    assert torch.isfinite(given).all()
    assert given.dtype == torch.float32


def test_near_an_anchor_float32_logits_keep_their_distance():
    z = torch.tensor([[10.0, 1e-3, 0.0]])
    given = losses(z, torch.tensor([0]), lam=1.0) - losses(z, torch.tensor([0]), lam=0.0)
    assert float(given) == pytest.approx(1e-3, rel=1e-3)


def test_the_gradient_is_that_of_the_formula():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(
        lambda z: losses(z, labels, alpha=2.0, lam=0.3), [logits.requires_grad_()]
    )


def test_at_an_anchor_there_is_a_gradient():
    logits = (10 * torch.eye(3)).requires_grad_()
    losses(logits, torch.tensor([0, 1, 2])).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_it_replaces_the_loss_and_is_the_only_one_to():
    assert ClassAnchors.replaces_loss

    class Another(oodcore.Regularizer):
        """``0``, instead of the loss."""

        kind = "another_loss"
        replaces_loss = True

    network = {"factory": "oodcore_plugins.networks:mlp"}
    with pytest.raises(ConfigurationError, match="each replace the classification loss"):
        validate(Blueprint, {"network": network, "regularizers": [ClassAnchors(), Another()]})


def test_features_without_logits_are_refused():
    with pytest.raises(DataError, match="logits are needed"):
        ClassAnchors().criterion(Features(embeddings=torch.ones(1, 2)), None, None, None, None)


@pytest.mark.parametrize("fields", [{"alpha": 0}, {"alpha": math.inf}, {"lam": -1}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        ClassAnchors(**fields)


@given(logits=arrays(np.float64, (6, 3), elements=st.floats(-15, 15)))
def test_the_score_from_the_anchors(logits):
    part = AnchorDistance(centers="anchors", alpha=4)
    given = part.score(Features(logits=torch.from_numpy(logits)), {})
    wanted = [naive_score(z, anchors(4, 3)) for z in logits]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-7, atol=1e-9)


def fitted(logits: torch.Tensor, labels: torch.Tensor, **fields):
    detector = oodcore.Detector(scorer=AnchorDistance(**fields))
    return detector.fit(Features(logits=logits, labels=labels))


def test_the_score_from_the_means_of_the_rows_that_were_right():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(40, 3, generator=generator).double()
    labels = torch.randint(3, (40,), generator=generator)
    right = logits.argmax(dim=1) == labels
    centers = [logits[right & (labels == k)].mean(dim=0).tolist() for k in range(3)]
    given = fitted(logits, labels).score(Features(logits=logits))
    np.testing.assert_allclose(given, [naive_score(z, centers) for z in logits.numpy()], rtol=1e-9)


def test_a_class_that_was_never_right_keeps_its_anchor():
    logits = torch.tensor([[4.0, 0.0], [5.0, 1.0], [6.0, 0.0]], dtype=torch.float64)
    detector = fitted(logits, torch.tensor([0, 0, 1]), alpha=7.0)
    centers = [[4.5, 0.5], [0.0, 7.0]]
    tested = torch.tensor([[0.0, 6.5], [3.0, 3.0]], dtype=torch.float64)
    given = detector.score(Features(logits=tested))
    np.testing.assert_allclose(given, [naive_score(z, centers) for z in tested.numpy()], rtol=1e-9)


def test_rows_at_a_centre_are_the_most_known_and_keep_their_order():
    near = 100 * torch.eye(2, dtype=torch.float64)[:1] + torch.tensor([[0.0], [0.01], [0.02]])
    part = AnchorDistance(centers="anchors", alpha=100)
    scores = part.score(Features(logits=near), {})
    # 1 - softmin would round to 0 for all of them.
    assert (scores[1:] < scores[:-1]).all()


def test_a_run_with_it_gathers_logits_around_the_anchors():
    def distance(*parts) -> torch.Tensor:
        exercise = Exercise(parts, Plan(epochs=30)).advance()
        with torch.no_grad():
            logits = exercise.run.model.eval()(exercise.inputs).logits
        targets = 10 * torch.nn.functional.one_hot(exercise.labels, 3)
        return (logits - targets).norm(dim=1).mean()

    assert distance(ClassAnchors()) < 0.7 * distance()


@pytest.mark.parametrize("check", regularizer_checks(ClassAnchors()), ids=str)
def test_the_laws_of_regularizers(check):
    check()


@pytest.mark.parametrize("check", scorer_checks(AnchorDistance()), ids=str)
def test_the_laws_of_scorers(check):
    check()


def test_both_are_found_by_their_kind():
    assert registry.build("regularizer", "cac") == ClassAnchors(alpha=10, lam=0.1, weight=1)
    assert registry.build("scorer", "cac") == AnchorDistance(centers="means", alpha=10)
