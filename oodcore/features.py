"""Head and Features: what a model says about a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from oodcore.errors import DataError

EPS = 1e-12
"""The smallest norm that is divided by: a zero row stays zero."""

Rerun = Callable[..., "Features"]


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their Euclidean norm, ``x / max(norm, 1e-12)``; a zero row stays zero."""
    norms: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / norms.clamp_min(EPS)


@dataclass(frozen=True)
class Head:
    """The last layer of a classifier, ``head(embeddings) -> logits``.

    Plain: ``embeddings @ weight.T + bias``. With ``normalize_weight`` the rows of the weight, with
    ``normalize_features`` the embeddings have unit norm first; ``scale`` multiplies the product.

    Args:
        weight: ``[K, D]``.
        bias: ``[K]``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    normalize_weight: bool = False
    normalize_features: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise DataError(f"a head's weight is [K, D], not {list(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise DataError(
                f"a head's bias is [K] = [{self.weight.shape[0]}], not {list(self.bias.shape)}"
            )

    def __call__(self, embeddings: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, embeddings.dtype)
        weight, rows = self.weight.to(dtype), embeddings.to(dtype)
        weight = unit(weight) if self.normalize_weight else weight
        rows = unit(rows) if self.normalize_features else rows
        logits = self.scale * (rows @ weight.T) if self.scale != 1.0 else rows @ weight.T
        return logits if self.bias is None else logits + self.bias

    def to(self, *args: Any, **kwargs: Any) -> Head:
        """The head on another device or with another dtype, as ``Tensor.to``."""
        weight = self.weight.to(*args, **kwargs)
        bias = None if self.bias is None else self.bias.to(*args, **kwargs)
        if weight is self.weight and bias is self.bias:
            return self
        return replace(self, weight=weight, bias=bias)

    def owned(self) -> Head:
        """The head as it is at this moment: it does not follow a model that is trained further."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return replace(self, weight=self.weight.detach().clone(), bias=bias)


