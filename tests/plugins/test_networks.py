"""networks: shapes, sizes, layers, published weights, and digits learnt in a few seconds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import oodcore
from oodcore import FeatureModel
from oodcore.data import Stream
from oodcore.errors import ConfigurationError
from oodcore.factory import load_weights, network
from oodcore.run_folder import RunFolder
from oodcore.training import train
from oodcore_plugins.digits import Digits
from oodcore_plugins.networks import digits_cnn, mlp, mnist_convnet, resnet18, wide_resnet
from oodcore_plugins.npz import Npz

DATA = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def images(rows: int = 5) -> torch.Tensor:
    return pixels(rows, 1, 8, 8)


@pytest.mark.parametrize(("classes", "width"), [(10, 32), (2, 4)])
def test_the_layers_of_digits_cnn(classes, width):
    model = FeatureModel.wrap(
        digits_cnn(classes, width), layers=("block1", "block2", "hidden", "head")
    )
    features = model(images())
    shapes = {name: tuple(value.shape[1:]) for name, value in features.layers.items()}
    assert shapes == {
        "block1": (width, 4, 4),
        "block2": (2 * width, 2, 2),
        "hidden": (4 * width,),
        "head": (classes,),
    }
    assert model.head_name(images()) == "head"
    assert torch.equal(features.embeddings, features.layers["hidden"])


@pytest.mark.parametrize("hidden", [(64, 32), (7,), ()])
def test_the_layers_of_mlp(hidden):
    network = mlp(64, 3, hidden)
    names = [f"{kind}{n}" for n in range(1, len(hidden) + 1) for kind in ("hidden", "relu")]
    assert [name for name, _ in network.named_children()] == ["flatten", *names, "head"]
    features = FeatureModel.wrap(network)(images())
    assert features.logits.shape == (5, 3)
    assert features.embeddings.shape == (5, (64, *hidden)[-1])


def test_digits_are_learnt(tmp_path):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    config = {
        "network": {"factory": "oodcore_plugins.networks:digits_cnn"},
        "train": {"kind": "digits", "split": "train"},
        "validation": {"kind": "digits", "split": "test"},
        "epochs": 6,
        "batch_size": 64,
        "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        "device": "cpu",
    }
    model, _ = RunFolder(train(config, tmp_path / "run")).load()
    rows = Digits(split="test").open()
    inputs = torch.stack([rows[row][0] for row in range(len(rows))])
    labels = torch.tensor([rows[row][1] for row in range(len(rows))])
    with torch.no_grad():
        right = (model(inputs).predicted == labels).float().mean()
    assert right > 0.97


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("factory", "arguments", "parameters"),
    [
        ("mnist_convnet", {}, 21_840),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"classes": 100}, 11_220_132),
        ("wide_resnet", {}, 2_243_546),
        ("wide_resnet", {"classes": 100}, 2_255_156),
        ("wide_resnet", {"depth": 28, "widen": 10}, 36_479_194),
        ("wide_resnet", {"depth": 16, "widen": 4}, 2_748_890),
    ],
)
def test_networks_have_their_published_size(factory, arguments, parameters):
    with torch.device("meta"):
        module = network(f"oodcore_plugins.networks:{factory}", arguments)
    assert size(module) == parameters


SHAPES = {
    "mnist_convnet": {
        "conv1": (10, 24, 24),
        "act1": (10, 12, 12),
        "conv2": (20, 8, 8),
        "act2": (20, 4, 4),
        "act3": (50,),
        "fc2": (10,),
    },
    "resnet18": {
        "layer1": (8, 32, 32),
        "layer2": (16, 16, 16),
        "layer3": (32, 8, 8),
        "layer4": (64, 4, 4),
        "flatten": (64,),
        "fc": (10,),
    },
    "wide_resnet": {
        "block1": (32, 32, 32),
        "block2": (64, 16, 16),
        "block3": (128, 8, 8),
        "relu": (128, 8, 8),
        "flatten": (128,),
        "fc": (10,),
    },
}


@pytest.mark.parametrize(
    ("name", "made", "shape"),
    [
        ("mnist_convnet", mnist_convnet, (1, 28, 28)),
        ("resnet18", lambda: resnet18(width=8), (3, 32, 32)),
        ("wide_resnet", lambda: wide_resnet(depth=10), (3, 32, 32)),
    ],
)
def test_the_layers_of_the_networks_for_images(name, made, shape):
    images = pixels(3, *shape)
    *_, embeddings, head = SHAPES[name]
    model = FeatureModel.wrap(made(), layers=SHAPES[name])
    features = model(images)
    assert {n: tuple(v.shape[1:]) for n, v in features.layers.items()} == SHAPES[name]
    assert model.head_name(images) == head
    assert torch.equal(features.embeddings, features.layers[embeddings])
    assert torch.equal(features.head(features.embeddings), features.logits)


@pytest.mark.parametrize("widen", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_residual_networks_take_images_of_other_sizes_and_channels(widen, channels):
    for module in (resnet18(4, 4 * widen, channels), wide_resnet(10, widen, 4, channels=channels)):
        for side in (17, 32, 64):
            images = pixels(2, channels, side, side)
            assert FeatureModel.wrap(module)(images).logits.shape == (2, 4)


@pytest.mark.parametrize("depth", [0, 4, 9, 18, 41])
def test_a_wide_resnet_has_certain_depths(depth):
    with pytest.raises(ConfigurationError, match=rf"6 n \+ 4 .* not {depth}"):
        wide_resnet(depth)


def moved(module):
    """A network whose batch normalisations have seen something, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for values in (part.weight, part.running_var):
                values.data.uniform_(0.5, 1.5, generator=generator)
            for values in (part.bias, part.running_mean):
                values.data.normal_(generator=generator)
    return module.double().eval()


