"""NECO against its definition in NumPy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from oodcore import Detector, Features
from oodcore.errors import ConfigurationError


def features(seed: int, count: int = 60, classes: int = 3) -> Features:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, 8)) @ np.random.default_rng(99).normal(size=(8, 8)) + 2
    rows[:, 7] = 5.0
    logits = generator.normal(size=(count, classes)) + 3
    return Features(embeddings=torch.tensor(rows), logits=torch.tensor(logits))


@pytest.mark.parametrize("dim", [None, 1, 5])
@pytest.mark.parametrize("max_logit", [True, False])
@pytest.mark.parametrize("denominator", ["scaled", "raw"])
def test_it_is_its_definition(dim, max_logit, denominator):
    train, asked = features(0), features(1, 20)
    scaler = StandardScaler().fit(train.embeddings.numpy())
    principal = PCA(3 if dim is None else dim, svd_solver="full")
    principal.fit(scaler.transform(train.embeddings.numpy()))
    scaled = scaler.transform(asked.embeddings.numpy())
    inside = np.linalg.norm(scaled @ principal.components_.T, axis=1)
    whole = scaled if denominator == "scaled" else asked.embeddings.numpy()
    expected = inside / np.linalg.norm(whole, axis=1)
    if max_logit:
        expected = expected * asked.logits.numpy().max(axis=1)
    scorer = {"kind": "neco", "dim": dim, "max_logit": max_logit, "denominator": denominator}
    np.testing.assert_allclose(Detector(scorer=scorer).fit(train).score(asked), expected, rtol=1e-9)


def test_it_does_not_depend_on_the_units_of_measurement():
    train, asked = features(0), features(1, 20)
    scores = Detector(scorer="neco").fit(train).score(asked)
    factors = torch.tensor([1e-9, 1.0, 1e3, 2.0, 1e6, 5.0, 7.0, 1.0], dtype=torch.float64)

    def measured(rows: Features) -> Features:
        return Features(embeddings=rows.embeddings * factors, logits=rows.logits)

    other = Detector(scorer="neco").fit(measured(train)).score(measured(asked))
    np.testing.assert_allclose(other, scores, rtol=1e-7)


@pytest.mark.parametrize("denominator", ["scaled", "raw"])
def test_where_the_norm_vanishes_the_score_is_zero(denominator):
    train = features(0)
    row = train.embeddings.mean(dim=0) if denominator == "scaled" else torch.zeros(8).double()
    asked = Features(embeddings=row[None], logits=torch.ones(1, 3).double())
    scorer = {"kind": "neco", "denominator": denominator}
    assert Detector(scorer=scorer).fit(train).score(asked)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("classes", "dim"), [(8, None), (9, None), (3, 8)])
def test_using_all_components_is_refused(classes, dim):
    with pytest.raises(ConfigurationError, match="give a dim below 8"):
        Detector(scorer={"kind": "neco", "dim": dim}).fit(features(0, classes=classes))
