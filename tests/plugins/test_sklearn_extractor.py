"""sklearn_extractor: fitted classifiers of scikit-learn as models."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from extractor_models import CLASSES, table
from pydantic import ValidationError
from sklearn.calibration import CalibratedClassifierCV
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

import oodcore
from oodcore import Detector
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.participants import unusable
from oodcore.preprocess import Preprocess
from oodcore_plugins.average import AveragedModels
from oodcore_plugins.sklearn_extractor import ClassifierModel, SklearnExtractor

SPEC = {"kind": "sklearn", "factory": "extractor_models:logistic"}
LINEAR = [LogisticRegression(), RidgeClassifier(), LinearSVC(), LinearDiscriminantAnalysis()]
OTHERS = [
    RandomForestClassifier(5, random_state=0),
    HistGradientBoostingClassifier(max_iter=3, random_state=0),
    GaussianNB(),
    KNeighborsClassifier(3),
    MLPClassifier((3,), solver="lbfgs", max_iter=2000, random_state=0),
    SVC(),
    GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2),
]


def called(classifier):
    return type(classifier).__name__


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("classifier", LINEAR + OTHERS, ids=called)
def test_logits_decide_as_the_classifier_does(classifier, classes):
    rows, labels = table(classes=classes)
    classifier = copy.deepcopy(classifier).fit(rows, labels)
    model = ClassifierModel(classifier)
    features = model(rows)
    assert features.logits.shape == (60, classes)
    assert features.logits.dtype == torch.float64
    assert np.array_equal(features.predicted.numpy(), classifier.predict(rows))
    torch.testing.assert_close(features.embeddings, torch.tensor(rows))
    linear = type(classifier) in [type(one) for one in LINEAR]
    assert (features.head is not None) == linear == ("head" in model.gives)
    if linear:
        torch.testing.assert_close(features.head(features.embeddings), features.logits)
    if hasattr(classifier, "decision_function"):
        decided = torch.tensor(classifier.decision_function(rows))
        shown = features.logits[:, 1] - features.logits[:, 0] if classes == 2 else features.logits
        torch.testing.assert_close(shown, decided)
    else:
        shares = torch.tensor(classifier.predict_proba(rows))
        torch.testing.assert_close(features.logits, shares.clamp_min(1e-12).log())
    assert model.rows_seen == 60


def test_two_classes_of_a_logistic_regression_keep_their_probabilities():
    rows, labels = table(classes=2)
    classifier = LogisticRegression().fit(rows, labels)
    shares = ClassifierModel(classifier)(rows).logits.softmax(1)
    torch.testing.assert_close(shares, torch.tensor(classifier.predict_proba(rows)))


def test_a_pipeline_gives_what_its_last_step_gets():
    rows, labels = table()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows, labels)
    features = ClassifierModel(pipeline)(rows)
    torch.testing.assert_close(features.embeddings, torch.tensor(pipeline[0].transform(rows)))
    torch.testing.assert_close(features.logits, torch.tensor(pipeline.decision_function(rows)))
    torch.testing.assert_close(features.head(features.embeddings), features.logits)


def test_texts():
    texts = ["a cat", "a dog", "the cat", "my dog"] * 3
    pipeline = make_pipeline(CountVectorizer(), LogisticRegression())
    pipeline.fit(texts, ["cat" if "cat" in text else "dog" for text in texts])
    detector = Detector(ClassifierModel(pipeline), scorer={"kind": "knn", "k": 1})
    detector.fit((texts, [0 if "cat" in text else 1 for text in texts]))
    scores = detector.score(["my cat dog the", "a cat"])
    assert scores[1] > scores[0]
    assert ClassifierModel(pipeline)(["cat"]).embeddings.shape == (1, 4)


def test_images_become_rows():
    rows, labels = table()
    classifier = LogisticRegression().fit(rows, labels)
    images = torch.tensor(rows).reshape(60, 1, 2, 2)
    flat = ClassifierModel(classifier)(rows).logits
    torch.testing.assert_close(ClassifierModel(classifier)(images).logits, flat)
    step = Preprocess(mean=(0.5,), std=(2.0,))
    prepared = ClassifierModel(classifier, preprocess=step)(images)
    torch.testing.assert_close(
        prepared.logits, torch.tensor(classifier.decision_function((rows - 0.5) / 2))
    )
    torch.testing.assert_close(prepared.rerun(prepared.inputs).logits, prepared.logits)


def test_pairs_of_classes_are_no_classes():
    rows, labels = table()
    classifier = SVC(decision_function_shape="ovo").fit(rows, labels)
    pipeline = make_pipeline(StandardScaler(), classifier).fit(rows, labels)
    for given in (classifier, pipeline):
        assert given.decision_function(rows).shape == (60, CLASSES)
        with pytest.raises(ConfigurationError, match="decision_function_shape='ovr'"):
            ClassifierModel(given, "decision_function")
        with pytest.raises(ConfigurationError, match="gives no probabilities"):
            ClassifierModel(given)
    calibrated = CalibratedClassifierCV(classifier, cv=2).fit(rows, labels)
    shares = torch.tensor(calibrated.predict_proba(rows))
    torch.testing.assert_close(ClassifierModel(calibrated)(rows).logits, shares.log())


@pytest.mark.parametrize("classifier", LINEAR + OTHERS, ids=called)
def test_fingerprints_tell_what_was_learnt(classifier):
    rows, labels = table()
    other, _ = table(seed=1)
    first = ClassifierModel(copy.deepcopy(classifier).fit(rows, labels))
    print_ = first.fingerprint()
    first(rows)
    assert len(print_) == 64
    assert first.fingerprint() == print_
    assert ClassifierModel(copy.deepcopy(classifier).fit(rows, labels)).fingerprint() == print_
    again = pickle.loads(pickle.dumps(first.classifier))
    assert ClassifierModel(again).fingerprint() == print_
    assert ClassifierModel(copy.deepcopy(classifier).fit(other, labels)).fingerprint() != print_
    step = Preprocess(size=3)
    assert ClassifierModel(first.classifier, preprocess=step).fingerprint() != print_


def test_it_lives_in_an_artifact(tmp_path):
    rows, labels = table()
    detector = Detector(SPEC, scorer={"kind": "knn", "k": 2}, shapers=["ash"])
    detector.fit((np.abs(rows), labels)).calibrate(np.abs(table(seed=1)[0]), 0.1)
    scores = detector.score(np.abs(rows))
    detector.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="runs extractor_models:logistic"):
        oodcore.load(tmp_path / "a")
    again = oodcore.load(tmp_path / "a", allow=["extractor_models:logistic"])
    np.testing.assert_allclose(again.score(np.abs(rows)), scores, rtol=1e-6)
    built = SklearnExtractor.model_validate(SPEC | {"arguments": {"C": 0.1}})
    assert SklearnExtractor.model_validate(built.dump()) == built
    assert built.load().classifier.C == 0.1


def test_a_classifier_in_memory_is_given_again(tmp_path):
    rows, labels = table()
    classifier = LogisticRegression().fit(rows, labels)
    detector = Detector(ClassifierModel(classifier), scorer="msp").fit((rows, labels))
    detector.save(tmp_path / "a")
    again = oodcore.load(tmp_path / "a", model=ClassifierModel(classifier))
    np.testing.assert_allclose(again.score(rows), detector.score(rows))
    other = ClassifierModel(LogisticRegression(C=0.1).fit(rows, labels))
    with pytest.raises(ArtifactError, match="another|other weights"):
        oodcore.load(tmp_path / "a", model=other)


def test_there_is_no_gradient():
    rows, labels = table()
    model = ClassifierModel(LogisticRegression().fit(rows, labels))
    detector = Detector(model, scorer={"kind": "odin", "epsilon": 0.01})
    with pytest.raises(DataError, match="scikit-learn gives no gradient"):
        detector.score(rows)
    with pytest.raises(ConfigurationError, match="no layer 'x' to edit"):
        model(rows, edit={"x": torch.neg})
    with pytest.raises(ConfigurationError, match="has no layers, so there is no 'x'"):
        model.with_layers(["x"])


def test_a_comparison_leaves_out_what_needs_a_gradient():
    rows, labels = table()
    data = (torch.tensor(rows), labels)
    model = ClassifierModel(LogisticRegression().fit(rows, labels))
    assert unusable(Detector(model, scorer="odin"), data) == "needs inputs"
    assert unusable(Detector(model, scorer="energy"), data) is None


def test_it_can_be_averaged_and_copied():
    rows, labels = table()
    models = [ClassifierModel(LogisticRegression(C=c).fit(rows, labels)) for c in (0.1, 1.0)]
    features = AveragedModels(models, "logits")(rows)
    expected = (models[0](rows).logits + models[1](rows).logits) / 2
    torch.testing.assert_close(features.logits, expected)
    torch.testing.assert_close(features.head(features.embeddings), expected)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(models[0])))
    assert twin.fingerprint() == models[0].fingerprint()
    twin(rows)
    assert twin.rows_seen == models[0].rows_seen + 60


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5), r"LogisticRegression fails on inputs \[2, 5\].*expecting 4"),
        (torch.zeros(2), "takes rows"),
        ({"x": torch.zeros(2, 4)}, r"takes rows .* not x \[2, 4\]"),
        (["text"], "fails on inputs 1 texts"),
        (torch.full((2, 4), torch.nan), "NaN"),
    ],
)
def test_what_is_wrong_with_inputs_is_said(inputs, message):
    model = ClassifierModel(LogisticRegression().fit(*table()))
    with pytest.raises(DataError, match=message):
        model(inputs)


def numbered_from_one():
    rows, labels = table()
    return LogisticRegression().fit(rows, labels + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "text", "not a str"),
        (lambda: LogisticRegression, "a fitted classifier of scikit-learn is needed"),
        (LinearRegression, "LinearRegression is no classifier"),
        (LogisticRegression, "is not fitted"),
        (numbered_from_one, r"classes of LogisticRegression are \[1, 2, 3\]; fit it on labels 0"),
        (lambda: KNeighborsClassifier().fit(table()[0], np.eye(60, 2, dtype=int)), "one label"),
    ],
)
def test_what_is_no_fitted_classifier_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        ClassifierModel(make())


def test_ways_that_a_classifier_does_not_have_are_refused():
    rows, labels = table()
    with pytest.raises(ConfigurationError, match="no decision function"):
        ClassifierModel(GaussianNB().fit(rows, labels), "decision_function")
    with pytest.raises(ConfigurationError, match="no probabilities"):
        ClassifierModel(LinearSVC().fit(rows, labels), "log_probabilities")
    chosen = ClassifierModel(LogisticRegression().fit(rows, labels), "log_probabilities")
    assert chosen.gives == {"embeddings", "logits"}
    torch.testing.assert_close(chosen(rows).logits.exp().sum(1), torch.ones(60).double())


@pytest.mark.parametrize("fields", [{"factory": "x"}, {"logits": "odds"}, {"classifier": 1}])
def test_a_field_that_makes_no_sense_is_refused(fields):
    with pytest.raises(ValidationError):
        SklearnExtractor.model_validate(SPEC | fields)
