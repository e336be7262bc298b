"""sklearn: the scores of scikit-learn's estimators, against the estimators themselves."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
from embedding_rows import LABELS, ROWS, TESTED, features
from sklearn.base import DensityMixin, OutlierMixin
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.linear_model import SGDOneClassSVM
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.neighbors import KernelDensity, LocalOutlierFactor
from sklearn.svm import OneClassSVM
from sklearn.utils import all_estimators

from oodcore import Detector, FeatureStore, load
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.plugins import registry
from oodcore_plugins import sklearn_estimators
from oodcore_plugins.sklearn_estimators import MODULES, Sklearn

ESTIMATORS = {
    "BayesianGaussianMixture": lambda: BayesianGaussianMixture(random_state=3),
    "EllipticEnvelope": lambda: EllipticEnvelope(random_state=3),
    "GaussianMixture": lambda: GaussianMixture(random_state=3),
    "IsolationForest": lambda: IsolationForest(random_state=3),
    "KernelDensity": lambda: KernelDensity(),
    "LocalOutlierFactor": lambda: LocalOutlierFactor(novelty=True),
    "OneClassSVM": lambda: OneClassSVM(),
    "SGDOneClassSVM": lambda: SGDOneClassSVM(random_state=3),
}


def fitted(scorer, rows=ROWS):
    """The state, and the training rows in the order in which the estimator sees them."""
    given = features(rows, LABELS[: len(rows)])
    state = scorer.fit(FeatureStore(given.head, scorer.statistics()).update(given))
    return state, state["rows"].tensor().double().numpy()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_it_is_what_the_estimator_says(name):
    scorer = Sklearn(estimator=name, seed=3)
    state, rows = fitted(scorer)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, ROWS))
    wanted = ESTIMATORS[name]().fit(rows).score_samples(TESTED)
    np.testing.assert_allclose(scorer.score(features(TESTED), state), wanted, rtol=1e-12)


def test_every_estimator_of_outliers_is_there():
    outliers = {name for name, cls in all_estimators() if issubclass(cls, OutlierMixin)}
    densities = {name for name, cls in all_estimators() if issubclass(cls, DensityMixin)}
    assert set(MODULES) == outliers | densities | {"KernelDensity"}
    assert set(get_args(Sklearn.model_fields["estimator"].annotation)) == set(MODULES)


def test_arguments_reach_the_estimator():
    scorer = Sklearn(estimator="LocalOutlierFactor", arguments={"n_neighbors": 3, "p": 1})
    state, rows = fitted(scorer)
    wanted = LocalOutlierFactor(n_neighbors=3, p=1, novelty=True).fit(rows).score_samples(TESTED)
    np.testing.assert_allclose(scorer.score(features(TESTED), state), wanted, rtol=1e-12)


def test_a_sample_of_the_rows():
    scorer = Sklearn(estimator="KernelDensity", rows=20)
    state, rows = fitted(scorer)
    assert rows.shape == (20, 5)
    assert set(map(tuple, rows)) < set(map(tuple, ROWS))
    np.testing.assert_allclose(
        scorer.score(features(TESTED), state),
        KernelDensity().fit(rows).score_samples(TESTED),
        rtol=1e-12,
    )
    _, everything = fitted(Sklearn(estimator="KernelDensity", rows=None))
    assert len(everything) == len(ROWS)


def test_the_seed_decides():
    one, again, other = (
        Detector(scorer={"kind": "sklearn", "seed": seed}).fit(ROWS).score(TESTED)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_loaded_detector_fits_it_again(tmp_path, name):
    detector = Detector(scorer={"kind": "sklearn", "estimator": name}).fit(ROWS)
    expected = detector.score(TESTED)
    detector.save(tmp_path / "saved")
    sklearn_estimators._fitted.clear()
    np.testing.assert_allclose(load(tmp_path / "saved").score(TESTED), expected, rtol=1e-9)


def test_it_is_fitted_once_where_it_was_fitted(monkeypatch):
    calls = []
    fit = IsolationForest.fit
    monkeypatch.setattr(
        IsolationForest, "fit", lambda self, *rows: calls.append(1) or fit(self, *rows)
    )
    detector = Detector(scorer="sklearn").fit(ROWS)
    for _ in range(3):
        detector.score(TESTED)
    assert len(calls) == 1


def test_an_estimator_that_has_become_another_is_refused(tmp_path, monkeypatch):
    detector = Detector(scorer="sklearn").fit(ROWS)
    detector.save(tmp_path / "saved")
    scores = IsolationForest.score_samples
    monkeypatch.setattr(
        IsolationForest, "score_samples", lambda self, rows: scores(self, rows) * 1.001
    )
    with pytest.raises(ArtifactError, match="gives other scores than when it was saved"):
        load(tmp_path / "saved")


def test_an_artifact_names_no_other_code(tmp_path):
    scorer = {"kind": "sklearn", "estimator": "os:system", "arguments": {"command": "true"}}
    with pytest.raises(ConfigurationError, match="estimator"):
        registry.build("scorer", scorer)
    folder = Detector(scorer="sklearn").fit(ROWS).save(tmp_path / "saved")
    document = json.loads((folder / "detector.json").read_text())
    assert document["configuration"]["scorer"]["estimator"] == "IsolationForest"


# A tree splits nothing beyond its rows, and SGDOneClassSVM knows a half-line only.
@pytest.mark.parametrize("name", sorted(set(MODULES) - {"IsolationForest", "SGDOneClassSVM"}))
def test_one_dimension_and_rows_that_are_equal(name):
    rows = np.repeat([[0.0], [1.0]], 30, axis=0)
    detector = Detector(scorer={"kind": "sklearn", "estimator": name}).fit(rows)
    near, far = detector.score(np.array([[0.0], [40.0]]))
    assert near > far


def test_no_rows_have_no_scores():
    scorer = Sklearn()
    state, _ = fitted(scorer)
    assert scorer.score(features(np.zeros((0, 5))), state).shape == (0,)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_global_generators_are_left_alone(name):
    before, torchs = np.random.get_state(legacy=False), torch.get_rng_state()
    Detector(scorer={"kind": "sklearn", "estimator": name}).fit(ROWS).score(TESTED)
    after = np.random.get_state(legacy=False)
    # A draw moves the position in the key, and the key itself only once in a while.
    assert after["state"]["pos"] == before["state"]["pos"]
    np.testing.assert_array_equal(after["state"]["key"], before["state"]["key"])
    assert torch.equal(torch.get_rng_state(), torchs)


def test_what_is_refused():
    for fields, told in (
        ({"estimator": "IsolationForrest"}, "estimator"),
        ({"arguments": {"n_estimator": 3}}, "did you mean 'n_estimators'"),
        ({"arguments": {"random_state": 3}}, "'random_state' is set by the scorer; give seed="),
        ({"estimator": "LocalOutlierFactor", "arguments": {"novelty": False}}, "'novelty' is set"),
        ({"rows": 0}, "rows"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            registry.build("scorer", {"kind": "sklearn", **fields})
    wrong = {"kind": "sklearn", "arguments": {"n_estimators": "many"}}
    with pytest.raises(DataError, match="IsolationForest with .* cannot be fitted on 60 rows"):
        Detector(scorer=wrong).fit(ROWS)
    mixture = {"kind": "sklearn", "estimator": "GaussianMixture", "arguments": {"n_components": 9}}
    with pytest.raises(DataError, match="cannot be fitted on 5 rows"):
        Detector(scorer=mixture).fit(ROWS[:5])
    same = Detector(scorer={"kind": "sklearn", "estimator": "EllipticEnvelope"})
    with pytest.raises(DataError, match="EllipticEnvelope with {} cannot be fitted on 60 rows"):
        same.fit(np.ones((60, 1)))
    scorer = Sklearn()
    with pytest.raises(DataError, match="IsolationForest cannot score on 15 rows: X has 4"):
        scorer.score(features(TESTED[:, :4], head=None), fitted(scorer)[0])
    far = Detector(scorer={"kind": "sklearn", "estimator": "LocalOutlierFactor"}).fit(ROWS)
    with pytest.raises(DataError, match="scorer 'sklearn' of row 0 .* are not finite"):
        far.score(TESTED * 1e200)
