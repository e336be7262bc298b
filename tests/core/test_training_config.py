"""TrainingConfig: what is refused, round trips, and the learning rate."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from toy_runs import (
    ALL,
    Clusters,
    Everything,
    Mix,
    Replacing,
    ReplacingToo,
    config_of,
    registered,
)

from oodcore import Regularizer
from oodcore.config import validate
from oodcore.errors import ConfigurationError
from oodcore.training_config import NetworkConfig, OptimizerConfig, TrainingConfig


class Headed(Regularizer):
    kind = "headed"
    replaces_head = True


class HeadedToo(Headed):
    kind = "also_headed"


class Batched(Regularizer):
    kind = "batched"
    replaces_batch = True


class BatchedToo(Batched):
    kind = "also_batched"


REFUSED = {
    "same kind": ({"regularizers": [Mix(), Mix(weight=2)]}, "mix is there more than once"),
    "two losses": (
        {"regularizers": [Replacing(), ReplacingToo()]},
        "also_replacing and replacing each replace the classification loss",
    ),
    "two heads": (
        {"regularizers": [Headed(), HeadedToo()]},
        "also_headed and headed each replace the head; a run has at most one that does",
    ),
    "two batches": (
        {"regularizers": [Batched(), BatchedToo()]},
        "also_batched and batched each replace the rows of the batch",
    ),
    "accumulated gradients": (
        {"accumulate": 2},
        "accumulate: gradients of several batches are not added up",
    ),
    "collapse": ({"collapse": 1}, "collapse"),
    "no outliers": (
        {"regularizers": [Everything()], "outliers": None},
        "everything needs outliers",
    ),
    "warm-up": ({"schedule": {"warmup": 3}}, "leaves nothing of 3 epochs"),
    "milestones": ({"schedule": {"kind": "step"}}, "which needs them"),
    "no step": ({"schedule": {"milestones": [1]}}, "belong to the schedule 'step'"),
    "final": ({"schedule": {"kind": "constant", "final": 0.1}}, "belongs to the schedule 'cosine'"),
    "momentum": ({"optimizer": {"kind": "adam", "lr": 0.1, "momentum": 0.9}}, "are SGD's"),
    "nesterov": (
        {"optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0, "nesterov": True}},
        "above 0",
    ),
    "factory": ({"network": {"factory": "os.system"}}, "package.module:name"),
    "no epochs": ({"epochs": 0}, "epochs"),
    "a typo": ({"epoch": 3}, "epoch"),
    "a source": ({"regularizers": [Clusters()]}, "a regularizer is needed"),
    "text": ({"epochs": "3"}, "epochs"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_cannot_work_is_refused(fields, message):
    usual = {name: getattr(config_of(), name) for name in TrainingConfig.model_fields}
    with pytest.raises(ConfigurationError, match=message):
        validate(TrainingConfig, {**usual, **fields})


def test_what_is_switched_off_is_not_refused():
    config_of(Everything(weight=0), outliers=None)
    config_of(Replacing(), ReplacingToo(weight=0))
    config_of(Headed(), HeadedToo(weight=0), Batched(weight=0), BatchedToo(), Replacing())


def test_a_configuration_is_plain_text_and_back():
    config = config_of(*ALL, schedule={"kind": "cosine", "warmup": 0.5}, preprocess={"size": 4})
    with registered():
        assert TrainingConfig.model_validate(json.loads(json.dumps(config.dump()))) == config


def test_only_what_is_learnt_counts_when_runs_are_compared():
    elsewhere = config_of(device="auto", checkpoint_every=3, num_workers=2)
    assert elsewhere.learning() == config_of().learning()
    assert config_of(batch_size=10).learning() != config_of().learning()


@pytest.mark.parametrize(
    ("fields", "cls", "group"),
    [
        ({"kind": "sgd"}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
        ({"kind": "sgd", "momentum": 0, "weight_decay": 0.1}, torch.optim.SGD, {"momentum": 0}),
        ({"kind": "adam", "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ({"kind": "adamw"}, torch.optim.AdamW, {"weight_decay": 0.0}),
    ],
)
def test_optimizers_are_those_of_torch(fields, cls, group):
    optimizer = OptimizerConfig(lr=0.2, **fields).build(nn.Linear(2, 2).parameters())
    assert type(optimizer) is cls
    assert {**group, "lr": 0.2}.items() <= optimizer.param_groups[0].items()


def test_a_network_comes_out_of_its_wrapper_and_from_its_seed():
    config = NetworkConfig(factory="toy_runs:wrapped")
    one, two, other = (config.build(seed) for seed in (1, 1, 2))
    assert type(one).__name__ == "Net"
    assert torch.equal(one.head.weight, two.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 5: 0.1, 10: 0.1}),
        ("cosine", {0: 0.1, 5: 0.05, 10: 0.0}),
        ({"kind": "cosine", "final": 0.02, "warmup": 2}, {0: 0.001, 1: 0.0505, 6: 0.06, 10: 0.02}),
        ({"kind": "step", "milestones": [3, 6]}, {2.9: 0.1, 3: 0.01, 5.9: 0.01, 6: 0.001}),
    ],
)
def test_the_learning_rate_is_a_function_of_the_epoch(schedule, expected):
    rate = config_of(schedule=schedule, epochs=10).schedule.rate(0.1, 10)
    for epoch, value in expected.items():
        assert rate(epoch) == pytest.approx(value, abs=1e-12)