def norm(state, name, maps):
    mean, variance, weight, bias = (
        state[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (maps - mean) / (variance + 1e-5).sqrt() * weight + bias


def conv(state, name, maps, stride=1):
    weight = state[f"{name}.weight"]
    return F.conv2d(maps, weight, stride=stride, padding=weight.shape[-1] // 2)


def test_resnet18_is_that_of_the_paper():
    module = moved(resnet18(width=4))
    state, images = module.state_dict(), pixels(2, 3, 32, 32).double()
    maps = norm(state, "bn1", conv(state, "conv1", images)).relu()
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            branch = norm(state, f"{at}.bn1", conv(state, f"{at}.conv1", maps, stride)).relu()
            branch = norm(state, f"{at}.bn2", conv(state, f"{at}.conv2", branch))
            if stride == 2:
                projected = conv(state, f"{at}.shortcut.0", maps, stride)
                maps = norm(state, f"{at}.shortcut.1", projected)
            maps = (branch + maps).relu()
    wanted = maps.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(module(images), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("widen", [1, 3])
def test_a_wide_resnet_is_that_of_the_paper(widen):
    module = moved(wide_resnet(16, widen, dropout=0.3))
    state, images = module.state_dict(), pixels(2, 3, 32, 32).double()
    maps = conv(state, "conv1", images)
    for stage in (1, 2, 3):
        for block in (0, 1):
            at, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
            active = norm(state, f"{at}.bn1", maps).relu()
            branch = norm(state, f"{at}.bn2", conv(state, f"{at}.conv1", active, stride)).relu()
            branch = conv(state, f"{at}.conv2", branch)
            if branch.shape[1] != maps.shape[1]:
                maps = conv(state, f"{at}.convShortcut", active, stride)
            maps = maps + branch
    rows = norm(state, "bn1", maps).relu().mean((2, 3))
    wanted = rows @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(module(images), wanted, rtol=1e-9, atol=1e-9)
    assert module.block1.layer[0].drop.p == 0.3


@pytest.mark.parametrize("made", [lambda: resnet18(width=16), lambda: wide_resnet(16, 2)])
def test_convolutions_are_drawn_as_he_says(made):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = made()
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            deviation = math.sqrt(2 / (part.kernel_size[0] ** 2 * part.out_channels))
            allowed = 5 * deviation / math.sqrt(2 * part.weight.numel())
            assert abs(float(part.weight.detach().std()) - deviation) < allowed


def test_pooling_comes_before_an_activation_that_is_not_monotone():
    module = network("oodcore_plugins.networks:mnist_convnet", {}).double().eval()
    images = 10 * pixels(4, 1, 28, 28).double()
    state = module.state_dict()

    def active(values):
        return values / (1 + (-1.702 * values).exp())

    def wanted(pool_first):
        maps = images
        for name in ("conv1", "conv2"):
            maps = F.conv2d(maps, state[f"{name}.weight"], state[f"{name}.bias"])
            maps = active(F.max_pool2d(maps, 2)) if pool_first else F.max_pool2d(active(maps), 2)
        hidden = active(maps.flatten(1) @ state["fc1.weight"].T + state["fc1.bias"])
        return hidden @ state["fc2.weight"].T + state["fc2.bias"]

    torch.testing.assert_close(module(images), wanted(True), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(module(images), wanted(False), rtol=1e-3, atol=1e-3)


def test_dropout_leaves_out_whole_channels():
    module = mnist_convnet(dropout=0.5).train()
    maps = module.drop(torch.ones(2, 20, 8, 8))
    assert set(maps.flatten(2).std(dim=2).flatten().tolist()) == {0.0}
    assert set(maps.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("weights", ["baseline", "oe_tune"])
def test_the_published_mnist_networks_err_as_often_as_their_authors_say(weights):
    if not (DATA / "oe_mnist").is_dir():
        pytest.skip("the published weights are not beside the repository")
    module = mnist_convnet()
    load_weights(module, DATA / "oe_mnist" / f"{weights}.safetensors")
    expected = json.loads((DATA / "oe_mnist" / "expected.json").read_text())
    source = Npz(path=DATA / "mnist.npz", inputs="x_test", labels="y_test")
    model, wrong = FeatureModel.wrap(module), 0
    for batch in Stream(source, batch_size=1000):
        with torch.no_grad():
            wrong += int((model(batch.inputs).predicted != batch.labels).sum())
    assert wrong / 100 == pytest.approx(expected[weights]["error_percent"], abs=1e-9)


def test_factories_are_named_in_configurations():
    spec = {
        "kind": "torch",
        "factory": "oodcore_plugins.networks:wide_resnet",
        "arguments": {"depth": 10, "widen": 1, "classes": 3, "dropout": 0.3},
    }
    extractor = oodcore.registry.build("extractor", spec)
    images = pixels(2, 3, 32, 32)
    assert extractor.load()(images).embeddings.shape == (2, 64)
    assert extractor.load().fingerprint() == extractor.load().fingerprint()
