"""Encoding: states as JSON and safetensors, and back after every check."""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import ArtifactError
from oodcore.index import Index
from oodcore.rows import Rows

STATE = "state.safetensors"
HEADER_LIMIT = 4 * 2**20
DEPTH_LIMIT = 64
PARTS_LIMIT = 2**18
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ESCAPES = re.compile(r"\\.", re.DOTALL)
_STRINGS = re.compile(r'"[^"]*"')
_BRACKETS = re.compile(r"[\[\]{}]")
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def encoded(value: Any, path: str, tensors: dict[str, Any], seen: dict[Any, str]) -> Any:
    """Plain JSON values, with tensors replaced by references into ``tensors``."""
    if isinstance(value, Tensor):
        return {"$tensor": _named(value, path, tensors, seen, id(value))}
    if isinstance(value, Rows):
        return {"$rows": _named(value, path, tensors, seen, value.identity)}
    if isinstance(value, Index):
        return {
            "$index": _named(value.rows, path, tensors, seen, value.rows.identity),
            "metric": value.metric,
            "factory": value.factory,
            "normalized": value.normalized,
        }
    if isinstance(value, Mapping):
        if bad := [name for name in value if not isinstance(name, str) or name.startswith("$")]:
            raise ArtifactError(f"{path or 'state'}: the name {bad[0]!r} cannot be saved")
        return {name: encoded(v, f"{path}.{name}", tensors, seen) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(v, f"{path}.{n}", tensors, seen) for n, v in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ArtifactError(
        f"{path.lstrip('.')}: a {type(value).__name__} cannot be saved; states hold tensors, Rows, "
        "Index and mappings of these"
    )


def _named(
    value: Tensor | Rows, path: str, tensors: dict[str, Any], seen: dict[Any, str], key: Any
) -> str:
    if key not in seen:
        name = path.lstrip(".")
        if isinstance(value, Tensor):
            value = value.detach()
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ArtifactError(f"{name} holds numbers that are not finite; it is not saved")
        if value.dtype not in _CODES:
            raise ArtifactError(f"{name}: {value.dtype} cannot be saved")
        if name in tensors:
            raise ArtifactError(f"two tensors are called '{name}': a name in a state has no dot")
        tensors[name] = value
        seen[key] = name
    return seen[key]


def safetensors(tensors: Mapping[str, Tensor | Rows]) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file, block by block; wide types first, so all are aligned."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, offset = {}, 0
    for name, value in order:
        shape = list(value.shape) if isinstance(value, Tensor) else [len(value), *value.shape]
        size = torch.Size(shape).numel() * value.dtype.itemsize
        header[name] = {
            "dtype": _CODES[value.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ArtifactError(f"{len(tensors)} tensors are too many to save")
    yield struct.pack("<Q", len(text))
    yield text
    for _, value in order:
        for block in [value] if isinstance(value, Tensor) else value.blocks():
            flat = block.cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def strict_json(content: bytes, name: str) -> Any:
    """Strict JSON of bounded depth and size: UTF-8, finite numbers, no key twice."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{name} is not UTF-8: {error.reason}") from None
    refuse_bombs(text, name)
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite
        )
        if "\\u" in text:
            # Half of a pair of surrogates is no text: it could not even be shown in a message.
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise ArtifactError(f"{name} is not valid JSON: {str(error)[:200]}") from None
    return value


def refuse_bombs(text: str, name: str) -> None:
    """Raise an ArtifactError for what would take long to parse; in one pass, whatever it is."""
    depth = parts = 0
    for bracket in _BRACKETS.finditer(_STRINGS.sub("", _ESCAPES.sub("", text))):
        opens = bracket.group() in "[{"
        depth += 1 if opens else -1
        parts += opens
        if depth > DEPTH_LIMIT:
            raise ArtifactError(f"{name} is nested deeper than {DEPTH_LIMIT}")
        if parts > PARTS_LIMIT:
            raise ArtifactError(f"{name} holds more than {PARTS_LIMIT} lists and mappings")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def tensors_of(content: mmap.mmap | bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped; every number in them is finite."""
    if len(content) < 8:
        raise ArtifactError(f"{STATE} is too short")
    length = struct.unpack("<Q", content[:8])[0]
    if length > HEADER_LIMIT or length > len(content) - 8:
        raise ArtifactError(f"{STATE}: a header of {length} bytes; at most {HEADER_LIMIT}")
    header = strict_json(bytes(content[8 : 8 + length]), STATE)
    if not isinstance(header, dict):
        raise ArtifactError(f"{STATE}: the header is no mapping")
    header.pop("__metadata__", None)
    body, end, tensors = 8 + length, 0, {}
    entries = [(name, *_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: entry[3:]):
        count = torch.Size(shape).numel()
        if first != end or last - first != count * dtype.itemsize:
            raise ArtifactError(f"{STATE}: '{name}' does not fit its place in the file")
        end = last
        if body + end > len(content):
            raise ArtifactError(f"{STATE} ends inside '{name}'")
        if count and (body + first) % dtype.itemsize:
            raise ArtifactError(f"{STATE}: '{name}' is not aligned")
        tensor = (
            torch.frombuffer(content, dtype=dtype, count=count, offset=body + first).reshape(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
        if dtype.is_floating_point and not all(
            bool(torch.isfinite(part).all()) for part in torch.split(tensor.flatten(), 2**24)
        ):
            raise ArtifactError(f"{STATE}: '{name}' holds numbers that are not finite")
        tensors[name] = tensor
    if body + end != len(content):
        raise ArtifactError(f"{STATE} holds bytes that belong to no tensor")
    return tensors


def _entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{STATE}: '{name}' needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    plain = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
    # Strides are products of sizes, and must be numbers even where another size is zero.
    plain = plain and math.prod(max(n, 1) for n in numbers[:-2]) < 2**62
    if not isinstance(dtype, str) or dtype not in DTYPES:
        plain = False
    if not plain or len(shape) > 8 or len(offsets) != 2:
        raise ArtifactError(f"{STATE}: '{name}' has an impossible dtype, shape or place")
    return DTYPES[dtype], shape, offsets[0], offsets[1]


class Decoder:
    """Puts the tensors of a file in the place of the references to them.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._copies: dict[str, Tensor] = {}
        self._indexes: dict[tuple[str, str, str, bool], Index] = {}
        self._budget = REPEATS * sum(tensor.nbytes for tensor in tensors.values()) + 2**20
        self.used: set[str] = set()

    def tree(self, value: Any) -> Any:
        """Plain values, with tensors, rows and indexes where the references were.

        Raises:
            ArtifactError: a reference that leads nowhere, or so many to the same tensors that
                copies of them would fill the memory.
        """
        if isinstance(value, list):
            return [self.tree(item) for item in value]
        if not isinstance(value, dict):
            return value
        if not any(name.startswith("$") for name in value):
            return {name: self.tree(item) for name, item in value.items()}
        form = next((name for name in _FORMS if name in value), None)
        name = None if form is None else value[form]
        if form is None or value.keys() != _FORMS[form] or not isinstance(name, str):
            raise ArtifactError(f"a reference that leads nowhere: {str(value)[:100]}")
        if name not in self._tensors:
            raise ArtifactError(f"a reference that leads nowhere: {str(value)[:100]}")
        self.used.add(name)
        if form == "$tensor":
            return self._copy(name)
        if self._tensors[name].ndim == 0:
            raise ArtifactError(f"'{name}' is no rows")
        return Rows.mapped(self._tensors[name]) if form == "$rows" else self._index(name, value)

    def _copy(self, name: str) -> Tensor:
        self._budget -= self._tensors[name].nbytes
        if self._budget < 0:
            raise ArtifactError(f"too many references to the same tensors, '{name}' among them")
        if name not in self._copies:
            self._copies[name] = self._tensors[name].clone()
        return self._copies[name]

    def _index(self, name: str, value: Mapping[str, Any]) -> Index:
        metric, factory, normalized = value["metric"], value["factory"], value["normalized"]
        if (
            metric not in ("l2", "inner_product")
            or not isinstance(factory, str)
            or not isinstance(normalized, bool)
            or self._tensors[name].ndim != 2
        ):
            raise ArtifactError(f"an index that cannot be built: {str(value)[:100]}")
        key = name, metric, factory, normalized
        if key not in self._indexes:
            self._indexes[key] = Index(
                Rows.mapped(self._tensors[name]), metric, factory, normalized
            )
        return self._indexes[key]


REPEATS = 16
"""How often a tensor may be referred to, on the average: many copies would fill the memory."""

_FORMS = {
    "$tensor": {"$tensor"},
    "$rows": {"$rows"},
    "$index": {"$index", "metric", "factory", "normalized"},
}
