"""The head is found, checked, or said not to be there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_models import (
    CLASSES,
    MLP,
    WIDTH,
    Attention,
    Contained,
    Convolutions,
    Cosine,
    Output,
    Tied,
    TwoOfOneShape,
    Wrapped,
    assert_untouched,
    drawn,
    mixed_modes,
    seeded,
    state,
)

from oodcore import Head
from oodcore.capture import Call
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import FeatureModel, head_of

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
        (Pixels, (5, 3, WIDTH), r"'fc' takes \[5, 3, 6\] and gives \[5, 3, 4\] for 5"),
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
    named = FeatureModel.wrap(module, head="fc")
    mended = named(bad, edit={"fc": torch.nan_to_num})
    assert torch.equal(mended.logits, torch.zeros(2, CLASSES))


def test_a_head_that_other_inputs_pass_by_is_an_error():
    class Branching(TwoOfOneShape):
        def forward(self, x):
            return self.aux(self.body(x)) if len(x) == 1 else self.fc(self.body(x))

    model = FeatureModel.wrap(Branching())
    model(drawn(5, WIDTH))
    with pytest.raises(ConfigurationError, match="the head 'fc' did not run"):
        model(drawn(1, WIDTH))


def test_head_of():
    linear = nn.Linear(3, 2)
    assert head_of(linear).weight is linear.weight
    assert head_of(Cosine()).scale == 7.0
    with pytest.raises(ConfigurationError, match="a ReLU is no linear layer"):
        head_of(nn.ReLU())


def test_weights_that_are_computed_are_read_without_a_trace():
    """Spectral normalisation updates its buffers each time the weight is read in training."""
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, CLASSES))
    module = nn.Sequential(nn.Tanh(), head).train()
    before = state(module)
    for name in ("auto", "1"):
        features = FeatureModel.wrap(module, head=name)(drawn(5, WIDTH))
        torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert_untouched(module, before)


def test_under_autocast():
    module = seeded(MLP())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = FeatureModel.wrap(module)(drawn(5, WIDTH))
    assert features.logits.dtype == torch.bfloat16
    assert features.double().head.weight.dtype == torch.float64


def test_an_empty_batch_proves_nothing():
    model = FeatureModel.wrap(seeded(MLP()))
    assert model(torch.zeros(0, WIDTH)).logits.shape == (0, CLASSES)
    assert model._memory.head is None


def test_looking_for_the_head_keeps_no_tokens(monkeypatch):
    """Of layers that run on [N, T, D] nothing may be kept: all of them at once would not fit."""
    kept = []
    original = Call.watch_head

    def spy(self, name, part):
        original(self, name, part)
        kept.append((self, name))

    monkeypatch.setattr(Call, "watch_head", spy)
    FeatureModel.wrap(seeded(Attention()))(drawn(5, 3, 8))
    firings = {name: call.heads[name] for call, name in kept}
    assert len(firings["encoder.layers.0.linear1"]) == 1
    assert firings["encoder.layers.0.linear1"][0].embeddings is None
    assert firings["encoder.layers.0.linear1"][0].logits is None
    assert firings["fc"][0].embeddings is not None


def test_of_equal_layers_the_one_that_made_the_output_is_the_head():
    class Equal(TwoOfOneShape):
        def forward(self, x):
            h = self.body(x)
            return [self.aux(h), self.fc(h)][1]

    module = seeded(Equal())
    module.aux.load_state_dict(module.fc.state_dict())
    assert FeatureModel.wrap(module).head_name(drawn(5, WIDTH)) == "fc"


def test_embeddings_are_what_the_head_was_given():
    class Reusing(TwoOfOneShape):
        def forward(self, x):
            h = self.body(x)
            logits = self.fc(h)
            h.zero_()
            return logits

    model = FeatureModel.wrap(seeded(Reusing()))
    for _ in range(2):
        with torch.no_grad():
            features = model(drawn(5, WIDTH))
        torch.testing.assert_close(features.head(features.embeddings), features.logits)
