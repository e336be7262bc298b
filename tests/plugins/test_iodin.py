"""iodin: a step of the input in few coordinates, against gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_network import WEIGHT, Linear, X, softmax

from oodcore import Detector
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry
from oodcore_plugins.iodin import steepest


def naive(x, temperature, epsilon, count=1, scale=None):
    """One row after another: the likeliest probability after the largest coordinates moved."""
    weight, scores = WEIGHT.numpy(), []
    for row in x.numpy():
        p = softmax(row[None] @ weight.T / temperature)[0]
        gradient = (p - np.eye(3)[p.argmax()]) @ weight / temperature
        moved = row.copy()
        for j in sorted(range(4), key=lambda j: (-abs(gradient[j]), j))[:count]:
            moved[j] -= epsilon * np.sign(gradient[j]) / (1 if scale is None else scale[j])
        scores.append(softmax(moved[None] @ weight.T / temperature).max())
    return np.array(scores)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
@pytest.mark.parametrize("epsilon", [0.0014, 0.3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_iodin_is_its_definition(temperature, epsilon, count):
    fields = {"temperature": temperature, "epsilon": epsilon, "coordinates": count}
    scores = Detector(Linear(WEIGHT), scorer={"kind": "iodin", **fields}).score(X)
    np.testing.assert_allclose(scores, naive(X, temperature, epsilon, count), rtol=1e-12)


@pytest.mark.parametrize("count", [4, 100])
def test_with_all_coordinates_it_is_odin(count):
    fields = {"temperature": 10.0, "epsilon": 0.2}
    all_of_them = {"kind": "iodin", "coordinates": count, **fields}
    odin = Detector(Linear(WEIGHT), scorer={"kind": "odin", **fields}).score(X)
    np.testing.assert_array_equal(Detector(Linear(WEIGHT), scorer=all_of_them).score(X), odin)


def test_the_largest_gradient_is_looked_for_before_the_scale_divides():
    scale = (100.0, 0.01, 1.0, 1.0)
    fields = {"temperature": 1.0, "epsilon": 0.1, "scale": scale}
    scores = Detector(Linear(WEIGHT), scorer={"kind": "iodin", **fields}).score(X)
    np.testing.assert_allclose(scores, naive(X, 1.0, 0.1, scale=scale), rtol=1e-12)


def test_one_coordinate_raises_the_score_less_than_all_do():
    one, all_of_them, none = (
        Detector(Linear(WEIGHT), scorer={"kind": "iodin", "temperature": 1, **fields}).score(X)
        for fields in ({"epsilon": 0.01}, {"epsilon": 0.01, "coordinates": 4}, {"epsilon": 0})
    )
    assert (none < one).all()
    assert (one < all_of_them).all()


def test_without_a_gradient_the_input_stays():
    flat = Linear(torch.zeros(3, 4).double())
    scores = Detector(flat, scorer={"kind": "iodin", "epsilon": 9.0}).score(X)
    np.testing.assert_allclose(scores, 1 / 3)


def test_of_coordinates_that_tie_the_first_are_moved():
    gradient = torch.tensor([[2.0, -2.0, 2.0], [0.0, 0.0, 0.0], [1.0, -3.0, 3.0]])
    one = [[1, 0, 0], [0, 0, 0], [0, -1, 0]]
    two = [[1, -1, 0], [0, 0, 0], [0, -1, 1]]
    assert steepest(gradient, 1).tolist() == one
    assert steepest(gradient, 2).tolist() == two
    images = gradient.reshape(3, 3, 1, 1)
    assert steepest(images, 1).shape == images.shape


def test_inputs_of_one_number():
    network = Linear(torch.tensor([[1.0], [-2.0]]).double())
    x = torch.tensor([[0.5], [-3.0]]).double()
    scores = Detector(network, scorer={"kind": "iodin", "epsilon": 0.1}).score(x)
    odin = Detector(network, scorer={"kind": "odin", "epsilon": 0.1}).score(x)
    np.testing.assert_array_equal(scores, odin)


def test_each_row_passes_through_the_model_three_times():
    detector = Detector(Linear(WEIGHT), scorer="iodin")
    detector.score(X)
    assert detector.model is not None
    assert detector.model.rows_seen == 3 * len(X)


def test_what_is_refused():
    for field, value in (("epsilon", -1), ("temperature", 0), ("coordinates", 0)):
        with pytest.raises(ConfigurationError, match=field):
            registry.build("scorer", {"kind": "iodin", field: value})
    with pytest.raises(DataError, match="needs a model and its inputs"):
        Detector(scorer="iodin").score(X)
