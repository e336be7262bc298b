"""Artifacts: folders of JSON and safetensors, written at once, checked before they are parsed."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from oodcore.encoding import (
    STATE,
    Decoder,
    encoded,
    refuse_bombs,
    safetensors,
    strict_json,
    tensors_of,
)
from oodcore.errors import ArtifactError
from oodcore.rows import Rows

SCHEMA = 1
MANIFEST = "MANIFEST.json"
FILES = {"detector": "detector.json", "ensemble": "detector.json", "store": "store.json"}
MANIFEST_LIMIT = 2**16
JSON_LIMIT = 16 * 2**20


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
        tree = encoded(packed, "", tensors, {})
        document = {"schema": SCHEMA, "type": kind, **tree}
        plain = json.dumps(document, indent=1, allow_nan=False)
        refuse_bombs(plain, FILES[kind])
        text = plain.encode()
        if len(text) > JSON_LIMIT:
            raise ArtifactError(f"the configuration takes {len(text)} bytes; at most {JSON_LIMIT}")
        files = {
            FILES[kind]: _write(fresh / FILES[kind], [text]),
            STATE: _write(fresh / STATE, safetensors(tensors)),
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


def _write(path: Path, blocks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in blocks:
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


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
    document = strict_json(bytes(_verified(folder, name, files[name])), name)
    if not isinstance(document, dict) or document.get("type") not in kinds:
        raise ArtifactError(f"{name} is not a {' or '.join(kinds)}")
    _check_schema(document.get("schema"), name)
    tensors = tensors_of(_verified(folder, STATE, files[STATE]))
    decoder = Decoder(tensors)
    decoded: dict[str, Any] = decoder.tree(document)
    if unused := tensors.keys() - decoder.used:
        raise ArtifactError(f"{STATE} holds what nothing refers to: {sorted(unused)[:3]}")
    return decoded


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
    manifest = strict_json(text, MANIFEST)
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
