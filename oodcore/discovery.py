"""Discovery: which layer of a model is its classifier head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodcore.capture import Call, Firing, listed, submodule
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Head

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far recomputed logits may be off, as a share of the largest."""


def head_of(part: nn.Module, name: str = "") -> Head:
    """The head that a module is, its weights as they are at this moment.

    That is its attribute ``head``, if it is a ``Head``; else weight and bias of a linear layer.

    Raises:
        ConfigurationError: it is neither.
    """
    declared = getattr(part, "head", None)
    if isinstance(declared, Head):
        return declared
    if isinstance(part, nn.Linear):
        return Head(part.weight, part.bias)
    raise ConfigurationError(
        f"a {type(part).__name__} is no linear layer, nor has it an attribute 'head' that is an "
        f"oodcore.Head, so '{name}' cannot be the head; the linear layers in it: "
        f"{_linear(part, name) or 'none'}"
    )


def candidates(module: nn.Module) -> dict[str, nn.Module]:
    """The submodules that could be the head, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) or isinstance(getattr(part, "head", None), Head)
    }


def reproduces(part: nn.Module, firing: Firing) -> bool:
    """Whether a module's head makes of its embeddings the logits that it gave, up to rounding."""
    head, rows, logits = head_of(part), firing.embeddings, firing.logits
    if rows is None or logits is None or rows.ndim != 2 or rows.shape[1] != head.weight.shape[1]:
        return False
    types = (rows.dtype, head.weight.dtype, logits.dtype)
    with torch.no_grad():
        rows = rows.to(head.weight.dtype)
        plain = not head.normalize_weight and not head.normalize_features and head.scale == 1.0
        again = F.linear(rows, head.weight, head.bias) if plain else head(rows)
        if again.shape != logits.shape:
            return False
        finite = logits[torch.isfinite(logits)].abs()
        size = float(finite.max()) if finite.numel() else 0.0
        return _close(again, logits, size * max(_TOLERANCE.get(kind, 1e-2) for kind in types))


def find_head(call: Call, output: Any) -> str:
    """The name of the watched part whose output is the module's, and whose head explains it.

    Raises:
        ConfigurationError: there is none, or more than one; the message lists the linear layers.
    """
    module, result = call.module, main(output)
    near = [
        (name, firing)
        for name, firings in call.heads.items()
        for firing in firings
        if firing.logits is not None and _same(firing.logits, result)
    ]
    near = [pair for pair in near if pair[1].output is result] or near
    parts = {name: submodule(module, name) for name, _ in near}
    exact = [name for name, firing in near if reproduces(parts[name], firing)]
    declared = [name for name in exact if isinstance(getattr(parts[name], "head", None), Head)]
    names = declared[:1] or list(dict.fromkeys(exact))
    if len(names) == 1:
        return names[0]
    cure = (
        "Name the layer whose inputs are the embeddings, as in head='classifier.fc'; for a model "
        "that gives embeddings, give an oodcore.Head, or head=None to do without logits."
    )
    layers = _linear(module) or "none"
    cure = f"The linear layers, [outputs, inputs]: {layers}. {cure}"
    if names:
        raise ConfigurationError(
            f"several layers give the output of {type(module).__name__}: {', '.join(names)}. {cure}"
        )
    if near:
        name, firing = near[0]
        raise ConfigurationError(
            f"'{name}' gives the output of {type(module).__name__}, but its input is "
            f"{list(firing.taken)}, or its output is not weight @ input + bias, so it is no head "
            f"for embeddings [N, D]. {cure}"
        )
    raise ConfigurationError(
        f"cannot find the head of {type(module).__name__}: no linear layer's output is the model's "
        f"output {list(result.shape)} for {call.rows} inputs. {cure}"
    )


def main(output: Any) -> Tensor:
    """The tensor that a model's output stands for: itself, its ``logits``, or its first part.

    Raises:
        DataError: there is no such tensor.
    """
    if isinstance(output, Mapping) and "logits" in output:
        result = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        result = output.logits
    elif isinstance(output, tuple | list) and output:
        result = output[0]
    else:
        result = output
    if not isinstance(result, Tensor):
        raise DataError(
            f"the model's output is a {type(output).__name__}: neither a tensor, nor something "
            "with 'logits', nor a tuple with a tensor first; wrap the model in a module that gives "
            "one"
        )
    return result


def _same(logits: Tensor, result: Tensor) -> bool:
    """Whether the result is these logits: the same numbers after a view or a cast."""
    if logits.numel() != result.numel() or logits.shape[:1] != result.shape[:1]:
        return False
    return _close(logits.detach().reshape(result.shape).to(result.dtype), result.detach(), 0.0)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.allclose(a.to(b.device, b.dtype), b, rtol=0.0, atol=tolerance, equal_nan=True)


def _linear(module: nn.Module, prefix: str = "") -> str:
    layers = [
        f"{'.'.join(filter(None, (prefix, name))) or 'the model itself'} "
        f"[{part.out_features}, {part.in_features}]"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    return listed(layers)
