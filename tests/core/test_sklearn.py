"""The estimator keeps scikit-learn's contract, whole."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from oodcore import Detector
from oodcore.sklearn import OODDetector

X, Y = load_iris(return_X_y=True)
STRANGE = X + np.array([0.0, 8.0, -6.0, 5.0])


@parametrize_with_checks(
    [
        OODDetector("mahalanobis"),
        OODDetector("knn"),
        OODDetector({"kind": "knn", "k": 3}, shapers=("react",)),
    ]
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_labels_give_classes_and_none_gives_one() -> None:
    names = np.array(["setosa", "versicolor", "virginica"])[Y]
    labelled, plain = OODDetector().fit(X, names), OODDetector().fit(X)
    assert list(labelled.classes_) == ["setosa", "versicolor", "virginica"]
    expected = Detector(scorer="mahalanobis").fit((X, Y)).score(STRANGE)
    np.testing.assert_allclose(labelled.score_samples(STRANGE), expected, rtol=1e-12)

    centred = X - X.mean(0)
    precision = np.linalg.inv(centred.T @ centred / len(X))
    gaps = STRANGE - X.mean(0)
    naive = -np.einsum("nd,de,ne->n", gaps, precision, gaps)
    np.testing.assert_allclose(plain.score_samples(STRANGE), naive, rtol=1e-9)


def test_the_threshold_is_a_quantile_of_the_training_scores() -> None:
    detector = OODDetector(contamination=0.2).fit(X)
    assert (detector.predict(X) == -1).sum() == 30
    assert (detector.predict(STRANGE) == -1).all()
    np.testing.assert_array_equal(
        detector.decision_function(X), detector.score_samples(X) - detector.offset_
    )
    assert set(detector.fit_predict(X)) == {-1, 1}


def test_in_a_pipeline_and_under_search() -> None:
    def separation(estimator: Any, rows: Any, _labels: Any = None) -> float:
        inside = estimator.score_samples(rows).mean()
        return float(inside - estimator.score_samples(rows + 5.0).mean())

    pipeline = make_pipeline(StandardScaler(), OODDetector({"kind": "knn", "k": 5}))
    scores = cross_val_score(pipeline, X, Y, scoring=separation, cv=3)
    assert scores.shape == (3,)
    assert (scores > 0).all()
    search = GridSearchCV(
        OODDetector(), {"scorer": ["mahalanobis", "max_norm"]}, scoring=separation, cv=3
    ).fit(X, Y)
    assert search.best_params_ == {"scorer": "mahalanobis"}


def test_clone_parameters_and_pickle() -> None:
    detector = OODDetector({"kind": "knn", "k": 4}, contamination=0.3, seed=2)
    copy = clone(detector)
    assert copy.get_params() == detector.get_params()
    copy.set_params(contamination=0.1)
    fitted = detector.fit(X)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(STRANGE), fitted.predict(STRANGE))


def test_what_is_refused() -> None:
    with pytest.raises(NotFittedError):
        OODDetector().predict(X)
    with pytest.raises(ValueError, match="contamination"):
        OODDetector(contamination=0.7).fit(X)
    with pytest.raises(ValueError, match="unknown scorer"):
        OODDetector("nonesuch").fit(X)
    with pytest.raises(ValueError, match="3 features.*4"):
        OODDetector().fit(X).predict(X[:, :3])
    with pytest.raises(ValueError, match="continuous"):
        OODDetector().fit(X, np.linspace(0, 1, len(X)))


def test_the_global_generators_are_left_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    OODDetector("knn").fit(X).predict(X)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
