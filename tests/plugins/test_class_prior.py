"""rp_msp, rp_gradnorm and reweighted: the definitions, and priors measured, given, uniform."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from logit_oracles import softmax
from pydantic import ValidationError

from oodcore import Detector, Features, FeatureStore, registry
from oodcore.errors import ConfigurationError
from oodcore_plugins.class_prior import RPMSP, Reweighted, RPGradNorm
from oodcore_plugins.energy import Energy
from oodcore_plugins.gradnorm import GradNorm
from oodcore_plugins.msp import MSP

DRAWN = np.random.default_rng(0)
LOGITS, ROWS = DRAWN.normal(size=(20, 3)) * 3, DRAWN.normal(size=(20, 5))
FEATURES = Features(embeddings=torch.as_tensor(ROWS), logits=torch.as_tensor(LOGITS))
LABELS = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
PRIOR = [0.6, 0.3, 0.1]


def fitted(scorer, labels=LABELS):
    store = FeatureStore(statistics=scorer.statistics())
    rows = Features(embeddings=FEATURES.embeddings, logits=FEATURES.logits, labels=labels)
    return scorer.fit(store.update(rows))


def score(scorer, state) -> np.ndarray:
    return scorer.score(FEATURES, state).numpy()


def test_rp_msp():
    wanted = [max(p - q for p, q in zip(softmax(row), PRIOR, strict=True)) for row in LOGITS]
    np.testing.assert_allclose(score(RPMSP(), fitted(RPMSP())), wanted, rtol=1e-12)


def test_rp_gradnorm():
    wanted = [
        sum(map(abs, h)) * sum(abs(p - q) for p, q in zip(softmax(row), PRIOR, strict=True))
        for row, h in zip(LOGITS, ROWS, strict=True)
    ]
    np.testing.assert_allclose(score(RPGradNorm(), fitted(RPGradNorm())), wanted, rtol=1e-12)


@pytest.mark.parametrize("inner", [Energy(), MSP(temperature=10)])
def test_reweighted(inner):
    scores = inner.score(FEATURES, {}).numpy()
    wanted = []
    for row, value in zip(LOGITS, scores, strict=True):
        given = softmax(row)
        dot = sum(p * q for p, q in zip(given, PRIOR, strict=True))
        wanted.append((1 - dot / math.hypot(*given) / math.hypot(*PRIOR)) * value)
    scorer = Reweighted(scorer=inner)
    np.testing.assert_allclose(score(scorer, fitted(scorer)), wanted, rtol=1e-11)


def test_a_uniform_prior_changes_no_ranking():
    uniform = {"prior": torch.full((3,), 1 / 3, dtype=torch.float64)}
    np.testing.assert_allclose(score(RPMSP(), uniform), score(MSP(), {}) - 1 / 3, rtol=1e-12)
    np.testing.assert_allclose(score(RPGradNorm(), uniform), score(GradNorm(), {}), rtol=1e-12)
    norms = np.array([math.hypot(*softmax(row)) for row in LOGITS])
    wanted = (1 - 1 / (math.sqrt(3) * norms)) * score(Energy(), {})
    np.testing.assert_allclose(score(Reweighted(), uniform), wanted, rtol=1e-11)


def test_the_weight_of_certain_and_of_uniform_predictions():
    logits = torch.tensor([[4000.0, 0, 0, 0], [5.0, 5, 5, 5]], dtype=torch.float64)
    state = {"prior": torch.full((4,), 0.25, dtype=torch.float64)}
    given = Reweighted(scorer="msp").score(Features(logits=logits), state)
    assert given.tolist() == pytest.approx([1 - 1 / math.sqrt(4), 0], abs=1e-15)


@pytest.mark.parametrize("kind", [RPMSP, RPGradNorm, Reweighted])
def test_a_prior_that_is_given_needs_no_data(kind):
    known = kind(prior=(12, 6, 2))
    assert known.statistics() == ()
    assert known.fit(FeatureStore()) == {}
    np.testing.assert_allclose(score(known, {}), score(kind(), fitted(kind())), rtol=1e-12)


@pytest.mark.parametrize("prior", [(), (0, 0), (-1, 2)])
def test_a_prior_of_nothing_is_refused(prior):
    with pytest.raises(ValidationError, match="prior"):
        RPMSP(prior=prior)


def test_a_prior_of_other_classes_is_refused():
    with pytest.raises(ConfigurationError, match="the prior has 2 numbers, and there are 3"):
        score(RPMSP(prior=(1, 2)), {})


def test_a_class_without_rows_has_prior_0():
    labels = LABELS.clamp_max(1)
    assert fitted(RPMSP(), labels)["prior"].tolist() == [0.6, 0.4, 0]


def test_reweighted_works_from_a_configuration_with_parts_that_learn():
    scorer = registry.build("scorer", {"kind": "reweighted", "scorer": {"kind": "knn", "k": 2}})
    rows = Features(FEATURES.embeddings, FEATURES.logits, LABELS, ids=torch.arange(len(LABELS)))
    detector = Detector(scorer=scorer).fit(rows)
    bare = Detector(scorer={"kind": "knn", "k": 2}).fit(rows)
    weights = detector.score(FEATURES) / bare.score(FEATURES)
    assert ((weights > 0) & (weights < 1)).all()


def test_energy_is_what_is_reweighted_where_nothing_is_said():
    assert Reweighted().scorer == Energy()
