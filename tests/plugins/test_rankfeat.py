"""rankfeat: against singular value decompositions in NumPy, and where there is none to take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oodcore import Detector, FeatureModel, Features
from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.rankfeat import leading, without_first


class Maps(nn.Module):
    """Two blocks, a mean over places, and a head; float64."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 2)
            self.head = nn.Linear(5, 3)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.two(self.one(inputs).relu()).mean(dim=(2, 3)))
        return logits


X = torch.randn(7, 2, 4, 5, generator=torch.Generator().manual_seed(1)).double()


def naive(maps: np.ndarray) -> np.ndarray:
    kept = []
    for row in maps:
        u, s, v = np.linalg.svd(row.reshape(len(row), -1), full_matrices=False)
        s[0] = 0
        kept.append(((u * s) @ v).reshape(row.shape))
    return np.array(kept)


def energy(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return temperature * np.log(np.exp(logits / temperature).sum(axis=1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_is_its_definition(temperature):
    model = Maps()
    with torch.no_grad():
        first = model.one(X)
        second = model.two(first.relu())
        without_second = torch.tensor(naive(second.numpy())).mean(dim=(2, 3))
        one = model.head(without_second)
        two = model.head(model.two(torch.tensor(naive(first.numpy())).relu()).mean(dim=(2, 3)))
    for layers, logits in (
        (["two"], one),
        (["one"], two),
        (["two", "one"], (one + two) / 2),
    ):
        scorer = {"kind": "rankfeat", "layers": layers, "temperature": temperature}
        given = Detector(model, scorer=scorer).score(X)
        np.testing.assert_allclose(given, energy(logits.numpy(), temperature), rtol=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(2, 6),
    st.integers(-12, 12),
    st.integers(1, 6),
    st.integers(0, 2**16),
)
def test_what_is_left_is_the_matrix_without_its_first_component(
    channels, places, exponent, rank, seed
):
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(2, channels, rank)), generator.normal(size=(2, rank, places))
    rows = factors[0] @ factors[1] * 10.0**exponent
    found = without_first(torch.tensor(rows)).numpy()
    scale = np.abs(rows).max()
    np.testing.assert_allclose(found / scale, naive(rows) / scale, atol=1e-9)


def test_zero_maps_stay_zero_and_the_type_stays():
    maps = torch.zeros(2, 3, 4)
    assert torch.equal(without_first(maps), maps)
    assert without_first(torch.ones(1, 2, 2, 2)).dtype == torch.float32


def test_the_same_each_time_and_in_chunks(monkeypatch):
    detector = Detector(Maps(), scorer={"kind": "rankfeat", "layers": ["one"]})
    whole = detector.score(X)
    np.testing.assert_array_equal(detector.score(X), whole)
    monkeypatch.setattr("oodcore_plugins.rankfeat.NUMBERS", 1)
    np.testing.assert_allclose(detector.score(X), whole, rtol=1e-12)


def test_the_gradient_survives_singular_values_that_are_equal():
    rows = torch.diag(torch.tensor([3.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))[None]
    rows = rows + 0.01 * torch.arange(25, dtype=torch.float64).reshape(1, 5, 5).sin().triu(3)
    weights = torch.arange(25, dtype=torch.float64).cos().reshape(1, 5, 5)
    leaf = rows.clone().requires_grad_()
    (slope,) = torch.autograd.grad((without_first(leaf) * weights).sum(), leaf)
    for place in ((0, 0, 0), (0, 1, 2), (0, 4, 4)):
        step = torch.zeros_like(rows)
        step[place] = 1e-6
        ahead, behind = (
            float((torch.tensor(naive(each.numpy())) * weights).sum())
            for each in (rows + step, rows - step)
        )
        assert float(slope[place]) == pytest.approx((ahead - behind) / 2e-6, rel=1e-5, abs=1e-6)


def test_a_tie_gives_one_of_both_and_a_finite_gradient():
    matrices = torch.eye(3).double()[None].requires_grad_()
    vector = leading(matrices)
    assert vector.norm().item() == pytest.approx(1)
    (slope,) = torch.autograd.grad(vector.sum(), matrices)
    assert bool(torch.isfinite(slope).all())


def test_inside_a_scorer_that_moves_the_input():
    scorer = {"kind": "perturbed", "scorer": {"kind": "rankfeat", "layers": ["one"]}}
    plain = Detector(Maps(), scorer=scorer["scorer"]).score(X)
    moved = Detector(Maps(), scorer={**scorer, "epsilon": 1e-4}).score(X)
    assert (moved > plain).all()


def test_shapers_see_what_is_left():
    react = {"kind": "react", "percentile": 90}
    scorer = {"kind": "rankfeat", "layers": ["two"]}
    model = Maps()
    detector = Detector(model, scorer=scorer, shapers=[react]).fit((X, torch.arange(7) % 3))
    with torch.no_grad():
        features = FeatureModel.wrap(model).forward(X)
        limit = np.percentile(features.embeddings.numpy(), 90)
        left = naive(model.two(model.one(X).relu()).numpy()).mean(axis=(2, 3))
        logits = model.head(torch.tensor(np.minimum(left, limit))).numpy()
    np.testing.assert_allclose(detector.score(X), energy(logits), rtol=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigurationError, match="layers"):
        Detector(Maps(), scorer="rankfeat")
    with pytest.raises(ConfigurationError, match="twice"):
        Detector(Maps(), scorer={"kind": "rankfeat", "layers": ["one", "one"]})
    with pytest.raises(DataError, match="without places; name a layer before the pooling"):
        Detector(Maps(), scorer={"kind": "rankfeat", "layers": ["head"]}).score(X)
    with pytest.raises(ConfigurationError, match="no layer 'three'"):
        Detector(Maps(), scorer={"kind": "rankfeat", "layers": ["three"]}).score(X)
    stored = Features(logits=torch.ones(2, 3))
    with pytest.raises(DataError, match="needs a model and its inputs"):
        Detector(scorer={"kind": "rankfeat", "layers": ["one"]}).score(stored)
