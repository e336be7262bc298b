"""Artifacts: folders of JSON and safetensors, written at once, checked before they are parsed."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import ArtifactError
from oodcore.index import Index, Rows

SCHEMA = 1
MANIFEST = "MANIFEST.json"
STATE = "state.safetensors"
FILES = {"detector": "detector.json", "ensemble": "detector.json", "store": "store.json"}
MANIFEST_LIMIT = 2**16
JSON_LIMIT = 16 * 2**20
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


# Writing


def write_artifact(
    folder: Path, kind: str, packed: Mapping[str, Any], *, overwrite: bool = False
) -> Path:
    """Write plain values, tensors, rows and indexes to a folder, whole or not at all.

    Args:
        folder: where to; written beside its place and moved there.
        kind: what it is: ``detector``, ``ensemble`` or ``store``.
        packed: nested mappings and lists of plain JSON values, tensors, Rows and Index.
        overwrite: replace an artifact that is there.

    Raises:
        ArtifactError: the folder exists and is not to be (or cannot safely be) overwritten.
    """
    folder = folder.absolute()
    refuse_to_overwrite(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tensors: dict[str, Tensor | Rows] = {}
        tree = _encoded(packed, "", tensors, {})
        document = {"schema": SCHEMA, "type": kind, **tree}
        plain = json.dumps(document, indent=1, allow_nan=False)
        _refuse_bombs(plain, FILES[kind])
        text = plain.encode()
        if len(text) > JSON_LIMIT:
            raise ArtifactError(f"the configuration takes {len(text)} bytes; at most {JSON_LIMIT}")
        files = {
            FILES[kind]: _write(fresh / FILES[kind], [text]),
            STATE: _write(fresh / STATE, _safetensors(tensors)),
        }
        manifest = {"format": "oodcore", "schema": SCHEMA, "files": files}
        _write(fresh / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        os.chmod(fresh, 0o755)
        _move(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


def refuse_to_overwrite(folder: Path, overwrite: bool) -> None:
    """Raise an ArtifactError if something is there that is not to be, or cannot be, replaced."""
    if not os.path.lexists(folder):
        return
    if not overwrite:
        raise ArtifactError(f"{folder} exists; give overwrite=True to replace it")
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder} is no folder, so it is not overwritten")
    names = set(os.listdir(folder))
    if names and not names <= {MANIFEST, STATE, *FILES.values()}:
        raise ArtifactError(
            f"{folder} holds more than an artifact ({', '.join(sorted(names)[:5])}), so it is not "
            "overwritten; remove it yourself or choose another folder"
        )


def _move(fresh: Path, folder: Path) -> None:
    """Old aside, new in, old away."""
    if not folder.exists():
        os.replace(fresh, folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.replace(folder, aside / "old")
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _encoded(value: Any, path: str, tensors: dict[str, Any], seen: dict[Any, str]) -> Any:
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
        return {name: _encoded(v, f"{path}.{name}", tensors, seen) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(v, f"{path}.{n}", tensors, seen) for n, v in enumerate(value)]
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


def _safetensors(tensors: Mapping[str, Tensor | Rows]) -> Iterable[bytes | memoryview]:
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


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in blocks:
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


# Reading


def read_artifact(
    folder: Path, kind: str | tuple[str, ...], *, sha256: str | None = None
) -> dict[str, Any]:
    """What ``write_artifact`` wrote, after every check; ``type`` says which kind it is.

    Args:
        folder: the artifact.
        kind: what it may be.
        sha256: of the manifest, if it is known from elsewhere.

    Raises:
        ArtifactError: anything that is not as it should be. Nothing is run and nothing unpickled.
    """
    kinds = (kind,) if isinstance(kind, str) else kind
    try:
        return _read(Path(folder), kinds, sha256)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error.strerror or error}") from None


def _read(folder: Path, kinds: tuple[str, ...], sha256: str | None) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder with an artifact")
    sizes = _listed(folder)
    if MANIFEST not in sizes:
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is not an artifact")
    files = _manifest(folder, sizes, sha256)
    main = {FILES[kind] for kind in kinds}
    if not main & files.keys():
        raise ArtifactError(f"{folder} is not a {' or '.join(kinds)}: it holds {sorted(files)}")
    name = (main & files.keys()).pop()
    if files.keys() != {name, STATE}:
        raise ArtifactError(f"{folder}: files that do not belong there: {sorted(files)}")
    if files[name]["size"] > JSON_LIMIT:
        raise ArtifactError(f"{name} has {files[name]['size']} bytes; at most {JSON_LIMIT}")
    document = _json(bytes(_verified(folder, name, files[name])), name)
    if not isinstance(document, dict) or document.get("type") not in kinds:
        raise ArtifactError(f"{name} is not a {' or '.join(kinds)}")
    _check_schema(document.get("schema"), name)
    tensors = _tensors(_verified(folder, STATE, files[STATE]))
    used: set[str] = set()
    decoded = _decoded(document, tensors, used)
    if unused := tensors.keys() - used:
        raise ArtifactError(f"{STATE} holds what nothing refers to: {sorted(unused)[:3]}")
    result: dict[str, Any] = decoded
    return result


def _check_schema(schema: Any, name: str) -> None:
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ArtifactError(f"{name}: the schema version is {schema!r}")
    if schema > SCHEMA:
        raise ArtifactError(
            f"{name} has schema version {schema}, and this oodcore reads up to {SCHEMA}: "
            "pip install --upgrade oodcore"
        )


def _listed(folder: Path) -> dict[str, int]:
    """The size of every entry, all of them regular files with plain names."""
    sizes = {}
    names = os.listdir(folder)
    if len(names) > 16:
        raise ArtifactError(f"{folder} holds more files than an artifact")
    for name in names:
        info = os.lstat(folder / name)
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{name!r} is not a regular file")
        sizes[name] = info.st_size
    return sizes


def _manifest(folder: Path, sizes: Mapping[str, int], sha256: str | None) -> dict[str, Any]:
    if sizes[MANIFEST] > MANIFEST_LIMIT:
        raise ArtifactError(f"{MANIFEST} has {sizes[MANIFEST]} bytes; at most {MANIFEST_LIMIT}")
    text = bytes(_opened(folder, MANIFEST, sizes[MANIFEST]))
    if sha256 is not None and hashlib.sha256(text).hexdigest() != sha256.lower():
        raise ArtifactError(f"{MANIFEST} has another SHA-256 than the one asked for")
    manifest = _json(text, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != "oodcore":
        raise ArtifactError(f"{MANIFEST} is not a manifest of oodcore")
    _check_schema(manifest.get("schema"), MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ArtifactError(f"{MANIFEST} names no files")
    if files.keys() != sizes.keys() - {MANIFEST}:
        raise ArtifactError(
            f"{MANIFEST} names {sorted(map(str, files))[:5]}, and the folder holds "
            f"{sorted(sizes.keys() - {MANIFEST})[:5]}"
        )
    for name, file in files.items():
        if (
            not isinstance(file, dict)
            or file.keys() != {"sha256", "size"}
            or not isinstance(file["sha256"], str)
            or type(file["size"]) is not int
        ):
            raise ArtifactError(f"{MANIFEST}: {name} needs a sha256 and a size")
        if file["size"] != sizes[name]:
            said = file["size"]
            raise ArtifactError(f"{name} has {sizes[name]} bytes, and {MANIFEST} says {said}")
    return files


def _opened(folder: Path, name: str, size: int) -> mmap.mmap | bytes:
    """A file's bytes, mapped from a descriptor that is opened once and follows no link."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(folder / name, flags | getattr(os, "O_BINARY", 0))
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            raise ArtifactError(f"{name} changed while it was read")
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) if size else b""
    finally:
        os.close(descriptor)


