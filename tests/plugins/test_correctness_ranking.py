"""correctness_ranking: the loss of pairs, the history, and its corners."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from training_runs import drawn, step_of

from oodcore import Features, Regularizer, registry
from oodcore.errors import DataError
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore_plugins.correctness_ranking import CorrectnessRanking
from oodcore_plugins.sam import SAM


def history_of(*counts: int) -> nn.Module:
    history = nn.Module()
    history.register_buffer("count", torch.tensor(counts))
    return history


def term(logits, counts, epoch, ids=None) -> torch.Tensor:
    step = step_of(Features(logits=logits), None, ids, epoch=epoch)
    return CorrectnessRanking().loss(step, history_of(*counts))


def naive(logits: np.ndarray, counts, epoch: int, ids) -> float:
    most, least = (1 if epoch < 2 else epoch), min(counts)
    confidence = []
    for row in logits:
        exponentials = [math.exp(z - max(row)) for z in row]
        confidence.append(1 / sum(exponentials))
    right = [(counts[i] - least) / (most - least) if most > least else 0.0 for i in ids]
    total = 0.0
    for i in range(len(ids)):
        j = (i + 1) % len(ids)
        sign = (right[i] > right[j]) - (right[i] < right[j])
        if sign:
            gap = confidence[i] - confidence[j]
            total += max(0.0, -sign * gap + abs(right[i] - right[j]))
    return total / len(ids)


@given(
    logits=arrays(np.float64, (5, 3), elements=st.floats(-8, 8)),
    epoch=st.integers(0, 5),
    data=st.data(),
)
def test_the_formula(logits, epoch, data):
    counts = data.draw(st.lists(st.integers(0, epoch), min_size=7, max_size=7))
    ids = data.draw(st.permutations(range(7)))[:5]
    given = term(torch.from_numpy(logits), counts, epoch, torch.tensor(ids))
    assert float(given) == pytest.approx(naive(logits, counts, epoch, ids), rel=1e-9, abs=1e-12)


def confident(*shares: float) -> torch.Tensor:
    """Logits of two classes whose largest probabilities are these."""
    p = torch.tensor(shares, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_values_worked_out_by_hand():
    # sign 1, gap 0.9 - 0.6 = 0.3 and margin 1: 1 - 0.3, the same in both orders.
    assert float(term(confident(0.9, 0.6), (2, 0), epoch=2)) == pytest.approx(0.7)
    assert float(term(confident(0.6, 0.9), (0, 2), epoch=2)) == pytest.approx(0.7)
    # The other way round: 1 + 0.3.
    assert float(term(confident(0.6, 0.9), (2, 0), epoch=2)) == pytest.approx(1.3)
    # Three classes allow less: confidences 0.9 and 0.4 are 0.5 apart.
    p = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]], dtype=torch.float64)
    assert float(term(p.log(), (2, 0), epoch=2)) == pytest.approx(0.5)


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_equal_histories_have_no_loss(epoch):
    for count in {0, epoch}:
        logits = drawn(4, 3).requires_grad_()
        given = term(logits, [count] * 4, epoch)
        assert float(given.detach()) == 0
        given.backward()
        assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_one_row_is_its_own_neighbour():
    assert float(term(drawn(1, 3), (2, 0, 1), 3, torch.tensor([0]))) == 0


def test_saturated_rows_have_a_loss_and_a_gradient():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]], requires_grad=True)
    given = term(logits, (0, 2, 1), 2)
    given.backward()
    assert torch.isfinite(given)
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_goes_through_both_of_a_pair():
    def loss(logits):
        return term(logits, (3, 0, 4, 1), 4)  # up and down in turn, so that no two pairs cancel

    logits = drawn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(loss, [logits])
    loss(logits).backward()
    assert (logits.grad.norm(dim=1) > 0).all()


class Observer(Regularizer):
    """Counts by itself, from what a step tells after its update."""

    kind = "observer"

    def after(self, step, state):
        for id_, right in zip(
            step.ids.tolist(), step.features.predicted == step.labels, strict=True
        ):
            SEEN[id_] += bool(right)


SEEN: list[int] = []


@pytest.mark.parametrize("parts", [(), (SAM(rho=0.1),)], ids=["alone", "sam"])
def test_the_history_is_how_often_a_row_was_right(parts):
    SEEN[:] = [0] * 32
    exercise = Exercise([CorrectnessRanking(), Observer(), *parts]).advance()
    counts = exercise.engine.states["correctness_ranking"].count
    assert counts.tolist() == SEEN
    assert counts.dtype == torch.int64
    assert counts.min() + counts.max() > 0
    assert counts.max() <= exercise.plan.epochs


def test_a_step_looks_back_and_not_at_itself():
    part, state = CorrectnessRanking(), history_of(0, 0)
    step = step_of(Features(logits=confident(0.9, 0.6)), torch.tensor([0, 1]))
    assert float(part.loss(step, state)) == 0
    part.after(step, state)
    assert state.count.tolist() == [1, 0]
    assert float(part.loss(step, state)) == pytest.approx(0.7)


def test_a_step_with_no_row_right_counts_nothing():
    part, state = CorrectnessRanking(), history_of(0, 0)
    part.after(step_of(Features(logits=confident(0.9, 0.9)), torch.tensor([1, 1])), state)
    assert state.count.tolist() == [0, 0]


def test_features_without_logits_are_refused():
    with pytest.raises(DataError, match="logits are needed"):
        CorrectnessRanking().loss(step_of(Features(embeddings=torch.ones(1, 2))), history_of(0))


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "correctness_ranking") == CorrectnessRanking(weight=1)


@pytest.mark.parametrize("check", regularizer_checks(CorrectnessRanking(weight=0.5)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
