"""The relation graph's score against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features
from oodcore_plugins import relation


def features(seed: int, count: int = 50) -> Features:
    generator = np.random.default_rng(seed)
    return Features(
        embeddings=torch.tensor(generator.normal(size=(count, 6)) + 0.4),
        logits=torch.tensor(2 * generator.normal(size=(count, 3))),
    )


def definition(train: Features, asked: Features, power: float, threshold: float) -> list[float]:
    def softmax(logits):
        return np.exp(logits) / np.exp(logits).sum()

    known = list(zip(train.embeddings.numpy(), train.logits.numpy(), strict=True))
    scores = []
    for h, z in zip(asked.embeddings.numpy(), asked.logits.numpy(), strict=True):
        total = 0.0
        for other, logits in known:
            cosine = h @ other / (np.linalg.norm(h) * np.linalg.norm(other))
            alike = max(cosine, 0) * (softmax(z) @ softmax(logits))
            total += alike**power if alike > threshold else 0
        scores.append(total)
    return scores


@pytest.mark.parametrize("power", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("pairs", [1, 64, 2**22])
def test_it_is_its_definition_in_steps_of_any_size(power, threshold, pairs, monkeypatch):
    monkeypatch.setattr(relation, "PAIRS", pairs)
    train, asked = features(0), features(1, 20)
    scorer = {"kind": "relation", "power": power, "threshold": threshold}
    scores = Detector(scorer=scorer).fit(train).score(asked)
    np.testing.assert_allclose(scores, definition(train, asked, power, threshold), rtol=1e-10)


@pytest.mark.parametrize("certainty", [0.5, 4.0, 60.0])
def test_blocks_that_are_passed_over_would_add_nothing(certainty, monkeypatch):
    monkeypatch.setattr(relation, "BLOCK", 4)
    train, asked = features(2, 60), features(3, 20)
    train, asked = (f.with_logits(certainty * f.logits) for f in (train, asked))
    scores = Detector(scorer="relation").fit(train).score(asked)
    np.testing.assert_allclose(scores, definition(train, asked, 1.0, 0.03), rtol=1e-10)


def test_rows_of_other_predictions_are_not_compared(monkeypatch):
    logits = 50 * torch.eye(3).double().repeat(8, 1)
    train = features(4, 24).with_logits(logits)
    monkeypatch.setattr(relation, "BLOCK", 8)
    detector = Detector(scorer="relation").fit(train)
    compared = []
    kernel = relation.Relation._kernel
    monkeypatch.setattr(
        relation.Relation, "_kernel", lambda self, r: compared.append(r.numel()) or kernel(self, r)
    )
    detector.score(train)
    assert sum(compared) == 24 * 8


def test_a_zero_row_scores_zero():
    zero = Features(embeddings=torch.zeros(1, 6).double(), logits=torch.ones(1, 3).double())
    assert Detector(scorer="relation").fit(features(0)).score(zero)[0] == 0


def test_each_training_row_counts():
    train, asked = features(0), features(1, 20)
    once = Detector(scorer="relation").fit(train).score(asked)
    twice = Detector(scorer="relation").fit(Features.cat([train, train])).score(asked)
    np.testing.assert_allclose(twice, 2 * once)


def test_a_fractional_power_has_a_gradient_where_nothing_is_alike():
    scorer = relation.Relation(power=0.5, threshold=0.0)
    rows = torch.tensor([[-1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    known = Features(embeddings=torch.eye(2).double(), logits=torch.zeros(2, 2).double())
    learnt = Detector(scorer=scorer).fit(known).ready()
    asked = Features(embeddings=rows, logits=torch.zeros(2, 2).double())
    (gradient,) = torch.autograd.grad(scorer.score(asked, learnt.scorer).sum(), rows)
    assert bool(torch.isfinite(gradient).all())
