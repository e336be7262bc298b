"""Inputs: what a model may be given, and how it is read, moved and cast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodcore.errors import DataError


def readable(inputs: Any) -> Any:
    """Inputs as tensors, mappings of tensors or a list of texts.

    Raises:
        DataError: they are none of these.
    """
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc":
        return torch.from_numpy(np.require(inputs, requirements=["C", "W"]))
    if isinstance(inputs, Mapping) and inputs:
        if all(isinstance(value, Tensor | np.ndarray) for value in inputs.values()):
            return {name: readable(value) for name, value in inputs.items()}
    elif isinstance(inputs, list | tuple) and all(isinstance(text, str) for text in inputs):
        return list(inputs)
    raise DataError(
        f"a model takes a tensor, a mapping of names to tensors, or a list of texts, not "
        f"{_described(inputs)}"
    )


def each(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs whose tensors have been changed; texts stay."""
    if isinstance(inputs, Mapping):
        return {name: change(value) for name, value in inputs.items()}
    return change(inputs) if isinstance(inputs, Tensor) else list(inputs)


def cast(inputs: Any, dtype: torch.dtype | None) -> Any:
    """Inputs with their floating numbers in a type; None leaves them."""

    def changed(value: Tensor) -> Tensor:
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return each(inputs, changed)


def written(copies: Any) -> bool | None:
    """Whether a module wrote to fresh copies of its inputs; None where torch keeps no count."""
    values = copies.values() if isinstance(copies, Mapping) else [copies]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(value.is_inference() for value in tensors):
        return None
    return any(value._version > 0 for value in tensors)


def form(inputs: Any) -> str:
    """The shape of readable inputs, for messages."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {form(value)}" for name, value in inputs.items())
    if isinstance(inputs, Tensor):
        return f"{list(inputs.shape)} ({str(inputs.dtype).removeprefix('torch.')})"
    return f"{len(inputs)} texts"


def _described(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        types = ", ".join(f"{name}: {type(value).__name__}" for name, value in inputs.items())
        return f"a mapping of {types or 'nothing'}"
    if isinstance(inputs, np.ndarray):
        return f"an array of {inputs.dtype}"
    if isinstance(inputs, list | tuple) and inputs:
        return f"a {type(inputs).__name__} of {type(inputs[0]).__name__}"
    return f"a {type(inputs).__name__}"
