"""FeatureStore: statistics and indexes of the training data; save, load, merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oodcore.component import canonical
from oodcore.errors import DataError, NotFittedError
from oodcore.features import Features, Head
from oodcore.index import Index
from oodcore.rows import Rows
from oodcore.statistics import (
    AtLayer,
    Bank,
    ClassMoments,
    Normalized,
    NormMoments,
    Norms,
    Shape,
    State,
    Statistic,
    copy_state,
)

Labelling = Literal["labels", "predicted", "one class"]


class FeatureStore:
    """Statistics of a stream of features, each kept once, with nearest-neighbour search.

    K, the number of classes, comes from the head or the logits, else from ``classes``, else from
    the labels of the first update. Without labels, a row's class is the one predicted; without
    logits too, there is one class.

    Args:
        head: the classifier head, where there is one; else the features' own is kept.
        statistics: what to collect.
        classes: K, where neither head nor logits tell.
    """

    def __init__(
        self,
        head: Head | None = None,
        statistics: Iterable[Statistic] = (),
        classes: int | None = None,
    ) -> None:
        self.head = head
        self.classes = classes if head is None else head.weight.shape[0]
        self.rows = 0
        self.labelling: Labelling | None = None
        self._statistics: dict[str, Statistic] = {}
        self._states: dict[str, State] = {}
        self._views: dict[str, Any] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}
        for statistic in statistics:
            self.add(statistic)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What is collected."""
        return tuple(self._statistics.values())

    def add(self, statistic: Statistic) -> None:
        """Collect one more statistic; asking twice for the same one is free.

        Raises:
            DataError: rows have been seen already.
        """
        key = canonical(statistic.dump())
        if key in self._statistics:
            return
        if self.rows:
            raise DataError(f"the statistic '{statistic.kind}' cannot begin after {self.rows} rows")
        self._statistics[key] = statistic

    @torch.no_grad()
    def update(self, features: Features) -> FeatureStore:
        """Take in a batch; returns the store. Rows without ids are numbered as they come.

        A batch that is refused changes nothing.

        Raises:
            DataError: a label outside ``0..K-1`` (named with its row), labels in some batches
                only, a field that a statistic needs and that is missing, or of another width than
                before.
        """
        if not len(features):
            return self
        features = features.double()
        if features.ids is None:
            numbers = torch.arange(self.rows, self.rows + len(features), device=features.device)
            features = replace(features, ids=numbers)
        self._check(features)
        if not self.rows:
            self._begin(features)
        for key, statistic in self._statistics.items():
            self._states[key] = statistic.update(self._states[key], features)
        self._views.clear()
        self.rows += len(features)
        return self

    @torch.no_grad()
    def merge(self, other: FeatureStore) -> FeatureStore:
        """A store of the rows of both; neither is changed.

        Raises:
            DataError: the stores collect different things.
        """
        if self._statistics.keys() != other._statistics.keys():
            raise DataError("stores that collect different statistics cannot be merged")
        if not self.rows or not other.rows:
            return (self if self.rows else other).copy()
        if self.classes != other.classes or self.labelling != other.labelling:
            raise DataError(
                f"stores of {self.classes} classes by {self.labelling} and of {other.classes} "
                f"classes by {other.labelling} cannot be merged"
            )
        both = self.copy()
        for key, statistic in self._statistics.items():
            both._states[key] = statistic.merge(both._states[key], copy_state(other._states[key]))
        both.rows += other.rows
        return both

    def copy(self, statistics: Iterable[Statistic] | None = None) -> FeatureStore:
        """A store that goes on apart from this one, with some of its statistics or all of them."""
        kept = self.statistics if statistics is None else statistics
        other = FeatureStore(self.head, kept, self.classes)
        other.rows, other.labelling = self.rows, self.labelling
        other._sizes = dict(self._sizes)
        if self._states:
            other._states = {key: copy_state(self._states[key]) for key in other._statistics}
        return other

    def __getitem__(self, statistic: Statistic) -> Any:
        """What a statistic has to show for the rows so far.

        Raises:
            NotFittedError: no rows yet, or a statistic that is not collected.
        """
        key = canonical(statistic.dump())
        if key not in self._statistics:
            known = ", ".join(s.kind for s in self.statistics) or "none"
            raise NotFittedError(
                f"the statistic {statistic!r} is not collected (collected: {known}); "
                "name it in statistics()"
            )
        if not self.rows:
            raise NotFittedError("the store has seen no rows yet; call update first")
        if key not in self._views:
            self._views[key] = statistic.view(self._states[key])
        return self._views[key]

    def at(self, layer: str, pool: Literal["mean", "max", "flatten"] = "mean") -> Place:
        """The statistics of a layer: ``store.at("layer3")[ClassMoments()]``."""
        return Place(self, lambda statistic: AtLayer(layer=layer, statistic=statistic, pool=pool))

    def normalized(self) -> Place:
        """The statistics of embeddings of unit norm: ``store.normalized()[ClassMoments()]``."""
        return Place(self, lambda statistic: Normalized(statistic=statistic))

    @property
    def norms(self) -> Norms:
        """The moments of the embedding norm, per class (needs ``NormMoments``)."""
        norms: Norms = self[NormMoments()]
        return norms

    def nearest_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest class mean of each row (needs ``ClassMoments``); absent classes are left out.

        Args:
            embeddings: ``[N, D]``.

        Returns:
            Euclidean distances ``[N]`` and classes ``[N]``.
        """
        moments = self[ClassMoments()]
        if "means" not in self._views:
            present = moments.present.nonzero().flatten()
            self._views["means"] = Index(Rows.of(moments.mean[present].cpu())), present
        index, present = self._views["means"]
        distances, found = index.search(embeddings.double(), 1)
        return distances[:, 0], present.to(found.device)[found[:, 0]]

    def neighbours(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest training rows of each row (needs ``Bank``).

        Args:
            embeddings: ``[N, D]``.

        Returns:
            Euclidean distances ``[N, k]``, nearest first, and ids ``[N, k]``.
        """
        bank = self[Bank()]
        if "bank" not in self._views:
            self._views["bank"] = Index(bank.embeddings)
        distances, found = self._views["bank"].search(embeddings.double(), k)
        return distances, bank.ids[found.cpu()].to(found.device)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the store as an artifact folder (safetensors and JSON, with hashes)."""
        from oodcore.artifact import write_artifact

        return write_artifact(Path(folder), "store", self.packed(), overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path, *, sha256: str | None = None) -> FeatureStore:
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: a folder that is damaged or is no store.
        """
        from oodcore.artifact import read_artifact

        return cls.unpacked(read_artifact(Path(folder), "store", sha256=sha256))

    def packed(self) -> dict[str, Any]:
        """The store as plain values and states, in the form that artifacts hold."""
        return {
            "rows": self.rows,
            "classes": self.classes,
            "labelling": self.labelling,
            "statistics": [statistic.dump() for statistic in self.statistics],
            "states": {str(n): self._states[k] for n, k in enumerate(self._states)},
            "head": packed_head(self.head),
        }

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> FeatureStore:
        """The store that ``packed`` described."""
        from oodcore.plugins import registry

        statistics = [registry.build("statistic", spec) for spec in packed["statistics"]]
        store = cls(unpacked_head(packed["head"]), statistics, packed["classes"])  # type: ignore[arg-type]
        store.rows, store.labelling = packed["rows"], packed["labelling"]
        store._states = {
            key: packed["states"][str(n)] for n, key in enumerate(store._statistics) if store.rows
        }
        return store

    def _check(self, features: Features) -> None:
        """Raise a DataError if these rows do not go with the statistics, or with those before."""
        for statistic in self._statistics.values():
            if missing := missing_fields(statistic.needs(), features):
                raise DataError(
                    f"the statistic '{statistic.kind}' needs {', '.join(missing)}, and these "
                    "features have none"
                )
        source = labelling(features)
        if self.rows and source != self.labelling:
            raise DataError(
                f"these rows have their class from {source}, and those before from "
                f"{self.labelling}; give labels with all batches or with none"
            )
        classes = self.classes if self.rows else class_count(features, self.classes)
        assert classes is not None
        check_labels(features.labels, classes, self.rows)
        for name, size in _sizes(features).items():
            before = self._sizes.get(name, size)
            if size != before:
                raise DataError(
                    f"{name} of one row are {list(size)} here, and were {list(before)} before"
                )

    def _begin(self, features: Features) -> None:
        """Settle, on the first rows, what the classes are and where they come from."""
        self.labelling = labelling(features)
        if self.head is None:
            self.head = None if features.head is None else features.head.owned()
        self.classes = class_count(features, self.classes)
        self._sizes = _sizes(features)
        layers = {name: tuple(value.shape[1:]) for name, value in features.layers.items()}
        width = 0 if features.embeddings is None else features.embeddings.shape[1]
        shape = Shape(self.classes, width, layers, features.device)
        self._states = {key: each.init(shape) for key, each in self._statistics.items()}


