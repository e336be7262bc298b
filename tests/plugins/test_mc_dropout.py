"""mc_dropout: thinned networks, averaged; what a row gets does not depend on its batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from extractor_models import Network, Sequences, images, spec, without_dropout
from pydantic import ValidationError
from torch import nn

import oodcore
from oodcore import Detector, FeatureModel
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore_plugins.mc_dropout import MCDropout, ThinnedNetworks, dropped
from oodcore_plugins.tta import AveragedViews


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WATCHED = ["bn", "act", "spatial", "hidden", "dropout"]


def test_each_draw_is_one_thinned_network():
    module = Network().eval()
    del module.act  # it would run twice
    module.act = torch.relu
    layers = ["bn", "spatial", "hidden", "dropout"]
    model = ThinnedNetworks(FeatureModel.wrap(module, layers=layers), samples=6, seed=3)
    x = images(5)
    runs = list(model.runs(x, None))
    assert len(runs) == 6
    masks = set()
    for run in runs:
        given = run.layers
        for name, inputs, scale in (
            ("spatial", given["bn"].relu(), 1 / 0.7),
            ("dropout", given["hidden"].relu(), 2.0),
        ):
            kept = given[name] / inputs.clamp_min(1e-9) > 0.5
            torch.testing.assert_close(given[name], torch.where(kept, inputs * scale, 0))
            alive = inputs > 1e-6  # a unit that is zero anyway does not tell
            for row in range(1, 5):
                both = alive[0] & alive[row]
                assert torch.equal(kept[0][both], kept[row][both]), "one mask for all rows"
        channels = (given["spatial"] != 0).flatten(2).any(2).any(0)
        assert torch.equal((given["spatial"].abs().amax((0, 2, 3)) > 0), channels)
        torch.testing.assert_close(run.embeddings, given["dropout"])
        torch.testing.assert_close(run.logits, module.fc(given["dropout"]))
        masks.add(tuple((run.embeddings != 0).any(0).tolist()))
    assert len(masks) > 2
    features = model(x)
    shares = torch.stack([run.logits.softmax(1) for run in runs]).mean(0)
    torch.testing.assert_close(features.logits, shares.log())
    torch.testing.assert_close(features.logits.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(
        features.embeddings, torch.stack([run.embeddings for run in runs]).mean(0)
    )
    torch.testing.assert_close(
        features.layers["bn"], torch.stack([run.layers["bn"] for run in runs]).mean(0)
    )


def test_a_row_does_not_depend_on_its_batch():
    for module, x in ((Network(), images(6)), (Sequences(), images(6).flatten(2))):
        x = x if isinstance(module, Network) else torch.randn(6, 12, 8, generator=seeded(0))
        model = ThinnedNetworks(FeatureModel.wrap(module), samples=4)
        whole = model(x)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(model(x[order]).logits, whole.logits[order])
        for size in (1, 2, 4):
            parts = torch.cat([model(x[i : i + size]).logits for i in range(0, 6, size)])
            torch.testing.assert_close(parts, whole.logits)
        # Fresh masks in each batch would not pass this either.
        fresh = ThinnedNetworks(FeatureModel.wrap(module), samples=4)
        torch.testing.assert_close(fresh(x[:1]).logits, whole.logits[:1])
        assert not torch.allclose(model.model(x).logits.log_softmax(1), whole.logits, atol=1e-2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_many_draws_are_the_mean_over_all_masks():
    """A network small enough to go through all masks: z = w (x * mask) / (1 - p)."""
    p, w = 0.25, torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]])
    module = nn.Sequential(nn.Dropout(p), nn.Linear(3, 2, bias=False))
    module[1].weight.data = w
    x = torch.tensor([[0.7, 0.2, -1.1], [2.0, 1.0, 0.1]])
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for number in range(8):
        mask = torch.tensor([float(number >> bit & 1) for bit in range(3)])
        chance = float((mask * (1 - p) + (1 - mask) * p).prod())
        expected += chance * ((x * mask / (1 - p)) @ w.T).double().softmax(1)
    model = ThinnedNetworks(FeatureModel.wrap(module), samples=3000)
    with torch.no_grad():
        features = model(x)
    torch.testing.assert_close(features.logits.exp().double(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(features.embeddings, x, rtol=0, atol=0.1)


LAYERS = [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
          nn.FeatureAlphaDropout]  # fmt: skip


@pytest.mark.parametrize("cls", LAYERS)
def test_layers_drop_as_torch_drops(cls):
    """Two values and their shares are those of torch's own layer in training."""
    layer, shape = cls(0.3), {nn.Dropout1d: (400, 6, 2), nn.Dropout3d: (400, 6, 2, 1, 1)}
    values = torch.full(shape.get(cls, (400, 6, 2, 1)), 1.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = layer.train()(values.clone())
    ours = torch.cat([dropped(layer, values[:1], 0, f"draw {i}") for i in range(400)])
    torch.testing.assert_close(ours.unique(), theirs.unique())
    assert len(ours.unique()) == 2
    share = float((ours == ours.unique()[0]).float().mean())
    assert abs(share - float((theirs == theirs.unique()[0]).float().mean())) < 0.06
    whole = all(bool((row == row[:, :1]).all()) for row in ours.flatten(2))
    assert whole == (cls not in (nn.Dropout, nn.AlphaDropout))


@pytest.mark.parametrize("cls", LAYERS[:1] + LAYERS[4:])
def test_what_drops_everything(cls):
    layer = cls(1.0)
    values = torch.ones(2, 3, 4, 1)
    assert torch.equal(dropped(layer, values, 0, "x"), layer.train()(values))


def test_nothing_of_the_model_and_no_generator_changes():
    module = Network()
    for number, part in enumerate(module.modules()):
        part.training = number % 2 == 0
    modes = [part.training for part in module.modules()]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    before = torch.get_rng_state()
    model = ThinnedNetworks(FeatureModel.wrap(module), samples=3)
    model(images(4))
    with pytest.raises(DataError, match="Network fails on inputs"):
        model(images(4)[:, :2])
    assert torch.equal(torch.get_rng_state(), before)
    assert modes == [part.training for part in module.modules()]
    assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
    quiet = FeatureModel.wrap(module)(images(4)).logits
    torch.testing.assert_close(quiet, Network().eval()(images(4)))


def test_others_may_use_the_module_at_once():
    module = Network()
    plain, model = FeatureModel.wrap(module), ThinnedNetworks(FeatureModel.wrap(module), 4)
    x = images(3)
    expected = {plain: plain(x).logits.detach(), model: model(x).logits.detach()}
    start = threading.Barrier(4)

    def work(number):
        chosen = (plain, model)[number % 2]
        start.wait()
        for _ in range(15):
            with torch.no_grad():
                torch.testing.assert_close(chosen(x).logits, expected[chosen])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_rows_are_counted_as_often_as_they_are_seen():
    model = ThinnedNetworks(FeatureModel.wrap(Network()), samples=4)
    model(images(5))
    assert model.rows_seen == 3 + 4 * 5  # one row alone and twice shows the axis of rows
    model(images(5))
    assert model.rows_seen == 3 + 4 * 10
    assert model.with_layers(["conv"]).rows_seen == model.rows_seen


def test_seeds_samples_and_weights_decide():
    x = images(4)
    module = Network()
    first = ThinnedNetworks(FeatureModel.wrap(module), 5, seed=1)
    again = ThinnedNetworks(FeatureModel.wrap(module), 5, seed=1)
    other = ThinnedNetworks(FeatureModel.wrap(module), 5, seed=2)
    assert torch.equal(first(x).logits, again(x).logits)
    assert not torch.allclose(first(x).logits, other(x).logits, atol=1e-3)
    fewer = ThinnedNetworks(FeatureModel.wrap(module), 4, seed=1)
    prints = {model.fingerprint() for model in (first, again, other, fewer)}
    prints.add(ThinnedNetworks(FeatureModel.wrap(Network(1)), 5, seed=1).fingerprint())
    assert len(prints) == 4


def test_rerun_is_differentiable():
    model = ThinnedNetworks(FeatureModel.wrap(Network()), samples=3)
    features = model(images(2))
    leaf = features.inputs.clone().requires_grad_()
    again = features.rerun(leaf)
    torch.testing.assert_close(again.logits, features.logits)
    (gradient,) = torch.autograd.grad(again.logits[:, 0].sum(), leaf)
    assert bool((gradient != 0).any())
    edited = features.rerun(features.inputs, edit={"dropout": torch.zeros_like})
    bias = model.model.module.fc.bias.detach()
    torch.testing.assert_close(edited.logits, bias.log_softmax(0).expand(2, -1))


@pytest.mark.parametrize("scorer", ["msp", "odin", {"kind": "knn", "k": 2}])
def test_it_composes_and_lives_in_an_artifact(tmp_path, scorer):
    extractor = {"kind": "mc_dropout", "extractor": spec(), "samples": 3}
    detector = Detector(extractor, scorer=scorer, shapers=["react"], batch_size=7)
    detector.fit((images(30), torch.arange(30) % 3)).calibrate(images(40, seed=1), 0.1)
    x = images(9, seed=2)
    scores = torch.tensor(detector.score(x))
    detector.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="runs extractor_models:network"):
        oodcore.load(tmp_path / "a")
    again = oodcore.load(tmp_path / "a", allow=["extractor_models:network"])
    torch.testing.assert_close(torch.tensor(again.score(x)), scores, rtol=1e-6, atol=1e-9)
    alone = torch.tensor([again.score(x[i : i + 1])[0] for i in range(9)])
    torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-6)


