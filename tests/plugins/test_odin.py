"""odin: one step of the input, against gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_network import WEIGHT, Linear, X, softmax

from oodcore import Detector
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry


def moved(temperature: float, epsilon: float) -> np.ndarray:
    """x - epsilon sign(d CE(z / T, argmax z) / dx), of a linear network by hand."""
    weight, x = WEIGHT.numpy(), X.numpy()
    p = softmax(x @ weight.T / temperature)
    likeliest = np.eye(3)[p.argmax(axis=1)]
    return x - epsilon * np.sign((p - likeliest) @ weight / temperature)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("epsilon", [0.0014, 0.3])
def test_odin_is_its_definition(temperature, epsilon):
    scorer = {"kind": "odin", "temperature": temperature, "epsilon": epsilon}
    scores = Detector(Linear(WEIGHT), scorer=scorer).score(X)
    wanted = softmax(moved(temperature, epsilon) @ WEIGHT.numpy().T / temperature).max(axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_is_perturbed_msp(temperature):
    odin = {"kind": "odin", "temperature": temperature, "epsilon": 0.2}
    msp = {"kind": "msp", "temperature": temperature}
    other = {"kind": "perturbed", "scorer": msp, "epsilon": 0.2}
    one, two = (Detector(Linear(WEIGHT), scorer=s).score(X) for s in (odin, other))
    np.testing.assert_array_equal(one, two)


def test_neither_inputs_nor_weights_are_changed_and_no_gradient_is_left():
    network, inputs = Linear(WEIGHT.clone()), X.clone()
    before = network.head.weight.detach().clone()
    Detector(network, scorer="odin").score(inputs)
    assert torch.equal(inputs, X)
    assert torch.equal(network.head.weight, before)
    assert network.head.weight.grad is None
    assert inputs.grad is None


@pytest.mark.parametrize("size", [1, 7])
def test_a_row_does_not_depend_on_its_batch(size):
    scores = Detector(Linear(WEIGHT), scorer="odin").score(X)
    apart = Detector(Linear(WEIGHT), scorer="odin", batch_size=size).score(X)
    np.testing.assert_allclose(apart, scores, rtol=1e-9)


def test_each_row_passes_through_the_model_three_times():
    detector = Detector(Linear(WEIGHT), scorer="odin")
    detector.score(X)
    assert detector.model is not None
    assert detector.model.rows_seen == 3 * len(X)


def test_what_is_refused():
    for field in ("epsilon", "temperature"):
        with pytest.raises(ConfigurationError, match=field):
            registry.build("scorer", {"kind": "odin", field: -1})
    with pytest.raises(DataError, match="needs a model and its inputs"):
        Detector(scorer="odin").score(X)


def test_odin_divides_its_step_by_the_scale_as_perturbed_does():
    scale = [0.25, 1.0, 2.0, 4.0]
    odin = {"kind": "odin", "epsilon": 0.2, "temperature": 10, "scale": scale}
    scores = Detector(Linear(WEIGHT), scorer=odin).score(X)
    steps = (moved(10.0, 0.2) - X.numpy()) / np.array(scale)
    wanted = softmax((X.numpy() + steps) @ WEIGHT.numpy().T / 10).max(axis=1)
    np.testing.assert_allclose(scores, wanted, rtol=1e-12)
    ones = {**odin, "scale": [1.0] * 4}
    bare = {**odin, "scale": None}
    np.testing.assert_array_equal(
        *(Detector(Linear(WEIGHT), scorer=s).score(X) for s in (ones, bare))
    )
