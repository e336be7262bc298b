"""The toy problem: rows of a few classes, rows of none, and a network that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from oodcore.data import Batch
from oodcore.extractor import FeatureModel
from oodcore.features import Features

Network = Callable[[int, int, Sequence[str]], nn.Module]
"""``network(classes, width, layers)``: a classifier of inputs ``[N, width, S, S]``, which has
submodules of these names; its last layer is the head."""

ACTIVE, IDLE, SPARE = 4.0, 0.3, 0.1
"""What a unit shows for its own class, for another, and where it belongs to no class."""
SHARES = (0.34, 0.26, 0.22, 0.18)
"""Of the classes; taken in turn where there are more."""


@dataclass(frozen=True)
class Sizes:
    """Of a toy problem: K, D, the side of the maps, and rows of each kind."""

    classes: int = 4
    width: int = 12
    side: int = 2
    rows: int = 320
    tested: int = 40


USUAL = Sizes()


class ToyNetwork(nn.Module):
    """A classifier of inputs ``[N, D, S, S]`` that are activations already, in float64.

    Each stage is ``ReLU(gain * x)`` with a gain near 1 for each unit; the embeddings are the mean
    over places, the head is linear. Nothing but the head has a bias, so that inputs times a number
    give embeddings times that number.

    Args:
        classes: K.
        width: D.
        layers: names of the stages; dots are allowed.
    """

    def __init__(self, classes: int, width: int, layers: Sequence[str] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.stages: list[str] = list(layers) or ["stage"]
        for name in self.stages:
            gain = 0.9 + 0.2 * torch.rand(width, 1, 1, generator=generator, dtype=torch.float64)
            _put(self, name, _Stage(gain))
        self.head_name = next(n for n in ("head", "classifier", "last") if not hasattr(self, n))
        means = class_means(classes, width)
        noise = torch.randn(classes, width, generator=generator, dtype=torch.float64)
        weight = 0.2 * means + 0.02 * noise
        squares = means.square().sum(dim=1)
        head = _Head(width, classes, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(0.1 * (squares.mean() - squares))
        self.add_module(self.head_name, head)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, K]``."""
        for name in self.stages:
            inputs = self.get_submodule(name)(inputs)
        logits: Tensor = self.get_submodule(self.head_name)(inputs.mean(dim=(2, 3)))
        return logits


