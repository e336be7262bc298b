"""cosine_head: the three ways of normalising, the scale, and the networks it leaves."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from training_runs import config_of, drawn, net, weights

from oodcore import registry
from oodcore.discovery import head_of
from oodcore.errors import ArtifactError, ConfigurationError
from oodcore.regularizer import TrainModel
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore.training import train
from oodcore_plugins.cosine_head import CosineHead, Directions
from oodcore_plugins.run_extractor import RunExtractor

WAYS = ("both", "weight", "features")


def naive(weight, row, normalize, scale) -> list[float]:
    def length(values, unit):
        return math.sqrt(sum(float(v) ** 2 for v in values)) if unit else 1.0

    return [
        scale
        * sum(float(w) * float(h) for w, h in zip(direction, row, strict=True))
        / length(direction, normalize != "features")
        / length(row, normalize != "weight")
        for direction in weight
    ]


@pytest.mark.parametrize("normalize", WAYS)
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_the_formula(normalize, scale):
    weight, rows = drawn(3, 4), 3 * drawn(5, 4, seed=1)
    head = Directions(weight, normalize=normalize, scale=scale, learn_scale=False)
    wanted = torch.tensor([naive(weight, row, normalize, scale) for row in rows]).double()
    torch.testing.assert_close(head(rows).detach(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head_of(head)(rows).detach(), head(rows).detach())


def test_a_value_worked_out_by_hand():
    # (3, 4) / 5 against (1, 0) and (1, 1) / sqrt(2).
    weight = torch.tensor([[2.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    head = Directions(weight, normalize="both", scale=10, learn_scale=False)
    given = head(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    assert given.tolist()[0] == pytest.approx([6, 10 * 7 / (5 * math.sqrt(2))], rel=1e-12)


@pytest.mark.parametrize("normalize", WAYS)
def test_the_gradient_is_that_of_the_formula(normalize):
    head = Directions(drawn(3, 4), normalize=normalize, scale=2.0, learn_scale=True)

    def logits(rows, weight, scale):
        parts = {"weight": weight, "scale": scale}
        return torch.func.functional_call(head, parts, (rows,))

    given = drawn(2, 4, seed=1), drawn(3, 4), torch.tensor(2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(logits, [part.requires_grad_() for part in given])


def test_probabilities_have_a_ceiling():
    classes, scale = 10, 8.0
    weight = torch.eye(classes, dtype=torch.float64) - 1 / classes
    head = Directions(weight, normalize="both", scale=scale, learn_scale=False)
    most = head(weight).softmax(dim=1).amax(dim=1)
    wanted = 1 / (1 + (classes - 1) * math.exp(-scale * classes / (classes - 1)))
    torch.testing.assert_close(most, torch.full_like(most, wanted))
    assert wanted == pytest.approx(0.999, abs=1e-3)


def test_rows_and_directions_of_zeros():
    weight = torch.zeros(2, 3, requires_grad=True)
    head = Directions(weight, normalize="both", scale=8, learn_scale=False)
    rows = torch.zeros(1, 3, requires_grad=True)
    logits = head(rows)
    assert logits.tolist() == [[0, 0]]
    logits.sum().backward()
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 8),
        ({"normalize": "features"}, 8),
        ({"normalize": "weight"}, 1),
        ({"normalize": "weight", "scale": 3}, 3),
        ({"scale": 40}, 40),
    ],
)
def test_the_scale_that_is_left_out(fields, scale):
    model = TrainModel(net(), "head")
    before = model.head.weight.clone()
    CosineHead(**fields).prepare_model(model, None)
    assert isinstance(model.head, Directions)
    assert torch.equal(model.head.weight, before)
    assert float(model.head.scale.detach()) == scale
    assert [name for name, _ in model.head.named_parameters()] == ["weight", "scale"]


@pytest.mark.parametrize("network", [nn.Linear(6, 3), nn.Sequential(nn.ReLU(), nn.Linear(6, 3))])
def test_a_head_is_replaced_wherever_it_is(network):
    model = TrainModel(network, "" if isinstance(network, nn.Linear) else "1")
    CosineHead().prepare_model(model, None)
    logits = model(torch.randn(4, 6)).logits
    assert logits.abs().max() <= 8


@pytest.mark.parametrize("learnt", [True, False])
def test_the_scale_is_trained_where_it_is_to_be(learnt):
    exercise = Exercise([CosineHead(learn_scale=learnt)]).advance()
    assert (float(exercise.run.model.head.scale.detach()) != 8) == learnt


def start_from(folder, **arguments) -> dict:
    return {"factory": "training_runs:net", "arguments": arguments, "weights": str(folder)}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    return train(config_of(CosineHead(learn_scale=True)), tmp_path_factory.mktemp("runs") / "first")


STILL = {"optimizer": {"kind": "sgd", "lr": 1e-12}, "epochs": 1}


def test_a_run_leaves_a_head_that_says_what_it_is(first):
    features = RunExtractor(path=first).load()(torch.randn(4, 6))
    head = features.head
    assert head.normalize_weight
    assert head.normalize_features
    assert head.scale == float(weights(first)["network.head.scale"]) != 8
    torch.testing.assert_close(head(features.embeddings), features.logits)


@pytest.mark.parametrize("arguments", [{}, {"dropout": 0.0}], ids=["same", "other arguments"])
def test_a_second_run_starts_from_the_head_of_the_first(tmp_path, first, arguments):
    config = config_of(
        CosineHead(learn_scale=True), network=start_from(first, **arguments), seed=5, **STILL
    )
    out = train(config, tmp_path / "second")
    for name in ("network.head.weight", "network.head.scale", "network.body.0.weight"):
        torch.testing.assert_close(weights(out)[name], weights(first)[name], rtol=1e-5, atol=1e-7)
    assert RunExtractor(path=out).load()(torch.randn(2, 6)).head.normalize_weight


@pytest.mark.parametrize("parts", [(), (CosineHead(),), (CosineHead(learn_scale=True, weight=0),)])
def test_a_second_run_without_that_head_is_refused(tmp_path, first, parts):
    config = config_of(*parts, network=start_from(first), **STILL)
    with pytest.raises(ConfigurationError, match="trained with the head of 'cosine_head'.*same"):
        train(config, tmp_path / "second")


def test_a_second_run_of_another_network_is_refused(tmp_path, first):
    network = {"factory": "training_runs:wider", "weights": str(first)}
    config = config_of(CosineHead(learn_scale=True), network=network, **STILL)
    with pytest.raises(
        ArtifactError, match="(?s)does not fit the network that starts from it.*size mismatch"
    ):
        train(config, tmp_path / "second")


def test_a_plain_first_run_gives_its_directions(tmp_path):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    first = train(config_of(epochs=1), tmp_path / "first")
    config = config_of(CosineHead(), network=start_from(first), **STILL)
    out = train(config, tmp_path / "second")
    name = "network.head.weight"
    torch.testing.assert_close(weights(out)[name], weights(first)[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", [{"scale": 0}, {"scale": -1}, {"normalize": "head"}])
def test_fields_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        CosineHead(**fields)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "cosine_head") == CosineHead(normalize="both")
    assert CosineHead.replaces_head


LATER = CosineHead(normalize="weight", scale=10, learn_scale=True)


@pytest.mark.parametrize("check", regularizer_checks(LATER), ids=str)
def test_the_laws_of_regularizers(check):
    check()
