"""Training runs of a few steps, and single steps, for the tests of regularizers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from oodcore import Source
from oodcore.training_config import TrainingConfig
from oodcore_plugins.correctness_ranking import CorrectnessRanking
from oodcore_plugins.cosine_head import CosineHead
from oodcore_plugins.regmixup import RegMixup
from oodcore_plugins.sam import SAM
from oodcore_plugins.swa import SWA

ROWS, CLASSES, STEPS, EPOCHS = 42, 3, 4, 3


class Points(Source):
    """Points around one centre a class."""

    kind = "points_for_regularizers"

    def open(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(ROWS) % CLASSES
        noise = torch.randn(ROWS, 6, generator=generator)
        return TensorDataset(2 * torch.eye(CLASSES, 6)[labels] + 0.7 * noise, labels)


class Net(nn.Module):
    """Batch normalisation and dropout, so that running statistics and random draws count."""

    def __init__(self, dropout: float, bias: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 5)
        )
        self.head = nn.Linear(5, CLASSES, bias)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def net(dropout: float = 0.3, bias: bool = True) -> nn.Module:
    return Net(dropout, bias)


def wider(dropout: float = 0.3) -> nn.Module:
    network = Net(dropout, True)
    network.head = nn.Linear(5, CLASSES + 1)
    return network


SURE = (
    CosineHead(scale=8),
    RegMixup(weight=0.5),
    CorrectnessRanking(weight=0.5),
    SAM(rho=0.05),
    SWA(start=1, lr=0.02, anneal=1),
)


def fields_of(*regularizers, **fields) -> dict:
    usual = {
        "network": {"factory": "training_runs:net"},
        "train": Points(),
        "epochs": EPOCHS,
        "batch_size": 11,
        "optimizer": {"kind": "sgd", "lr": 0.05, "weight_decay": 1e-3},
        "gradient_clip": 5.0,
        "device": "cpu",
    }
    return {**usual, "regularizers": regularizers, **fields}


def config_of(*regularizers, **fields) -> TrainingConfig:
    return TrainingConfig(**fields_of(*regularizers, **fields))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def plain(rows, labels):
    """Cross-entropy of each row."""
    return cross_entropy(rows.logits, labels, reduction="none")


def step_of(features=None, labels=None, ids=None, *, epoch=0, seed=0, **fields) -> SimpleNamespace:
    """What a step tells a regularizer, without a run behind it."""
    rows = len(features) if features is not None else len(labels)
    return SimpleNamespace(
        features=features,
        labels=labels,
        ids=torch.arange(rows) if ids is None else ids,
        epoch=epoch,
        ends_epoch=False,
        memo={},
        extra=None,
        criterion=plain,
        generator=torch.Generator().manual_seed(seed),
        run=SimpleNamespace(gather=lambda values: values),
        **fields,
    )


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