def _sizes(features: Features) -> dict[str, tuple[int, ...]]:
    """The shape of one row of each field."""
    fields = {"embeddings": features.embeddings, "logits": features.logits}
    fields.update({f"layer '{name}'": value for name, value in features.layers.items()})
    return {n: tuple(value.shape[1:]) for n, value in fields.items() if value is not None}


class Place:
    """A store's statistics of something else than its embeddings, which the head does not fit."""

    head: Head | None = None

    def __init__(self, store: FeatureStore, wrap: Callable[[Statistic], Statistic]) -> None:
        self._store = store
        self._wrap = wrap

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return self._store.rows

    @property
    def classes(self) -> int | None:
        """K."""
        return self._store.classes

    def __getitem__(self, statistic: Statistic) -> Any:
        return self._store[self._wrap(statistic)]


def labelling(features: Features) -> Labelling:
    """Where the classes of these rows come from."""
    if features.labels is not None:
        return "labels"
    return "predicted" if features.logits is not None else "one class"


def class_count(features: Features, classes: int | None = None) -> int:
    """K: from the logits, else as given, else from the labels, else 1."""
    if features.logits is not None:
        return int(features.logits.shape[1])
    if classes is not None:
        return classes
    return int(features.labels.max()) + 1 if features.labels is not None else 1


