"""The extractor kind "torch": a factory, its arguments and its weights."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from safetensors.torch import save_file

import oodcore
from oodcore.errors import ConfigurationError
from oodcore.preprocess import Preprocess
from oodcore_plugins.torch_extractor import TorchExtractor

SOURCE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, hidden, slope):
        super().__init__()
        assert isinstance(slope, float) and isinstance(hidden, tuple)
        self.conv = nn.Conv2d(1, hidden[0], 3)
        self.act = nn.LeakyReLU(slope)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(hidden[0], classes))

    def forward(self, x):
        return self.classifier(self.act(self.conv(x)).mean(dim=(2, 3)))

def net(classes=3, hidden=(4,), slope=1.0):
    return Net(classes, hidden, slope)
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A configuration of a model with weights, and the model."""
    (tmp_path / "user_net.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    import user_net

    module = user_net.net(classes=6, hidden=(5,))
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    yield (
        {
            "kind": "torch",
            "factory": "user_net:net",
            "arguments": {"classes": 6, "hidden": [5], "slope": 1.0},
            "weights": str(tmp_path / "net.safetensors"),
            "layers": ["conv"],
            "preprocess": {"size": 8, "mean": [0.5], "std": [0.25]},
        },
        module.eval(),
    )
    sys.modules.pop("user_net", None)


def test_it_gives_the_features_of_the_model(written):
    spec, module = written
    extractor = oodcore.registry.build("extractor", spec)
    assert isinstance(extractor, TorchExtractor)
    assert extractor.code() == ("user_net:net",)
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = extractor.load()
    features = model(images)
    prepared = Preprocess(size=8, mean=(0.5,), std=(0.25,))(images)
    torch.testing.assert_close(features.logits, module(prepared))
    torch.testing.assert_close(features.layers["conv"], module.conv(prepared))
    assert features.embeddings.shape == (5, 5)
    assert model.head_name(images) == "classifier.1"
    assert model.fingerprint() == extractor.load().fingerprint()


def test_it_is_written_as_it_is_read(written):
    spec, _ = written
    extractor = oodcore.registry.build("extractor", spec)
    dumped = json.loads(json.dumps(extractor.dump()))
    assert dumped["arguments"] == {"classes": 6, "hidden": [5], "slope": 1.0}
    assert type(dumped["arguments"]["slope"]) is float
    again = oodcore.registry.build("extractor", dumped)
    assert again == extractor
    assert hash(again) == hash(extractor)
    again.load()  # the factory asserts the types of its arguments
    schema = TorchExtractor.model_json_schema()
    del dumped["kind"]
    Draft202012Validator(schema).validate(dumped)
    assert not Draft202012Validator(schema).is_valid(dumped | {"arguments": [1]})
    assert not Draft202012Validator(schema).is_valid(dumped | {"factory": "user_net"})


def test_without_weights_the_same_model_is_drawn_each_time(written):
    spec = {"kind": "torch", "factory": "user_net:net"}
    before = torch.get_rng_state()
    prints = {oodcore.registry.build("extractor", spec).load().fingerprint() for _ in range(2)}
    assert len(prints) == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_may_be_named_or_left_out(written):
    spec, _ = written
    named = TorchExtractor.model_validate(spec | {"head": "classifier.1"}).load()
    images = torch.ones(2, 1, 8, 8)
    assert named(images).logits.shape == (2, 6)
    bare = TorchExtractor.model_validate(spec | {"head": None}).load()
    features = bare(images)
    assert features.logits is None
    torch.testing.assert_close(features.embeddings, named(images).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": "user_net:nett"}, "has no 'nett'"),
        ({"factory": "user_net:nn"}, "not a function"),
        ({"factory": "builtins:dict", "arguments": {}}, "gave a dict"),
        ({"factory": "missing_package.net:net"}, "cannot import"),
        ({"arguments": {"clases": 6}}, r"cannot be called.*it takes \(classes=3"),
        ({"arguments": {"classes": 7, "hidden": [5]}}, "size mismatch for classifier.1.weight"),
        ({"weights": "nowhere.safetensors"}, "no file of weights nowhere.safetensors"),
        ({"head": "classifier.2"}, "no layer 'classifier.2'"),
        ({"layers": ["cnv"]}, "did you mean 'conv'"),
    ],
)
def test_what_is_wrong_is_said(written, change, message):
    extractor = TorchExtractor.model_validate(written[0] | change)
    with pytest.raises(ConfigurationError, match=message):
        extractor.load()


@pytest.mark.parametrize(
    "change",
    [
        {"factory": "user_net"},
        {"factory": None},
        {"arguments": [1, 2]},
        {"arguments": {"a": {"b": 1}}},
        {"weights": 3},
        {"head": 3},
        {"layers": "conv"},
        {"preprocess": {"sise": 8}},
        {"device": "cpu"},
    ],
)
def test_a_field_that_makes_no_sense_is_refused(written, change):
    with pytest.raises(ValidationError):
        TorchExtractor.model_validate(written[0] | change)


class Pooled(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.head = torch.nn.Linear(8, classes)

    def forward(self, images):
        return self.head(self.stem(images).mean((2, 3)))


def test_models_of_timm_need_no_kind_of_their_own(monkeypatch):
    calls = []

    def create_model(model_name, pretrained=False, checkpoint_path=None, drop_rate=0.0, **kwargs):
        calls.append((model_name, pretrained, checkpoint_path, drop_rate, kwargs))
        return Pooled(kwargs["num_classes"])

    timm = types.ModuleType("timm")
    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    arguments = {"model_name": "vit_tiny", "num_classes": 7, "drop_rate": 0.1, "img_size": [32, 32]}
    extractor = TorchExtractor.model_validate(
        {
            "factory": "timm:create_model",
            "arguments": arguments,
            "preprocess": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3},
        }
    )
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    features = extractor.load()(images)
    assert features.logits.shape == (2, 7)
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    further = {"num_classes": 7, "img_size": (32, 32)}
    assert calls == [("vit_tiny", False, None, 0.1, further)]
