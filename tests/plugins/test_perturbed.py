"""perturbed: one step of the input, against slopes measured and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_network import WEIGHT, Linear, X, softmax

from oodcore import Detector
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry


@pytest.mark.parametrize("scorer", ["energy", "max_logit", "max_cosine", "max_norm"])
def test_a_step_raises_the_score_by_the_length_of_the_gradient(scorer):
    epsilon = 1e-6
    plain = Detector(Linear(WEIGHT), scorer=scorer)
    perturbed = Detector(
        Linear(WEIGHT), scorer={"kind": "perturbed", "scorer": scorer, "epsilon": epsilon}
    )
    slopes = np.zeros(len(X))
    for axis in range(4):
        step = torch.zeros(4).double()
        step[axis] = 1e-4
        slopes += np.abs(plain.score(X + step) - plain.score(X - step)) / 2e-4
    raised = (perturbed.score(X) - plain.score(X)) / epsilon
    np.testing.assert_allclose(raised, slopes, rtol=1e-4)


def test_a_fitted_scorer_inside():
    scorer = {"kind": "perturbed", "scorer": {"kind": "knn", "k": 2}, "epsilon": 0.05}
    detector = Detector(Linear(WEIGHT), scorer=scorer).fit(X)
    plain = Detector(Linear(WEIGHT), scorer={"kind": "knn", "k": 2}).fit(X)
    outside = 3 * X.flip(0) + 1
    assert (detector.score(outside) >= plain.score(outside)).all()
    assert (detector.score(outside) > plain.score(outside)).any()


def test_the_step_goes_through_the_shapers():
    shaper = {"kind": "react", "percentile": 70}
    scorer = {"kind": "perturbed", "scorer": "energy", "epsilon": 0.1}
    detector = Detector(Linear(WEIGHT), scorer=scorer, shapers=[shaper]).fit(X.abs())
    asked = X.abs()
    limit = np.percentile(asked, 70)
    weight = WEIGHT.numpy()

    def energy(rows):
        return np.log(np.exp(np.minimum(rows, limit) @ weight.T).sum(axis=1))

    p = softmax(np.minimum(asked.numpy(), limit) @ weight.T)
    # The subgradient of clamp at its limit itself is 1 in torch.
    slope = (p @ weight) * (asked.numpy() <= limit)
    wanted = energy(asked.numpy() + 0.1 * np.sign(slope))
    np.testing.assert_allclose(detector.score(asked), wanted, rtol=1e-9)


def test_without_a_step_or_a_gradient_the_score_is_as_it_was():
    msp = Detector(Linear(WEIGHT), scorer="msp").score(X)
    still = {"kind": "perturbed", "scorer": "msp", "epsilon": 0}
    np.testing.assert_array_equal(Detector(Linear(WEIGHT), scorer=still).score(X), msp)
    flat = Linear(torch.zeros(3, 4).double())
    scores = Detector(flat, scorer={"kind": "perturbed", "scorer": "msp", "epsilon": 9.0}).score(X)
    np.testing.assert_allclose(scores, 1 / 3)


def test_in_a_callers_inference_mode():
    scorer = {"kind": "perturbed", "scorer": "mahalanobis", "epsilon": 0.05}
    detector = Detector(Linear(WEIGHT), scorer=scorer).fit(X)
    expected = detector.score(X)
    with torch.inference_mode():
        np.testing.assert_array_equal(detector.score(X), expected)


def test_what_is_refused():
    ecdf = {"kind": "sum", "scorers": ["msp"], "normalize": "ecdf"}
    for inner in ("odin", ecdf):
        with pytest.raises(ConfigurationError, match="has no gradient to move the input along"):
            registry.build("scorer", {"kind": "perturbed", "scorer": inner})
    with pytest.raises(ConfigurationError, match="epsilon"):
        registry.build("scorer", {"kind": "perturbed", "scorer": "msp", "epsilon": -1})


def in_channels(rows: torch.Tensor) -> torch.Tensor:
    """Rows of four numbers as images of two channels and two places."""
    return rows.reshape(-1, 2, 2, 1)


class Flattened(torch.nn.Module):
    """A linear network of images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(WEIGHT)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(inputs.flatten(1))
        return logits


@pytest.mark.parametrize("inner", ["energy", "msp"])
def test_scale_divides_the_step_in_each_channel(inner):
    scale = (0.5, 4.0)
    scorer = {"kind": "perturbed", "scorer": inner, "epsilon": 0.1, "scale": scale}
    scores = Detector(Flattened(), scorer=scorer).score(in_channels(X))
    leaf = X.clone().requires_grad_()
    logits = leaf @ WEIGHT.T
    total = logits.logsumexp(1) if inner == "energy" else logits.softmax(1).amax(1)
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    moved = X + 0.1 * gradient.sign() / torch.tensor([0.5, 0.5, 4.0, 4.0])
    np.testing.assert_allclose(
        scores, Detector(Linear(WEIGHT), scorer=inner).score(moved), rtol=1e-12
    )


def test_scale_is_what_the_preprocessing_divides_by():
    """A step in pixels is the same whether the network or the preprocessing normalises."""
    mean, std = torch.tensor([0.4, 0.6]), torch.tensor([0.2, 0.5])
    images = torch.rand(9, 2, 2, 1, generator=torch.Generator().manual_seed(2)).double()

    class Normalising(Flattened):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward((inputs - mean[:, None, None]) / std[:, None, None])

    plain = {"kind": "perturbed", "scorer": "energy", "epsilon": 0.03}
    scaled = {**plain, "scale": std.tolist()}
    inside = Detector(Normalising(), scorer=plain).score(images)
    normal = (images - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(
        Detector(Flattened(), scorer=scaled).score(normal), inside, rtol=1e-6
    )


@pytest.mark.parametrize("kind", ["perturbed", "odin", "iodin"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_a_scale_of_other_channels_is_refused(kind, epsilon):
    scorer = {"kind": kind, "scale": [1.0, 1.0, 1.0], "epsilon": epsilon}
    if kind == "perturbed":
        scorer["scorer"] = "msp"
    with pytest.raises(DataError, match=r"scale has 3 numbers.*\[20, 2, 2, 1\].*each channel"):
        Detector(Flattened(), scorer=scorer).score(in_channels(X))


@pytest.mark.parametrize("scale", [[], [0.0], [1, -1], ["1"], 0.5])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(ConfigurationError, match="scale"):
        registry.build("scorer", {"kind": "odin", "scale": scale})


def test_inputs_that_cannot_be_moved_are_refused():
    class Embedding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding.from_pretrained(torch.eye(4))
            self.head = torch.nn.Linear(4, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.table(inputs))
            return logits

    for scorer in ("odin", "iodin", "input_gradient"):
        with pytest.raises(DataError, match="one tensor of floating numbers"):
            Detector(Embedding(), scorer=scorer).score(torch.tensor([0, 1]))
