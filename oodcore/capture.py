"""Capture: what flows through the layers of a module in one call."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from oodcore.component import suggestion
from oodcore.errors import ConfigurationError

Change = Callable[[Tensor], Tensor]

_LISTED = 16
_RUNNING = threading.local()
_EAGER = threading.RLock()


@dataclass(frozen=True)
class Firing:
    """One run of a module that may be the head.

    The tensors are kept only where each input has one row; ``shape`` is that of the embeddings,
    ``output`` the very object that the module gave, ``logits`` a copy of it.
    """

    shape: tuple[int, ...]
    embeddings: Tensor | None = None
    output: Tensor | None = None
    logits: Tensor | None = None


class Call:
    """One call of a module: hooks for its length, and what they caught, in this thread alone.

    What is caught is on the way to what comes after it, so that gradients reach it, and it is a
    copy, so that what the module changes in place does not.

    Args:
        rows: how many inputs there are.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.heads: dict[str, list[Firing]] = defaultdict(list)
        self._layers: dict[str, list[Tensor]] = defaultdict(list)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def watch_layer(self, name: str, part: nn.Module, change: Change | None = None) -> None:
        """Capture a submodule's output, after ``change`` where that is given."""

        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            if not self._running:
                return None
            kept = _activation(name, output)
            if change is not None:
                kept = change(kept)
                if not isinstance(kept, Tensor):
                    raise ConfigurationError(
                        f"the edit of layer '{name}' gave a {type(kept).__name__}, not a tensor"
                    )
            kept = kept.clone()
            self._layers[name].append(kept)
            onwards = change is not None or kept.requires_grad
            return _with_activation(output, kept.clone()) if onwards else None

        self._handles.append(part.register_forward_hook(hook))

    def watch_head(self, name: str, part: nn.Module) -> None:
        """Capture a submodule's input and output, where each input has one row of them."""
        entered: list[tuple[tuple[int, ...], Tensor | None]] = []

        def before(part: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not self._running:
                return None
            rows = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(rows, Tensor):
                entered.append(((), None))
                return None
            if not self._one_each(rows):
                entered.append((tuple(rows.shape), None))
                return None
            rows = rows.clone()
            entered.append((tuple(rows.shape), rows))
            if args:
                return (rows, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): rows}

        def after(part: nn.Module, args: Any, output: Any) -> None:
            if not self._running:
                return
            shape, rows = entered.pop()
            if rows is None or not isinstance(output, Tensor) or not self._one_each(output):
                self.heads[name].append(Firing(shape))
            else:
                self.heads[name].append(Firing(shape, rows, output, output.clone()))

        self._handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(part.register_forward_hook(after))

    def run(self, module: nn.Module, inputs: Any) -> Any:
        """The module's output for the inputs; a mapping's entries are its keyword arguments."""
        outer = getattr(_RUNNING, "call", None)
        with _evaluating(module), _eager(module):
            _RUNNING.call = self
            try:
                if isinstance(inputs, Mapping):
                    return module(**inputs)
                return module(inputs)
            finally:
                _RUNNING.call = outer

    def layer(self, name: str) -> Tensor:
        """What a watched layer gave.

        Raises:
            ConfigurationError: it ran not at all, or more than once.
        """
        _once(f"layer '{name}'", len(self._layers[name]))
        return self._layers[name][0]

    def head(self, name: str) -> Firing:
        """What a watched head was given and gave; ``embeddings`` and ``logits`` are there.

        Raises:
            ConfigurationError: it ran not at all or more than once, or not on ``[N, D]``.
        """
        _once(f"the head '{name}'", len(self.heads[name]))
        firing = self.heads[name][0]
        if len(firing.shape) != 2 or firing.embeddings is None:
            raise ConfigurationError(
                f"the input of the head '{name}' is {list(firing.shape)} for {self.rows} inputs, "
                "and embeddings are [N, D]; name a head behind the pooling, or wrap the model in a "
                "module that pools or flattens"
            )
        return firing

    @property
    def _running(self) -> bool:
        return getattr(_RUNNING, "call", None) is self

    def _one_each(self, rows: Tensor) -> bool:
        return rows.ndim > 1 and rows.shape[0] == self.rows and rows[:1].numel() == rows.shape[-1]


def unwrapped(module: nn.Module) -> nn.Module:
    """A module out of ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def submodule(module: nn.Module, name: str) -> nn.Module:
    """The submodule of a name, as in ``named_modules()``.

    Raises:
        ConfigurationError: there is none; the message says which there are.
    """
    if name == "":
        return module
    try:
        return module.get_submodule(name)
    except AttributeError:
        known = [known for known, _ in module.named_modules(remove_duplicate=False) if known]
        near = suggestion(name, known)
        raise ConfigurationError(
            f"{type(module).__name__} has no layer '{name}'{near or ';'} there are: {listed(known)}"
        ) from None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each submodule's own mode again.

    Only the flag is set: ``eval()`` may be overridden to do more, such as merging weights.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, training in modes:
            if training:
                part.training = False
        yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.training = training


@contextmanager
def _eager(module: nn.Module) -> Iterator[None]:
    """Compiled submodules run as they were written, for compiled code passes hooks by.

    How torch runs compiled code is a setting of the whole process, hence one lock.
    """
    compiled = any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
    if not compiled or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with _EAGER, torch.compiler.set_stance("force_eager"):
        yield


def _once(what: str, times: int) -> None:
    if times == 0:
        raise ConfigurationError(
            f"{what} did not run: the model does not call it for these inputs, or hooks do not see "
            "it (its weights are used directly, or it is in a scripted part); name another"
        )
    if times > 1:
        raise ConfigurationError(
            f"{what} ran {times} times in one call of the model, so it has no single activation; "
            "name a layer that runs once"
        )


def _activation(name: str, output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise ConfigurationError(
            f"layer '{name}' gives a {type(output).__name__}, not a tensor or a tuple with one "
            "first; name a layer inside it"
        )
    return first


def _with_activation(output: Any, activation: Tensor) -> Any:
    if isinstance(output, Tensor):
        return activation
    parts = [activation, *output[1:]]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def listed(items: list[str]) -> str:
    """Items with commas between; of a long list the last ones, which are nearest the output."""
    shown = items[-_LISTED:]
    return ", ".join(["..."] * (len(shown) < len(items)) + shown)
