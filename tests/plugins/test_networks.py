"""networks: shapes, layers, and digits learnt in a few seconds."""

from __future__ import annotations

import pytest
import torch

from oodcore import FeatureModel
from oodcore.run_folder import RunFolder
from oodcore.training import train
from oodcore_plugins.digits import Digits
from oodcore_plugins.networks import digits_cnn, mlp


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(rows: int = 5) -> torch.Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


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
