"""nac: against histograms counted by hand, slopes measured, and a reference's scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodcore import Detector, FeatureModel, Features, FeatureStore, Head
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import check_statistic
from oodcore_plugins.nac import NAC, Binned, NeuronStates, edges, influences

GOLDEN = Path(__file__).parents[1] / "golden"


class Deep(nn.Module):
    """A block of maps, a hidden layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(2, 4, 2), nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)
        self.double()

    def after(self, maps: Tensor) -> Tensor:
        hidden = self.fc(maps.relu().mean(dim=(2, 3))).relu()
        logits: Tensor = self.head(hidden)
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        return self.after(self.conv(inputs))


X = torch.randn(60, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
TRAIN, ASKED = X[:45], X[45:]


def kl(logits: np.ndarray) -> np.ndarray:
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -logs.mean(axis=1)


def naive_edges(bins: int) -> np.ndarray:
    """All edges, the outermost too, as the authors space them."""
    half = np.log(np.linspace(1, np.sqrt(1000), bins // 2)) / np.log(1000)
    return np.concatenate([half[:-1], (1 - half)[::-1]])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def naive_coverage(train: np.ndarray, asked: np.ndarray, bins: int, r: float) -> np.ndarray:
    limits = naive_edges(bins)
    limits[-1] += 1e-2
    scores = np.zeros(len(asked))
    for neuron in range(train.shape[1]):
        counts = np.histogram(train[:, neuron], limits)[0]
        for row, state in enumerate(asked[:, neuron]):
            found = np.flatnonzero((limits[:-1] <= state) & (state < limits[1:]))
            scores[row] += min(counts[found[0]] / (r * len(train)), 1) / train.shape[1]
    return scores


def naive_influences(model: Deep, inputs: Tensor) -> np.ndarray:
    """``o g`` at ``conv`` by finite differences."""
    with torch.no_grad():
        maps = model.conv(inputs)
        slopes = torch.zeros_like(maps)
        for place in np.ndindex(*maps.shape[1:]):
            step = torch.zeros_like(maps)
            step[(slice(None), *place)] = 1e-5
            ahead, behind = (kl(model.after(maps + s).numpy()) for s in (step, -step))
            slopes[(slice(None), *place)] = torch.tensor(ahead - behind) / 2e-5
    return (maps.sum(dim=(2, 3)) * slopes.sum(dim=(2, 3))).numpy()


def test_influences_are_activations_times_slopes():
    model = Deep()
    features = FeatureModel.wrap(model).forward(X).double()
    with torch.no_grad():
        at_conv, at_end = influences(features, ["conv", None])
    np.testing.assert_allclose(at_conv, naive_influences(model, X), rtol=1e-4, atol=1e-9)
    logits = features.logits.detach().numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    closed = features.embeddings.detach().numpy() * (
        (p - 1 / 3) @ model.head.weight.detach().numpy()
    )
    np.testing.assert_allclose(at_end, closed, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bins", [4, 50, 500])
def test_edges_are_the_authors(bins):
    np.testing.assert_allclose(edges(bins), naive_edges(bins)[1:-1], rtol=1e-12)
    assert float(edges(bins)[bins // 2 - 2]) == 0.5
    assert len(edges(bins)) == bins - 3


@pytest.mark.parametrize(
    ("bins", "alpha", "r"), [(50, 100.0, 0.05), (8, 3.0, 0.4), (500, 0.1, 1.0)]
)
def test_is_its_definition_at_the_embeddings(bins, alpha, r):
    model = Deep()
    features = FeatureModel.wrap(model).forward(X).double().detach()
    states = sigmoid(alpha * influences(features, [None])[0].numpy())
    wanted = naive_coverage(states[:45], states[45:], bins, r)
    layers = [{"bins": bins, "alpha": alpha, "saturation": r}]
    given = Detector(model, scorer={"kind": "nac", "layers": layers}).fit(TRAIN).score(ASKED)
    np.testing.assert_allclose(given, wanted, rtol=1e-9)
    assert len(set(given)) > 1


def test_layers_are_averaged_with_settings_of_their_own():
    model = Deep()
    conv = {"layer": "conv", "bins": 20, "alpha": 2.0, "saturation": 0.2}
    states = sigmoid(2.0 * naive_influences(model, X))
    wanted = naive_coverage(states[:45], states[45:], 20, 0.2)
    one = Detector(model, scorer={"kind": "nac", "layers": [conv]}).fit(TRAIN).score(ASKED)
    np.testing.assert_allclose(one, wanted, rtol=1e-9)
    two = Detector(model, scorer="nac").fit(TRAIN).score(ASKED)
    both = Detector(model, scorer={"kind": "nac", "layers": [{}, conv]}).fit(TRAIN).score(ASKED)
    np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-12)


def test_slopes_go_through_shapers_and_the_model_is_left_alone():
    model = Deep()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    conv = {"kind": "nac", "layers": [{"layer": "conv", "bins": 500, "alpha": 9.0}]}
    plain = Detector(model, scorer=conv).fit(TRAIN)
    shaped = Detector(model, scorer=conv, shapers=[{"kind": "react", "percentile": 60}]).fit(TRAIN)
    assert (plain.score(ASKED) != shaped.score(ASKED)).any()
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.inference_mode():
        np.testing.assert_array_equal(plain.score(ASKED.clone()), plain.score(ASKED))


def test_rows_of_zeros_fall_into_the_bin_at_the_middle():
    head = Head(torch.eye(2).double())
    rows = Features(embeddings=torch.zeros(4, 2), head=head)
    statistic = NeuronStates()
    counts = FeatureStore(head, [statistic]).update(rows)[statistic].layers[0]
    assert counts[:, 24].tolist() == [4, 4]
    assert int(counts.sum()) == 8
    assert Detector(scorer="nac").fit(rows).score(rows).tolist() == [1.0] * 4


def test_extreme_rows_are_scored():
    head = Head(torch.eye(3).double() * 50, torch.ones(3).double())
    rows = torch.tensor([[1e8, 0, 0], [0, -1e8, 0], [1e-9, 1e-9, 0]], dtype=torch.float64)
    given = Features(embeddings=rows, head=head)
    scores = Detector(scorer="nac").fit(given).score(given)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_a_share_of_rows_saturates_whatever_their_number():
    head = Head(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double())
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(1)).double()
    once = Detector(scorer="nac").fit(Features(embeddings=rows, head=head))
    thrice = Detector(scorer="nac").fit(Features(embeddings=rows.repeat(3, 1), head=head))
    asked = Features(embeddings=2 * rows, head=head)
    np.testing.assert_allclose(once.score(asked), thrice.score(asked), rtol=1e-12)


def arrays(*names: str) -> list[np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as inputs, np.load(GOLDEN / "scores.npz") as scores:
        return [inputs[name] if name in inputs else scores[name] for name in names]


def test_a_reference_agrees_but_for_its_bins():
    """Its 50 bins are finest at 0 and 1, where float32 decides; our states in these are its own."""
    weight, bias, train = arrays("head_weight", "head_bias", "train_features")
    asked = np.concatenate(arrays(*(f"{n}_features" for n in ("test_id", "ood_near", "ood_far"))))
    head = Head(torch.from_numpy(weight), torch.from_numpy(bias))
    lower = torch.logspace(-6, np.log10(0.5), 26)
    limits = torch.cat([lower, (1 - lower.flip(0))[1:]])

    def bins(rows: np.ndarray) -> np.ndarray:
        features = Features(embeddings=torch.from_numpy(rows), head=head)
        states = (100 * influences(features, [None])[0]).sigmoid().clamp(1e-6, 1 - 1e-6)
        return (torch.bucketize(states, limits) - 1).clamp(0, 49).numpy()

    counts = np.stack([np.bincount(column, minlength=50) for column in bins(train).T])
    scores = np.minimum(counts[np.arange(32), bins(asked)] / 50, 1).mean(axis=1)
    error = np.abs(scores - arrays("nac@pytorch-ood")[0])
    # Where a state is rounded to the other side of an edge, a count differs by one.
    assert (error < 1e-6).mean() > 0.7
    assert np.quantile(error, 0.95) < 2e-3
    assert error.max() < 0.04


def test_the_statistic_keeps_the_laws_at_layers():
    check_statistic(NeuronStates(layers=(Binned(layer="stage", alpha=0.5), Binned(bins=10))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": []}, "layers"),
        ({"layers": [{}, {}]}, "twice"),
        ({"layers": [{"bins": 5}]}, "multiple of 2"),
        ({"layers": [{"saturation": 0}]}, "saturation"),
        ({"layers": [{"layer": "conv", "alfa": 1}]}, "alfa"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Detector(scorer={"kind": "nac", **fields})


def test_a_layer_without_a_part_in_the_logits():
    class Idle(Deep):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.after(self.conv(inputs).detach() * 0 + 1)

    scorer = {"kind": "nac", "layers": [{"layer": "conv"}]}
    with pytest.raises(ConfigurationError, match="do not depend on layer 'conv'"):
        Detector(Idle(), scorer=scorer).fit(TRAIN)


def test_stored_features_are_not_enough_for_layers():
    rows = Features(embeddings=torch.ones(4, 2), head=Head(torch.eye(2)))
    with pytest.raises(DataError, match="inputs"):
        Detector(scorer={"kind": "nac", "layers": [{"layer": "conv"}]}).fit(rows)
    assert NAC().needs() == {"embeddings", "head"}
