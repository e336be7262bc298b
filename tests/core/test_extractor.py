"""FeatureModel: the head is found, layers are caught, and the model is left as it was."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from oodcore import Extractor, Features, Head
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import _LOCKS, FeatureModel, head_of
from oodcore.preprocess import Preprocess

CLASSES, WIDTH = 4, 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return module


class MLP(nn.Module):
    """Two linear layers of one shape before the head, dropout before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.second(torch.relu(self.first(x))))))


class Contained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.classifier = nn.ModuleDict({"top": nn.Sequential(nn.ReLU(), nn.Linear(WIDTH, 4))})

    def forward(self, x):
        return self.classifier["top"](self.body(x))


class TwoOfOneShape(nn.Module):
    """Two heads on one embedding; the first made is not the one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = torch.relu(self.body(x))
        main = self.fc(h)
        self.aux(h)
        return main


class Tied(nn.Module):
    """A head that shares its weight with another layer, and another that only looks like it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc.weight = self.first.weight

    def forward(self, x):
        return self.fc(torch.relu(self.first(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.encoder(x)[:, 0])


class Convolutions(nn.Module):
    """In place where it can be, as networks for images are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        y = self.block(x)
        y += x
        return self.fc(self.relu(y).mean(dim=(2, 3)))


@dataclass
class Output:
    loss: None
    logits: torch.Tensor


class Wrapped(nn.Module):
    """A model whose output comes in some wrapping."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.net = MLP()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.net(x))


class Cosine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, WIDTH))
        self.inner = nn.Linear(WIDTH, CLASSES)  # never run

    @property
    def head(self) -> Head:
        return Head(self.weight, normalize_weight=True, normalize_features=True, scale=7.0)

    def forward(self, h):
        return self.head(h)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].to(self.embedding.weight.dtype)
        hidden = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return {"loss": None, "logits": self.fc(hidden)}


class Texts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, CLASSES)

    def forward(self, texts):
        assert isinstance(texts, list)
        rows = [[float(len(text)), float(text.count("a"))] for text in texts]
        return self.fc(torch.tensor(rows))


