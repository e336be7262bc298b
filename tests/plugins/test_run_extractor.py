"""run_extractor: the model of a run as it was trained, its branches and its preprocessing."""

from __future__ import annotations

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import oodcore
from oodcore import Detector, Regularizer, Source, registry
from oodcore.errors import ArtifactError, ConfigurationError
from oodcore.preprocess import Preprocess
from oodcore.run_folder import RunFolder
from oodcore.training import train
from oodcore_plugins.run_extractor import RunExtractor

pytest.importorskip("lightning", reason="training needs the extra 'train'")


class Beside(Regularizer):
    """A branch, and a head of its own."""

    kind = "beside_for_tests"

    name: str = "confidence"

    def prepare_model(self, model, run):
        model.branches[self.name] = nn.Linear(run.width, 1)
        model.head = nn.Linear(run.width, run.classes, bias=False)
        return model

    def loss(self, step, state):
        return step.features.layers[self.name].square().mean()


class Vectors(Source):
    """Rows of eight numbers."""

    kind = "vectors_for_tests"

    def open(self):
        inputs = torch.rand(12, 8, generator=torch.Generator().manual_seed(1))
        return [(row, number % 3, number) for number, row in enumerate(inputs)]


@pytest.fixture(autouse=True, scope="module")
def plugin():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hook = oodcore.hookimpl(lambda register: register(Beside))
    with registry.using(SimpleNamespace(register_regularizers=hook)):
        yield
    torch.set_num_threads(threads)


def run_of(folder, *regularizers, **fields):
    config = {
        "network": {"factory": "oodcore_plugins.networks:digits_cnn", "arguments": {"width": 4}},
        "preprocess": {"mean": [0.5], "std": [0.25]},
        "train": {"kind": "digits", "split": "train"},
        "regularizers": regularizers,
        "epochs": 1,
        "optimizer": {"kind": "sgd", "lr": 0.05},
        "device": "cpu",
    }
    return train({**config, **fields}, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("runs") / "run", Beside())


def images(rows: int = 6) -> torch.Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_gives_what_was_trained(run):
    model = registry.build("extractor", {"kind": "run", "path": str(run)}).load()
    trained, _ = RunFolder(run).load()
    features = model(images())
    wanted = trained(Preprocess(mean=(0.5,), std=(0.25,))(images()))
    torch.testing.assert_close(features.logits, wanted.logits)
    torch.testing.assert_close(features.embeddings, wanted.embeddings)
    assert features.head.bias is None
    torch.testing.assert_close(features.head(features.embeddings), features.logits)


def test_a_branch_is_a_layer_of_its_name(run):
    model = RunExtractor(path=run, layers=("confidence", "block2")).load()
    trained, _ = RunFolder(run).load()
    inputs = images().requires_grad_()
    features = model(inputs)
    wanted = trained.branches["confidence"](features.embeddings)
    torch.testing.assert_close(features.layers["confidence"], wanted)
    assert features.layers["block2"].shape == (6, 8, 2, 2)
    features.layers["confidence"].sum().backward()
    assert inputs.grad.abs().sum() > 0
    edited = features.rerun(features.inputs, {"block2": torch.zeros_like})
    assert not torch.equal(edited.layers["confidence"], features.layers["confidence"])


def test_preprocessing_is_the_runs_unless_it_is_given(run):
    own = RunExtractor(path=run).load()
    bare = RunExtractor(path=run, preprocess=Preprocess()).load()
    assert own.preprocess == Preprocess(mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(bare((images() - 0.5) / 0.25).logits, own(images()).logits)
    assert own.fingerprint() != bare.fingerprint()


def test_two_loads_are_one_model(run):
    one, two = (RunExtractor(path=run).load() for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    assert torch.equal(copy.deepcopy(one.module)(images()), two.module(images()))
    assert "confidence.weight" in one.module.state_dict()


def test_the_code_that_runs_is_the_factory(run):
    assert RunExtractor(path=run).code() == ("oodcore_plugins.networks:digits_cnn",)


def test_a_run_without_branches_or_preprocessing(tmp_path):
    config = {"preprocess": None, "classes": 10}
    out = run_of(tmp_path / "run", **config)
    model = RunExtractor(path=out).load()
    assert model.preprocess is None
    assert model(images()).logits.shape == (6, 10)
    assert not model.module.head._forward_hooks


def test_a_network_that_is_its_own_head(tmp_path):
    linear = {"factory": "torch.nn:Linear", "arguments": {"in_features": 8, "out_features": 3}}
    fields = {"network": linear, "preprocess": None, "train": Vectors()}
    out = run_of(tmp_path / "run", Beside(), **fields)
    features = RunExtractor(path=out, layers=("confidence",)).load()(torch.rand(4, 8))
    assert features.logits.shape == (4, 3)
    assert features.layers["confidence"].shape == (4, 1)
    assert features.head.bias is None


def test_a_branch_takes_no_part_in_a_sequence(tmp_path):
    network = {
        "factory": "oodcore_plugins.networks:mlp",
        "arguments": {"inputs": 64, "classes": 10},
    }
    out = run_of(tmp_path / "run", Beside(), network=network)
    model = RunExtractor(path=out, layers=("confidence",)).load()
    trained, _ = RunFolder(out).load()
    assert type(trained.network).forward is torch.nn.Sequential.forward
    wanted = trained(Preprocess(mean=(0.5,), std=(0.25,))(images()))
    features = model(images())
    torch.testing.assert_close(features.logits, wanted.logits)
    torch.testing.assert_close(features.layers["confidence"], wanted.layers["confidence"])


def test_a_branch_named_like_a_layer_is_told(tmp_path):
    out = run_of(tmp_path / "run", Beside(name="block1"))
    with pytest.raises(ConfigurationError, match="a layer 'block1' already"):
        RunExtractor(path=out).load()


def test_a_folder_that_holds_no_finished_run_is_told(tmp_path, run):
    with pytest.raises(ArtifactError, match="no training run"):
        RunExtractor(path=tmp_path).load()
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half" / "run.json").unlink()
    with pytest.raises(ArtifactError, match="did not finish"):
        RunExtractor(path=tmp_path / "half").load()


def test_a_detector_is_fitted_on_it_and_loaded_again(tmp_path, run):
    data = {"kind": "digits", "split": "held_out"}
    detector = Detector(RunExtractor(path=run), scorer="energy").fit(data)
    scores = detector.score(data)
    detector.save(tmp_path / "detector")
    loaded = oodcore.load(tmp_path / "detector", allow=("oodcore_plugins.networks:digits_cnn",))
    torch.testing.assert_close(torch.tensor(loaded.score(data)), torch.tensor(scores))
