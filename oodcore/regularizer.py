"""Regularizer and Step: what a method may do while a network is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from oodcore.capture import submodule
from oodcore.component import Component
from oodcore.data import Batch
from oodcore.discovery import head_of
from oodcore.errors import OodcoreError
from oodcore.features import Features
from oodcore.preprocess import Preprocess

Closure = Callable[[], Tensor]
"""One pass of a step: forward, gradients to zero, backward; gives the total loss."""
Schedule = Callable[[float], float]
"""Epochs done, as a fraction, to learning rate."""
Inner = Callable[[Features, Tensor], Tensor]
"""The criterion further in: features and labels ``[N]`` to losses ``[N]``."""


class Diverged(OodcoreError, RuntimeError):
    """A training run whose loss or weights are no longer usable numbers.

    A run that is resumed repeats itself, so only other settings (a lower learning rate, more
    sampling steps, another seed) lead elsewhere.
    """


class Memory(nn.Module):
    """A regularizer's state with optimizers of its own.

    ``own`` maps a name to an optimizer of parameters of this module; what the optimizers remember
    is saved and restored with the parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[str, Optimizer] = {}

    def get_extra_state(self) -> dict[str, Any]:
        """What each optimizer remembers, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.own.items()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Give each optimizer back what it remembered."""
        for name, optimizer in self.own.items():
            # An optimizer keeps the very tensors that it is given, and writes to them.
            optimizer.load_state_dict(deepcopy(state[name]))