class Mixed(nn.Module):
    """Hidden activations that some test wants to reach, and layers that misbehave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU()
        self.unused = nn.Linear(WIDTH, CLASSES)
        self.pair = Pair()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = self.act(self.second(self.act(self.first(x))))
        return self.fc(self.pair(h)[0])


class Pair(nn.Module):
    def forward(self, x):
        return 2 * x, x.sum()


def state(module: nn.Module) -> dict:
    """Everything about a module that must not change."""
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "grads": [(p.requires_grad, p.grad) for p in module.parameters()],
        "hooks": [
            (dict(part._forward_hooks), dict(part._forward_pre_hooks), dict(part._backward_hooks),
             dict(part._forward_hooks_with_kwargs), dict(part._forward_pre_hooks_with_kwargs))
            for part in module.modules()
        ],
    }  # fmt: skip


def assert_untouched(module: nn.Module, before: dict) -> None:
    after = state(module)
    weights, own = after.pop("weights"), dict(before)
    for name, value in own.pop("weights").items():
        assert torch.equal(weights[name], value), name
    assert after == own


def mixed_modes(module: nn.Module) -> nn.Module:
    for number, part in enumerate(module.modules()):
        part.training = number % 2 == 0
    return module


MODELS = {
    "mlp": (MLP, (5, WIDTH), "fc"),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
        (5, WIDTH),
        "2",
    ),
    "container": (Contained, (5, WIDTH), "classifier.top.1"),
    "two heads": (TwoOfOneShape, (5, WIDTH), "fc"),
    "tied": (Tied, (5, WIDTH), "fc"),
    "attention": (Attention, (5, 3, 8), "fc"),
    "convolutions": (Convolutions, (5, 3, 7, 9), "fc"),
    "tuple": (lambda: Wrapped(lambda z: (z, z.sum())), (5, WIDTH), "net.fc"),
    "list": (lambda: Wrapped(lambda z: [z]), (5, WIDTH), "net.fc"),
    "mapping": (lambda: Wrapped(lambda z: {"logits": z}), (5, WIDTH), "net.fc"),
    "object": (lambda: Wrapped(lambda z: Output(None, z)), (5, WIDTH), "net.fc"),
    "view": (lambda: Wrapped(lambda z: z.view(-1, 2, 2)), (5, WIDTH), "net.fc"),
    "cast": (lambda: Wrapped(lambda z: z.double()), (5, WIDTH), "net.fc"),
    "identity after": (lambda: nn.Sequential(MLP(), nn.Identity()), (5, WIDTH), "0.fc"),
    "the linear layer itself": (lambda: nn.Linear(WIDTH, CLASSES), (5, WIDTH), ""),
    "one class": (
        lambda: nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 1), nn.Flatten(0)),
        (5, WIDTH),
        "1",
    ),
    "no bias": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 3, bias=False)), (5, 6), "1"),
    "cosine": (lambda: nn.Sequential(nn.Tanh(), Cosine()), (5, WIDTH), "1"),
    "one row": (MLP, (1, WIDTH), "fc"),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_head_is_found(case):
    build, shape, name = MODELS[case]
    module = mixed_modes(seeded(build()))
    x = drawn(*shape)
    before, given = state(module), x.clone()
    model = FeatureModel.wrap(module)
    first = model(x)
    again = model.forward(x)
    assert_untouched(module, before)
    assert torch.equal(x, given)
    assert model.head_name(x) == name
    module.eval()
    expected = module(x.clone())
    if not isinstance(expected, torch.Tensor):
        parts = {"object": "logits", "mapping": "logits"}
        expected = vars(expected)["logits"] if case == "object" else expected[parts.get(case, 0)]
    for features in (first, again):
        assert features.embeddings is not None
        assert features.head is not None
        assert features.logits is not None
        torch.testing.assert_close(
            features.logits, expected.reshape(len(x), -1).to(features.logits.dtype)
        )
        torch.testing.assert_close(features.head(features.embeddings), features.logits)
        assert not features.head.weight.requires_grad
        assert features.layers == {}
        assert torch.equal(features.inputs, x)


@pytest.mark.parametrize("case", ["mlp", "convolutions", "attention", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(case, dtype):
    build, shape, name = MODELS[case]
    module = seeded(build()).to(dtype)
    model = FeatureModel.wrap(module)
    with torch.no_grad():
        features = model(drawn(*shape))
    assert model.head_name(drawn(*shape)) == name
    assert features.embeddings.dtype == features.logits.dtype == features.inputs.dtype == dtype
    assert features.double().logits.dtype == torch.float64


def test_a_declared_head_goes_before_the_linear_layer_in_it():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, CLASSES)

        @property
        def head(self) -> Head:
            return Head(self.linear.weight, self.linear.bias, normalize_features=True)

        def forward(self, h):
            return self.linear(nn.functional.normalize(h))

    model = FeatureModel.wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), seeded(Scaled())))
    features = model(drawn(5, WIDTH))
    assert model.head_name(drawn(5, WIDTH)) == "1"
    assert features.head.normalize_features


class InPlaceTemperature(MLP):
    def forward(self, x):
        logits = super().forward(x)
        logits /= 3.0
        return logits


class Softmax(MLP):
    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Pixels(nn.Module):
    """A head for each token: the logits are one row an input, the embeddings are not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.fc(x).mean(1)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 1)

    def forward(self, x):
        return self.conv(x).mean(dim=(2, 3))


class Recurrent(nn.Module):
    """The head runs at every step, and the last is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return [self.fc(x[:, step]) for step in range(x.shape[1])][-1]


class Bypassed(nn.Module):
    """The head's weights are used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


