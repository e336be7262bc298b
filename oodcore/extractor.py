"""Extractor and FeatureModel: from inputs to Features."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from oodcore.capture import Call, Firing, evaluating, submodule, unwrapped
from oodcore.component import Component
from oodcore.data import Batch, to_device
from oodcore.discovery import candidates, find_head, head_of, main, reproduces
from oodcore.errors import ConfigurationError, DataError
from oodcore.factory import imported
from oodcore.features import Features, Head, required
from oodcore.preprocess import Preprocess

__all__ = ["Edit", "Extractor", "FeatureModel", "head_of", "imported"]

Edit = Mapping[str, Callable[[Tensor], Tensor]]
"""Layer name to what becomes of its activation on the way."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


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


@dataclass
class _Memory:
    """What all FeatureModels of one wrapping know; guarded by the module's lock."""

    head: str | None = None
    writes: bool | None = None
    rows: int = 0


class FeatureModel:
    """Any ``torch.nn.Module`` as a function from inputs to Features; made by ``wrap``.

    The module runs in evaluation mode and is left as it was: no hook stays, each submodule gets its
    own mode back, weights and buffers are not touched. Several threads may use it at once; their
    batches take turns. Whether gradients are recorded is up to the caller.

    Args:
        module: the model, out of its compiled or parallel wrapper.
        head: "auto", the name of a submodule, a Head, or None.
        layers: names of the submodules whose activations are captured.
        preprocess: what inputs go through first, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        head: str | Head | None,
        layers: tuple[str, ...],
        preprocess: Preprocess | None,
        memory: _Memory | None = None,
    ) -> None:
        self.module = module
        self.head = head
        self.layers = layers
        self.preprocess = preprocess
        self._memory = _Memory() if memory is None else memory

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        head: str | Head | None = "auto",
        layers: Iterable[str] = (),
        preprocess: Preprocess | None = None,
    ) -> FeatureModel:
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
        if not isinstance(module, nn.Module):
            raise ConfigurationError(
                f"a FeatureModel wraps a torch.nn.Module, not a {type(module).__name__}"
            )
        if not (head is None or isinstance(head, str | Head)):
            raise ConfigurationError(
                f"head is 'auto', the name of a submodule, an oodcore.Head or None, not a "
                f"{type(head).__name__}"
            )
        module = unwrapped(module)
        if isinstance(head, str) and head != "auto":
            with _lock(module), evaluating(module.modules()):
                head_of(submodule(module, head), head)
        return cls(module, head, (), preprocess).with_layers(layers)

    def __call__(self, inputs: Any, edit: Edit | None = None) -> Features:
        return self.forward(inputs, edit)

    def __repr__(self) -> str:
        head = "Head(...)" if isinstance(self.head, Head) else repr(self.head)
        return f"FeatureModel({type(self.module).__name__}, head={head}, layers={self.layers})"

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
            DataError: inputs that are none of these, or embeddings that are not ``[N, D]``.
        """
        inputs = to_device(_readable(inputs), self.device)
        return self._rerun(inputs if self.preprocess is None else self.preprocess(inputs), edit)

    def with_layers(self, names: Iterable[str]) -> FeatureModel:
        """The same model, capturing these layers too; head and ``rows_seen`` are shared.

        Raises:
            ConfigurationError: the module has no such submodule.
        """
        if isinstance(names, str):
            raise ConfigurationError(f"layers is a list of names, not the text {names!r}")
        layers = tuple(dict.fromkeys([*self.layers, *names]))
        for name in layers:
            submodule(self.module, name)
        return FeatureModel(self.module, self.head, layers, self.preprocess, self._memory)

    def to(self, device: torch.device | str) -> FeatureModel:
        """This model, its module moved to a device (in place, as torch does)."""
        with _lock(self.module):
            self.module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter is; the CPU if it has none."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def rows_seen(self) -> int:
        """How many rows went through the module so far, those of ``rerun`` among them."""
        return self._memory.rows

    def fingerprint(self) -> str:
        """SHA-256 of all weights and of the preprocessing, in hexadecimal.

        It covers name, type, shape and bytes of every parameter and buffer of the state dict, in
        its order, and does not depend on the device.
        """
        digest = hashlib.sha256()
        settings = None if self.preprocess is None else self.preprocess.model_dump(mode="json")
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, value in self.module.state_dict().items():
            if isinstance(value, Tensor):
                digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def head_name(self, inputs: Any) -> str:
        """The name of the submodule that is the head; "" for the module itself.

        It is found with these inputs, if it is not known already.

        Raises:
            ConfigurationError: there is no such submodule, or ``head`` is no name.
            DataError: the logits of these inputs are not finite, so they prove nothing.
        """
        if not isinstance(self.head, str):
            raise ConfigurationError("this model has no head among its submodules")
        if self._memory.head is None:
            with torch.no_grad():
                self.forward(inputs)
        if self._memory.head is None:
            raise DataError("the head cannot be found with logits that are not finite")
        return self._memory.head

    def _rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        inputs = _cast(to_device(_readable(inputs), self.device), self._dtype)
        with _lock(self.module):
            if edit and isinstance(self.head, str) and self._memory.head is None:
                self._extract(inputs, {})  # an edited call may hide what is the head
            return self._extract(inputs, edit or {})

    @property
    def _dtype(self) -> torch.dtype | None:
        types = (parameter.dtype for parameter in self.module.parameters())
        return next((dtype for dtype in types if dtype in _FLOATS), None)

    def _extract(self, inputs: Any, edit: Edit) -> Features:
        known = self._memory.head if self.head == "auto" else self.head
        names = tuple(dict.fromkeys([*self.layers, *edit]))
        with Call(self.module, len(Batch(inputs))) as call:
            for name in names:
                call.watch_layer(name, submodule(self.module, name), edit.get(name))
            if isinstance(known, str):
                call.watch_head(known, submodule(self.module, known))
            elif self.head == "auto":
                for name, part in candidates(self.module).items():
                    call.watch_head(name, part)
            output = self._run(call, inputs)
            activations = {name: call.layer(name) for name in names}
            return Features(
                **self._ends(call, output, known, remember=not edit),
                layers={name: activations[name] for name in self.layers},
                inputs=inputs,
                rerun=self._rerun,
            )

    def _ends(
        self, call: Call, output: Any, known: str | Head | None, remember: bool
    ) -> dict[str, Any]:
        """Embeddings, logits and head, as far as the model has them."""
        if not isinstance(self.head, str):
            return _encoded(main(output), self.head, call.rows)
        name = known if isinstance(known, str) else find_head(call, output)
        firing, part = call.head(name), submodule(self.module, name)
        if remember and self._memory.head is None:
            self._remember(name, part, firing)
        return {
            "embeddings": firing.embeddings,
            "logits": firing.logits,
            "head": _detached(head_of(part)),
        }

    def _run(self, call: Call, inputs: Any) -> Any:
        """The module's output; ``inputs`` stay what they are, whatever the module does to them."""
        writes = self._memory.writes
        sent = inputs if writes is False else _each(inputs, torch.clone)
        output = call.run(sent)
        if writes is None:
            self._memory.writes = _written(sent)
        self._memory.rows += call.rows
        return output

    def _remember(self, name: str, part: nn.Module, firing: Firing) -> None:
        if not reproduces(part, firing):
            raise ConfigurationError(
                f"the output of '{name}' is not weight @ input + bias, so it cannot be the head; "
                "give the module an attribute 'head' that is an oodcore.Head"
            )
        logits = required(firing.logits, "logits")
        if len(logits) and bool(torch.isfinite(logits).all()):
            self._memory.head = name


