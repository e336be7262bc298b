"""Splits: a study divided by classes, one study for each open-set split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from oodcore.data import Adapt, Batch, Source, Stream, rows_of
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features
from oodcore.open_set import CHOOSES, UNKNOWN, OpenSet, Split
from oodcore.plugins import registry

if TYPE_CHECKING:
    from oodcore.detector import Detector
    from oodcore.evaluation import Study


def divided(study: Study) -> dict[str, Study]:
    """The study of each split by its name; the study itself, under "", where nothing is divided.

    Raises:
        ConfigurationError: a source that chooses classes itself, or models that do not go with the
            splits.
        DataError: data that can be read only once.
    """
    protocol = study.protocol
    if not isinstance(protocol, OpenSet):
        return {"": study}
    adapt = study.options.get("adapt")
    known_sets = ("train", "held_out", "calibrate", "id_test")
    studies = {}
    for name, split in protocol.splits.items():
        known = {
            title: restricted(rows, split.known, title, adapt)
            for title in known_sets
            if (rows := getattr(study, title)) is not None
        }
        unknown = restricted(study.id_test, protocol.unknown(name), "id_test", adapt)
        studies[name] = replace(
            study,
            models=_models(study, protocol, name, split),
            ood={UNKNOWN: unknown, **study.ood},
            classes=len(split.known),
            **known,
        )
    return studies


def check_outputs(name: str, study: Study, detectors: Iterable[Detector]) -> None:
    """Raise a ConfigurationError where a model of a split does not know its classes, one for one.

    Its predictions would be compared with labels that mean something else.
    """
    if not isinstance(study.protocol, OpenSet):
        return
    known = len(study.protocol.splits[name].known)
    for detector in detectors:
        outputs = detector.shape.get("K")
        if outputs is not None and outputs != known:
            raise ConfigurationError(
                f"the split {name} knows {known} classes, and its model has {outputs} outputs: "
                "give one that was trained on the known classes, in the order of 'known'"
            )


def restricted(data: Any, classes: Sequence[int], name: str, adapt: Adapt | None = None) -> Any:
    """The rows of some classes, labelled by their label's position among them; ids stay.

    Args:
        data: as a ``Stream`` takes it, with labels.
        classes: the labels to keep.
        name: what to call the data in an error.
        adapt: of the stream.

    Raises:
        ConfigurationError: a source that chooses classes itself.
        DataError: data that can be read only once.
    """
    if isinstance(data, str) or (isinstance(data, Mapping) and "kind" in data):
        data = registry.build("source", data)
    if isinstance(data, Source) and "classes" in type(data).model_fields:
        if getattr(data, "classes", None) is not None:
            raise ConfigurationError(f"{name}: {CHOOSES}")
        return data.model_copy(update={"classes": tuple(classes)})
    if not Stream(data, adapt=adapt).repeatable:
        raise DataError(f"{name} is read for every split: give a Dataset, a Source or arrays")
    return _OfClasses(data, classes, name, adapt)


class _OfClasses:
    """The batches of some data with the rows of some classes alone."""

    def __init__(self, data: Any, classes: Sequence[int], name: str, adapt: Adapt | None) -> None:
        self._data, self._classes, self._name, self._adapt = data, list(classes), name, adapt

    def __iter__(self) -> Iterator[Batch | Features]:
        wanted = torch.tensor(self._classes)
        found = 0
        for batch in Stream(self._data, adapt=self._adapt):
            if batch.labels is None:
                raise DataError(f"{self._name} has rows without a label, so no class can be chosen")
            match = batch.labels.cpu()[:, None] == wanted
            rows = match.any(1).nonzero().flatten()
            chosen = batch[rows] if isinstance(batch, Features) else rows_of(batch, rows)
            assert chosen.labels is not None
            labels = match[rows].long().argmax(1).to(chosen.labels.device)
            found += len(rows)
            yield replace(chosen, labels=labels)
        if not found:
            raise DataError(f"{self._name} has no row of the classes {self._classes}")


def _models(study: Study, protocol: OpenSet, name: str, split: Split) -> Mapping[str, Any]:
    """The models of a split: its own, else the study's of that name, else the only one there is."""
    given = study.models
    alone = list(given) == [""]
    own = split.models or ({} if split.extractor is None else {"": split.extractor})
    if own:
        if not (alone and given[""] is None):
            raise ConfigurationError(
                f"protocol.splits.{name} brings its own model; leave out the benchmark's"
            )
        return own
    if alone:
        return given
    if set(given) != set(protocol.splits):
        raise ConfigurationError(
            f"with the protocol open_set, models are one for each split "
            f"({', '.join(protocol.splits)}), not for {', '.join(given)}; several models of a "
            f"split stand in its own 'models'"
        )
    model = given[name]
    several = isinstance(model, Mapping) and "kind" not in model
    return model if several else {"": model}
