"""perturbed: one step of the input, against slopes measured and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_network import WEIGHT, Linear, X, softmax

from oodcore import Detector
from oodcore.errors import ConfigurationError
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