class TrainModel(nn.Module):
    """The network being trained, with a head that can be replaced and branches beside it.

    Args:
        network: any classifier; a mapping of inputs is passed as its keyword arguments.
        head: the name of the head in the network: the module whose output ``[N, K]`` is the
            network's, a linear layer or one with a ``head: Head`` attribute.

    ``head`` reads and replaces that module in place. Each module in ``branches`` is applied to the
    embeddings ``[N, D]``; its output is the layer of the same name in the features.

    Raises:
        ConfigurationError: the network has no such submodule.
    """

    def __init__(self, network: nn.Module, head: str) -> None:
        super().__init__()
        self.network = network
        self.branches = nn.ModuleDict()
        self.head_name = head
        submodule(network, head)

    @property
    def head(self) -> nn.Module:
        """The module that turns embeddings into logits."""
        return submodule(self.network, self.head_name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "head":
            super().__setattr__(name, value)
        elif not self.head_name:
            self.network = value
        else:
            parent, _, leaf = self.head_name.rpartition(".")
            setattr(self.network.get_submodule(parent), leaf, value)

    def forward(self, inputs: Any) -> Features:
        """Embeddings ``[N, D]``, logits ``[N, K]`` and branches, in the model's type.

        Raises:
            OodcoreError: the head did not run exactly once.
        """
        calls: list[tuple[Tensor, Tensor]] = []
        handle = self.head.register_forward_hook(
            lambda module, args, output: calls.append((args[0], output))
        )
        try:
            self.network(**inputs) if isinstance(inputs, Mapping) else self.network(inputs)
        finally:
            handle.remove()
        if len(calls) != 1:
            raise OodcoreError(
                f"the head '{self.head_name}' ran {len(calls)} times in one pass of "
                f"{type(self.network).__name__}; it must run once"
            )
        embeddings, logits = calls[0]
        return Features(
            embeddings=embeddings,
            logits=logits,
            layers={name: branch(embeddings) for name, branch in self.branches.items()},
            head=head_of(self.head),
        )


@dataclass
class Run:
    """What stays the same all through a training run.

    Args:
        model: the network being trained.
        classes: K.
        width: D, the size of the embeddings before any ``prepare_model``.
        input_shape: of one row, as the network gets it; () where inputs are no single tensor.
        rows: in the training data.
        epochs: passes over them.
        steps_per_epoch: steps in one of these passes.
        seed: of everything that is drawn.
        rank: of this process among ``world`` that train together.
        device: where the model is.
        preprocess: what the rows went through before they became inputs, or None.
    """

    model: TrainModel
    classes: int
    width: int
    input_shape: tuple[int, ...]
    rows: int
    epochs: int
    steps_per_epoch: int
    seed: int
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    preprocess: Preprocess | None = None
    passes: Callable[[], Iterator[Batch]] = field(default=lambda: iter(()), repr=False)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows ``[N, ...]`` of every process, in the order of their ranks; N may differ."""
        if self.world == 1:
            return rows
        from torch import distributed

        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        longest = max(int(count) for count in counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        distributed.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def average_gradients(self, module: nn.Module) -> None:
        """Average the gradients of a module that an optimizer of a regularizer's own trains."""
        if self.world == 1:
            return
        from torch import distributed

        for parameter in module.parameters():
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def batches(self) -> Iterator[Batch]:
        """A pass over all training rows, on the device, the same in every process."""
        return self.passes()


class Loop(Protocol):
    """What a step asks of the run it belongs to."""

    def forward(self, inputs: Any, *, stats: bool) -> Features:
        """A further forward pass."""

    def criterion(self, rows: Features, labels: Tensor) -> Tensor:
        """The run's criterion, every regularizer's part in it."""

    def log(self, name: str, value: Tensor | float) -> None:
        """A number for the metrics."""


@dataclass
class Step:
    """A batch on its way through the network, as one regularizer sees it.

    Args:
        kind: of the regularizer.
        run: what does not change.
        epoch: of the step, from 0.
        index: of the step in the whole run, from 0.
        ends_epoch: whether it is the last step of its epoch.
        inputs: ``[N, ...]`` as the network gets them.
        labels: ``[N]`` int64.
        ids: ``[N]`` int64, each row's position in the training data, 0 to ``run.rows - 1``.
        outliers: ``[M, ...]`` rows of the run's ``outliers``, or None where it has none.
        generator: on the run's device, a pure function of (seed, index, rank, kind); ``loss`` finds
            it in the same state in every pass.
        repeat: 0 in the first pass of the step, 1 in the second (SAM).
        memo: this regularizer's own, for this batch, kept over the passes.
        extra: the features of the rows that this regularizer's ``before`` returned.
        features: of the batch, with labels, ids and branches. There are none in ``before``.
    """

    kind: str
    run: Run
    epoch: int
    index: int
    ends_epoch: bool
    inputs: Any
    labels: Tensor
    ids: Tensor
    outliers: Any
    generator: torch.Generator
    loop: Loop = field(repr=False)
    repeat: int = 0
    memo: dict[str, Any] = field(default_factory=dict)
    extra: Features | None = None
    features: Features = field(init=False)

    def forward(self, inputs: Any, stats: bool = False) -> Features:
        """Further rows through the network.

        Running statistics (of batch normalisation and the like) stay as they are, unless ``stats``
        asks that they move; in a repeated pass they never do.
        """
        return self.loop.forward(inputs, stats=stats and self.repeat == 0)

    def criterion(self, rows: Features, labels: Tensor) -> Tensor:
        """The classification loss ``[N]`` that the run optimises, of other rows."""
        return self.loop.criterion(rows, labels)

    def log(self, name: str, value: Tensor | float) -> None:
        """A number whose mean over the epoch is wanted, as ``<kind>/<name>`` in the metrics."""
        if self.repeat == 0:
            self.loop.log(f"{self.kind}/{name}", value)


class Regularizer(Component):
    """A method that acts while a network is trained.

    Every hook is optional. The loss of a step is ``criterion(features, labels).mean()`` plus the
    sum of ``weight_at(epoch) * loss(step, state)`` over the regularizers. What a regularizer
    remembers is the module that ``build`` returns: it is kept beside the network, moved to the
    device, saved and restored, and the main optimizer does not train it.

    A weight of 0 switches a regularizer off whole. Draw from ``step.generator`` alone, and change
    nothing in ``criterion`` and ``loss``: they may run several times a step.

    Args:
        weight: of its term, at least 0.
    """

    slot: ClassVar[str] = "regularizer"
    replaces_loss: ClassVar[bool] = False
    """Its ``criterion`` ignores ``inner``: at most one such in a run, and it is innermost."""
    per_rank: ClassVar[bool] = False
    """Its state differs between processes (a replay buffer), so that all are saved."""
    replaces_head: ClassVar[bool] = False
    """Its ``prepare_model`` puts another head in place: at most one such in a run."""
    replaces_batch: ClassVar[bool] = False
    """The rows that its ``before`` returns pass through the network in place of the batch, as many:
    at most one such in a run."""
    needs_outliers: ClassVar[bool] = False
    """It reads ``step.outliers``: a run without ``outliers`` is refused."""

    weight: NonNegativeFloat = 1.0

    def prepare_model(self, model: TrainModel, run: Run) -> TrainModel:
        """Edit ``model.head`` or ``model.branches``.

        Also called when a finished run is loaded, and for a run that starts from the weights of
        another, whose network has the head of that one already.
        """
        return model

    def build(self, run: Run) -> nn.Module | None:
        """The state: buffers, modules of its own; a ``Memory`` where it has own optimizers."""
        return None

    def weight_at(self, epoch: int) -> float:
        """The weight of ``loss`` in an epoch, from 0.

        Where it is 0, ``loss`` is not called and the rows of ``before`` do not join the forward.
        """
        return self.weight

    def wrap_schedule(self, schedule: Schedule, run: Run) -> Schedule:
        """Another learning rate: epochs done, as a fraction, to rate; a pure function."""
        return schedule

    def augment(self, inputs: Any, step: Step) -> Any:
        """Once a step, first of all: other views of the same rows, as many and of the same shape.

        They become ``step.inputs`` for everything that follows; ``inputs`` are those of the data,
        or what a regularizer whose kind comes earlier made of them.
        """
        return inputs

    def before(self, step: Step, state: Any) -> Tensor | None:
        """Once a step, ahead of the forward: draw, sample, step own modules.

        Returns:
            Rows ``[M, ...]`` that join the one forward and come back as ``step.extra``, or None.
            Those of a class with ``replaces_batch`` pass in place of the batch, as many, and their
            features are ``step.features``; ``step.inputs`` stay those of the data.
        """
        return None

    def criterion(
        self, rows: Features, labels: Tensor, inner: Inner, step: Step, state: Any
    ) -> Tensor:
        """The classification loss of each row, ``[N]``.

        The rows of the batch have ids; those of another regularizer have none.
        """
        return inner(rows, labels)

    def loss(self, step: Step, state: Any) -> Tensor | None:
        """The regularizer's term, a scalar, unweighted; None in a step that has none."""
        return None

    def wrap_closure(self, closure: Closure, optimizer: Optimizer) -> Closure:
        """Another way to the gradient of a step; each call of ``closure`` is one pass."""
        return closure

    def after(self, step: Step, state: Any) -> None:
        """Once a step, after the update: histories, averages, budgets.

        ``step.features`` are those of the first pass, detached.
        """

    def finish(self, run: Run, state: Any) -> None:
        """After the last epoch: may write ``run.model`` (averaged weights)."""


def place(seed: int, *where: int | str) -> int:
    """The seed, in [0, 2^63), of one place in a run: a pure function of its arguments."""
    digest = hashlib.blake2b(repr((seed, *where)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def held_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, forward passes leave the buffers of a model as they are.

    The model works on copies meanwhile. Writing the old values back in place would invalidate
    the graphs of earlier passes, which still refer to the buffers.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
