"""TrainingConfig: a training run as its configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    Field,
    GetJsonSchemaHandler,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from torch import nn

from oodcore import factory
from oodcore.capture import unwrapped
from oodcore.component import FilePath, Settings, Slot
from oodcore.data import Source
from oodcore.factory import Arguments, Importable
from oodcore.preprocess import Preprocess
from oodcore.regularizer import Regularizer, Schedule

_WARM = 0.01
"""The share of the learning rate at which a warm-up begins."""


class NetworkConfig(Settings):
    """A network that an importable factory makes; its random weights come from the run's seed.

    Args:
        factory: ``package.module:function``, which gives an ``nn.Module``.
        arguments: its keyword arguments.
        weights: what training starts from, where it is not random weights: the folder of a finished
            run, or a file with the network's whole state dict (safetensors or torch).
    """

    factory: Importable
    arguments: Arguments = Arguments()
    weights: FilePath | None = None

    def build(self, seed: int) -> nn.Module:
        """The network with random weights, on the CPU, out of any compiled or parallel wrapper.

        Raises:
            ConfigurationError: the factory cannot be imported or called, or gives no module.
        """
        return unwrapped(factory.network(self.factory, self.arguments, seed))


class OptimizerConfig(Settings):
    """What turns gradients into updates.

    Args:
        kind: "sgd", "adam" or "adamw", as in ``torch.optim``.
        lr: the learning rate, before the schedule.
        momentum: of SGD, in [0, 1); 0.9 where it is left out.
        nesterov: for SGD with momentum.
        weight_decay: L2 penalty of SGD and Adam, decoupled decay of AdamW.
    """

    kind: Literal["sgd", "adam", "adamw"]
    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.kind != "sgd" and (self.momentum is not None or self.nesterov):
            raise PydanticCustomError(
                "not_sgd", "momentum and nesterov are SGD's, not {kind}'s", {"kind": self.kind}
            )
        if self.nesterov and self.momentum == 0:
            raise PydanticCustomError("no_momentum", "nesterov needs a momentum above 0")
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of some parameters."""
        if self.kind == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.lr,
                momentum=0.9 if self.momentum is None else self.momentum,
                nesterov=self.nesterov,
                weight_decay=self.weight_decay,
            )
        cls = torch.optim.Adam if self.kind == "adam" else torch.optim.AdamW
        return cls(parameters, lr=self.lr, weight_decay=self.weight_decay)


class ScheduleConfig(Settings):
    """The learning rate as a pure function of the epochs done, set at every step.

    Args:
        kind: "constant"; "cosine", half a cosine from ``lr`` to ``final`` after the warm-up; or
            "step", times ``factor`` at each of the ``milestones``.
        warmup: epochs in which the rate rises linearly from a hundredth.
        final: the rate at the end of a cosine.
        milestones: epochs at which a step falls.
        factor: of a step.
    """

    kind: Literal["constant", "cosine", "step"] = "cosine"
    warmup: NonNegativeFloat = 0.0
    final: NonNegativeFloat = 0.0
    milestones: tuple[PositiveInt, ...] = ()
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="before")
    @classmethod
    def _from_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        full = handler.resolve_ref_schema(handler(core))
        return {"anyOf": [{"enum": full["properties"]["kind"]["enum"]}, full]}

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if (self.kind == "step") != bool(self.milestones):
            raise PydanticCustomError(
                "milestones", "milestones belong to the schedule 'step', which needs them"
            )
        if self.final and self.kind != "cosine":
            raise PydanticCustomError("final", "final belongs to the schedule 'cosine'")
        return self

    def rate(self, lr: float, epochs: int) -> Schedule:
        """Epochs done, as a fraction, to learning rate."""
        shape = self._shape(lr, epochs)

        def rate(epoch: float) -> float:
            if epoch < self.warmup:
                return lr * (_WARM + (1 - _WARM) * epoch / self.warmup)
            return shape(epoch)

        return rate

    def _shape(self, lr: float, epochs: int) -> Callable[[float], float]:
        if self.kind == "cosine":
            length = epochs - self.warmup
            half = (lr - self.final) / 2
            return lambda epoch: (
                self.final + half * (1 + math.cos(math.pi * (epoch - self.warmup) / length))
            )
        return lambda epoch: lr * self.factor ** sum(epoch >= at for at in self.milestones)


