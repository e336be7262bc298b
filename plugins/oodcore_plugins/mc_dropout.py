"""mc_dropout: what a network says with dropout left on, averaged over several draws of it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from oodcore import Extractor, FeatureModel, Features, Paper, Slot, hookimpl
from oodcore.capture import locked
from oodcore.composite import Repeated
from oodcore.data import Batch
from oodcore.errors import ConfigurationError
from oodcore.extractor import Edit, PreprocessInside
from oodcore.hookspecs import Register

Firing = tuple[str, int]
"""A dropout layer, and which of its runs in one call of the model."""

_ALPHA = (nn.AlphaDropout, nn.FeatureAlphaDropout)
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_SELU = -1.7580993408473766
"""What dropped units become in alpha dropout: minus SELU's scale times its alpha."""


class ThinnedNetworks(Repeated):
    """A model's features under several draws of dropout, averaged; ``MCDropout`` says how.

    Args:
        model: any FeatureModel around torch modules with dropout layers.
        samples: how many draws.
        seed: of the draws.

    Raises:
        ConfigurationError: no module has a dropout layer that drops anything.
    """

    def __init__(self, model: FeatureModel, samples: int = 10, seed: int = 0) -> None:
        super().__init__("mc_dropout", model, {"samples": samples, "seed": seed}, "probabilities")
        if not _layers(model):
            raise ConfigurationError(
                f"mc_dropout: {model.title} has no dropout layer (nn.Dropout and its kind, with "
                "p > 0), so that all draws would be the same; dropout that is a function, not a "
                "layer, cannot be seen"
            )
        self.samples = samples
        self.seed = seed
        self._memory: dict[Firing, int | None] = {}

    def ready(self, inputs: Any) -> Any:
        return inputs

    def runs(self, inputs: Any, edit: Edit | None) -> Iterator[Features]:
        for sample in range(self.samples):
            # While masks are on, nobody else's batch may run through these modules.
            with locked(self.model.modules):
                if not self._memory and len(Batch(inputs)):
                    self._memory.update(_axes(self.model, inputs))
                with _masked(self.model, self._memory, f"{self.seed} {sample}"):
                    features = self.model.rerun(inputs, edit)
            yield features


class MCDropout(Extractor):
    """``z = log mean_s softmax(z_s)`` and ``h = mean_s h_s`` over draws s of dropout, of logits z
    and embeddings h.

    The paper draws weights: a mask stands for one thinned network, a sample of the approximate
    posterior. So it is here: draw s has one mask for each dropout layer, the same for every row,
    which depends on the seed, the layer and the shape of what the layer gets, on nothing else. A
    row's score then does not depend on its batch, as it would if each row had masks of its own,
    which is how most implementations draw them; for a single row the two are alike. Rows whose
    shape depends on the batch, such as padded texts, share masks with rows of equal shape.

    Only dropout layers (``nn.Dropout``, ``Dropout1d`` to ``3d``, ``AlphaDropout``,
    ``FeatureAlphaDropout``) drop; the network stays in evaluation mode, batch normalisation too.
    Dropout that is called as a function, as inside ``nn.MultiheadAttention``, stays off. The head
    is the network's; what it makes of the mean embeddings are not these logits, and shapers, which
    recompute logits, work with the former. Layers are averaged. The model sees a row once for every
    draw, and its first row three times more, to see along which axis dropout layers get rows.

    Args:
        extractor: the model.
        samples: how many draws.
        seed: of the draws; the global random generator is not used.
        preprocess: none: it is the inner extractor's.

    ``load`` raises a ConfigurationError if the model has no dropout layer, and scoring one if a
    dropout layer mixes rows.
    """

    kind = "mc_dropout"
    paper = Paper(
        "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
        "Yarin Gal, Zoubin Ghahramani",
        "ICML",
        2016,
        "https://arxiv.org/abs/1506.02142",
    )

    extractor: Annotated[Extractor, Slot("extractor")]
    samples: PositiveInt = 10
    seed: NonNegativeInt = 0
    preprocess: PreprocessInside = None

    @model_validator(mode="after")
    def _one_draw_at_a_time(self) -> MCDropout:
        if any(isinstance(part, MCDropout) for part in self.extractor.walk()):
            raise ValueError("mc_dropout inside mc_dropout would drop twice; leave one of them out")
        return self

    def load(self) -> ThinnedNetworks:
        return ThinnedNetworks(self.extractor.load(), self.samples, self.seed)

    def code(self) -> tuple[str, ...]:
        return self.extractor.code()


def _layers(model: FeatureModel) -> dict[str, _DropoutNd]:
    """The layers that drop something, by the number of their module and their name in it."""
    return {
        f"{number}.{name}": part
        for number, module in enumerate(model.modules)
        for name, part in module.named_modules()
        if isinstance(part, _DropoutNd) and part.p > 0
    }


