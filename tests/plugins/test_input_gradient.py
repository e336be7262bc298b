"""input_gradient: the norm of a score's gradient, against networks whose gradient is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_network import WEIGHT, Linear, X, softmax

from oodcore import Detector
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry


def scores_of(network, rows=X, **fields):
    return Detector(network, scorer={"kind": "input_gradient", **fields}).score(rows)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_of_a_linear_network_it_is_the_norm_of_the_mixed_weights(temperature):
    """The approximate mass of JEM: d logsumexp(A x) / dx = A' p."""
    scorer = {"kind": "energy", "temperature": temperature}
    p = softmax((X @ WEIGHT.T).numpy() / temperature)
    wanted = -np.linalg.norm(p @ WEIGHT.numpy(), axis=1)
    np.testing.assert_allclose(scores_of(Linear(WEIGHT), scorer=scorer), wanted, rtol=1e-12)
    if temperature == 1:
        np.testing.assert_array_equal(
            scores_of(Linear(WEIGHT)), scores_of(Linear(WEIGHT), scorer="energy")
        )


@pytest.mark.parametrize("scorer", ["msp", "max_cosine", {"kind": "knn", "k": 2}])
def test_of_any_score_it_is_the_norm_of_slopes_along_the_axes(scorer):
    plain = Detector(Linear(WEIGHT), scorer=scorer).fit(X)
    asked = 3 * X.flip(0) + 1
    slopes = []
    for axis in range(4):
        step = torch.zeros(4).double()
        step[axis] = 1e-5
        slopes.append((plain.score(asked + step) - plain.score(asked - step)) / 2e-5)
    detector = Detector(Linear(WEIGHT), scorer={"kind": "input_gradient", "scorer": scorer}).fit(X)
    np.testing.assert_allclose(
        detector.score(asked), -np.linalg.norm(slopes, axis=0), rtol=1e-5, atol=1e-8
    )


def test_images_are_taken_as_one_row_of_numbers():
    class Flattened(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear(WEIGHT)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.linear(inputs.flatten(1))
            return logits

    np.testing.assert_allclose(
        scores_of(Flattened(), X.reshape(-1, 1, 2, 2)), scores_of(Linear(WEIGHT)), rtol=1e-12
    )


def test_the_input_in_other_units_divides_the_score():
    np.testing.assert_allclose(
        scores_of(Linear(WEIGHT * 8), X / 8), 8 * scores_of(Linear(WEIGHT)), rtol=1e-12
    )


def test_a_flat_score_is_the_highest():
    np.testing.assert_array_equal(scores_of(Linear(torch.zeros(3, 4).double())), 0)


def test_the_gradient_goes_through_the_shapers():
    shaper = {"kind": "react", "percentile": 70}
    asked = X.abs()
    detector = Detector(Linear(WEIGHT), scorer="input_gradient", shapers=[shaper]).fit(asked)
    limit = np.percentile(asked, 70)
    p = softmax(np.minimum(asked.numpy(), limit) @ WEIGHT.numpy().T)
    # The subgradient of clamp at its limit itself is 1 in torch.
    slope = (p @ WEIGHT.numpy()) * (asked.numpy() <= limit)
    np.testing.assert_allclose(detector.score(asked), -np.linalg.norm(slope, axis=1), rtol=1e-9)


def test_nothing_is_left_behind_and_a_row_passes_twice():
    network, inputs = Linear(WEIGHT.clone()), X.clone()
    detector = Detector(network, scorer="input_gradient")
    expected = detector.score(inputs)
    assert torch.equal(inputs, X)
    assert network.head.weight.grad is None
    assert inputs.grad is None
    assert detector.model is not None
    assert detector.model.rows_seen == 2 * len(X)
    with torch.inference_mode():
        np.testing.assert_array_equal(detector.score(inputs), expected)


def test_what_is_refused():
    for inner in ("odin", "input_gradient"):
        with pytest.raises(ConfigurationError, match="has no gradient to measure"):
            registry.build("scorer", {"kind": "input_gradient", "scorer": inner})
    with pytest.raises(DataError, match="needs a model and its inputs"):
        Detector(scorer="input_gradient").score(X)
