"""Factories: the importable code that a configuration may name, and the networks it builds."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import (
    AfterValidator,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from safetensors.torch import load_file
from torch import Tensor, nn

from oodcore.errors import ConfigurationError

IMPORTABLE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"


def _importable(name: str) -> str:
    if not re.fullmatch(IMPORTABLE, name):
        raise PydanticCustomError(
            "not_importable",
            "write it as 'package.module:name', not {given}",
            {"given": repr(name)},
        )
    return name


Importable = Annotated[
    str,
    AfterValidator(_importable),
    WithJsonSchema({"type": "string", "pattern": IMPORTABLE}),
]
"""A field that names code: ``package.module:name``."""


class Arguments(Mapping[str, Any]):
    """Keyword arguments of a factory, as a configuration writes them: a frozen mapping.

    Values are None, bool, int, finite float, text, and tuples of these; lists become tuples, and
    numbers keep their type. Two are equal if they are the same text in JSON.

    Raises:
        ValueError: another kind of value, or a name that is no identifier.
    """

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        self._values = {_name(name): _frozen(name, value) for name, value in (values or {}).items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Arguments) and self._text() == other._text()

    def __hash__(self) -> int:
        return hash(self._text())

    def __repr__(self) -> str:
        return f"Arguments({self._values!r})"

    def _text(self) -> str:
        return json.dumps(self._values, sort_keys=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated,
            serialization=core_schema.plain_serializer_function_ser_schema(dict),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": True}

    @classmethod
    def _validated(cls, value: Any) -> Arguments:
        if isinstance(value, Arguments):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "not_arguments", "write arguments as a mapping of names to values"
            )
        return cls(value)


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise PydanticCustomError(
            "not_a_name", "{name} cannot be the name of an argument", {"name": repr(name)}
        )
    return str(name)


def _frozen(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(name, item) for item in value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("not_finite", "{name} is not finite", {"name": name})
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if value is None:
        return None
    raise PydanticCustomError(
        "not_an_argument",
        "{name} is a {given}; an argument is a number, text, true, false, null or a list of these",
        {"name": name, "given": type(value).__name__},
    )


def imported(name: str) -> Any:
    """What ``package.module:name`` stands for. Importing runs the module's code.

    Raises:
        ConfigurationError: ill-formed, the module cannot be imported, or it has no such name.
    """
    if not re.fullmatch(IMPORTABLE, name):
        raise ConfigurationError(f"write importable code as 'package.module:name', not {name!r}")
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"cannot import '{name}': {error}; is it installed, or its folder on PYTHONPATH?"
        ) from error
    except Exception as error:
        raise ConfigurationError(f"cannot import '{name}': {error!r}") from error
    if not hasattr(found, attribute):
        raise ConfigurationError(f"cannot import '{name}': '{module}' has no '{attribute}'")
    return getattr(found, attribute)


def built(name: str, arguments: Mapping[str, Any]) -> Any:
    """What the factory ``package.module:name`` gives for these keyword arguments.

    Raises:
        ConfigurationError: it cannot be imported or called, or does not take these arguments. What
            the factory itself raises goes through.
    """
    factory = imported(name)
    if not callable(factory):
        raise ConfigurationError(f"'{name}' is a {type(factory).__name__}, not a function")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some functions written in C tell nobody what they take
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigurationError(
                f"'{name}' cannot be called with {dict(arguments)}: {error}; it takes {signature}"
            ) from None
    return factory(**arguments)


def network(name: str, arguments: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """The network that a factory gives, its random weights drawn from ``seed``.

    The global random generator is the same afterwards as before.

    Raises:
        ConfigurationError: as ``built``, or the factory gives no ``nn.Module``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        module = built(name, arguments)
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"'{name}' gave a {type(module).__name__}, and a torch.nn.Module is needed"
        )
    return module


def settled(name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments for which a factory gives a network like that of these, with nothing on the disk.

    A factory whose arguments name files has a function ``settled`` of the same arguments as its
    attribute. None for any other, whose arguments are settled as they are.

    Raises:
        ConfigurationError: as ``imported``. What that function raises goes through.
    """
    settle = getattr(imported(name), "settled", None)
    return None if settle is None else dict(settle(**arguments))


def load_weights(module: nn.Module, path: Path) -> None:
    """Give a module the weights in a file, all of them, without running any code in it.

    The file is a ``.safetensors``, or a torch checkpoint (read with ``weights_only=True``): a state
    dict, or a mapping with one as its ``state_dict``. Of weights that a module shares between
    layers, one name is enough.

    Raises:
        ConfigurationError: no such file, not readable in this way, or names or shapes that are not
            the module's.
    """
    state = _state_dict(path)
    own = module.state_dict()
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigurationError(
            f"the weights in {path} do not fit {type(module).__name__}: {error}"
        ) from None
    given = {_place(own[name]) for name in state if name in own}
    missing = [name for name in missing if _place(own[name]) not in given]
    if missing or unexpected:
        faults = [
            f"{what} {_names(names)}"
            for what, names in (("it lacks", missing), ("it has unknown", unexpected))
            if names
        ]
        prefix = next((p for p in ("module.", "_orig_mod.") if _all_start(unexpected, p)), None)
        cure = (
            f"; save the state dict of the unwrapped module, without '{prefix}'" if prefix else ""
        )
        raise ConfigurationError(
            f"the weights in {path} do not fit {type(module).__name__}: {'; '.join(faults)}{cure}"
        )


def _state_dict(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"there is no file of weights {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(
            f"the weights in {path} cannot be read without running code from the file: {error}; "
            "save the state dict as safetensors"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ConfigurationError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def _place(value: Any) -> tuple[Any, ...]:
    """What two names of one tensor have in common."""
    if not isinstance(value, Tensor) or not value.numel():
        return (id(value),)
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, and {len(names) - 8} more" if len(names) > 8 else shown


def _all_start(names: list[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)