def _verified(folder: Path, name: str, file: Mapping[str, Any]) -> mmap.mmap | bytes:
    content = _opened(folder, name, file["size"])
    if hashlib.sha256(content).hexdigest() != file["sha256"]:
        raise ArtifactError(f"{name} is damaged: its SHA-256 is not the one in {MANIFEST}")
    return content


def _json(content: bytes, name: str) -> Any:
    """Strict JSON of bounded depth and size: UTF-8, finite numbers, no key twice."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{name} is not UTF-8: {error.reason}") from None
    _refuse_bombs(text, name)
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


def _refuse_bombs(text: str, name: str) -> None:
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


def _tensors(content: mmap.mmap | bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped; every number in them is finite."""
    if len(content) < 8:
        raise ArtifactError(f"{STATE} is too short")
    length = struct.unpack("<Q", content[:8])[0]
    if length > HEADER_LIMIT or length > len(content) - 8:
        raise ArtifactError(f"{STATE}: a header of {length} bytes; at most {HEADER_LIMIT}")
    header = _json(bytes(content[8 : 8 + length]), STATE)
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


def _decoded(value: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors, used) for item in value]
    if not isinstance(value, dict):
        return value
    if not any(name.startswith("$") for name in value):
        return {name: _decoded(item, tensors, used) for name, item in value.items()}
    forms = {"$tensor": {"$tensor"}, "$rows": {"$rows"}}
    forms["$index"] = {"$index", "metric", "factory", "normalized"}
    form = next((name for name in forms if name in value), None)
    name = None if form is None else value[form]
    known = isinstance(name, str) and name in tensors
    if form is None or value.keys() != forms[form] or not known:
        raise ArtifactError(f"a reference that leads nowhere: {str(value)[:100]}")
    used.add(value[form])
    tensor = tensors[value[form]]
    if form == "$tensor":
        return tensor.clone()
    if tensor.ndim == 0:
        raise ArtifactError(f"'{value[form]}' is no rows")
    rows = Rows.mapped(tensor)
    if form == "$rows":
        return rows
    if (
        value["metric"] not in ("l2", "inner_product")
        or not isinstance(value["factory"], str)
        or not isinstance(value["normalized"], bool)
        or tensor.ndim != 2
    ):
        raise ArtifactError(f"an index that cannot be built: {str(value)[:100]}")
    return Index(rows, value["metric"], value["factory"], value["normalized"])
