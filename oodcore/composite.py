"""Composite: a model made of others, whose features it puts together."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oodcore.component import canonical
from oodcore.extractor import Edit, FeatureModel
from oodcore.features import Features


class Composite(FeatureModel):
    """A model that runs other models, several times or several of them.

    Args:
        kind: of the extractor that makes it.
        parts: the models inside.
        settings: all that decides the features besides the parts, as plain JSON values.
        layers: names of the activations that are captured.
    """

    def __init__(
        self,
        kind: str,
        parts: tuple[FeatureModel, ...],
        settings: Mapping[str, Any],
        layers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"{kind} of {', '.join(part.title for part in parts)}", layers)
        self.parts = parts
        self.settings = {"kind": kind, **settings}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title}, layers={self.layers})"

    def to(self, device: torch.device | str) -> Composite:
        for part in self.parts:
            part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(dict.fromkeys(module for part in self.parts for module in part.modules))

    @property
    def rows_seen(self) -> int:
        """How many rows went through the parts so far: a row counts once for each time it did."""
        return sum(part.rows_seen for part in self.parts)

    def fingerprint(self) -> str:
        prints = [part.fingerprint() for part in self.parts]
        return hashlib.sha256(canonical([self.settings, prints]).encode()).hexdigest()

    def identity(self) -> tuple[Any, ...]:
        inside = tuple(part.identity() for part in self.parts)
        return (type(self), canonical(self.settings), *inside)


class Repeated(Composite):
    """A composite that runs one model several times and averages what it says.

    Embeddings, logits and layers are the means over the runs, layers position by position; the head
    is the model's own. The runs follow one another, so that memory is that of one of them, unless
    gradients are recorded.

    Args:
        kind: of the extractor that makes it.
        model: the model inside.
        settings: all that decides the features besides the model, as plain JSON values.
        of: what is averaged to give logits: "logits", or "probabilities" for the logarithm of the
            mean probabilities.
    """

    def __init__(
        self,
        kind: str,
        model: FeatureModel,
        settings: Mapping[str, Any],
        of: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__(kind, (model,), settings, model.layers)
        self.of = of

    @property
    def model(self) -> FeatureModel:
        """The model inside."""
        return self.parts[0]

    @property
    def gives(self) -> frozenset[str]:
        return self.model.gives

    def _capture(self) -> None:
        self.parts = (self.model.with_layers(self.layers),)

    def prepared(self, inputs: Any) -> Any:
        return self.model.prepared(inputs)

    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        inputs = self.ready(inputs)
        features = averaged(self.runs(inputs, edit), self.of)
        return replace(features, inputs=inputs, rerun=self.rerun)

    @abstractmethod
    def ready(self, inputs: Any) -> Any:
        """Prepared inputs, if they can be run several times.

        Raises:
            DataError: they cannot.
        """

    @abstractmethod
    def runs(self, inputs: Any, edit: Edit | None) -> Iterator[Features]:
        """The features of each run of the model, of the same rows in the same order."""


def averaged(
    parts: Iterable[Features], of: Literal["logits", "probabilities"] = "logits"
) -> Features:
    """Features of the same rows as one: means of embeddings, logits and layers; the first's head.

    Numbers of half precision are averaged, and given, in single precision.

    Args:
        parts: at least one; all have the same fields, of the same shapes.
        of: "logits", or "probabilities": ``log mean softmax(z)`` in place of ``mean z``.
    """
    count, head = 0, None
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    layers: dict[str, Tensor] = {}
    for features in parts:
        count += 1
        head = features.head if head is None else head
        if features.embeddings is not None:
            embeddings = _plus(embeddings, features.embeddings)
        if features.logits is not None and of == "logits":
            logits = _plus(logits, features.logits)
        elif features.logits is not None:
            told = torch.log_softmax(_single(features.logits), dim=1)
            logits = told if logits is None else torch.logaddexp(logits, told)
        for name, value in features.layers.items():
            layers[name] = _plus(layers.get(name), value)
    if logits is not None:
        logits = logits / count if of == "logits" else logits - math.log(count)
    return Features(
        embeddings=None if embeddings is None else embeddings / count,
        logits=logits,
        layers={name: value / count for name, value in layers.items()},
        head=head,
    )


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return _single(value) if total is None else total + _single(value)


def _single(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
