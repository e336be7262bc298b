"""Cache: what a model said of a batch, kept in a folder, so that it need not be asked again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from oodcore.behaviour import Behaviour
from oodcore.errors import ConfigurationError
from oodcore.extractor import FeatureModel
from oodcore.features import Features, Head

log = logging.getLogger("oodcore")

FORM = 2
"""Of what is written; entries of another form are not found."""
SEAL = 64
"""Characters of the SHA-256 that an entry begins with, before a line feed."""

_TYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
    | {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)


class Cache:
    """The features of batches, in a folder that many models, data sets and processes may share.

    An entry is found by a SHA-256 of all that decides what it holds: the model (weights, code,
    preprocessing, head, layers), where and how it computes (kind of device, version and precision
    of torch) and the inputs of the batch, bit by bit. Nothing that is found can be out of date, and
    nothing needs to be declared. Labels and ids play no part. An entry holds embeddings, logits and
    layers in the model's own types, so that scores are the same to the last bit.

    An entry is a file of 65 bytes more than its numbers take: a SHA-256, which is checked before
    anything is read, and safetensors. A damaged one is a warning, and the model sees the batch
    again. Each is written beside its place and moved there, so that several processes may work in
    one folder. To clear the cache, or the part of one model, delete the folder.

    A batch is not kept, and a warning says so, where the model drew from a global random generator
    or changed its own weights and buffers to compute it. Other things that change what a model
    gives (files that it reads, the time) cannot be seen: use no cache with such a model.

    Args:
        folder: made where it does not exist.

    Raises:
        ConfigurationError: it is no folder, or cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"the cache '{folder}' cannot be made: {error.strerror or error}; give a folder"
            ) from None

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"

    def of(
        self, model: FeatureModel, extractor: Any = None, *, inputs: bool = False
    ) -> CachedModel:
        """A model that is asked only about batches that the cache does not have.

        Args:
            model: it stays what it is for as long as this is used.
            extractor: the component that it was loaded from, if any.
            inputs: whether features are to have ``inputs`` and ``rerun``; these ask the model.
        """
        return CachedModel(self, model, extractor, inputs)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the record of an entry; None where there is none that can be read."""
        try:
            raw = memoryview(path.read_bytes())
            return _unsealed(raw, path)
        except FileNotFoundError:
            return None
        except OSError as error:
            why = error.strerror or str(error)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            why = str(error)
        log.warning(
            "an entry of the cache is left out and made again (%s): %s; if this happens often, "
            "delete the folder", why, path
        )  # fmt: skip
        return None

    def write(self, path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Put an entry in its place in one step.

        Raises:
            ConfigurationError: the folder cannot be written to.
        """
        own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        payload = safetensors.torch.save(own, {"record": json.dumps(record, sort_keys=True)})
        passing = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(exist_ok=True)
            with passing.open("xb") as file:
                file.write(_seal(payload, path))
                file.write(payload)
            os.replace(passing, path)
        except OSError as error:
            raise ConfigurationError(
                f"the cache '{self.folder}' cannot be written: {error.strerror or error}; give a "
                "folder that can be, or none"
            ) from None
        finally:
            with suppress(OSError):
                passing.unlink(missing_ok=True)