def _axes(model: FeatureModel, inputs: Any) -> dict[Firing, int | None]:
    """The axis along which each dropout layer gets rows; None where what it gets has none.

    It is the one that grows when a batch of one row becomes a batch of two.
    """
    first = _first(inputs)
    one, two = _shapes(model, first), _shapes(model, _twice(first))
    axes: dict[Firing, int | None] = {}
    for firing, shape in one.items():
        more = two.get(firing, ())
        alike = len(more) == len(shape)
        grown = [axis for axis in range(len(shape)) if alike and shape[axis] != more[axis]]
        if not alike or len(grown) > 1:
            raise ConfigurationError(
                f"mc_dropout: the dropout layer '{_called(firing)}' gets {list(shape)} "
                f"for one row and {list(more)} for two, so it has no axis of rows; a row's score "
                "would depend on its batch"
            )
        axes[firing] = grown[0] if grown else None
    if not axes:
        raise ConfigurationError(
            f"mc_dropout: no dropout layer of {model.title} runs, so that all draws are the same"
        )
    return axes


def _called(firing: Firing) -> str:
    """The layer's name in its module."""
    return firing[0].partition(".")[2]


def _first(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _first(value) for name, value in inputs.items()}
    return inputs[:1]


def _twice(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _twice(value) for name, value in inputs.items()}
    return torch.cat([inputs, inputs]) if isinstance(inputs, Tensor) else [*inputs, *inputs]


def _shapes(model: FeatureModel, inputs: Any) -> dict[Firing, tuple[int, ...]]:
    """The shape of what each dropout layer gets."""
    shapes: dict[Firing, tuple[int, ...]] = {}

    def look(firing: Firing, layer: _DropoutNd, given: Tensor) -> Tensor:
        shapes[firing] = tuple(given.shape)
        return given

    with torch.no_grad(), _hooked(model, look):
        model.rerun(inputs)
    return shapes


@contextmanager
def _masked(model: FeatureModel, axes: Mapping[Firing, int | None], draw: str) -> Iterator[None]:
    """The masks of one draw on a model's dropout layers, for the length of a with-block."""

    def drop(firing: Firing, layer: _DropoutNd, given: Tensor) -> Tensor:
        if axes and firing not in axes:
            raise ConfigurationError(
                f"mc_dropout: the dropout layer '{_called(firing)}' runs more often for these "
                "inputs than for the first ones, so that nobody knows what is a row of it"
            )
        return dropped(layer, given, axes.get(firing), " ".join([draw, firing[0], str(firing[1])]))

    with _hooked(model, drop):
        yield


@contextmanager
def _hooked(
    model: FeatureModel, change: Callable[[Firing, _DropoutNd, Tensor], Tensor]
) -> Iterator[None]:
    """What dropout layers give is ``change`` of it, for the length of a with-block."""
    times: Counter[str] = Counter()

    def hook(name: str, layer: _DropoutNd, args: Any, output: Tensor) -> Tensor:
        times[name] += 1
        return change((name, times[name] - 1), layer, output)

    with ExitStack() as stack:
        for module in model.modules:
            # Each call of a module, as for each view of an image, is of the same thinned network.
            handle = module.register_forward_pre_hook(lambda part, args: times.clear())
            stack.callback(handle.remove)
        for name, layer in _layers(model).items():
            stack.callback(layer.register_forward_hook(partial(hook, name)).remove)
        yield


def dropped(layer: _DropoutNd, values: Tensor, rows: int | None, draw: str) -> Tensor:
    """What a dropout layer makes of values in training, with a mask that a text decides.

    Args:
        layer: one of torch's; ``Dropout1d`` and its kind drop whole channels, axis 1.
        values: what it gets.
        rows: the axis along which all share the mask; None where there is none.
        draw: decides the mask, together with the shape.
    """
    shape = [1 if axis == rows else size for axis, size in enumerate(values.shape)]
    if isinstance(layer, _CHANNELS):
        shape[2:] = [1] * len(shape[2:])
    seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:7], "big")
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = (drawn >= layer.p).to(values)
    if layer.p == 1:
        return values * kept
    if not isinstance(layer, _ALPHA):
        return values * kept / (1 - layer.p)
    # Mean and variance of standard normal values stay, which is what the paper of SELU asks for.
    scale = 1 / math.sqrt((1 + layer.p * _SELU**2) * (1 - layer.p))
    return scale * (values * kept + _SELU * (1 - kept)) - scale * _SELU * layer.p


@hookimpl
def register_extractors(register: Register) -> None:
    register(MCDropout)