def _lock(module: nn.Module) -> threading.RLock:
    """The one lock of a module, whatever wraps it; a call may hold it and call again."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


def _encoded(embeddings: Tensor, head: Head | None, rows: int) -> dict[str, Any]:
    if embeddings.ndim != 2 or embeddings.shape[0] != rows:
        raise DataError(
            f"with head={'None' if head is None else 'Head(...)'} the model's output are the "
            f"embeddings [N, D], and it is {list(embeddings.shape)} for {rows} inputs; wrap the "
            "model in a module that pools or flattens"
        )
    if head is None:
        return {"embeddings": embeddings}
    dtype = torch.promote_types(head.weight.dtype, embeddings.dtype)
    head = _detached(head).to(embeddings.device, dtype)
    return {"embeddings": embeddings.to(dtype), "head": head}


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, weight=head.weight.detach(), bias=bias)


def _readable(inputs: Any) -> Any:
    """Inputs as tensors, mappings of tensors or a list of texts."""
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc":
        return torch.from_numpy(np.require(inputs, requirements=["C", "W"]))
    if isinstance(inputs, Mapping) and inputs:
        if all(isinstance(value, Tensor | np.ndarray) for value in inputs.values()):
            return {name: _readable(value) for name, value in inputs.items()}
    elif isinstance(inputs, list | tuple) and all(isinstance(text, str) for text in inputs):
        return list(inputs)
    raise DataError(
        f"a model takes a tensor, a mapping of names to tensors, or a list of texts, not "
        f"{_described(inputs)}"
    )


def _described(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        types = ", ".join(f"{name}: {type(value).__name__}" for name, value in inputs.items())
        return f"a mapping of {types or 'nothing'}"
    if isinstance(inputs, np.ndarray):
        return f"an array of {inputs.dtype}"
    if isinstance(inputs, list | tuple) and inputs:
        return f"a {type(inputs).__name__} of {type(inputs[0]).__name__}"
    return f"a {type(inputs).__name__}"


def _each(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return change(inputs) if isinstance(inputs, Tensor) else list(inputs)


def _cast(inputs: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return _each(inputs, cast)


def _written(copies: Any) -> bool | None:
    """Whether a module wrote to fresh copies of its inputs; None where torch keeps no count."""
    values = copies.values() if isinstance(copies, Mapping) else [copies]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(value.is_inference() for value in tensors):
        return None
    return any(value._version > 0 for value in tensors)