@dataclass(frozen=True)
class Features:
    """A batch as a model sees it. Every field but one of embeddings and logits may be absent.

    Args:
        embeddings: ``[N, D]``, the input of the classifier head.
        logits: ``[N, K]``, kept as given; where absent, ``head(embeddings)``.
        labels: ``[N]`` int64.
        ids: ``[N]`` int64, each row's number in its data set.
        layers: further activations ``[N, ...]``, by module name.
        head: the classifier head.
        inputs: the batch as the model got it; kept only where a component needs "inputs".
        rerun: ``rerun(inputs, edit={layer: fn}) -> Features``, the same road again (extractor, then
            the shapers before this component), differentiable; ``edit`` maps a named activation on
            the way.

    Raises:
        DataError: shapes that do not fit together.
    """

    embeddings: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    ids: Tensor | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    head: Head | None = None
    inputs: Any | None = None
    rerun: Rerun | None = None

    def __post_init__(self) -> None:
        given = {
            name: value
            for name, value in (
                ("embeddings", self.embeddings),
                ("logits", self.logits),
                ("labels", self.labels),
                ("ids", self.ids),
            )
            if value is not None
        }
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise DataError(
                    f"{name} must be a torch.Tensor, not {type(value).__name__}; "
                    "torch.as_tensor makes one"
                )
        if self.logits is None and self.head is not None and self.embeddings is not None:
            if self.embeddings.ndim == 2 and self.embeddings.shape[1] != self.head.weight.shape[1]:
                raise DataError(
                    f"embeddings have {self.embeddings.shape[1]} columns, the head takes "
                    f"{self.head.weight.shape[1]}"
                )
            given["logits"] = self.head(self.embeddings)
            object.__setattr__(self, "logits", given["logits"])
        if self.embeddings is None and self.logits is None and not self.layers:
            raise DataError("features need embeddings, logits or layers")
        rows = len(self)
        for name, value in given.items():
            wanted = 2 if name in ("embeddings", "logits") else 1
            if value.ndim != wanted or value.shape[0] != rows:
                shape = f"[{rows}, ...]" if wanted == 2 else f"[{rows}]"
                raise DataError(f"{name} must be {shape}, not {list(value.shape)}")
            if wanted == 1 and (value.is_floating_point() or value.dtype == torch.bool):
                kind = str(value.dtype).removeprefix("torch.")
                raise DataError(f"{name} must be integers, not {kind}")
            if wanted == 1 and value.dtype != torch.int64:
                object.__setattr__(self, name, value.to(torch.int64))
        for name, value in self.layers.items():
            if value.shape[0] != rows:
                raise DataError(f"layer '{name}' has {value.shape[0]} rows, not {rows}")

    def __len__(self) -> int:
        for value in (self.embeddings, self.logits, *self.layers.values()):
            if value is not None:
                return int(value.shape[0])
        return 0

    def __getitem__(self, rows: slice | Tensor) -> Features:
        """Some of the rows; inputs and rerun are left behind."""
        return self._map(lambda value: value[rows], inputs=None, rerun=None)

    def taken(self, rows: slice | Tensor) -> Features:
        """Some of the rows, by number, with their inputs and the way through the model."""
        inputs = None if self.inputs is None else _taken(self.inputs, rows)
        return replace(self[rows], inputs=inputs, rerun=self.rerun)

    def with_embeddings(self, embeddings: Tensor) -> Features:
        """Other embeddings ``[N, D]``, and the logits that the head makes of them."""
        return replace(self, embeddings=embeddings, logits=None)

    def with_logits(self, logits: Tensor) -> Features:
        """Other logits ``[N, K]``; the embeddings stay."""
        return replace(self, logits=logits)

    def with_head(self, head: Head) -> Features:
        """Another head, and the logits that it makes of the embeddings."""
        return replace(self, head=head, logits=None)

    def at(self, layer: str, pool: Literal["mean", "max", "flatten"] = "mean") -> Features:
        """A layer's activations as embeddings; axes after the second are pooled away.

        Logits and labels stay, and the head goes: it does not fit these embeddings.

        Raises:
            DataError: the layer is not among ``layers``, or an unknown way of pooling.
        """
        if layer not in self.layers:
            raise DataError(f"no layer '{layer}'; there are: {', '.join(self.layers) or 'none'}")
        if pool not in ("mean", "max", "flatten"):
            raise DataError(f"a layer is pooled by mean, max or flatten, not {pool!r}")
        rows = self.layers[layer]
        rows = rows.to(_wide(rows.device))
        if rows.ndim == 1:
            rows = rows[:, None]
        if rows.ndim > 2 and pool == "flatten":
            rows = rows.flatten(1)
        elif rows.ndim > 2:
            rows = rows.flatten(2).mean(2) if pool == "mean" else rows.flatten(2).amax(2)
        return replace(self, embeddings=rows, head=None)

    def normalized(self) -> Features:
        """Embeddings of unit norm (a zero row stays zero); logits stay, the head goes."""
        return replace(self, embeddings=unit(required(self.embeddings, "embeddings")), head=None)

    @property
    def predicted(self) -> Tensor:
        """The class with the largest logit, ``[N]`` int64; the first one on a tie."""
        return required(self.logits, "logits").argmax(dim=1)

    def detach(self) -> Features:
        """The same numbers without a gradient."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> Features:
        """The same numbers on another device."""
        head = None if self.head is None else self.head.to(device)
        return self._map(lambda value: value.to(device), head=head)

    def double(self) -> Features:
        """Embeddings, logits and head as float64, on the CPU where the device has none.

        This is the one place where a batch is cast; layers keep their type. What is float64 already
        is not copied.
        """
        device = self.device if self.device.type != "mps" else torch.device("cpu")
        wide = torch.float64
        cast: dict[str, Any] = {
            "embeddings": None if self.embeddings is None else self.embeddings.to(device, wide),
            "logits": None if self.logits is None else self.logits.to(device, wide),
            "labels": None if self.labels is None else self.labels.to(device),
            "ids": None if self.ids is None else self.ids.to(device),
            "head": None if self.head is None else self.head.to(device, wide),
        }
        if all(getattr(self, name) is value for name, value in cast.items()):
            return self
        return replace(self, **cast)

    def check_finite(self, stage: str) -> Features:
        """These features, if every number in them is finite.

        Raises:
            DataError: names the stage, the field and the first offending row.
        """
        for name in ("embeddings", "logits"):
            value = getattr(self, name)
            if value is not None:
                check_finite(value, f"{stage}: {name}", self.ids)
        for name, value in self.layers.items():
            if value.is_floating_point():
                check_finite(value, f"{stage}: layer '{name}'", self.ids)
        return self

    @staticmethod
    def cat(batches: Iterable[Features]) -> Features:
        """Batches one after another; a field is kept if all have it, the head is the first's."""
        parts = list(batches)
        if not parts:
            raise DataError("there are no batches to put together")

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if any(value is None for value in values) else torch.cat(values)

        return Features(
            embeddings=joined("embeddings"),
            logits=joined("logits"),
            labels=joined("labels"),
            ids=joined("ids"),
            layers={
                name: torch.cat([part.layers[name] for part in parts])
                for name in parts[0].layers
                if all(name in part.layers for part in parts)
            },
            head=parts[0].head,
        )

    @property
    def device(self) -> torch.device:
        for value in (self.embeddings, self.logits, *self.layers.values()):
            if value is not None:
                return value.device
        return torch.device("cpu")

    def _map(self, change: Callable[[Tensor], Tensor], **others: Any) -> Features:
        fields = {
            name: None if getattr(self, name) is None else change(getattr(self, name))
            for name in ("embeddings", "logits", "labels", "ids")
        }
        layers = {name: change(value) for name, value in self.layers.items()}
        return replace(self, **{**fields, "layers": layers, **others})


def required(value: Tensor | None, name: str) -> Tensor:
    """A field of the features that must be there.

    Raises:
        DataError: it is not.
    """
    if value is None:
        raise DataError(f"{name} are needed here, and these features have none")
    return value


def _taken(inputs: Any, rows: slice | Tensor) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _taken(value, rows) for name, value in inputs.items()}
    if isinstance(rows, slice):
        return inputs[rows]
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    return [inputs[int(row)] for row in rows]


def check_finite(values: Tensor, stage: str, ids: Tensor | None = None) -> None:
    """Raise a DataError that names the stage and the first row that is not finite."""
    # A finite sum has finite terms, and is found in a third of the time; it may overflow by itself.
    if math.isfinite(float(values.detach().sum())) or bool(torch.isfinite(values).all()):
        return
    row = int((~torch.isfinite(values.flatten(1) if values.ndim > 1 else values[:, None]))
              .any(dim=1).nonzero()[0])  # fmt: skip
    number = f" (id {int(ids[row])})" if ids is not None else ""
    raise DataError(f"{stage} of row {row}{number} are not finite")


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
