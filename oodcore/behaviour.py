"""Behaviour: what decides what a model gives for a batch, as a text to hash."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from oodcore.extractor import FeatureModel
from oodcore.features import Head

_OWN_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module carries with it, whatever it computes."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")})
_PLAIN = (type(None), bool, int, str)


class Behaviour:
    """Models and values in words that differ wherever one can see that they act differently.

    A module is told by class, weights, buffers (those that are not saved too), attributes, hooks,
    and the code of its classes with the functions of their modules that it calls by name. Of an
    installed package the version stands for the code. Other objects are told by their class and
    their plain attributes alone, generators by their seed.

    A model is told by its fingerprint, its modules, its head, its layers and the models inside it.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        """Every tensor that was told of."""
        self._told: dict[Any, int] = {}
        self._alive: list[Any] = []
        self._open: set[int] = set()

    def text(self, value: Any) -> str:
        """A value as JSON."""
        return json.dumps(self.of(value), sort_keys=True, separators=(",", ":"))

    def of(self, value: Any) -> Any:
        """A value as plain lists, mappings, texts and numbers."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, list | tuple | set | frozenset | Mapping):
            return self._holder(value)
        if isinstance(value, Tensor):
            return self._once(_place(value), value, self._tensor)
        if isinstance(value, np.ndarray):
            inside = self.of(value.tolist()) if value.dtype.hasobject else _sha256(value.tobytes())
            return [str(value.dtype), list(value.shape), inside]
        if isinstance(value, float | complex | bytes | np.generic | torch.dtype | torch.device):
            return repr(value)
        if isinstance(value, type):
            return _name(value)
        if isinstance(value, Enum):
            return [_name(type(value)), value.name]
        if isinstance(value, torch.Generator):
            return value.initial_seed()
        return self._once(id(value), value, self._thing)

    def _holder(self, value: Any) -> Any:
        """Lists, mappings and sets, which may hold themselves."""
        if id(value) in self._open:
            return {"around": type(value).__name__}
        self._open.add(id(value))
        try:
            if isinstance(value, list | tuple):
                return [self.of(item) for item in value]
            if isinstance(value, Mapping):
                pairs = [[self.of(key), self.of(item)] for key, item in value.items()]
                return {"pairs": sorted(pairs, key=lambda pair: json.dumps(pair[0]))}
            return {"set": sorted(json.dumps(self.of(item)) for item in value)}
        finally:
            self._open.remove(id(value))

    def _once(self, place: Any, value: Any, tell: Any) -> Any:
        """What there is to tell of a value, or that it was told before; so circles end."""
        if place in self._told:
            return {"again": self._told[place]}
        self._told[place] = len(self._told)
        self._alive.append(value)
        return tell(value)

    def _tensor(self, value: Tensor) -> Any:
        if value.is_meta:
            return [str(value.dtype), list(value.shape)]
        self.tensors.append(value)
        flat = value.detach()
        if flat.is_quantized:
            flat = flat.dequantize()
        if flat.layout != torch.strided:
            flat = flat.to_dense()
        flat = flat.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        digest = _sha256(flat.view(torch.uint8).numpy().data)
        return [str(value.dtype), list(value.shape), digest]

    def _thing(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, FeatureModel):
            # Not all attributes: what a model counts and remembers says nothing of what it gives.
            about = {name: part for name, part in vars(value).items() if _is_telling(part)}
            told = [value.fingerprint(), sorted(value.layers), value.modules, about]
            return [_name(type(value)), self._class(type(value)), self.of(told)]
        if isinstance(value, BaseModel):
            return [_name(type(value)), value.model_dump(mode="json")]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return [self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, BuiltinFunctionType):
            return value.__qualname__
        if is_dataclass(value):
            about = {field.name: getattr(value, field.name, None) for field in fields(value)}
            return [_name(type(value)), self.of(about)]
        about = {name: part for name, part in _attributes(value) if _is_plain(part)}
        return [_name(type(value)), self._class(type(value)), self.of(about)]

    def _module(self, module: nn.Module) -> Any:
        written = getattr(module, "code", None)
        return {
            "class": [_name(type(module)), self._class(type(module))],
            # A scripted or traced module has its code as a text of its own.
            "code": written if isinstance(written, str) else None,
            "settings": self.of(
                {name: part for name, part in vars(module).items() if name not in _OWN_OF_TORCH}
            ),
            "state": self.of([dict(module._parameters), dict(module._buffers)]),
            # Packed weights of quantized modules are seen here alone.
            "saved": self.of(dict(module.state_dict())) if not self._inside(module) else None,
            "parts": self.of([[name, part] for name, part in module._modules.items()]),
            "hooks": self.of([list(getattr(module, name).values()) for name in _HOOKS]),
        }

    def _inside(self, module: nn.Module) -> bool:
        """Whether a module is part of one that was told of; else it is marked as the outermost."""
        inside = ("within", id(module)) in self._told
        for part in module.modules():
            self._told.setdefault(("within", id(part)), -1)
        return inside

    def _class(self, cls: type) -> Any:
        """The code of a class and of those it inherits from."""
        if ("class", cls) in self._told:
            return self._told["class", cls]
        self._told["class", cls] = len(self._told)
        return [
            [_name(one), _version(one.__module__) or self._members(one)]
            for one in cls.__mro__
            if one.__module__ not in ("builtins", "abc", "typing")
        ]

    def _members(self, cls: type) -> Any:
        """The functions of a class and its plain attributes; Python adds others as it goes."""
        told = {}
        for name, part in sorted(vars(cls).items()):
            part = getattr(part, "__func__", getattr(part, "fget", part))
            if isinstance(part, FunctionType) or (_is_constant(part) and not name.startswith("__")):
                told[name] = self.of(part)
        return told

    def _function(self, function: FunctionType) -> Any:
        if (version := _version(function.__module__)) is not None:
            return [function.__module__, function.__qualname__, version]
        return {
            "code": self._code(function.__code__),
            "defaults": self.of([function.__defaults__, function.__kwdefaults__]),
            "around": [self.of(cell) for cell in _cells(function)],
            "wraps": self.of(getattr(function, "__wrapped__", None)),
            "calls": {
                name: self.of(function.__globals__[name])
                for name in sorted(set(_names(function.__code__)))
                if isinstance(part := function.__globals__.get(name), FunctionType)
                or (part is not None and _is_constant(part))
            },
        }

    def _code(self, code: CodeType) -> Any:
        consts = [
            self._code(part) if isinstance(part, CodeType) else self.of(part)
            for part in code.co_consts
        ]
        return [_sha256(code.co_code), consts, list(code.co_names), list(code.co_varnames)]


def _names(code: CodeType) -> Iterator[str]:
    """The names that some code looks up, in the functions inside it too."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names(part)


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            yield "empty"


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()


