"""NAC: how well training rows cover the states of a row's neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from oodcore import Features, FeatureStore, Head, Paper, Scorer, Shape, Statistic, hookimpl
from oodcore.component import Settings
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import State

BASE = 1000
"""Of the logarithm that the edges of bins are spaced by."""


class Binned(Settings):
    """A layer whose neurons' states are counted.

    Args:
        layer: its name; the embeddings where left out.
        bins: M, of which M - 2 can be reached; even.
        alpha: the steepness of the sigmoid.
    """

    layer: str | None = None
    bins: Annotated[int, Field(ge=4, multiple_of=2)] = 50
    alpha: PositiveFloat = 100.0


class Neurons(Binned):
    """A layer whose neurons should be covered.

    Args:
        saturation: r, the share of the training rows in a bin from which on it is covered.
    """

    saturation: Annotated[float, Field(gt=0, le=1)] = 0.05


Layers = Annotated[tuple[Binned, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Counts:
    """How many of ``rows`` training rows have a neuron's state in a bin: ``[C, M - 2]`` a layer."""

    rows: int
    layers: tuple[Tensor, ...]


class NeuronStates(Statistic):
    """A histogram of the state of each neuron of some layers; see ``nac``.

    Args:
        layers: what to count, each with ``layer``, ``bins`` and ``alpha``.
    """

    kind = "neuron_states"
    layers: Layers = (Binned(),)

    def needs(self) -> frozenset[str]:
        return sources(self.layers)

    def init(self, shape: Shape) -> State:
        # How many neurons a layer has is seen when the first rows pass through it.
        return {"rows": torch.zeros((), dtype=torch.int64, device=shape.device)}

    def update(self, state: State, features: Features) -> State:
        if not len(features):
            return state
        found: dict[str, Tensor] = {"rows": state["rows"] + len(features)}
        for number, (binned, bins) in enumerate(
            zip(self.layers, occupied(features, self.layers), strict=True)
        ):
            neurons, size = bins.shape[1], binned.bins - 2
            places = (bins + size * torch.arange(neurons, device=bins.device)).flatten()
            counts = torch.bincount(places, minlength=neurons * size).reshape(neurons, size)
            name = str(number)
            found[name] = counts + state[name] if name in state else counts
        return found

    def merge(self, a: State, b: State) -> State:
        one, two = (a, b) if len(a) >= len(b) else (b, a)
        return {name: value + two[name] if name in two else value for name, value in one.items()}

    def view(self, state: State) -> Counts:
        layers = tuple(state[str(number)].clone() for number in range(len(state) - 1))
        return Counts(int(state["rows"]), layers)


class NAC(Scorer):
    """``mean_l mean_c min(n_lc / (r N), 1)``, the coverage of a row's neurons c, in [0, 1].

    A neuron's state is ``sigmoid(alpha o g)`` with o its activation and g the slope in it of
    ``KL(u || softmax(z))``, u uniform; both are summed over the places of a map. ``n_lc`` of the N
    training rows have the neuron's state in the same bin. The M - 2 bins are spaced as in the
    authors' code: the edges above 1/2 are ``1 - log_1000 x`` for evenly spaced x from 1 to
    ``sqrt(1000)``, and those below mirror them, so that bins are finest at 1/2. The score is
    discrete: rows tie, it has no gradient, and a state at an edge may fall either way.

    At the embeddings the slope follows from the head. At further layers each row passes through
    the model once more, with a gradient, when fitting and when scoring. Labels are not used.

    alpha has to suit the model: states that are all near 0 and 1, or all near 1/2, say little.
    The authors count on 1000 training rows and give r N, 50 of them by default; a share means the
    same for any number of rows. Their tuned settings for a ResNet-18 on CIFAR-10 are M 50, r 0.05,
    alpha 100 at the pooled embeddings; 500, 0.1, 1000 at ``layer3``; 50, 0.005, 0.001 at
    ``layer2``; 500, 0.1, 0.001 at ``layer1``.

    Args:
        layers: each with ``layer`` (its name; the embeddings where left out), ``bins`` (M),
            ``alpha`` and ``saturation`` (r).
    """

    kind = "nac"
    paper = Paper(
        "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization",
        "Yibing Liu, Chris Xing Tian, Haoliang Li, Lei Ma, Shiqi Wang",
        "ICLR",
        2024,
        "https://arxiv.org/abs/2306.02879",
    )
    differentiable: ClassVar[bool] = False
    layers: Annotated[tuple[Neurons, ...], Field(min_length=1)] = (Neurons(),)

    @model_validator(mode="after")
    def _each_once(self) -> NAC:
        names = [neurons.layer for neurons in self.layers]
        if len(set(names)) < len(names):
            raise ValueError("a layer is there twice")
        return self

    def needs(self) -> frozenset[str]:
        return sources(self.layers)

    def statistics(self) -> tuple[Statistic, ...]:
        counted = (Binned(layer=n.layer, bins=n.bins, alpha=n.alpha) for n in self.layers)
        return (NeuronStates(layers=tuple(counted)),)

    def fit(self, store: FeatureStore) -> State:
        counts = store[self.statistics()[0]]
        return {
            str(number): (found.double() / (neurons.saturation * counts.rows)).clamp_max(1.0)
            for number, (neurons, found) in enumerate(zip(self.layers, counts.layers, strict=True))
        }

    def score(self, features: Features, state: State) -> Tensor:
        covered = []
        for number, bins in enumerate(occupied(features, self.layers)):
            coverage = state[str(number)]
            neurons = torch.arange(bins.shape[1], device=bins.device)
            covered.append(coverage[neurons, bins].mean(dim=1))
        return torch.stack(covered, dim=1).mean(dim=1)


