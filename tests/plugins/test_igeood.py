"""igeood: Fisher-Rao distances by the definition, near and far, and a reference's numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_oracles import softmax

from oodcore import Detector, Features
from oodcore.testing import check_statistic
from oodcore_plugins.igeood import ClassLogits, Igeood

GOLDEN = Path(__file__).parents[1] / "golden"


def logits(seed: int, count: int, classes: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, classes)) * scale


def features(values, labels=None) -> Features:
    numbers = None if labels is None else torch.as_tensor(np.asarray(labels))
    return Features(logits=torch.as_tensor(np.asarray(values)), labels=numbers)


def fitted(train, labels, **fields) -> Detector:
    return Detector(scorer={"kind": "igeood", **fields}).fit(features(train, labels))


def distance(p, q) -> float:
    return 2 * math.acos(min(1.0, math.fsum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 5),
    temperature=st.sampled_from([0.5, 1.0, 5.0]),
    reduce=st.sampled_from(["sum", "min"]),
)
def test_it_is_its_definition(seed, classes, temperature, reduce):
    train, labels = logits(seed, 30, classes), np.arange(30) % classes
    asked = logits(seed + 1, 8, classes)
    centres = [softmax(train[labels == k].mean(axis=0) / temperature) for k in range(classes)]
    wanted = []
    for row in asked:
        apart = [distance(softmax(row / temperature), centre) for centre in centres]
        wanted.append(sum(apart) if reduce == "sum" else -min(apart))
    given_scores = fitted(train, labels, temperature=temperature, reduce=reduce).score(
        features(asked)
    )
    np.testing.assert_allclose(given_scores, wanted, rtol=1e-6, atol=1e-7)


def test_it_agrees_with_a_reference():
    # The reference is the mean in place of the sum, in float32.
    with np.load(GOLDEN / "inputs.npz") as inputs, np.load(GOLDEN / "scores.npz") as scores:
        train = features(inputs["train_logits"], inputs["train_labels"])
        asked = [inputs[f"{name}_logits"] for name in ("test_id", "ood_near", "ood_far")]
        reference = scores["igeood_logits@detectors"].astype(np.float64)
    ours = Detector(scorer="igeood").fit(train).score(features(np.concatenate(asked))) / 6
    np.testing.assert_allclose(ours, reference, rtol=1e-5)


def test_one_hot_predictions_are_pi_apart():
    train, labels = 1e4 * np.eye(4), np.arange(4)
    scores = fitted(train, labels).score(features(1e4 * np.eye(4)))
    np.testing.assert_allclose(scores, 3 * math.pi)
    assert fitted(train, labels, reduce="min").score(features(train)).tolist() == [0] * 4


def test_near_predictions_are_told_apart():
    # arccos of the sum would give 0 or rounding for each of these.
    train = np.array([[1.0, 0.0, -1.0]])
    scorer = fitted(train, [0], reduce="min")
    p = np.array(softmax(train[0]))
    for step in (1e-4, 1e-7, 1e-10):
        moved = train + step * np.array([[1.0, 0.0, 0.0]])
        # The Fisher metric: the squared length of a small step is sum dp^2 / p.
        change = p * (np.array([1.0, 0, 0]) - p[0]) * step
        wanted = -math.sqrt(np.sum(change**2 / p))
        assert scorer.score(features(moved))[0] == pytest.approx(wanted, rel=2 * step + 1e-5)


def test_classes_without_rows_are_left_out():
    train, labels = logits(0, 20, 4), np.arange(20) % 2
    asked = features(logits(1, 6, 4))
    state = fitted(train, labels).ready().scorer
    assert state["roots"].shape == (2, 4)
    assert np.isfinite(fitted(train, labels).score(asked)).all()


def test_the_gradient_is_finite_everywhere():
    state = {"roots": torch.eye(3).double()}
    rows = torch.tensor([[5.0, 1, 0], [2000, 0, 0], [0, 0, 0]], dtype=torch.float64)
    for reduce in ("sum", "min"):
        leaf = rows.clone().requires_grad_()
        total = Igeood(reduce=reduce).score(Features(logits=leaf), state).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        assert bool(torch.isfinite(gradient).all())
    some = rows[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: Igeood().score(Features(logits=z), state), (some,))


def test_the_statistic_keeps_the_laws():
    check_statistic(ClassLogits())
