"""What a check compares: every tensor inside a value, bit by bit or within a tolerance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oodcore.index import Index
from oodcore.rows import Rows

TOLERANCE = 1e-6
"""Relative; matrix products of other batch sizes are not bitwise the same."""

SAME = 1e-9
"""Relative; between runs that differ in nothing that should matter."""
TINY = 1e-12
"""What is left of numbers near 1 when they cancel, with room; nothing is more exact than that."""

Tensors = Mapping[str, Tensor]


def tensors(value: Any, at: str = "") -> dict[str, Tensor]:
    """Every tensor and number in features, states, views and modules, by its place."""
    if isinstance(value, Tensor):
        return {at: value.detach()}
    if isinstance(value, np.ndarray):
        return {at: torch.from_numpy(value)}
    if isinstance(value, Rows):
        return {at: value.tensor()}
    if isinstance(value, Index):
        return {at: value.rows.tensor()}
    if isinstance(value, bool | int | float):
        return {at: torch.tensor(value, dtype=torch.float64)}
    found: dict[str, Tensor] = {}
    for name, part in _inside(value):
        found.update(tensors(part, f"{at}.{name}" if at else name))
    return found


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, nn.Module):
        yield from value.state_dict().items()
    elif isinstance(value, Mapping):
        yield from ((str(name), part) for name, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(number), part) for number, part in enumerate(value))
    elif is_dataclass(value):
        yield from ((field.name, getattr(value, field.name)) for field in fields(value))


def copied(value: Any) -> dict[str, Tensor]:
    """The tensors inside a value, as they are at this moment."""
    return {name: tensor.clone() for name, tensor in tensors(value).items()}


def written(value: Any) -> dict[str, Tensor]:
    """How often torch wrote to each tensor inside: what changed nothing here may elsewhere."""
    return {
        name: torch.tensor(tensor._version)
        for name, tensor in tensors(value).items()
        if not tensor.is_inference()
    }


def changed(before: Tensors, after: Tensors) -> str | None:
    """Where two sets of tensors are not bit by bit the same, or None."""
    if before.keys() != after.keys():
        return ", ".join(sorted(before.keys() ^ after.keys()))
    for name, tensor in before.items():
        other = after[name]
        if tensor.dtype != other.dtype or tensor.shape != other.shape:
            return f"{name} ({_form(tensor)}, then {_form(other)})"
        # Bytes, for NaN is not equal to itself and 0.0 is equal to -0.0.
        if not torch.equal(_bytes(tensor), _bytes(other)):
            return name
    return None


def apart(a: Tensors, b: Tensors, tolerance: float = TOLERANCE) -> str | None:
    """Where numbers differ by more than a tolerance, in words, or None.

    The tolerance is relative to the number, to the median and, times a millionth, to the largest:
    what is left of a difference of large numbers is not exact.
    """
    if a.keys() != b.keys():
        return f"{', '.join(sorted(a.keys() ^ b.keys()))}: only in one of both"
    for name, left in a.items():
        right = b[name]
        if left.shape != right.shape:
            return f"{name or 'it'} is {list(left.shape)} and {list(right.shape)}"
        one, two = left.detach().cpu().double(), right.detach().cpu().double()
        if not one.numel():
            continue
        finite = two[torch.isfinite(two)].abs()
        usual = finite.median() + 1e-6 * finite.max() if finite.numel() else 0.0
        gap = (one - two).abs() > tolerance * (two.abs() + usual) + TINY
        wrong = (one != two) & (gap | ~torch.isfinite(one) | ~torch.isfinite(two))
        if bool(wrong.any()):
            place = [int(index) for index in wrong.nonzero()[0]]
            where = tuple(place)
            return f"{name or 'it'} at {place} is {one[where]:.8g} and {two[where]:.8g}"
    return None


def unfinite(values: Tensors) -> str | None:
    """The first place that is NaN or infinite, in words, or None."""
    for name, tensor in values.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            place = [int(index) for index in bad.nonzero()[0]]
            return f"{name or 'the score'} at {place} is {float(tensor[tuple(place)])}"
    return None


def ordered(view: Any) -> dict[str, Tensor]:
    """The tensors of a view; its Rows, which are as many, sorted together."""
    found = tensors(view)
    kept = [name for name, value in _rows(view) if isinstance(value, Rows | Index)]
    if not kept or len({len(found[name]) for name in kept}) > 1:
        return found
    columns = torch.cat([found[name].double().flatten(1) if found[name].ndim > 1
                         else found[name].double()[:, None] for name in kept], dim=1)  # fmt: skip
    order = torch.arange(len(columns))
    for column in reversed(range(columns.shape[1])):
        order = order[columns[order, column].argsort(stable=True)]
    return {name: value[order] if name in kept else value for name, value in found.items()}


def _rows(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Rows | Index):
        yield at, value
        return
    inside = value.items() if isinstance(value, dict) else getattr(value, "__dict__", {}).items()
    for name, part in inside:
        yield from _rows(part, f"{at}.{name}" if at else str(name))


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Within it, the global random generators are not to be drawn from or seeded.

    Raises:
        AssertionError: they were.
    """
    before = _generators()
    yield
    for name, (one, two) in zip(
        ("torch", "NumPy", "Python"), zip(before, _generators(), strict=True), strict=True
    ):
        if not one == two:
            raise AssertionError(
                f"it touches the global random generator of {name}; draw from a generator of its "
                "own, seeded by a field"
            )


@contextmanager
def other_seeds(seed: int = 9) -> Iterator[None]:
    """Within it, the global random generators stand elsewhere; afterwards as before."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _generators() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()
    numpy_state = (name, np.asarray(keys).tobytes(), *rest)
    return torch.get_rng_state().numpy().tobytes(), numpy_state, random.getstate()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
