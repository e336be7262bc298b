"""Capture: what flows through the layers of a module in one call."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from oodcore.component import suggestion
from oodcore.errors import ConfigurationError

Change = Callable[[Tensor], Tensor]

_LISTED = 16
_RUNNING = threading.local()
_EAGER = threading.RLock()
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


@dataclass(frozen=True)
class Firing:
    """One run of a module that may be the head.

    The tensors are kept only where each input has one row; ``taken`` and ``given`` are the shapes
    of the embeddings and logits, ``output`` is the very object that the module gave, ``logits`` a
    copy of it.
    """

    taken: tuple[int, ...]
    given: tuple[int, ...]
    embeddings: Tensor | None = None
    output: Tensor | None = None
    logits: Tensor | None = None


class Call:
    """One call of a module: hooks, and what they caught, in this thread alone.

    For the length of a with-block the module is in evaluation mode; afterwards hooks are off and
    modes are back. What is caught is on the way to what comes after it, so that gradients reach it,
    and it is a copy, so that what the module changes in place does not.

    Args:
        module: what is called.
        rows: how many inputs there are.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        self.module = module
        self.rows = rows
        self.heads: dict[str, list[Firing]] = defaultdict(list)
        self._layers: dict[str, list[Tensor]] = defaultdict(list)
        self._parts = list(module.modules())
        self._exit = ExitStack()

    def __enter__(self) -> Call:
        self._exit.enter_context(evaluating(self._parts))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

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

        self._exit.callback(part.register_forward_hook(hook).remove)

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
            taken, rows = entered.pop()
            given = tuple(output.shape) if isinstance(output, Tensor) else ()
            if rows is None or not given or not self._one_each(output):
                self.heads[name].append(Firing(taken, given))
            else:
                self.heads[name].append(Firing(taken, given, rows, output, output.clone()))

        self._exit.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._exit.callback(part.register_forward_hook(after).remove)

    def run(self, inputs: Any) -> Any:
        """The module's output for the inputs; a mapping's entries are its keyword arguments."""
        outer = getattr(_RUNNING, "call", None)
        with _eager(self._parts):
            _RUNNING.call = self
            try:
                if isinstance(inputs, Mapping):
                    return self.module(**inputs)
                return self.module(inputs)
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
        if len(firing.taken) != 2 or len(firing.given) != 2 or firing.embeddings is None:
            raise ConfigurationError(
                f"the head '{name}' takes {list(firing.taken)} and gives {list(firing.given)} for "
                f"{self.rows} inputs, and embeddings are [N, D], logits [N, K]; name a head behind "
                "the pooling, or wrap the model in a module that pools or flattens"
            )
        return firing

    @property
    def _running(self) -> bool:
        return getattr(_RUNNING, "call", None) is self

    def _one_each(self, rows: Tensor) -> bool:
        return (
            rows.ndim > 1
            and rows.shape[0] == self.rows
            and rows.shape[1:].numel() == rows.shape[-1]
        )


def lock_of(module: nn.Module) -> threading.RLock:
    """The one lock of a module, whatever wraps it; a call may hold it and call again."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


@contextmanager
def locked(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Nobody else's batch runs through these modules, nor reads them, for a with-block."""
    with ExitStack() as stack:
        # One order for all callers: two that want the same modules cannot wait for each other.
        for module in sorted(dict.fromkeys(modules), key=id):
            stack.enter_context(lock_of(module))
        yield


def unwrapped(module: nn.Module) -> nn.Module:
    """A module out of ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
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
def evaluating(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode for a module's parts, and afterwards each one's own mode again.

    Only the flag is set: ``eval()`` may be overridden to do more, such as merging weights. Weights
    too are read in this mode: what computes them may update buffers in training.
    """
    modes = [(part, part.training) for part in parts]
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
def _eager(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Compiled submodules run as they were written, for compiled code passes hooks by.

    How torch runs compiled code is a setting of the whole process, hence one lock.
    """
    compiled = any(
        "_orig_mod" in part._modules or getattr(part, "_compiled_call_impl", None) is not None
        for part in parts
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