def _is_plain(value: Any, depth: int = 8) -> bool:
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return depth > 0 and all(_is_plain(part, depth - 1) for part in value)
    return isinstance(value, (*_PLAIN, float, complex, bytes, torch.dtype, torch.device))


def _is_constant(value: Any) -> bool:
    """Whether it stays what it is; lists and mappings of modules and classes often are memories."""
    if isinstance(value, tuple | frozenset):
        return all(map(_is_constant, value))
    return not isinstance(value, list | set | Mapping) and _is_plain(value)


def _is_telling(value: Any) -> bool:
    """Whether an attribute of a model says which head it has, or is a model inside it."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_telling(part) for part in value.values())
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_telling, value))
    return isinstance(value, FeatureModel | Head | BaseModel | str)


def _place(value: Tensor) -> Any:
    """Equal for tensors that show the same numbers in the same memory."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return id(value)
    form = (value.dtype, tuple(value.shape), value.stride(), value.is_conj(), value.is_neg())
    return (value.data_ptr(), value.device, *form) if value.numel() else id(value)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _version(module: str) -> str | None:
    """The version of the installed package that a module belongs to; None for code of one's own."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    if not file.startswith(_INSTALLED):
        return None
    top = sys.modules.get(module.partition(".")[0])
    return str(getattr(top, "__version__", sys.version))


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
