"""ModuleModel: a ``torch.nn.Module`` as a function from inputs to Features."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from oodcore.capture import Call, Firing, evaluating, lock_of, submodule, unwrapped
from oodcore.data import Batch, to_device
from oodcore.discovery import candidates, find_head, head_of, main, reproduces
from oodcore.errors import ConfigurationError, DataError, OodcoreError
from oodcore.extractor import Edit, FeatureModel, fingerprint_of
from oodcore.features import Features, Head, required
from oodcore.inputs import cast, each, form, readable, written
from oodcore.preprocess import Preprocess

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)
"""What a module raises on inputs that it is not made for."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class _Memory:
    """What all models of one wrapping know; guarded by the module's lock."""

    head: str | None = None
    writes: bool | None = None
    rows: int = 0


class ModuleModel(FeatureModel):
    """Any ``torch.nn.Module`` as a function from inputs to Features; made by ``FeatureModel.wrap``.

    The module runs in evaluation mode and is left as it was: no hook stays, each submodule gets its
    own mode back, weights and buffers are not touched. Several threads may use it at once; their
    batches take turns. Whether gradients are recorded is up to the caller.

    Args:
        module: the model, out of its compiled or parallel wrapper.
        head: "auto", the name of a submodule, a Head, or None.
        preprocess: what inputs go through first, or None.
    """

    def __init__(
        self, module: nn.Module, head: str | Head | None, preprocess: Preprocess | None
    ) -> None:
        super().__init__(type(module).__name__)
        self.module = module
        self.head = head
        self.preprocess = preprocess
        self._memory = _Memory()

    def __repr__(self) -> str:
        head = "Head(...)" if isinstance(self.head, Head) else repr(self.head)
        return f"FeatureModel({self.title}, head={head}, layers={self.layers})"

    def _capture(self) -> None:
        for name in self.layers:
            submodule(self.module, name)

    def prepared(self, inputs: Any) -> Any:
        inputs = to_device(readable(inputs), self.device)
        inputs = inputs if self.preprocess is None else self.preprocess(inputs)
        return cast(inputs, self._dtype)

    def to(self, device: torch.device | str) -> ModuleModel:
        with lock_of(self.module):
            self.module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter is; the CPU if it has none."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def gives(self) -> frozenset[str]:
        if self.head is None:
            return frozenset({"embeddings", "inputs"})
        return frozenset({"embeddings", "logits", "head", "inputs"})

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    @property
    def rows_seen(self) -> int:
        return self._memory.rows

    def identity(self) -> tuple[Any, ...]:
        head = id(self.head) if isinstance(self.head, Head) else self.head
        return id(self.module), head, self.preprocess

    def fingerprint(self) -> str:
        settings = None if self.preprocess is None else self.preprocess.model_dump(mode="json")
        head = self.head if isinstance(self.head, Head) else None
        return fingerprint_of(settings, self.module.state_dict(), head)

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

    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        inputs = cast(to_device(readable(inputs), self.device), self._dtype)
        with lock_of(self.module):
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
                rerun=self.rerun,
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
        sent = inputs if writes is False else each(inputs, torch.clone)
        try:
            output = call.run(sent)
        except (OodcoreError, torch.cuda.OutOfMemoryError):
            raise
        except _FAILURES as error:
            told = (str(error) or repr(error)).strip().splitlines()[0][:300]
            raise DataError(
                f"{self.title} fails on inputs {form(inputs)}: {told}; check the size and the "
                "channels of the data, and what 'preprocess' makes of them"
            ) from error
        if writes is None:
            self._memory.writes = written(sent)
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


def wrapped(
    module: nn.Module, head: str | Head | None, layers: Iterable[str], preprocess: Preprocess | None
) -> ModuleModel:
    """A module in memory as a model; arguments and errors as of ``FeatureModel.wrap``."""
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
        with lock_of(module), evaluating(module.modules()):
            head_of(submodule(module, head), head)
    return ModuleModel(module, head, preprocess).with_layers(layers)


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