class _Head(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: the weights come at once, and the global random generator is left alone."""


class _Stage(nn.Module):
    def __init__(self, gain: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(gain)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.gain * inputs)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    first, _, rest = name.partition(".")
    if not rest:
        module.add_module(first, part)
        return
    if not hasattr(module, first):
        module.add_module(first, nn.Module())
    _put(module.get_submodule(first), rest, part)


def class_means(classes: int, width: int) -> Tensor:
    """The mean embedding of each class, ``[K, D]``: units of its own and some that no class uses;
    where there are fewer units than classes, a level for each class."""
    if width < classes:
        level = torch.linspace(1.0, ACTIVE, classes, dtype=torch.float64)
        return level[:, None].expand(classes, width).clone()
    used = max(classes, width - width // 3)
    means = torch.full((classes, width), IDLE, dtype=torch.float64)
    means[:, used:] = SPARE
    units = torch.arange(used)
    means[units % classes, units] = ACTIVE
    return means


@dataclass(frozen=True)
class Problem:
    """Rows to fit on and to score, and the model that sees them.

    Args:
        model: a FeatureModel in float64.
        sizes: of everything.
        train: labelled rows to fit on.
        other: labelled rows of another distribution, to fit on in their place.
        known: inputs of the distribution of ``train``.
        unknown: inputs of no class: weak activity spread over all units.
    """

    model: FeatureModel
    sizes: Sizes
    train: Batch
    other: Batch
    known: Tensor
    unknown: Tensor

    @property
    def tested(self) -> Tensor:
        """Known and unknown inputs, in this order."""
        return torch.cat([self.known, self.unknown])

    def with_train(self, rows: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Problem:
        """The same with other training rows: those named by ``rows``, their inputs changed."""
        assert self.train.labels is not None
        inputs = self.train.inputs[rows]
        inputs = inputs if change is None else change(inputs)
        return replace(self, train=batch(inputs, self.train.labels[rows]))

    def scaled(self, factor: float) -> Problem:
        """The same with all inputs times a number."""
        assert self.train.labels is not None
        return replace(
            self,
            train=batch(self.train.inputs * factor, self.train.labels),
            known=self.known * factor,
            unknown=self.unknown * factor,
        )

    def on(self, device: str) -> Problem:
        """The same on another device; the model moves there."""
        return replace(self, model=self.model.to(device))


def problem(
    layers: Sequence[str] = (),
    network: Network | None = None,
    sizes: Sizes = USUAL,
) -> Problem:
    """A toy problem of some sizes; nothing is shared with another one.

    Args:
        layers: names of the submodules whose activations are wanted.
        network: makes the network, where the toy network will not do.
        sizes: of everything.
    """
    module = (network or ToyNetwork)(sizes.classes, sizes.width, tuple(layers)).double().eval()
    head = module.head_name if isinstance(module, ToyNetwork) else "auto"
    train, other, labels, known, unknown = (numbers.clone() for numbers in _drawn(sizes))
    return Problem(
        model=FeatureModel.wrap(module, head=head, layers=layers),
        sizes=sizes,
        train=batch(train, labels),
        other=batch(other, labels),
        known=known,
        unknown=unknown,
    )


@cache
def _drawn(sizes: Sizes) -> tuple[Tensor, ...]:
    """Inputs of ``train`` and ``other``, the labels of both, ``known`` and ``unknown``."""
    generator = torch.Generator().manual_seed(2)
    means = class_means(sizes.classes, sizes.width)
    labels = _labels(sizes, generator)
    tested = _labels(sizes, generator)[: sizes.tested]
    return (
        _inputs(means[labels], 0.5, sizes, generator),
        _inputs(0.5 + 1.7 * means.roll(1, dims=0)[labels], 0.8, sizes, generator),
        labels,
        _inputs(means[tested], 0.5, sizes, generator),
        _unknown(sizes, generator),
    )


def batch(inputs: Tensor, labels: Tensor) -> Batch:
    """Rows numbered from 0."""
    return Batch(inputs, labels, torch.arange(len(inputs)))


def labelled(rows: Batch) -> tuple[Any, Tensor | None]:
    """Inputs and labels, as a detector is fitted on them."""
    return rows.inputs, rows.labels


def features_of(model: FeatureModel, rows: Batch | Tensor, inputs: bool = True) -> Features:
    """What a model says of rows, in float64, with labels and ids where there are some.

    Args:
        model: the model.
        rows: labelled rows, or inputs alone; they are copied first.
        inputs: keep the inputs and the way through the model, as for scorers that need "inputs".
    """
    if isinstance(rows, Tensor):
        rows = Batch(rows)
    features = model.forward(rows.inputs.clone())
    device = features.device
    features = replace(
        features,
        labels=None if rows.labels is None else rows.labels.to(device, copy=True),
        ids=None if rows.ids is None else rows.ids.to(device, copy=True),
    )
    if not inputs:
        features = replace(features, inputs=None, rerun=None)
    return features.double()


def part_of(rows: Batch, chosen: slice | Tensor) -> Batch:
    """Some of the rows."""
    values: list[Any] = [rows.inputs, rows.labels, rows.ids]
    return Batch(*(None if value is None else value[chosen] for value in values))


def in_parts(rows: Batch, size: int) -> list[Batch]:
    """The rows in order, ``size`` at a time."""
    return [part_of(rows, slice(i, i + size)) for i in range(0, len(rows), size)]


def _labels(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """A label for each row, every class among them, in no order."""
    shares = torch.tensor(
        [SHARES[k % len(SHARES)] for k in range(sizes.classes)], dtype=torch.float64
    )
    ends = (shares.cumsum(0) / shares.sum() * sizes.rows).round()
    labels = torch.bucketize(torch.arange(sizes.rows, dtype=torch.float64), ends, right=True)
    return labels.clamp_max(sizes.classes - 1)[torch.randperm(sizes.rows, generator=generator)]


def _inputs(means: Tensor, spread: float, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Inputs ``[N, D, S, S]`` whose means over places scatter about ``means`` ``[N, D]``."""
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    rows = (means + spread * noise * (0.3 + means / ACTIVE)).clamp_min(0.0)
    return _maps(rows, sizes, generator)


def _unknown(sizes: Sizes, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(sizes.tested, sizes.width, generator=generator, dtype=torch.float64)
    return _maps(1.5 * drawn, sizes, generator)


def _maps(rows: Tensor, sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = (*rows.shape, sizes.side, sizes.side)
    places = 1 + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return rows[:, :, None, None] * places.clamp_min(0.0)