class Adapted(nn.Linear):
    """A linear layer that is more than its weight and bias."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x[:, :1]


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (Softmax, (5, WIDTH), r"cannot find the head of Softmax.*\[5, 4\] for 5 inputs.*"
         r"first \[6, 6\], second \[6, 6\], fc \[4, 6\].*head='classifier.fc'.*head=None"),
        (InPlaceTemperature, (5, WIDTH), "cannot find the head of InPlaceTemperature"),
        (Pixels, (5, 3, WIDTH), r"cannot find the head.*fc \[4, 6\]"),
        (Convolved, (5, 3, 2, 2), "cannot find the head of Convolved.*inputs]: none"),
        (Recurrent, (5, 3, WIDTH), "head 'fc' ran 3 times"),
        (lambda: nn.Sequential(Adapted(WIDTH, CLASSES)), (5, WIDTH), "'0' gives the output.*not "
         "weight @ input"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Linear(6, 4), nn.Flatten(1)), (5, 6),
         r"'1' gives the output.*its input is \[5, 1, 6\]"),
    ],
)  # fmt: skip
def test_a_model_without_a_head_is_said_to_be_one(build, shape, message):
    module = seeded(build())
    before = state(module)
    with pytest.raises(ConfigurationError, match=message):
        FeatureModel.wrap(module)(drawn(*shape))
    assert_untouched(module, before)


def test_heads_that_cannot_be_told_apart_are_an_error():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, CLASSES)
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return torch.maximum(self.a(x), self.b(x))

    with pytest.raises(ConfigurationError, match="several layers give the output of Twins: a, b"):
        FeatureModel.wrap(Twins())(drawn(5, WIDTH))
    assert FeatureModel.wrap(Twins(), head="b")(drawn(5, WIDTH)).head is not None


@pytest.mark.parametrize("build", [Softmax, InPlaceTemperature, lambda: Wrapped(str)])
def test_a_named_head_gives_the_logits(build):
    module = seeded(build()).eval()
    name = "net.fc" if isinstance(module, Wrapped) else "fc"
    model = FeatureModel.wrap(module, head=name)
    x = drawn(5, WIDTH)
    for _ in range(2):
        features = model(x)
        torch.testing.assert_close(features.logits, features.head(features.embeddings))
    if isinstance(module, InPlaceTemperature):
        torch.testing.assert_close(module(x), features.logits / 3.0)


@pytest.mark.parametrize(
    ("build", "head", "message"),
    [
        (MLP, "fcc", "MLP has no layer 'fcc'; did you mean 'fc'"),
        (MLP, "dropout", "a Dropout is no linear layer.*'dropout' cannot be the head"),
        (Contained, "classifier", r"a ModuleDict.*classifier.top.1 \[4, 6\]"),
        (MLP, 3, "not a int"),
        (MLP, nn.Linear(2, 2), "not a Linear"),
    ],
)
def test_a_head_that_cannot_be_one_is_refused_at_once(build, head, message):
    with pytest.raises(ConfigurationError, match=message):
        FeatureModel.wrap(build(), head=head)


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (Pixels, (5, 3, WIDTH), r"the head 'fc' is \[5, 3, 6\] for 5 inputs"),
        (Recurrent, (5, 3, WIDTH), "the head 'fc' ran 3 times"),
        (Bypassed, (5, WIDTH), "the head 'fc' did not run"),
    ],
)
def test_a_named_head_must_run_once_on_rows(build, shape, message):
    with pytest.raises(ConfigurationError, match=message):
        FeatureModel.wrap(build(), head="fc")(drawn(*shape))


def test_a_named_head_must_be_linear():
    module = nn.Sequential(Adapted(WIDTH, CLASSES))
    with pytest.raises(ConfigurationError, match="'0' is not weight @ input"):
        FeatureModel.wrap(module, head="0")(drawn(5, WIDTH))


def test_no_head_means_embeddings():
    module = seeded(nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU()))
    features = FeatureModel.wrap(module, head=None)(drawn(5, WIDTH))
    torch.testing.assert_close(features.embeddings, module(drawn(5, WIDTH)))
    assert features.logits is None
    assert features.head is None
    with pytest.raises(DataError, match=r"it is \[5, 1, 3\] for 5 inputs"):
        FeatureModel.wrap(nn.Sequential(module, nn.Unflatten(1, (1, 3))), head=None)(drawn(5, 6))
    with pytest.raises(DataError, match="output is a str"):
        FeatureModel.wrap(Wrapped(str), head=None)(drawn(5, WIDTH))
    with pytest.raises(ConfigurationError, match="no head among its submodules"):
        FeatureModel.wrap(module, head=None).head_name(drawn(5, WIDTH))


def test_a_head_that_is_given_makes_the_logits():
    head = Head(drawn(CLASSES, 3).double().requires_grad_(), drawn(CLASSES, seed=3).double())
    module = seeded(nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU()))
    features = FeatureModel.wrap(module, head=head)(drawn(5, WIDTH))
    torch.testing.assert_close(features.logits, head(module(drawn(5, WIDTH)).double()))
    assert not features.head.weight.requires_grad
    with pytest.raises(DataError, match="3 columns, the head takes 6"):
        FeatureModel.wrap(module, head=Head(torch.zeros(2, 6)))(drawn(5, WIDTH))


def test_the_head_is_read_anew_at_each_call():
    module = seeded(MLP())
    model = FeatureModel.wrap(module)
    x = drawn(5, WIDTH)
    old = model(x)
    with torch.no_grad():
        module.fc.weight *= 2.0
    features = model(x)
    assert torch.equal(features.head.weight, module.fc.weight)
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert not torch.allclose(old.logits, features.logits)


def test_a_batch_that_proves_nothing_is_not_remembered():
    module = seeded(MLP())
    model = FeatureModel.wrap(module)
    bad = torch.full((2, WIDTH), torch.nan)
    model(bad)
    with pytest.raises(DataError, match="not finite"):
        model.head_name(bad)
    assert model.head_name(drawn(3, WIDTH)) == "fc"


def test_a_head_that_other_inputs_pass_by_is_an_error():
    class Branching(TwoOfOneShape):
        def forward(self, x):
            return self.aux(self.body(x)) if len(x) == 1 else self.fc(self.body(x))

    model = FeatureModel.wrap(Branching())
    model(drawn(5, WIDTH))
    with pytest.raises(ConfigurationError, match="the head 'fc' did not run"):
        model(drawn(1, WIDTH))


# -- layers


def test_layers_are_what_the_module_gives():
    module = seeded(Convolutions()).eval()
    x = drawn(5, 3, 7, 9)
    names = ("conv", "bn", "relu", "block", "fc")
    with pytest.raises(ConfigurationError, match="layer 'relu' ran 2 times"):
        FeatureModel.wrap(module, layers=names)(x)
    names = ("conv", "bn", "block", "block.0", "fc")
    expected = {"conv": module.conv(x)}
    expected["bn"] = module.bn(expected["conv"])
    hidden = expected["bn"].relu()
    expected["block.0"] = module.block[0](hidden)
    expected["block"] = module.block[1](expected["block.0"])
    expected["fc"] = module(x)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            features = FeatureModel.wrap(module, layers=names)(x)
        assert tuple(features.layers) == names
        for name in names:  # in-place operations that follow must not show
            torch.testing.assert_close(features.layers[name], expected[name])
        torch.testing.assert_close(features.logits, expected["fc"])


def test_a_tuple_gives_its_first_part():
    module = seeded(Mixed())
    features = FeatureModel.wrap(module, layers=["pair", "second"])(drawn(5, WIDTH))
    torch.testing.assert_close(features.layers["pair"], features.embeddings)
    torch.testing.assert_close(features.layers["pair"], 2 * features.layers["second"].relu())


def test_with_layers_is_the_same_model():
    model = FeatureModel.wrap(seeded(Mixed()), layers=["first"])
    more = model.with_layers(["second", "first"])
    assert more.layers == ("first", "second")
    assert model.layers == ("first",)
    assert set(more(drawn(3, WIDTH)).layers) == {"first", "second"}
    assert set(model(drawn(4, WIDTH)).layers) == {"first"}
    assert model.rows_seen == more.rows_seen == 7


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["secnd"], "Mixed has no layer 'secnd'; did you mean 'second'"),
        (["first.weight"], "no layer 'first.weight'"),
        ("first", "a list of names, not the text 'first'"),
    ],
)
def test_a_layer_that_is_none_is_refused_at_once(layers, message):
    with pytest.raises(ConfigurationError, match=message):
        FeatureModel.wrap(Mixed(), layers=layers)


@pytest.mark.parametrize(
    ("layer", "message"),
    [("act", "layer 'act' ran 2 times"), ("unused", "layer 'unused' did not run")],
)
def test_a_layer_must_run_once(layer, message):
    module = seeded(Mixed())
    before = state(module)
    model = FeatureModel.wrap(module, layers=[layer])
    with pytest.raises(ConfigurationError, match=message):
        model(drawn(5, WIDTH))
    plain = FeatureModel.wrap(module)
    with pytest.raises(ConfigurationError, match=message):
        plain(drawn(5, WIDTH), edit={layer: torch.neg})
    assert_untouched(module, before)


def test_a_layer_without_a_tensor_is_an_error():
    class Named(nn.Module):
        def forward(self, x):
            return {"h": x}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named, self.fc = Named(), nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.fc(self.named(x)["h"])

    with pytest.raises(ConfigurationError, match="layer 'named' gives a dict"):
        FeatureModel.wrap(Model(), layers=["named"])(drawn(2, WIDTH))


# -- rerun, edit, gradients


def test_rerun_takes_the_road_again_without_preprocessing():
    module = seeded(Convolutions())
    model = FeatureModel.wrap(
        module, layers=["bn"], preprocess=Preprocess(size=5, mean=(0.5,) * 3, std=(0.2,) * 3)
    )
    features = model(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert features.inputs.shape == (4, 3, 5, 5)
    again = features.rerun(features.inputs)
    assert torch.equal(again.logits, features.logits)
    assert torch.equal(again.layers["bn"], features.layers["bn"])
    assert again.rerun is not None
    assert model.rows_seen == 8


def test_gradients_reach_inputs_layers_and_embeddings():
    module = seeded(Convolutions()).eval()
    model = FeatureModel.wrap(module, layers=["conv", "block"])
    with torch.no_grad():
        features = model(drawn(3, 3, 6, 6))
    assert not features.logits.requires_grad
    inputs = features.inputs.clone().requires_grad_()
    again = features.rerun(inputs)
    wanted = (inputs, again.layers["conv"], again.layers["block"], again.embeddings)
    grads = torch.autograd.grad(again.logits.logsumexp(1).sum(), wanted)
    for tensor, gradient in zip(wanted, grads, strict=True):
        assert gradient.shape == tensor.shape
        assert float(gradient.abs().sum()) > 0
    plain = features.inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(plain).logsumexp(1).sum(), plain)
    torch.testing.assert_close(grads[0], expected)
    torch.testing.assert_close(grads[3], torch.softmax(again.logits, 1) @ module.fc.weight)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_callers_gradient_goes_through_forward():
    x = drawn(3, 3, 6, 6).requires_grad_()
    model = FeatureModel.wrap(
        seeded(Convolutions()), preprocess=Preprocess(size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    )
    model(x).logits.sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_edit_changes_an_activation_on_the_way():
    module = seeded(Mixed()).eval()
    model = FeatureModel.wrap(module, layers=["second"])
    x = drawn(5, WIDTH)
    edited = model(x, edit={"second": lambda a: a.clamp(max=0.1)})  # the very first call
    hidden = module.second(module.first(x).relu()).clamp(max=0.1)
    torch.testing.assert_close(edited.layers["second"], hidden)
    torch.testing.assert_close(edited.logits, module.fc(2 * hidden.relu()))
    torch.testing.assert_close(model(x).logits, module(x))
    scale = torch.ones((), requires_grad=True)
    pair = model(x).rerun(x, edit={"pair": lambda a: a * scale, "first": torch.zeros_like})
    torch.testing.assert_close(pair.embeddings, 2 * module.second(torch.zeros(5, 6)).relu())
    pair.logits.sum().backward()
    assert float(scale.grad) != 0
    assert set(pair.layers) == {"second"}


@pytest.mark.parametrize("head", ["auto", "fc"])
def test_an_edit_of_the_head_changes_the_logits(head):
    model = FeatureModel.wrap(seeded(MLP()), head=head)
    x = drawn(5, WIDTH)
    edited = model(x, edit={"fc": lambda a: a + 1.0})
    torch.testing.assert_close(edited.logits, model(x).logits + 1.0)


def test_an_edit_keeps_its_own_tensor():
    """The model works in place on what an edit returns; that may belong to somebody."""
    module = seeded(Convolutions())
    own = drawn(2, 5, 6, 6)
    before = own.clone()
    with torch.no_grad():
        FeatureModel.wrap(module)(drawn(2, 3, 6, 6), edit={"bn": lambda a: own})
    assert torch.equal(own, before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"bnn": torch.neg}, "no layer 'bnn'; did you mean 'bn'"),
        ({"bn": lambda a: None}, "edit of layer 'bn' gave a NoneType"),
    ],
)
def test_an_edit_that_makes_no_sense_is_an_error(edit, message):
    module = seeded(Convolutions())
    before = state(module)
    with pytest.raises(ConfigurationError, match=message):
        FeatureModel.wrap(module)(drawn(2, 3, 6, 6), edit=edit)
    assert_untouched(module, before)


def test_rerun_may_be_called_inside_of_a_call():
    module = seeded(Mixed())
    model = FeatureModel.wrap(module, layers=["second"])
    x = drawn(5, WIDTH)
    plain = model(x)
    inner = []

    def nested(activation):
        inner.append(plain.rerun(-x))
        return activation

    outer = plain.rerun(x, edit={"first": nested})
    torch.testing.assert_close(outer.logits, plain.logits)
    torch.testing.assert_close(outer.layers["second"], plain.layers["second"])
    torch.testing.assert_close(inner[0].logits, model(-x).logits)


# -- inputs


def test_mappings_are_keyword_arguments():
    module = seeded(Mapped())
    model = FeatureModel.wrap(module)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "attention_mask": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64),
    }
    features = model(batch)
    torch.testing.assert_close(features.logits, module(**batch)["logits"])
    assert features.inputs["input_ids"].dtype == torch.int64
    assert features.inputs["attention_mask"].dtype == torch.float32
    assert batch["attention_mask"].dtype == torch.float64
    assert model.rows_seen == len(features) == 2
    assert torch.equal(features.rerun(features.inputs).logits, features.logits)


def test_texts_are_a_list():
    module = seeded(Texts())
    texts = ("banana", "x")
    features = FeatureModel.wrap(module)(texts)
    torch.testing.assert_close(features.logits, module(list(texts)))
    assert features.inputs == ["banana", "x"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_arrays_are_tensors(dtype):
    module = seeded(nn.Sequential(nn.Flatten(), MLP())) if dtype != np.int64 else Mapless()
    array = np.arange(12).reshape(2, 6).astype(dtype)
    array.flags.writeable = False
    features = FeatureModel.wrap(module)(array[:, ::-1])
    expected = torch.tensor(array[:, ::-1].copy())
    expected = expected.float() if dtype != np.int64 else expected
    torch.testing.assert_close(features.inputs, expected)


class Mapless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(12, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.fc(self.embedding(x).mean(1))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, "not a int"),
        ({}, "not a mapping of nothing"),
        ({"x": "text"}, "not a mapping of x: str"),
        ([1, 2], "not a list of int"),
        (np.array(["a"]), "not an array of <U1"),
        (torch.tensor(1.0), "a single number"),
    ],
)
def test_other_inputs_are_refused(inputs, message):
    with pytest.raises(DataError, match=message):
        FeatureModel.wrap(MLP())(inputs)


def test_preprocessing_of_texts_is_refused():
    model = FeatureModel.wrap(Texts(), preprocess=Preprocess(size=3))
    with pytest.raises(DataError, match="not texts"):
        model(["a"])


def test_a_model_that_writes_to_its_inputs_gets_copies():
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.fc(x.mul_(2.0))

    module = seeded(Writer())
    x = drawn(5, WIDTH)
    given = x.clone()
    model = FeatureModel.wrap(module)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            features = model(x)
            assert torch.equal(x, given)
            assert torch.equal(features.inputs, given)
            assert torch.equal(features.rerun(features.inputs).logits, features.logits)
    inputs = given.clone().requires_grad_()
    model(inputs).logits.sum().backward()
    assert torch.equal(inputs.grad, 2 * module.fc.weight.sum(0).expand(5, -1))


# -- the model is left as it was


def test_an_exception_in_the_middle_leaves_nothing_behind():
    class Failing(MLP):
        fail = False

        def forward(self, x):
            logits = super().forward(x)
            if self.fail:
                raise RuntimeError("in the middle")
            return logits

    module = mixed_modes(seeded(Failing()))
    before = state(module)
    model = FeatureModel.wrap(module, layers=["first"])
    module.fail = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            model(drawn(5, WIDTH), edit={"second": torch.neg})
    assert_untouched(module, before)
    module.fail = False
    assert len(model(drawn(5, WIDTH)).layers) == 1


def test_the_users_hooks_and_flags_stay():
    module = seeded(MLP())
    module.first.requires_grad_(False)
    calls = []
    module.fc.register_forward_hook(lambda *_: calls.append("user"))
    before = state(module)
    FeatureModel.wrap(module, layers=["fc"])(drawn(5, WIDTH), edit={"first": torch.neg})
    assert_untouched(module, before)
    assert calls == ["user", "user"]  # once for finding the head, once edited


def test_eval_that_does_more_is_not_called():
    class Merging(MLP):
        def train(self, mode: bool = True):
            raise AssertionError("the model's own train() was called")

    module = seeded(Merging())
    assert module.training
    features = FeatureModel.wrap(module)(drawn(5, WIDTH))
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert module.training


def test_the_global_random_generator_stays():
    module = seeded(MLP()).train()  # its dropout draws in training mode
    before = torch.get_rng_state()
    model = FeatureModel.wrap(module)
    model(drawn(5, WIDTH))
    model.fingerprint()
    assert torch.equal(torch.get_rng_state(), before)


# -- wrappers


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name):
    module = seeded(MLP()).eval()
    wrapped = WRAPPERS[name](module)
    x = drawn(5, WIDTH)
    model = FeatureModel.wrap(wrapped, layers=["first"])
    assert model.module is module
    torch.testing.assert_close(model(x).logits, module(x))
    assert model.fingerprint() == FeatureModel.wrap(module).fingerprint()


def test_distributed_data_parallel_is_taken_off():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        module = seeded(MLP()).eval()
        wrapped = nn.parallel.DistributedDataParallel(module)
        model = FeatureModel.wrap(wrapped)
        assert model.module is module
        torch.testing.assert_close(model(drawn(5, WIDTH)).logits, module(drawn(5, WIDTH)))
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_compiled_parts_run_as_written():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.compile(nn.Sequential(nn.Linear(WIDTH, WIDTH)), backend="eager")
            self.net = torch.compile(MLP(), backend="eager")

        def forward(self, x):
            return self.net(self.body(x))

    module = seeded(Half()).eval()
    x = drawn(5, WIDTH)
    expected = module(x)
    model = FeatureModel.wrap(module, layers=["body._orig_mod.0"])
    for _ in range(2):
        features = model(x)
        torch.testing.assert_close(features.logits, expected)
        assert torch.equal(features.layers["body._orig_mod.0"], module.body(x))
    module.compile(backend="eager")
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(model(x).logits, expected)


# -- threads


def test_threads_take_turns():
    module = mixed_modes(seeded(Convolutions()))
    before = state(module)
    quiet = copy.deepcopy(module).eval()
    models = [FeatureModel.wrap(module, layers=["conv"]), FeatureModel.wrap(module, layers=["bn"])]
    batches = [drawn(2 + number, 3, 6, 6, seed=number) for number in range(4)]
    expected = [quiet(x).detach() for x in batches]
    faults = []
    start = threading.Barrier(4)

    def work(number):
        model, x = models[number % 2], batches[number]
        try:
            start.wait()
            for _ in range(20):
                with torch.no_grad():
                    features = model(x)
                    negated = features.rerun(x, edit={"fc": torch.neg})
                torch.testing.assert_close(features.logits, expected[number])
                torch.testing.assert_close(negated.logits, -expected[number])
                assert set(features.layers) == set(model.layers)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert_untouched(module, before)
    assert sum(model.rows_seen for model in models) == 20 * 2 * sum(map(len, batches))


def test_a_call_of_the_user_in_another_thread_is_not_caught():
    module = seeded(Mixed()).eval()
    x = drawn(5, WIDTH)
    expected, others = module(x), []

    def elsewhere(activation):
        thread = threading.Thread(target=lambda: others.append(module(x)))
        thread.start()
        thread.join()
        return -activation

    features = FeatureModel.wrap(module, layers=["second"])(x, edit={"first": elsewhere})
    torch.testing.assert_close(others[-1], expected)
    assert not torch.allclose(features.logits, expected)


def test_locks_do_not_keep_models_alive():
    gc.collect()
    count = len(_LOCKS)
    model = FeatureModel.wrap(MLP())
    model(drawn(2, WIDTH))
    assert len(_LOCKS) == count + 1
    del model
    gc.collect()
    assert len(_LOCKS) <= count


# -- what a model is


def test_fingerprints():
    module = seeded(Convolutions())
    model = FeatureModel.wrap(module)
    print_ = model.fingerprint()
    assert len(print_) == 64
    model(drawn(2, 3, 6, 6))
    module.eval()
    assert model.fingerprint() == print_
    assert FeatureModel.wrap(copy.deepcopy(module), layers=["bn"]).fingerprint() == print_
    others = {print_}
    step = Preprocess(size=8)
    others.add(FeatureModel.wrap(module, preprocess=step).fingerprint())
    others.add(FeatureModel.wrap(copy.deepcopy(module).double()).fingerprint())
    for change in ("fc.bias", "bn.running_mean", "bn.num_batches_tracked"):
        changed = copy.deepcopy(module)
        changed.state_dict()[change].view(-1)[0] += 1
        others.add(FeatureModel.wrap(changed).fingerprint())
    reshaped = copy.deepcopy(module)
    reshaped.fc.weight.data = reshaped.fc.weight.data.reshape(5, 4)
    others.add(FeatureModel.wrap(reshaped).fingerprint())
    assert len(others) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float16])
def test_fingerprints_of_any_type(dtype):
    module = nn.Module()
    module.register_buffer("none", torch.zeros(0, dtype=dtype))
    module.register_buffer("one", torch.ones((), dtype=dtype))
    module.register_buffer("turned", torch.ones(2, 3, dtype=dtype).T)
    assert FeatureModel.wrap(module).fingerprint() == FeatureModel.wrap(module).fingerprint()


def test_devices():
    model = FeatureModel.wrap(seeded(MLP()))
    assert model.device == torch.device("cpu")
    assert FeatureModel.wrap(nn.Identity(), head=None).device == torch.device("cpu")
    before = model.fingerprint()
    assert model.to("cpu") is model
    assert model.fingerprint() == before
    moved = FeatureModel.wrap(MLP()).to("meta")
    assert moved.device == torch.device("meta")


def test_only_modules_are_wrapped():
    with pytest.raises(ConfigurationError, match=r"wraps a torch.nn.Module, not a function"):
        FeatureModel.wrap(lambda x: x)


def test_it_is_no_module():
    assert not isinstance(FeatureModel.wrap(MLP()), nn.Module)
    assert "MLP" in repr(FeatureModel.wrap(MLP()))


def test_head_of():
    linear = nn.Linear(3, 2)
    assert head_of(linear).weight is linear.weight
    assert head_of(Cosine()).scale == 7.0
    with pytest.raises(ConfigurationError, match="a ReLU is no linear layer"):
        head_of(nn.ReLU())


def test_an_extractor_is_a_component():
    class Memory(Extractor):
        kind: ClassVar[str] = "memory"

        def load(self) -> FeatureModel:
            return FeatureModel.wrap(MLP(), preprocess=self.preprocess)

    assert Memory().code() == ()
    assert Memory().preprocess is None
    given = Memory.model_validate({"kind": "memory", "preprocess": {"size": 3, "mean": [0]}})
    assert given == Memory.model_validate(given.dump())
    assert given.load().preprocess == Preprocess(size=3, mean=(0.0,))
    assert isinstance(Memory().load()(drawn(2, WIDTH)), Features)
