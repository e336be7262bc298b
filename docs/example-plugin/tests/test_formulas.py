"""Each component computes what its docstring says, against a plain loop."""

import math

import pytest
import torch
from oodcore_example import ClassDirections, ConfidencePenalty, NearestDirection, TypicalRange

from oodcore import Detector, Features, FeatureStore
from oodcore.features import unit


def rows() -> Features:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(30, 5, generator=generator, dtype=torch.float64)
    return Features(embeddings=drawn, labels=torch.arange(30) % 3, ids=torch.arange(30))


def test_the_score_is_the_cosine_to_the_nearest_class():
    features = rows()
    directions = [unit(features.embeddings[k::3]).mean(dim=0) for k in range(3)]
    expected = [
        max(torch.cosine_similarity(row, d, dim=0).item() for d in directions)
        for row in features.embeddings
    ]
    detector = Detector(scorer=NearestDirection()).fit(features, classes=3)
    assert detector.score(features) == pytest.approx(expected)


def test_a_class_without_rows_is_left_out():
    features = rows()
    wide = Detector(scorer="nearest_direction").fit(features, classes=5)
    assert wide.learnt.scorer["directions"].shape == (3, 5)


def test_activations_stay_within_the_usual_range():
    features = rows()
    shaper = TypicalRange(width=1.0)
    store = FeatureStore(statistics=shaper.statistics(), classes=3).update(features)
    shaped = shaper.apply(features, shaper.fit(store)).embeddings
    mean, deviation = features.embeddings.mean(dim=0), features.embeddings.std(dim=0, correction=0)
    lowest, highest = mean - deviation, mean + deviation
    expected = torch.minimum(torch.maximum(features.embeddings, lowest), highest)
    assert torch.allclose(shaped, expected)
    assert not torch.equal(shaped, features.embeddings)


def test_the_penalty_is_least_where_all_classes_are_as_likely():
    class Step:
        features = Features(logits=torch.zeros(2, 4))

    assert float(ConfidencePenalty().loss(Step, None)) == pytest.approx(-math.log(4))


def test_the_statistic_counts_the_rows():
    store = FeatureStore(statistics=[ClassDirections()], classes=4).update(rows())
    assert store[ClassDirections()].count.tolist() == [10, 10, 10, 0]
