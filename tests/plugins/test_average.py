"""average: several models as one, by probabilities, logits or parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from extractor_models import CLASSES, Network, images, spec, without_dropout
from pydantic import ValidationError
from torch import nn

import oodcore
from oodcore import Detector, FeatureModel, Head
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.preprocess import Preprocess
from oodcore_plugins.average import Average, AveragedModels, mean_parameters
from oodcore_plugins.mc_dropout import ThinnedNetworks
from oodcore_plugins.tta import AveragedViews


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def three(**options):
    return [FeatureModel.wrap(Network(seed), **options) for seed in range(3)]


def test_probabilities():
    models, x = three(), images(4)
    features = AveragedModels(models)(x)
    expected = torch.stack([model(x).logits.softmax(1) for model in models]).mean(0)
    torch.testing.assert_close(features.logits.exp(), expected)
    assert features.embeddings is None
    assert features.head is None


def test_small_probabilities_keep_their_logarithm():
    models = []
    for shift in (0.0, -300.0):
        module = nn.Linear(2, 2).double()
        module.weight.data.zero_()
        module.bias.data = torch.tensor([0.0, -900.0 + shift], dtype=torch.float64)
        models.append(FeatureModel.wrap(module))
    logits = AveragedModels(models)(torch.zeros(1, 2)).logits
    expected = torch.tensor([[0.0, -900.0 - torch.log(torch.tensor(2.0)).item()]]).double()
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("cosine", [False, True])
def test_logits_come_with_the_head_that_makes_them(cosine):
    networks = [Network(0), Network(1, cosine=cosine), Network(2)]
    networks[2].fc.bias = None
    models, x = [FeatureModel.wrap(network) for network in networks], images(4)
    averaged = AveragedModels(models, "logits")
    features = averaged(x)
    expected = torch.stack([model(x).logits for model in models]).mean(0)
    torch.testing.assert_close(features.logits, expected)
    assert features.embeddings.shape == (4, 21)
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert averaged.gives == {"embeddings", "logits", "head", "inputs"}


def test_parameters_are_the_mean_and_the_models_stay():
    networks = [Network(seed) for seed in range(3)]
    networks[1].bn.num_batches_tracked += 5
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    model = mean_parameters(FeatureModel.wrap(network, layers=["conv"]) for network in networks)
    state = model.module.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            mean = sum(one[name].double() for one in before) / 3
            torch.testing.assert_close(value, mean.float())
    assert state["bn.num_batches_tracked"] == 0
    for network, own in zip(networks, before, strict=True):
        assert all(torch.equal(network.state_dict()[name], own[name]) for name in own)
    features = model(images(2))
    assert features.layers.keys() == {"conv"}
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert model.rows_seen == 2


def test_parameters_of_equal_models_are_those():
    network = Network().bfloat16()
    model = mean_parameters([FeatureModel.wrap(network), FeatureModel.wrap(network)])
    assert model.fingerprint() == FeatureModel.wrap(network).fingerprint()


class Indexed(nn.Linear):
    def __init__(self, *order: int) -> None:
        super().__init__(len(order), 2)
        self.register_buffer("order", torch.tensor(order))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (lambda: FeatureModel.wrap(without_dropout()), r"of model 1 cannot.*is in one of them"),
        (lambda: FeatureModel.wrap(Network().double()), "torch.float32 and torch.float64"),
        (lambda: FeatureModel.wrap(Network(act="Tanh")), "their layers are of other kinds"),
        (lambda: FeatureModel.wrap(Network(), head="fc"), "other heads"),
        (
            lambda: FeatureModel.wrap(Network(), preprocess=Preprocess(size=3)),
            "their preprocessing differs",
        ),
        (lambda: AveragedViews(FeatureModel.wrap(Network()), "flips"), "model 1 is tta of Network"),
    ],
)
def test_parameters_of_other_architectures_are_refused(others, message):
    with pytest.raises(ConfigurationError, match=message):
        mean_parameters([FeatureModel.wrap(Network()), others()])


def test_parameters_that_have_no_mean_are_refused():
    with pytest.raises(ConfigurationError, match="'order' holds torch.int64, which has no mean"):
        mean_parameters([FeatureModel.wrap(Indexed(0, 1)), FeatureModel.wrap(Indexed(1, 0))])
    with pytest.raises(ConfigurationError, match=r"'weight' is \[2, 2\] and \[2, 3\]"):
        mean_parameters([FeatureModel.wrap(Indexed(0, 1)), FeatureModel.wrap(Indexed(0, 1, 2))])
    head = Head(torch.ones(2, 2))
    pair = [FeatureModel.wrap(nn.Linear(2, 2), head=head) for _ in range(2)]
    with pytest.raises(ConfigurationError, match="heads of their own"):
        mean_parameters(pair)
    with pytest.raises(ConfigurationError, match="no models"):
        mean_parameters([])


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_layers_are_named_after_their_model(of):
    models = three(layers=["conv"])
    averaged = AveragedModels(models, of).with_layers(["1.bn", "0.conv"])
    assert averaged.layers == ("0.conv", "1.conv", "2.conv", "1.bn")
    x = images(4)
    features = averaged(x)
    assert tuple(features.layers) == averaged.layers
    bn = models[1].with_layers(["bn"])(x).layers["bn"]
    torch.testing.assert_close(features.layers["1.bn"], bn)
    edited = averaged.rerun(features.inputs, {"1.hidden": torch.zeros_like})
    parts = [model(x).logits for model in models]
    parts[1] = models[1].module.fc.bias.expand(4, -1)
    stacked = torch.stack(parts)
    mean = stacked.mean(0) if of == "logits" else stacked.softmax(2).mean(0).log()
    torch.testing.assert_close(edited.logits, mean)


@pytest.mark.parametrize("name", ["conv", "3.conv", "-1.conv", ".conv"])
def test_layers_of_no_model_are_refused(name):
    with pytest.raises(ConfigurationError, match=r"no layer '.*'; of 3 models, write the number"):
        AveragedModels(three()).with_layers([name])
    with pytest.raises(ConfigurationError, match="no layer 'cnv'"):
        AveragedModels(three()).with_layers(["0.cnv"])


def test_each_model_prepares_its_inputs():
    steps = [None, Preprocess(size=5), Preprocess(crop=6, mean=(0.5,) * 3)]
    models = [FeatureModel.wrap(Network(i), preprocess=step) for i, step in enumerate(steps)]
    averaged, x = AveragedModels(models, "logits"), images(3)
    features = averaged(x)
    expected = torch.stack([model(x).logits for model in models]).mean(0)
    torch.testing.assert_close(features.logits, expected)
    assert torch.equal(features.inputs, x)
    leaf = features.inputs.clone().requires_grad_()
    again = features.rerun(leaf)
    torch.testing.assert_close(again.logits, features.logits)
    (gradient,) = torch.autograd.grad(again.logits.sum(), leaf)
    naive = x.clone().requires_grad_()
    total = sum(
        model.module.eval()(naive if step is None else step(naive)).sum()
        for model, step in zip(models, steps, strict=True)
    )
    (expected,) = torch.autograd.grad(total / 3, naive)
    torch.testing.assert_close(gradient, expected)


def test_rows_and_fingerprints():
    models = three()
    averaged = AveragedModels(models)
    averaged(images(4))
    assert averaged.rows_seen == 12
    prints = {AveragedModels(models, of).fingerprint() for of in ("logits", "probabilities")}
    prints.add(AveragedModels(models[:2]).fingerprint())
    prints.add(AveragedModels([*models[:2], models[0]]).fingerprint())
    assert len(prints) == 4
    assert averaged.with_layers(["0.conv"]).identity() == averaged.identity()
    assert averaged.identity() != AveragedModels(models, "logits").identity()


def test_wrappers_go_into_one_another():
    plain, x = FeatureModel.wrap(Network()), images(3)
    parts = [AveragedViews(plain, "flips"), ThinnedNetworks(plain, 2)]
    features = AveragedModels(parts, "logits")(x)
    torch.testing.assert_close(features.logits, (parts[0](x).logits + parts[1](x).logits) / 2)
    thinned = ThinnedNetworks(AveragedModels(three(), "logits"), 2)(x)
    assert thinned.embeddings.shape == (3, 21)


CONFIGURED = [
    ("probabilities", "msp", ()),
    ("probabilities", "odin", ()),
    ("logits", {"kind": "knn", "k": 2}, ("react",)),
    ("logits", "odin", ()),
    ("parameters", {"kind": "knn", "k": 2}, ("react",)),
    ("parameters", "odin", ()),
]


@pytest.mark.parametrize(("of", "scorer", "shapers"), CONFIGURED)
def test_it_composes_and_lives_in_an_artifact(tmp_path, of, scorer, shapers):
    extractor = {"kind": "average", "extractors": [spec(), spec(seed=1)], "of": of}
    detector = Detector(extractor, scorer=scorer, shapers=shapers)
    detector.fit((images(30), torch.arange(30) % 3))
    scores = torch.tensor(detector.score(images(9, seed=2)))
    detector.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="runs extractor_models:network"):
        oodcore.load(tmp_path / "a")
    again = oodcore.load(tmp_path / "a", allow=["extractor_models:network"])
    assert again.extractor == detector.extractor
    told = torch.tensor(again.score(images(9, seed=2)))
    torch.testing.assert_close(told, scores, rtol=1e-6, atol=1e-9)


def test_what_needs_embeddings_says_so_of_probabilities():
    detector = Detector(AveragedModels(three()), scorer="knn")
    with pytest.raises(DataError, match="needs embeddings"):
        detector.fit((images(12), torch.arange(12) % 3))


def test_an_artifact_of_one_of_the_models_is_another():
    extractor = {"kind": "average", "extractors": [spec(), spec(seed=1)], "of": "logits"}
    built = oodcore.registry.build("extractor", extractor)
    assert built.code() == ("extractor_models:network",)
    assert Average.model_validate(built.dump()) == built
    assert built.load().fingerprint() != built.extractors[0].load().fingerprint()


def test_what_cannot_be_averaged_is_said():
    with pytest.raises(ConfigurationError, match=r"model 1 \(Network\) gives no logits"):
        AveragedModels([FeatureModel.wrap(Network()), FeatureModel.wrap(Network(), head=None)])
    with pytest.raises(ConfigurationError, match="no models"):
        AveragedModels([])
    odd = nn.Sequential(nn.Flatten(), nn.Linear(240, CLASSES + 1))
    models = [FeatureModel.wrap(Network()), FeatureModel.wrap(odd)]
    with pytest.raises(ConfigurationError, match="the models give 3, 4 logits"):
        AveragedModels(models)(images(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extractors": []}, "at least 1"),
        ({"extractors": [spec(), {"kind": "torch"}]}, "factory"),
        ({"of": "votes"}, "probabilities"),
        ({"preprocess": {"size": 8}}, "leave it out here"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said(fields, message):
    with pytest.raises(ValidationError, match=message):
        Average.model_validate({"extractors": [spec()]} | fields)


def test_an_artifact_names_an_option_for_every_function_it_runs(tmp_path):
    factories = ["extractor_models:network", "extractor_models:without_dropout"]
    parts = [{"kind": "torch", "factory": name} for name in factories]
    oodcore.Detector({"kind": "average", "extractors": parts}, scorer="msp").save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=" ".join(f"--allow {name}" for name in factories)):
        oodcore.load(tmp_path / "a")
