"""temperature_scaled: the temperature is the minimum, and everything behind it sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from oodcore import Detector, Features, registry
from oodcore.errors import DataError
from oodcore_plugins.energy import Energy
from oodcore_plugins.msp import MSP
from oodcore_plugins.temperature_scaled import TemperatureScaled, calibrating

GENERATOR = torch.Generator().manual_seed(0)


def labelled(temperature: float, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels drawn from their softmax at a temperature of 1, the logits times it."""
    logits = 2 * torch.randn(rows, 4, generator=GENERATOR, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=GENERATOR)[:, 0]
    return logits * temperature, labels


def features(temperature: float = 1.0, rows: int = 400) -> Features:
    logits, labels = labelled(temperature, rows)
    return Features(logits=logits, labels=labels, ids=torch.arange(rows))


@pytest.mark.parametrize("true", [1e-3, 0.3, 1.0, 7.0, 1e4])
def test_the_true_temperature_is_found(true):
    logits, labels = labelled(true, 20_000)
    assert float(calibrating(logits, labels)) == pytest.approx(true, rel=0.05)


def test_it_is_the_minimum():
    logits, labels = labelled(3.0)
    best = calibrating(logits, labels)
    loss = cross_entropy(logits / best, labels)
    for factor in (1 - 1e-4, 1 + 1e-4):
        assert cross_entropy(logits / (best * factor), labels) > loss
    leaf = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(logits / leaf, labels), leaf)
    assert abs(float(slope)) < 1e-12


def test_it_scores_logits_divided_by_it():
    train, held, tested = features(), features(3.0), features(3.0)
    detector = Detector(scorer=TemperatureScaled()).fit(train, held_out=held)
    best = calibrating(held.logits, held.labels)
    wanted = MSP(temperature=float(best)).score(tested, {}).numpy()
    np.testing.assert_allclose(detector.score(tested), wanted, rtol=1e-12)


def test_it_is_measured_on_rows_set_apart_where_none_are_held_out():
    train = features(3.0)
    detector = Detector(scorer=TemperatureScaled()).fit(train)
    all_rows = calibrating(train.logits, train.labels)
    fitted = detector.ready().scorer["temperature"]
    assert float(fitted) != float(all_rows)
    assert float(fitted) == pytest.approx(3.0, rel=0.6)


def test_any_score_of_logits_may_be_behind_it():
    train, held, tested = features(), features(3.0), features(3.0)
    detector = Detector(scorer=TemperatureScaled(scorer=Energy())).fit(train, held_out=held)
    best = calibrating(held.logits, held.labels)
    wanted = torch.logsumexp(tested.logits / best, dim=1).numpy()
    np.testing.assert_allclose(detector.score(tested), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("labels", "why"), [([0, 1], "every held-out row is classified right"), ([1, 0], "by chance")]
)
def test_without_a_best_temperature_it_stays_1(labels, why):
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=why):
        assert float(calibrating(logits, torch.tensor(labels))) == 1


def test_one_class_has_nothing_to_calibrate():
    assert float(calibrating(torch.ones(3, 1).double(), torch.zeros(3).long())) == 1


def test_labels_are_needed():
    rows = features()
    bare = Features(logits=rows.logits, ids=rows.ids)
    with pytest.raises(DataError, match="labelled data"):
        Detector(scorer=TemperatureScaled()).fit(bare)


@pytest.mark.parametrize(
    "inner",
    ["kl_matching", {"kind": "sum", "scorers": ["msp", "energy"], "normalize": "zscore"}],
)
def test_what_learns_from_logits_is_refused(inner):
    with pytest.raises(ValidationError, match="learns from logits"):
        TemperatureScaled(scorer=inner)


def test_an_input_that_is_moved_passes_behind_the_temperature_too():
    network = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=GENERATOR)
    inputs = torch.randn(60, 5, generator=GENERATOR)
    labels = torch.multinomial(network(inputs).detach().softmax(1), 1, generator=GENERATOR)[:, 0]
    inner = {"kind": "perturbed", "scorer": "msp", "epsilon": 0.01}
    scorer = registry.build("scorer", {"kind": "temperature_scaled", "scorer": inner})
    detector = Detector(network, scorer=scorer).fit((inputs, labels), held_out=(inputs, labels))
    best = float(detector.ready().scorer["temperature"])
    plain = {"kind": "odin", "temperature": best, "epsilon": 0.01}
    wanted = Detector(network, scorer=plain).fit((inputs, labels)).score(inputs)
    np.testing.assert_allclose(detector.score(inputs), wanted, rtol=1e-6)
