"""caref and cadref: errors counted dimension by dimension, their sum, and odd confidences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from embedding_rows import HEAD, LABELS, ROWS, TESTED, features, fitted, logits, score
from logit_oracles import softmax

from oodcore import Features, Head
from oodcore.errors import DataError
from oodcore.testing import check_statistic
from oodcore_plugins.cadref import CADRef, CARef, MeanConfidence, PredictedMeans


def predicted(row) -> int:
    return int(np.argmax(logits(row)))


def means() -> dict[int, np.ndarray]:
    by_class: dict[int, list[np.ndarray]] = {}
    for row in ROWS:
        by_class.setdefault(predicted(row), []).append(row)
    return {k: np.mean(rows, axis=0) for k, rows in by_class.items()}


def confidence(row, name: str) -> float:
    given = logits(row)
    if name == "energy":
        return math.log(math.fsum(math.exp(z) for z in given))
    if name == "max_logit":
        return max(given)
    shares = softmax(given)
    if name == "msp":
        return max(shares)
    return 1 / math.fsum((p * (1 - p)) ** 0.1 for p in shares)


def test_caref():
    known = means()
    wanted = [-np.abs(h - known[predicted(h)]).sum() / np.abs(h).sum() for h in TESTED]
    np.testing.assert_allclose(score(CARef()), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["energy", "max_logit", "msp", "gen"])
def test_cadref(name):
    known, weight = means(), HEAD.weight.numpy()
    level = np.mean([confidence(row, name) for row in ROWS])
    wanted = []
    for h in TESTED:
        y = predicted(h)
        raised = lowered = 0.0
        for value, mean, w in zip(h, known[y], weight[y], strict=True):
            aligned = np.sign(w) * (value - mean)
            raised, lowered = raised + max(aligned, 0), lowered + max(-aligned, 0)
        size = np.abs(h).sum()
        wanted.append(-(raised / size / confidence(h, name) + lowered / size / level))
    np.testing.assert_allclose(score(CADRef(confidence=name)), wanted, rtol=1e-10)


def test_with_equal_confidences_cadref_is_caref_over_them():
    given = features(TESTED)
    level = given.logits.logsumexp(1)
    state = {**fitted(CARef()), "level": torch.tensor(1.0).double()}
    whole = score(CARef(), state=state)
    for row in range(len(TESTED)):
        one = {**state, "level": level[row]}
        found = score(CADRef(), TESTED[row : row + 1], one)[0]
        assert found * float(level[row]) == pytest.approx(whole[row])


def test_labels_are_not_used():
    other = np.random.default_rng(5).permutation(LABELS)
    for scorer in (CARef(), CADRef()):
        state = fitted(scorer, labels=other)
        np.testing.assert_array_equal(score(scorer, state=state), score(scorer))


def test_a_class_that_is_never_predicted_has_the_mean_of_all_rows():
    head = Head(torch.eye(3).double(), torch.tensor([0.0, 0, -100]).double())
    train = np.abs(np.random.default_rng(0).normal(size=(30, 3)))
    state = fitted(CARef(), train, None, head)
    np.testing.assert_allclose(state["means"][2], train.mean(axis=0))
    asked = np.array([[0.0, 0, 500]])
    wanted = -np.abs(asked[0] - train.mean(axis=0)).sum() / 500
    assert score(CARef(), asked, state, head)[0] == pytest.approx(wanted)


def test_a_zero_embedding_is_finite_and_last():
    for scorer in (CARef(), CADRef()):
        given = score(scorer, np.concatenate([TESTED, np.zeros((1, 5))]))
        assert np.isfinite(given).all()
        assert given.argmin() == len(TESTED)


def test_dimensions_without_weight_count_in_neither_part():
    head = Head(torch.tensor([[1.0, 0], [-1, 0]]).double(), torch.ones(2).double())
    train = np.array([[1.0, 3], [2, 5], [-1, 4], [-3, 1]])
    state = fitted(CADRef(), train, None, head)
    one, other = np.array([[1.0, 4]]), np.array([[1.0, -4]])
    assert score(CADRef(), one, state, head) == score(CADRef(), other, state, head)


def test_rows_without_confidence_come_last():
    state = {**fitted(CARef()), "level": torch.tensor(4.0).double()}
    embeddings = torch.from_numpy(ROWS.max(axis=0) * np.ones((3, 5)) * 1.5)
    values = torch.tensor([[9.0, 0, 0, 0], [0.5, 0, 0, 0], [-50.0, -60, -60, -60]]).double()
    given = CADRef().score(Features(embeddings, values, head=HEAD), state)
    assert bool(torch.isfinite(given).all())
    assert given.argsort().tolist() == [2, 1, 0]


def test_a_mean_confidence_that_is_not_positive_is_refused():
    head = Head(HEAD.weight, HEAD.bias - 1000)
    with pytest.raises(DataError, match="give confidence: msp"):
        fitted(CADRef(), head=head)
    assert np.isfinite(score(CADRef(confidence="msp"), state=None, head=head)).all()


def test_it_needs_a_head():
    given = features(TESTED)
    bare = Features(given.embeddings, given.logits)
    with pytest.raises(DataError, match="there is none"):
        CADRef().score(bare, fitted(CADRef()))


def test_certain_predictions_have_a_finite_confidence():
    head = Head(1e6 * HEAD.weight, HEAD.bias)
    for name in ("energy", "max_logit", "msp", "gen"):
        scorer = CADRef(confidence=name)
        state = fitted(scorer, head=head)
        assert np.isfinite(score(scorer, state=state, head=head)).all()


@pytest.mark.parametrize("statistic", [PredictedMeans(), MeanConfidence(confidence="max_logit")])
def test_the_statistics_keep_the_laws(statistic):
    check_statistic(statistic)