def test_views_and_dropout_go_together():
    inner = FeatureModel.wrap(Network())
    x = images(3)
    outside = AveragedViews(ThinnedNetworks(inner, 3), "flips")(x)
    inside = ThinnedNetworks(AveragedViews(inner, "flips"), 3)(x)
    torch.testing.assert_close(outside.embeddings, inside.embeddings)
    draws = ThinnedNetworks(inner, 3)
    expected = (draws(x).logits + draws(x.flip(3)).logits) / 2
    torch.testing.assert_close(outside.logits, expected)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigurationError, match="Sequential has no dropout layer"):
        ThinnedNetworks(FeatureModel.wrap(without_dropout()))
    with pytest.raises(ConfigurationError, match="no dropout layer"):
        ThinnedNetworks(FeatureModel.wrap(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2))))

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.fc = nn.Dropout(), nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x)

    with pytest.raises(ConfigurationError, match="no dropout layer of Unused runs"):
        ThinnedNetworks(FeatureModel.wrap(Unused()))(torch.zeros(2, 2))

    class Mixing(Unused):
        def forward(self, x):
            return self.fc(self.dropout(x @ x.T) @ x)

    with pytest.raises(ConfigurationError, match=r"'dropout' gets \[1, 1\].*\[2, 2\] for two"):
        ThinnedNetworks(FeatureModel.wrap(Mixing()))(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "greater than 0"),
        ({"preprocess": {"size": 8}}, "leave it out here"),
        ({"extractor": {"kind": "mc_dropout", "extractor": spec()}}, "would drop twice"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said(fields, message):
    with pytest.raises(ValidationError, match=message):
        MCDropout.model_validate({"extractor": spec()} | fields)
