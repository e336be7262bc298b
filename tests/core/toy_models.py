"""Small models of many kinds, and what about a model must not change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from oodcore import Head

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