class Blueprint(Settings):
    """What is needed of a run's configuration to make its model again.

    Args:
        network: the classifier.
        preprocess: what becomes of the rows of the sources before the network gets them.
        regularizers: what acts on the training, each kind at most once; the order does not matter.
    """

    network: NetworkConfig
    preprocess: Preprocess | None = None
    regularizers: tuple[Annotated[Regularizer, Slot("regularizer")], ...] = ()

    @model_validator(mode="after")
    def _check_regularizers(self) -> Blueprint:
        kinds = [part.kind for part in self.regularizers]
        if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            raise PydanticCustomError(
                "same_kind",
                "regularizers: {kinds} is there more than once; a run has each kind at most once",
                {"kinds": ", ".join(twice)},
            )
        acting = [part for part in self.regularizers if part.weight]
        for what, kinds in {
            "the classification loss": [part.kind for part in acting if part.replaces_loss],
            "the head": [part.kind for part in acting if part.replaces_head],
            "the rows of the batch": [part.kind for part in acting if part.replaces_batch],
        }.items():
            if len(kinds) > 1:
                raise PydanticCustomError(
                    "replaced_twice",
                    "regularizers: {kinds} each replace {what}; a run has at most one that does",
                    {"kinds": " and ".join(sorted(kinds)), "what": what},
                )
        return self


class TrainingConfig(Blueprint):
    """A training run.

    Args:
        train: the labelled rows to train on.
        validation: labelled rows on which accuracy and cross-entropy are measured after each epoch.
        outliers: rows for the regularizers that need some.
        classes: K; where it is left out, the largest label of ``train`` plus one.
        epochs: passes over the training rows.
        batch_size: most rows of a step, over all processes; an epoch's rows are spread evenly.
        outlier_batch_size: outliers of a step; as many as ``batch_size`` where it is left out.
        optimizer: SGD of rate 0.1 with Nesterov momentum 0.9 where it is left out.
        schedule: of the learning rate.
        collapse: measure neural collapse (``wfc`` and ``cfc``) on the training rows after each
            epoch, in one further pass.
        gradient_clip: the norm that the gradient of all parameters is clipped to.
        seed: of the weights, the order of the rows, and all that is drawn.
        device: "auto" is a GPU where there is one.
        checkpoint_every: steps between two checkpoints; there is one after every epoch besides.
        num_workers: processes that read rows.
    """

    train: Annotated[Source, Slot("source")]
    validation: Annotated[Source, Slot("source")] | None = None
    outliers: Annotated[Source, Slot("source")] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    epochs: PositiveInt
    batch_size: PositiveInt = 128
    outlier_batch_size: PositiveInt | None = None
    optimizer: OptimizerConfig = OptimizerConfig(kind="sgd", lr=0.1, momentum=0.9, nesterov=True)
    schedule: ScheduleConfig = ScheduleConfig()
    collapse: bool = False
    gradient_clip: PositiveFloat | None = None
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: PositiveInt | None = None
    num_workers: NonNegativeInt = 0

    @model_validator(mode="before")
    @classmethod
    def _no_accumulation(cls, data: Any) -> Any:
        for name in ("accumulate", "accumulate_grad_batches"):
            if isinstance(data, Mapping) and name in data:
                raise PydanticCustomError(
                    "accumulation",
                    "{name}: gradients of several batches are not added up, for what passes a "
                    "batch twice (sam) or counts steps would see the last of them only; take a "
                    "larger batch_size",
                    {"name": name},
                )
        return data

    @model_validator(mode="after")
    def _check_run(self) -> TrainingConfig:
        if self.schedule.warmup >= self.epochs:
            raise PydanticCustomError(
                "warmup",
                "schedule.warmup of {warmup} epochs leaves nothing of {epochs} epochs",
                {"warmup": self.schedule.warmup, "epochs": self.epochs},
            )
        acting = [part for part in self.regularizers if part.weight]
        needy = sorted(part.kind for part in acting if part.needs_outliers)
        if needy and self.outliers is None:
            raise PydanticCustomError(
                "no_outliers",
                "regularizers: {kinds} needs outliers, and the run has none; name a source as "
                "'outliers'",
                {"kinds": ", ".join(needy)},
            )
        return self

    def dump(self) -> dict[str, Any]:
        """The full mapping that rebuilds this configuration: plain JSON values."""
        return self.model_dump(mode="json")

    def learning(self) -> dict[str, Any]:
        """The part of ``dump`` that decides what is learnt, not where and how it is computed."""
        aside = {"device", "checkpoint_every", "num_workers"}
        return {name: value for name, value in self.dump().items() if name not in aside}
