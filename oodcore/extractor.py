"""Extractor and FeatureModel: from inputs to Features."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from oodcore.component import Component
from oodcore.discovery import head_of
from oodcore.errors import ConfigurationError
from oodcore.factory import imported
from oodcore.features import Features, Head
from oodcore.preprocess import Preprocess

if TYPE_CHECKING:
    from oodcore.module_model import ModuleModel

__all__ = ["Edit", "Extractor", "FeatureModel", "PreprocessInside", "head_of", "imported"]

Edit = Mapping[str, Callable[[Tensor], Tensor]]
"""Layer name to what becomes of its activation on the way."""

Model = TypeVar("Model", bound="FeatureModel")


class Extractor(Component):
    """A trained model as a component: where it comes from, and what its inputs go through.

    Args:
        preprocess: what becomes of the rows of a source before the model gets them.
    """

    slot: ClassVar[str] = "extractor"

    preprocess: Preprocess | None = None

    @abstractmethod
    def load(self) -> FeatureModel:
        """The model, on the CPU, with this preprocessing.

        Raises:
            ConfigurationError: the model is not where or what the configuration says.
        """

    def code(self) -> tuple[str, ...]:
        """The importable names (``package.module:name``) that ``load`` would import and run."""
        return ()


def _not_here(value: Any) -> Any:
    if value is not None:
        raise PydanticCustomError(
            "preprocess_inside",
            "leave it out here: what becomes of inputs is said by the extractor inside",
        )
    return value


PreprocessInside = Annotated[None, BeforeValidator(_not_here)]
"""The field ``preprocess`` of an extractor that leaves it to those inside it."""


class FeatureModel(ABC):
    """A function from inputs to Features: ``wrap`` makes one of a ``torch.nn.Module``.

    What an extractor loads is one too, whatever is behind it. A subclass says how inputs are
    prepared and what becomes of them then.

    Args:
        title: what it is, in a word or two.
        layers: names of the activations that are captured.
    """

    def __init__(self, title: str, layers: tuple[str, ...] = ()) -> None:
        self.title = title
        self.layers = layers

    @staticmethod
    def wrap(
        module: nn.Module,
        head: str | Head | None = "auto",
        layers: Iterable[str] = (),
        preprocess: Preprocess | None = None,
    ) -> ModuleModel:
        """A module in memory as a FeatureModel.

        Args:
            module: called with a tensor, a list of texts, or the entries of a mapping as keyword
                arguments. ``torch.compile``, DataParallel and DDP wrappers are taken off.
            head: what turns embeddings into logits. "auto": the linear layer (or module with an
                attribute ``head: Head``) whose output is the model's output, found with the first
                batch and checked by recomputing its logits. A name: that submodule, checked in the
                same way; its output are the logits. A Head: the module's output are the
                embeddings, and the head makes logits of them. None: the output are the embeddings,
                and there are no logits.
            layers: names of submodules, as in ``module.named_modules()``.
            preprocess: what inputs go through before the module gets them.

        Raises:
            ConfigurationError: no module, a name that it does not have, or a submodule that is no
                head.
        """
        from oodcore.module_model import wrapped

        return wrapped(module, head, layers, preprocess)

    def __call__(self, inputs: Any, edit: Edit | None = None) -> Features:
        return self.forward(inputs, edit)

    def forward(self, inputs: Any, edit: Edit | None = None) -> Features:
        """Features of a batch, in the model's type and on its device.

        Args:
            inputs: a tensor or array ``[N, ...]``, a mapping of names to such, or N texts.
                Floating numbers are cast to the model's type.
            edit: layer name to a function; what it makes of the activation goes on in its place.

        Returns:
            Embeddings, logits and head where there is one, ``layers``, the ``inputs`` as the model
            got them (after preprocessing), and ``rerun(inputs, edit=None)``, which takes such
            inputs and is differentiable with respect to them.

        Raises:
            ConfigurationError: no head was found, a head or layer ran not at all or several times.
            DataError: inputs that are none of these or that the model fails on, or embeddings that
                are not ``[N, D]``.
        """
        return self.rerun(self.prepared(inputs), edit)

    def with_layers(self: Model, names: Iterable[str]) -> Model:
        """The same model, capturing these layers too; head and ``rows_seen`` are shared.

        Raises:
            ConfigurationError: the model has no such layer.
        """
        if isinstance(names, str):
            raise ConfigurationError(f"layers is a list of names, not the text {names!r}")
        other = copy.copy(self)
        other.layers = tuple(dict.fromkeys([*self.layers, *names]))
        other._capture()
        return other

    @abstractmethod
    def _capture(self) -> None:
        """Get ready to capture ``layers``, in a copy that nobody else has seen.

        Raises:
            ConfigurationError: the model has no such layer.
        """

    @abstractmethod
    def prepared(self, inputs: Any) -> Any:
        """Inputs as ``rerun`` takes them: read, preprocessed, on the model's device, in its type.

        Raises:
            DataError: inputs that the model cannot take.
        """

    @abstractmethod
    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        """Features of prepared inputs; as ``forward`` in all else."""

    @abstractmethod
    def to(self, device: torch.device | str) -> FeatureModel:
        """This model, moved to a device (modules in place, as torch does)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs are taken."""

    @property
    @abstractmethod
    def gives(self) -> frozenset[str]:
        """Which of embeddings, logits and head its features have; "inputs" where gradients reach
        them."""

    @property
    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """The torch modules that run, none of them inside another."""

    @property
    @abstractmethod
    def rows_seen(self) -> int:
        """How many rows went through the model so far, those of ``rerun`` among them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the features of an input, in hexadecimal: weights,
        preprocessing, settings. It does not depend on the device."""

    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """The same for two models in memory that differ in the layers they capture at most."""


@dataclass
class RowCount:
    """How many rows went through a model; its copies with other layers share it."""

    rows: int = 0

    def add(self, rows: int) -> None:
        """Count some more; several threads may."""
        with _COUNTING:
            self.rows += rows


_COUNTING = threading.Lock()


def fingerprint_of(settings: Any, tensors: Mapping[str, Any], head: Head | None = None) -> str:
    """SHA-256 of settings in JSON, of name, type, shape and bytes of tensors in their order, and of
    a head; what is no tensor is passed over."""
    digest = hashlib.sha256()
    digest.update(json.dumps(settings, sort_keys=True).encode())
    if head is not None:
        flags = [head.normalize_weight, head.normalize_features, head.scale]
        digest.update(json.dumps(["head", *flags]).encode())
        tensors = {**tensors, "head.weight": head.weight, "head.bias": head.bias}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
