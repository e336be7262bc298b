"""arrays: features that were stored, as a model, so that a configuration can work on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import PositiveFloat, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from oodcore import Extractor, FeatureModel, Features, Head, hookimpl
from oodcore.component import FilePath, suggestion
from oodcore.data import to_device
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import Edit, PreprocessInside, RowCount, fingerprint_of
from oodcore.hookspecs import Register
from oodcore.inputs import form, readable


class StoredFeatures(FeatureModel):
    """Features that were stored, as a model; ``Arrays`` says how.

    Args:
        embeddings: the entry of a row that holds its embedding, or None.
        logits: the entry that holds its logits, or None.
        head: what makes logits of embeddings, or None.

    Raises:
        ConfigurationError: neither embeddings nor logits, or both from one entry.
    """

    def __init__(
        self,
        embeddings: str | None = "embeddings",
        logits: str | None = None,
        head: Head | None = None,
    ) -> None:
        if fault := _misfit(embeddings, logits):
            raise ConfigurationError(fault)
        super().__init__("arrays")
        self.embeddings = embeddings
        self.logits = logits
        self.head = head
        self._device = torch.device("cpu") if head is None else head.weight.device
        self._memory = RowCount()

    def __repr__(self) -> str:
        return f"StoredFeatures(embeddings={self.embeddings!r}, logits={self.logits!r})"

    def _capture(self) -> None:
        """Any entry of a row may be a layer; whether it is there is seen when rows come."""

    def prepared(self, inputs: Any) -> Any:
        return to_device(readable(inputs), self.device)

    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        if edit:
            raise ConfigurationError(
                f"stored features are on no way through a model: there is no layer "
                f"'{next(iter(edit))}' to edit"
            )
        inputs = self.prepared(inputs)
        entries = self._entries(inputs)
        features = Features(
            embeddings=self._rows(entries, self.embeddings),
            logits=self._rows(entries, self.logits),
            layers={name: _entry(entries, name) for name in self.layers},
            head=self.head,
        )
        self._memory.add(len(features))
        return replace(features, inputs=inputs, rerun=self.rerun)

    def _entries(self, inputs: Any) -> Mapping[str, Tensor]:
        if isinstance(inputs, Mapping):
            return inputs
        names = [name for name in (self.embeddings, self.logits) if name is not None]
        if not isinstance(inputs, Tensor):
            raise DataError(f"arrays: rows are numbers, not {form(inputs)}")
        if len(names) > 1 or self.layers:
            wanted = ", ".join(f"'{name}'" for name in (*names, *self.layers))
            raise DataError(
                f"arrays: a row is one array {form(inputs)}, and {wanted} are wanted of it; give "
                "rows that are mappings of names to arrays"
            )
        return {names[0]: inputs}

    def _rows(self, entries: Mapping[str, Tensor], name: str | None) -> Tensor | None:
        """An entry with one row of floating numbers each, ``[N, D]``; None where none is named."""
        if name is None:
            return None
        rows = _entry(entries, name)
        if rows.ndim != 2:
            raise DataError(f"arrays: '{name}' must be [N, D], not {list(rows.shape)}")
        return rows if rows.is_floating_point() else rows.double()

    def to(self, device: torch.device | str) -> StoredFeatures:
        self.head = None if self.head is None else self.head.to(device)
        self._device = torch.device(device)
        return self

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def gives(self) -> frozenset[str]:
        return frozenset(
            name
            for name, there in (
                ("embeddings", self.embeddings is not None),
                ("logits", self.logits is not None or self.head is not None),
                ("head", self.head is not None),
                ("inputs", True),
            )
            if there
        )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return ()

    @property
    def rows_seen(self) -> int:
        return self._memory.rows

    def fingerprint(self) -> str:
        return fingerprint_of(["arrays", self.embeddings, self.logits], {}, self.head)

    def identity(self) -> tuple[Any, ...]:
        return self.embeddings, self.logits, id(self.head)


class Arrays(Extractor):
    """``h`` and ``z`` as they were stored: rows are embeddings or logits, or mappings with both.

    A row that is one array is the embedding, or the logits where ``embeddings`` is null. A row that
    is a mapping of names to arrays has each under its name, and further arrays that are captured as
    ``layers``. Logits that are stored are kept as they are, also where there is a head; where none
    are stored, they are what the head makes of the embeddings. Inputs, where a scorer moves them,
    are the stored numbers.

    Args:
        embeddings: the name of the embeddings in a row ``[D]``; null where there are none.
        logits: the name of the logits in a row ``[K]``; null where there are none.
        layers: names of further arrays in a row.
        head: a safetensors file with the classifier's last layer; other tensors in it are left.
        weight: the name of its weight ``[K, D]`` in the file.
        bias: the name of its bias ``[K]``; null where there is none.
        normalize_weight, normalize_features: whether rows of the weight, and embeddings, have unit
            norm first.
        scale: what multiplies the product.
        preprocess: none: features are stored as they are.

    ``load`` raises a ConfigurationError if the file of the head cannot be read or has no such
    tensors. Rows without the entries that are named, or of another shape, are a DataError.
    """

    kind = "arrays"

    embeddings: str | None = "embeddings"
    logits: str | None = None
    layers: tuple[str, ...] = ()
    head: FilePath | None = None
    weight: str = "weight"
    bias: str | None = "bias"
    normalize_weight: bool = False
    normalize_features: bool = False
    scale: PositiveFloat = 1.0
    preprocess: PreprocessInside = None

    @model_validator(mode="after")
    def _has_something(self) -> Arrays:
        if fault := _misfit(self.embeddings, self.logits):
            raise ValueError(fault)
        if self.head is not None and self.embeddings is None:
            raise ValueError("a head makes logits of embeddings; name the embeddings")
        return self

    def load(self) -> StoredFeatures:
        model = StoredFeatures(self.embeddings, self.logits, self._read_head())
        return model.with_layers(self.layers)

    def _read_head(self) -> Head | None:
        if self.head is None:
            return None
        if not self.head.is_file():
            raise ConfigurationError(f"there is no file of a head {self.head}")
        names = [name for name in (self.weight, self.bias) if name is not None]
        try:
            with safe_open(self.head, framework="pt") as file:
                known = list(file.keys())
                if missing := [name for name in names if name not in known]:
                    near = suggestion(missing[0], known) or f"; it has: {', '.join(known[:16])}"
                    cure = "; where there is no bias, set bias: null"
                    raise ConfigurationError(
                        f"{self.head} has no tensor '{missing[0]}'{near}"
                        + (cure if missing[0] == self.bias else "")
                    )
                tensors = [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(
                f"{self.head} cannot be read as safetensors: {error}"
            ) from error
        try:
            return Head(
                tensors[0],
                tensors[1] if self.bias is not None else None,
                normalize_weight=self.normalize_weight,
                normalize_features=self.normalize_features,
                scale=float(self.scale),
            )
        except DataError as error:
            raise ConfigurationError(f"{self.head}: {error}") from None


def _entry(entries: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in entries:
        raise DataError(
            f"arrays: a row has no '{name}'{suggestion(name, list(entries)) or ';'} it has: "
            f"{', '.join(entries)}"
        )
    return entries[name]


def _misfit(embeddings: str | None, logits: str | None) -> str | None:
    if embeddings is None and logits is None:
        return "name the embeddings, the logits or both"
    if embeddings == logits:
        return f"embeddings and logits cannot both be '{logits}'"
    return None


@hookimpl
def register_extractors(register: Register) -> None:
    register(Arrays)
