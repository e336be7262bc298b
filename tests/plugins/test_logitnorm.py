"""logitnorm: the formula, its corners, composition, and the laws of regularizers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from oodcore import Features, registry
from oodcore.errors import DataError
from oodcore.run_folder import RunFolder
from oodcore.testing import regularizer_checks
from oodcore.training import train
from oodcore_plugins.digits import Digits
from oodcore_plugins.logitnorm import LogitNorm


def inner(rows, labels):
    return cross_entropy(rows.logits, labels, reduction="none")


def losses(logits, labels, temperature=0.04, within=inner) -> torch.Tensor:
    part = LogitNorm(temperature=temperature)
    return part.criterion(Features(logits=logits), labels, within, None, None)


def naive(logits: np.ndarray, label: int, temperature: float) -> float:
    norm = math.sqrt(sum(float(z) ** 2 for z in logits))
    scaled = [float(z) / (temperature * (norm + 1e-7)) for z in logits]
    top = max(scaled)
    return top + math.log(sum(math.exp(z - top) for z in scaled)) - scaled[label]


@given(
    logits=arrays(np.float64, (4, 3), elements=st.floats(-50, 50)),
    temperature=st.sampled_from([0.01, 0.04, 1.0, 5]),
)
def test_the_formula(logits, temperature):
    labels = torch.tensor([0, 1, 2, 0])
    given = losses(torch.from_numpy(logits), labels, temperature)
    wanted = [
        naive(row, int(label), temperature) for row, label in zip(logits, labels, strict=True)
    ]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_a_value_worked_out_by_hand():
    # ||(3, 4)|| = 5, so the logits become (0.6, 0.8) / 0.04 = (15, 20).
    given = losses(torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([0]))
    assert float(given) == pytest.approx(5 + math.log1p(math.exp(-5)), rel=1e-6)


@given(scale=st.floats(0.1, 1e4))
def test_the_norm_of_the_logits_does_not_matter(scale):
    logits = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    one, two = (losses(z, torch.tensor([1])) for z in (logits, scale * logits))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=0)


def test_logits_of_0_have_a_loss_and_a_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    loss = losses(logits, torch.tensor([2]))
    assert float(loss.detach()) == pytest.approx(math.log(4))
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_is_that_of_the_formula():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: losses(z, labels, 0.5), [logits])


def test_what_is_further_in_sees_the_scaled_logits():
    seen = []

    def within(rows, labels):
        seen.append(rows)
        return torch.zeros(len(labels))

    embeddings = torch.randn(2, 3)
    features = Features(embeddings=embeddings, logits=torch.randn(2, 4))
    LogitNorm(temperature=0.5).criterion(features, torch.tensor([0, 1]), within, None, None)
    torch.testing.assert_close(seen[0].logits.norm(dim=1), torch.full((2,), 2.0))
    assert seen[0].embeddings is embeddings
    assert features.logits.norm(dim=1).ne(2).all()


def test_features_without_logits_are_refused():
    with pytest.raises(DataError, match="logits are needed"):
        LogitNorm().criterion(Features(embeddings=torch.ones(1, 2)), None, inner, None, None)


@pytest.mark.parametrize("temperature", [0, -1, math.inf, "1"])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ValidationError):
        LogitNorm(temperature=temperature)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "logitnorm") == LogitNorm(temperature=0.04, weight=1)
    assert not LogitNorm.replaces_loss


@pytest.mark.parametrize("check", regularizer_checks(LogitNorm()), ids=str)
def test_the_laws_of_regularizers(check):
    check()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_with_it_is_less_sure_and_learns_as_well(tmp_path, one_thread):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")

    def trained(name: str, *parts: str) -> tuple[float, float]:
        config = {
            "network": {
                "factory": "oodcore_plugins.networks:mlp",
                "arguments": {"inputs": 64, "classes": 10},
            },
            "train": {"kind": "digits", "split": "train"},
            "regularizers": parts,
            "epochs": 10,
            "batch_size": 32,
            "optimizer": {"kind": "sgd", "lr": 0.05},
            "gradient_clip": 1.0,
            "device": "cpu",
        }
        model, blueprint = RunFolder(train(config, tmp_path / name)).load()
        assert tuple(part.kind for part in blueprint.regularizers) == parts
        rows = Digits(split="test").open()
        inputs = torch.stack([rows[row][0] for row in range(len(rows))])
        labels = torch.tensor([rows[row][1] for row in range(len(rows))])
        with torch.no_grad():
            features = model(inputs)
        confidence = features.logits.softmax(dim=1).amax(dim=1).mean()
        return float((features.predicted == labels).float().mean()), float(confidence)

    accuracy, confidence = trained("logitnorm", "logitnorm")
    plain_accuracy, plain_confidence = trained("plain")
    assert min(accuracy, plain_accuracy) > 0.9
    assert confidence < plain_confidence - 0.1