def check_labels(labels: Tensor | None, classes: int, first: int = 0) -> None:
    """Raise a DataError naming the first row whose label is not in ``0..K-1``."""
    if labels is None:
        return
    if not len(labels):
        return
    least, largest = labels.aminmax()
    if int(least) < 0 or int(largest) >= classes:
        row = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        raise DataError(
            f"row {first + row} has the label {int(labels[row])}, and labels go from 0 to "
            f"{classes - 1}; oodcore.data.select(data, classes) keeps and relabels the rest"
        )


def missing_fields(needs: Iterable[str], features: Features) -> Sequence[str]:
    """Which of the needed fields these features do not have."""
    missing = []
    for need in sorted(needs):
        name, _, layer = need.partition(".")
        value = features.layers.get(layer) if name == "layers" else getattr(features, name, None)
        if value is None:
            missing.append(need)
    return missing


def packed_head(head: Head | None) -> dict[str, Any] | None:
    """A head as plain values and tensors."""
    if head is None:
        return None
    tensors = {"weight": head.weight, "bias": head.bias}
    return {
        "normalize_weight": head.normalize_weight,
        "normalize_features": head.normalize_features,
        "scale": float(head.scale),
        "tensors": {name: value for name, value in tensors.items() if value is not None},
    }


def unpacked_head(packed: dict[str, Any] | None) -> Head | None:
    """The head that ``packed_head`` described."""
    if packed is None:
        return None
    return Head(
        packed["tensors"]["weight"],
        packed["tensors"].get("bias"),
        packed["normalize_weight"],
        packed["normalize_features"],
        packed["scale"],
    )