class CachedModel:
    """A model behind a cache; made by ``Cache.of``.

    ``found`` and ``asked`` count batches that were there, and batches that the model saw.
    """

    def __init__(self, cache: Cache, model: FeatureModel, extractor: Any, inputs: bool) -> None:
        self._cache = cache
        self._model = model
        self._extractor = extractor
        self._inputs = inputs
        self._heads: dict[str, Head] = {}
        self._warned = False
        self.found = self.asked = 0

    def forward(self, inputs: Any) -> Features:
        """Features of a batch, as the model's ``forward`` gives them.

        Raises:
            ConfigurationError: the cache cannot be written to.
            ConfigurationError, DataError: as the model.
        """
        path = self._place[0] / f"{self._key(inputs)}.features"
        known = self._known(path)
        if known is not None:
            self.found += 1
            if not self._inputs:
                return known
            return replace(known, inputs=self._model.prepared(inputs), rerun=self._model.rerun)
        self.asked += 1
        before = self._state()
        features = self._model.forward(inputs)
        if self._state() != before:
            self._unkept("it draws random numbers, or changes its own weights or buffers")
        elif odd := [str(value.dtype) for value in _tensors(features) if value.dtype not in _TYPES]:
            self._unkept(f"it gives tensors of type {odd[0].removeprefix('torch.')}")
        else:
            self._keep(path, features)
        return features

    @cached_property
    def _place(self) -> tuple[Path, list[Tensor]]:
        """The folder of this model, and the tensors that it is made of."""
        told = Behaviour()
        text = told.text([FORM, self._model, self._extractor, _arithmetic(self._model)])
        return self._cache.folder / _sha256(text.encode()), told.tensors

    def _key(self, inputs: Any) -> str:
        return _sha256(Behaviour().text(inputs).encode())

    def _known(self, path: Path) -> Features | None:
        entry = self._cache.read(path)
        if entry is None:
            return None
        tensors, record = entry
        head = self._head(record["head"])
        if head is None and record["head"] is not None:
            return None
        device = self._model.device
        there = {name: value.to(device) for name, value in tensors.items()}
        return Features(
            embeddings=there.get("embeddings"),
            logits=there.get("logits"),
            layers={name: there[f"layers.{name}"] for name in record["layers"]},
            head=head,
        )

    def _keep(self, path: Path, features: Features) -> None:
        tensors = {
            name: value
            for name in ("embeddings", "logits")
            if (value := getattr(features, name)) is not None
        }
        layers = {f"layers.{name}": value for name, value in features.layers.items()}
        record = {"head": self._keep_head(features.head), "layers": list(features.layers)}
        self._cache.write(path, {**tensors, **layers}, record)

    def _keep_head(self, head: Head | None) -> str | None:
        """The name under which a head is kept, once for all batches of the model."""
        if head is None:
            return None
        name = _sha256(Behaviour().text(head).encode())
        if name not in self._heads:
            tensors = {"weight": head.weight}
            if head.bias is not None:
                tensors["bias"] = head.bias
            record = {
                "normalize_weight": head.normalize_weight,
                "normalize_features": head.normalize_features,
                "scale": head.scale,
            }
            self._cache.write(self._head_path(name), tensors, record)
            self._heads[name] = head
        return name

    def _head(self, name: str | None) -> Head | None:
        if name is None or name in self._heads:
            return None if name is None else self._heads[name]
        entry = self._cache.read(self._head_path(name))
        if entry is None:
            return None
        tensors, record = entry
        head = Head(tensors["weight"], tensors.get("bias"), **record).to(self._model.device)
        self._heads[name] = head
        return head

    def _head_path(self, name: str) -> Path:
        return self._place[0] / f"{name}.head"

    def _state(self) -> Any:
        """What a forward pass that always gives the same leaves as it was."""
        kind, words, *place = np.random.get_state()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return (
            [None if t.is_inference() else (id(t), t._version) for t in self._place[1]],
            torch.get_rng_state().numpy().tobytes(),
            torch.cuda.get_rng_state().numpy().tobytes() if cuda else None,
            random.getstate(),
            (kind, np.asarray(words).tobytes(), *place),
        )

    def _unkept(self, why: str) -> None:
        if not self._warned:
            log.warning("the cache does not keep what %s gives: %s", self._model.title, why)
        self._warned = True


def _seal(payload: bytes, path: Path) -> bytes:
    """What an entry begins with: of its place too, so that an entry of another place is damage."""
    place = f"{path.parent.name}/{path.name}".encode()
    return f"{_sha256(place + payload)}\n".encode()


def _unsealed(raw: memoryview, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record in a file.

    Raises:
        ValueError, KeyError, TypeError, SafetensorError: it is not what was written.
    """
    payload = bytes(raw[SEAL + 1 :])
    if bytes(raw[: SEAL + 1]) != _seal(payload, path):
        raise ValueError("it is damaged")
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    return safetensors.torch.load(payload), json.loads(header["__metadata__"]["record"])


def _tensors(features: Features) -> Iterator[Tensor]:
    head = features.head
    own = (features.embeddings, features.logits, *features.layers.values())
    for value in (*own, *((head.weight, head.bias) if head is not None else ())):
        if value is not None:
            yield value


def _arithmetic(model: FeatureModel) -> list[Any]:
    """What else decides the last digits of what a model computes here."""
    device = model.device
    one = torch.ones(1, 1, device=device)
    return [
        device.type,
        torch.__version__,
        torch.get_float32_matmul_precision(),
        str(torch.get_default_dtype()),
        # Within autocast a product has another type.
        str((one @ one).dtype),
    ]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