def sources(layers: Sequence[Binned]) -> frozenset[str]:
    """The fields of Features that the states of these layers are found from."""
    inner = {"inputs"} if any(each.layer is not None for each in layers) else set[str]()
    outer = {"embeddings", "head"} if any(each.layer is None for each in layers) else set[str]()
    return frozenset(inner | outer)


def occupied(features: Features, layers: Sequence[Binned]) -> list[Tensor]:
    """The bin of each neuron's state, ``[N, C]`` a layer."""
    found = influences(features, [each.layer for each in layers])
    return [
        torch.bucketize((each.alpha * one).sigmoid(), edges(each.bins).to(one), right=True)
        for each, one in zip(layers, found, strict=True)
    ]


def edges(bins: int) -> Tensor:
    """The ``M - 3`` edges between ``M - 2`` bins of [0, 1], ascending."""
    steps = torch.linspace(1, math.sqrt(BASE), bins // 2, dtype=torch.float64)
    lower = steps.log() / math.log(BASE)
    # The middle is exact, for the states of silent neurons are.
    return torch.cat([lower[1:-1], lower.new_tensor([0.5]), 1 - lower[1:-1].flip(0)])


def influences(features: Features, layers: Sequence[str | None]) -> list[Tensor]:
    """``o g`` of the neurons of each layer, ``[N, C]`` float64; None names the embeddings.

    Raises:
        DataError: there is no head, or no way through the model.
        ConfigurationError: the logits do not depend on a layer.
    """
    found = _at_layers(features, [name for name in layers if name is not None])
    if None in layers:
        rows = required(features.embeddings, "embeddings")
        if features.head is None:
            raise DataError("nac: the slope at the embeddings needs a head, and there is none")
        found[None] = rows.detach() * _head_slopes(rows, features.head)
    return [found[name] for name in layers]


def _head_slopes(rows: Tensor, head: Head) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = rows.detach().clone().requires_grad_()
        (slopes,) = torch.autograd.grad(divergence(head(leaf)), leaf)
    return slopes


def _at_layers(features: Features, names: Sequence[str]) -> dict[str | None, Tensor]:
    if not names:
        return {}
    inputs, rerun = features.inputs, features.rerun
    if inputs is None or rerun is None:
        raise DataError("nac passes through the model again; stored features do not do")
    seen: dict[str | None, Tensor] = {}

    def keep(activation: Tensor, name: str) -> Tensor:
        # Where nothing before it has a gradient, it begins here.
        traced = activation.requires_grad
        seen[name] = activation if traced else activation.detach().requires_grad_()
        return seen[name]

    # A caller's inference mode would forbid the gradient.
    with torch.inference_mode(False), torch.enable_grad():
        edit = {name: partial(keep, name=name) for name in names}
        given = inputs.clone() if isinstance(inputs, Tensor) else inputs
        logits = required(rerun(given, edit=edit).logits, "logits")
        slopes = torch.autograd.grad(divergence(logits), list(seen.values()), allow_unused=True)
    found = {}
    for (name, activation), slope in zip(seen.items(), slopes, strict=True):
        if slope is None:
            raise ConfigurationError(f"nac: the logits do not depend on layer '{name}'")
        found[name] = _summed(activation.detach()) * _summed(slope)
    return found


def divergence(logits: Tensor) -> Tensor:
    """``sum_i KL(u || softmax(z_i))`` up to a constant, of logits ``[N, K]``."""
    return -logits.log_softmax(dim=1).mean(dim=1).sum()


def _summed(maps: Tensor) -> Tensor:
    wide = maps.double()
    return wide.flatten(2).sum(dim=2) if wide.ndim > 2 else wide.reshape(len(wide), -1)


@hookimpl
def register_statistics(register: Register) -> None:
    register(NeuronStates)


@hookimpl
def register_scorers(register: Register) -> None:
    register(NAC)
