"""center: the term, the three ways in which centres follow, and the schedule of its weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from training_runs import drawn, step_of

from oodcore import Features, registry
from oodcore.config import validate
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore.training_config import Blueprint
from oodcore_plugins.center import Center

WAYS = ("learned", "batch_mean", "ema")
LABELS = torch.tensor([0, 2, 0, 0, 2])


def center(**fields) -> Center:
    return Center(weights=(0.1,), starts=(0,), **fields)


def state_of(part: Center, centers: torch.Tensor):
    class Run:
        classes, width, epochs = *centers.shape, 3

    state = part.build(Run)
    state.centers.data = centers.clone()
    return state


def naive(rows, labels, centers, squared: bool) -> float:
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        distance = sum((float(h) - float(c)) ** 2 for h, c in zip(row, centers[label], strict=True))
        total += distance if squared else distance**0.5
    return total / len(rows)


@given(rows=arrays(np.float64, (4, 3), elements=st.floats(-50, 50)), squared=st.booleans())
def test_the_formula(rows, squared):
    part, centers, labels = center(squared=squared), drawn(3, 3), [0, 1, 2, 1]
    step = step_of(Features(embeddings=torch.from_numpy(rows)), torch.tensor(labels))
    given = part.loss(step, state_of(part, centers))
    wanted = naive(rows, labels, centers.tolist(), squared)
    assert float(given) == pytest.approx(wanted, rel=1e-9, abs=1e-6)


@pytest.mark.parametrize("squared", [True, False])
def test_the_gradient_is_that_of_the_formula_and_leaves_the_centres(squared):
    part = center(squared=squared)
    state = state_of(part, drawn(3, 4))

    def loss(rows):
        return part.loss(step_of(Features(embeddings=rows), LABELS), state)

    rows = drawn(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, [rows])
    assert state.centers.grad is None


def test_a_row_in_its_centre_has_a_gradient_of_0():
    part = center(squared=False)
    state = state_of(part, drawn(3, 4))
    rows = drawn(3, 4)[LABELS].requires_grad_()
    part.loss(step_of(Features(embeddings=rows), LABELS), state).backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.parametrize("lr", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_how_centres_follow(way, lr):
    part, before, rows = center(centers=way, lr=lr), drawn(3, 4), drawn(5, 4, seed=1)
    state = state_of(part, before)
    part.after(step_of(Features(embeddings=rows), LABELS), state)
    wanted = before.clone()
    for k in range(3):
        own = rows[k == LABELS]
        if not len(own):
            continue
        if way == "learned":  # the gradient of the mean squared distance
            wanted[k] -= lr * 2 * (before[k] - own).sum(dim=0) / 5
        elif way == "batch_mean":
            wanted[k] -= lr * (before[k] - own).sum(dim=0) / (1 + len(own))
        else:
            wanted[k] = (1 - lr) * before[k] + lr * own.mean(dim=0)
    torch.testing.assert_close(state.centers.detach(), wanted)
    assert torch.equal(state.centers[1], before[1]), "the centre of an absent class"


def test_learnt_centres_follow_the_distance_itself_where_that_is_the_term():
    part, before, rows = center(squared=False), drawn(3, 4), drawn(5, 4, seed=1)
    state = state_of(part, before)
    part.after(step_of(Features(embeddings=rows), LABELS), state)
    away = before[LABELS] - rows
    shift = torch.zeros(3, 4).double().index_add(0, LABELS, away / away.norm(dim=1, keepdim=True))
    torch.testing.assert_close(state.centers.detach(), before - 0.5 * shift / 5)


@pytest.mark.parametrize("way", WAYS)
def test_centres_do_not_depend_on_the_weight(way):
    results = []
    for weight in (1e-6, 10.0):
        part = Center(weights=(weight,), starts=(0,), centers=way)
        state = state_of(part, drawn(3, 4))
        part.after(step_of(Features(embeddings=drawn(5, 4, seed=1)), LABELS), state)
        results.append(state.centers.detach())
    assert torch.equal(*results)


def test_the_weight_goes_by_epochs():
    part = Center(weight=2)
    epochs = (0, 59, 60, 79, 80, 199)
    assert [part.weight_at(epoch) for epoch in epochs] == [0, 0, 0.002, 0.002, 0.01, 0.01]


def test_centres_wait_for_their_weight():
    exercise = Exercise([Center(weights=(0.1,), starts=(1,))])
    centers = exercise.engine.states["center"].centers
    before = centers.detach().clone()
    exercise.advance(exercise.plan.steps_per_epoch)
    assert torch.equal(centers, before)
    exercise.advance(exercise.plan.steps_per_epoch + 1)
    assert not torch.equal(centers, before)


def test_embeddings_come_nearer_to_their_centres():
    def spread(*parts) -> float:
        exercise = Exercise(parts).advance()
        rows = exercise.run.model.eval()(exercise.inputs).embeddings.detach()
        means = torch.stack([rows[exercise.labels == k].mean(dim=0) for k in range(3)])
        within = (rows - means[exercise.labels]).square().sum() / rows.square().sum()
        return float(within)

    assert spread(Center(weights=(0.2,), starts=(0,))) < 0.8 * spread()


def test_a_start_behind_the_last_epoch_is_refused():
    with pytest.raises(ConfigurationError, match="from epoch 60 on, and the run has 3"):
        Exercise([Center()])
    Exercise([Center(weights=(0.1, 0.2), starts=(2, 60))])
    Exercise([Center(weight=0)])


REFUSED = {
    "no weights": ({"weights": [], "starts": []}, "0 weights need as many starts"),
    "one start too few": ({"weights": [0.1, 0.2], "starts": [0]}, "2 weights need as many starts"),
    "not ascending": ({"weights": [0.1, 0.2], "starts": [5, 5]}, r"must ascend: \(5, 5\)"),
    "a rate": ({"lr": 1.5}, "lr"),
    "a way": ({"centers": "fixed"}, "centers"),
    "a weight": ({"weights": [-0.1], "starts": [0]}, "weights"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_that_mean_nothing_are_refused(fields, message):
    blueprint = {
        "network": {"factory": "training_runs:net"},
        "regularizers": [{"kind": "center", **fields}],
    }
    with pytest.raises(ConfigurationError, match=message):
        validate(Blueprint, blueprint)
    with pytest.raises(ValidationError, match=message):
        Center(**fields)


def test_features_without_embeddings_are_refused():
    step = step_of(Features(logits=torch.ones(5, 3)), LABELS)
    with pytest.raises(DataError, match="embeddings are needed"):
        center().loss(step, state_of(center(), drawn(3, 4)))


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "center") == Center(
        weights=(0.001, 0.005), starts=(60, 80), centers="learned", lr=0.5, squared=True
    )


PARTS = (center(centers="batch_mean"), center(centers="ema", squared=False))


@pytest.mark.parametrize("check", regularizer_checks(*PARTS), ids=str)
def test_the_laws_of_regularizers(check):
    check()
