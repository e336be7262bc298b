"""Layers are caught and edited, gradients reach them, and the model is left as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from toy_models import (
    CLASSES,
    MLP,
    WIDTH,
    Convolutions,
    Mixed,
    assert_untouched,
    drawn,
    mixed_modes,
    seeded,
    state,
)

from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import FeatureModel
from oodcore.preprocess import Preprocess


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
        with pytest.raises(DataError, match="in the middle") as error:
            model(drawn(5, WIDTH), edit={"second": torch.neg})
        assert isinstance(error.value.__cause__, RuntimeError)
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
