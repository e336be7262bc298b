"""Composite: models made of others, and features averaged."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_models import MLP, WIDTH, drawn, seeded

from oodcore import FeatureModel, Features, Head
from oodcore.capture import locked
from oodcore.composite import Repeated, averaged
from oodcore.errors import ConfigurationError, DataError


class Signed(Repeated):
    """A model on inputs and on minus them."""

    def __init__(self, model: FeatureModel, times: int = 1) -> None:
        super().__init__("signed", model, {"times": times})

    def ready(self, inputs: Any) -> Any:
        if not isinstance(inputs, torch.Tensor):
            raise DataError("no tensor")
        return inputs

    def runs(self, inputs: Any, edit: Any) -> Iterator[Features]:
        yield self.model.rerun(inputs, edit)
        yield self.model.rerun(-inputs, edit)


def test_it_is_a_model_like_any_other():
    inner = FeatureModel.wrap(seeded(MLP()), layers=["first"])
    model, x = Signed(inner), drawn(3, WIDTH)
    features = model(x)
    one, two = inner(x), inner(-x)
    torch.testing.assert_close(features.logits, (one.logits + two.logits) / 2)
    assert features.layers.keys() == {"first"}
    assert torch.equal(features.inputs, x)
    assert torch.equal(features.rerun(x).logits, features.logits)
    assert model.rows_seen == 18
    assert (model.device, model.gives, model.modules) == (inner.device, inner.gives, inner.modules)
    assert model.to("cpu") is model
    assert model.title == "signed of MLP"
    assert "signed of MLP" in repr(model)
    with pytest.raises(DataError, match="no tensor"):
        model(["text"])


def test_copies_capture_other_layers_and_share_the_rest():
    model = Signed(FeatureModel.wrap(seeded(MLP()), layers=["first"]))
    more = model.with_layers(["second"])
    assert (model.layers, more.layers) == (("first",), ("first", "second"))
    assert more(drawn(3, WIDTH)).layers.keys() == {"first", "second"}
    assert model.rows_seen == more.rows_seen == 6
    with pytest.raises(ConfigurationError, match="no layer 'third'"):
        model.with_layers(["third"])
    with pytest.raises(ConfigurationError, match="a list of names"):
        model.with_layers("second")


def test_identities_and_fingerprints_go_down_to_the_models_inside():
    inner, other = FeatureModel.wrap(seeded(MLP())), FeatureModel.wrap(MLP())
    models = [Signed(inner), Signed(inner, 2), Signed(other), Signed(Signed(inner)), inner]
    assert len({model.fingerprint() for model in models}) == 5
    assert len({model.identity() for model in models}) == 5
    assert Signed(inner).fingerprint() == models[0].fingerprint()
    assert Signed(inner).identity() == models[0].identity()
    before = models[3].fingerprint()
    inner.module.fc.bias.data[0] += 1
    assert models[3].fingerprint() != before


def test_a_copy_and_a_pickle_are_the_same_model():
    model = Signed(FeatureModel.wrap(seeded(MLP())))
    x = drawn(3, WIDTH)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.fingerprint() == model.fingerprint()
        assert torch.equal(twin(x).logits, model(x).logits)


def test_locks_may_be_taken_again_and_in_any_order():
    a, b = MLP(), MLP()
    with locked([a, b, a]), locked([b, a]):
        assert len(FeatureModel.wrap(a)(drawn(2, WIDTH))) == 2


rows = st.integers(1, 4)


@given(count=rows, number=st.integers(1, 5), classes=st.integers(1, 4), scale=st.floats(0, 1e3))
def test_averages_are_those_of_numbers(count, number, classes, scale):
    generator = torch.Generator().manual_seed(number)
    parts = [
        Features(
            embeddings=torch.randn(count, 2, generator=generator, dtype=torch.float64),
            logits=scale * torch.randn(count, classes, generator=generator, dtype=torch.float64),
            layers={"x": torch.randn(count, 3, 2, generator=generator, dtype=torch.float64)},
        )
        for _ in range(number)
    ]
    stacked = torch.stack([part.logits for part in parts])
    plain = averaged(parts)
    torch.testing.assert_close(plain.logits, stacked.mean(0))
    torch.testing.assert_close(
        plain.embeddings, torch.stack([part.embeddings for part in parts]).mean(0)
    )
    torch.testing.assert_close(
        plain.layers["x"], torch.stack([part.layers["x"] for part in parts]).mean(0)
    )
    shares = averaged(iter(parts), "probabilities")
    expected = torch.logsumexp(stacked.log_softmax(2), 0) - torch.log(torch.tensor(number)).double()
    torch.testing.assert_close(shares.logits, expected)
    ones = torch.ones(count, dtype=torch.float64)
    torch.testing.assert_close(shares.logits.exp().sum(1), ones)


def test_half_precision_is_averaged_in_single():
    part = Features(logits=torch.full((1, 2), 60000.0, dtype=torch.float16))
    logits = averaged([part, part]).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.full((1, 2), 60000.0))


def test_the_head_is_the_firsts_and_logits_stay_as_given():
    heads = [Head(torch.ones(2, 2)), Head(torch.zeros(2, 2))]
    parts = [Features(embeddings=torch.ones(1, 2), logits=torch.eye(2)[:1], head=h) for h in heads]
    features = averaged(parts)
    assert features.head is heads[0]
    assert torch.equal(features.logits, torch.eye(2)[:1])
