"""t2fnorm: what the head gets in training and afterwards, and the networks it leaves."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from training_runs import config_of, drawn, net, weights

from oodcore import Head, registry
from oodcore.discovery import head_of
from oodcore.errors import ConfigurationError
from oodcore.regularizer import TrainModel
from oodcore.run_folder import RunFolder
from oodcore.testing import regularizer_checks
from oodcore.training import train
from oodcore_plugins.cosine_head import CosineHead
from oodcore_plugins.run_extractor import RunExtractor
from oodcore_plugins.t2fnorm import Normalizing, T2FNorm


def head_from(bias: bool = True, temperature: float = 0.5) -> Normalizing:
    offset = drawn(3, seed=1) if bias else None
    return Normalizing(Head(drawn(3, 4), offset), temperature)


def naive(head: Normalizing, row: torch.Tensor, training: bool) -> list[float]:
    values = [float(x) / head.temperature for x in row]
    norm = math.sqrt(sum(float(x) ** 2 for x in row)) if training else 1.0
    offset = [0.0] * 3 if head.bias is None else head.bias.tolist()
    return [
        sum(w * x / norm for w, x in zip(weight, values, strict=True)) + b
        for weight, b in zip(head.weight.tolist(), offset, strict=True)
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_formula(bias, training):
    head, rows = head_from(bias).train(training), 3 * drawn(5, 4, seed=2)
    wanted = torch.tensor([naive(head, row, training) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(head(rows).detach(), wanted)
    torch.testing.assert_close(head_of(head)(rows).detach(), wanted)


def test_the_norm_matters_afterwards_alone():
    head, rows = head_from(), drawn(2, 4, seed=2)
    torch.testing.assert_close(head(rows), head(7 * rows))
    head.eval()
    assert not torch.allclose(head(rows), head(7 * rows))
    torch.testing.assert_close(head(7 * rows) - head.bias, 7 * (head(rows) - head.bias))


def test_the_gradient_is_that_of_the_formula_and_has_no_part_along_the_row():
    head, rows = head_from(), drawn(3, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(head, [rows])
    head(rows).square().sum().backward()
    along = (rows.grad * rows.detach()).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-10)


def test_a_row_of_zeros_gets_the_bias():
    head = head_from()
    torch.testing.assert_close(head(torch.zeros(1, 4, dtype=torch.float64))[0], head.bias)


def test_it_starts_from_the_head_that_it_replaces():
    model = TrainModel(net(bias=False), "head")
    before = model.head.weight.clone()
    T2FNorm(temperature=0.2).prepare_model(model, None)
    assert torch.equal(model.head.weight, before)
    assert model.head.bias is None
    assert model.head.weight is not before


class Scaled(nn.Linear):
    @property
    def head(self):
        return Head(self.weight, self.bias, scale=2.0)


def test_a_head_that_does_something_by_itself_is_refused():
    network = net()
    network.head = Scaled(5, 3)
    with pytest.raises(ConfigurationError, match="head is a Scaled, which normalises or scales"):
        T2FNorm().prepare_model(TrainModel(network, "head"), None)


def test_a_second_head_is_refused_when_the_configuration_is_checked():
    with pytest.raises(ValidationError, match="cosine_head and t2fnorm each replace the head"):
        config_of(CosineHead(), T2FNorm())
    config_of(CosineHead(weight=0), T2FNorm())


def test_a_run_leaves_a_network_that_divides_and_does_not_normalise(tmp_path):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    out = train(config_of(T2FNorm(temperature=0.5)), tmp_path / "run")
    model, _ = RunFolder(out).load()
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    features = RunExtractor(path=out).load()(inputs)
    kept = weights(out)
    logits = 2 * features.embeddings @ kept["network.head.weight"].T + kept["network.head.bias"]
    torch.testing.assert_close(features.logits, logits)
    torch.testing.assert_close(features.head(features.embeddings), logits)
    assert features.head.scale == 2
    assert not features.head.normalize_features
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, logits)
    start = {"factory": "training_runs:net", "weights": str(out)}
    still = {"optimizer": {"kind": "sgd", "lr": 1e-12}, "epochs": 1}
    tuned = train(config_of(T2FNorm(temperature=0.5), network=start, **still), tmp_path / "tuned")
    name = "network.head.weight"
    torch.testing.assert_close(weights(tuned)[name], kept[name])
    assert RunExtractor(path=tuned).load()(inputs).head.scale == 2


@pytest.mark.parametrize("temperature", [0, -1, math.inf])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ValidationError):
        T2FNorm(temperature=temperature)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "t2fnorm") == T2FNorm(temperature=0.1)
    assert T2FNorm.replaces_head


@pytest.mark.parametrize("check", regularizer_checks(T2FNorm(temperature=1)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
