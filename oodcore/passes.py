"""Passes over data: a model sees each row once, however many detectors are fitted or scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oodcore.component import canonical
from oodcore.data import Batch, Stream
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import FeatureModel
from oodcore.features import Features, Rerun
from oodcore.fitting import Fitting
from oodcore.progress import track
from oodcore.recipe import scored, shaped

if TYPE_CHECKING:
    from oodcore.detector import Detector

Array = np.ndarray[Any, Any]
Classes = int | Sequence[int] | None


def fit(
    detectors: Mapping[str, Detector], data: Any, held_out: Any = None, *, classes: Classes = None
) -> None:
    """Fit many detectors in the same passes: a model sees each row once, however many use it.

    Args:
        detectors: by name; those that share a model share its passes.
        data: as in ``Detector.fit``.
        held_out: as in ``Detector.fit``.
        classes: as in ``Detector.fit``.

    Raises:
        ConfigurationError, DataError: as ``Detector.fit``; no detector is changed then.
    """
    groups = by_model(detectors)
    _refuse_reading_twice(groups, data, held_out)
    done = []
    for group in groups:
        first = _with_layers(group)
        count = class_number(classes)
        if count is None:
            count = _largest_label(data, first)
        recipes = {name: detector.recipe for name, detector in group.items()}
        fitting = Fitting(recipes, count, held_out is not None)
        fold(fitting, first, data, held_out)
        learnt = fitting.finish(_reread(fitting, first, data, held_out))
        done += [(group[name], learnt[name], fitting, name) for name in group]
    for detector, learnt_by_one, fitting, name in done:
        detector.take(learnt_by_one, fitting, name)


def score(detectors: Mapping[str, Detector], data: Any) -> dict[str, Array]:
    """The scores of many detectors, ``[N]`` float64 each, from one pass of each model.

    Raises:
        NotFittedError: a detector that has not learnt what it needs.
        DataError: rows that cannot be scored.
    """
    return _numpy(_scores(by_model(detectors), data, lambda _features: None))


@dataclass(frozen=True)
class Seen:
    """What a pass over labelled rows shows: scores by detector, accuracy by detector's name."""

    scores: Mapping[str, Array]
    accuracy: Mapping[str, float]


def score_labelled(detectors: Mapping[str, Detector], data: Any) -> Seen:
    """Scores, and the share of rows that each detector's model classifies as labelled.

    Where the rows have no labels or the model no logits, there is no accuracy.
    """
    scores: dict[str, Array] = {}
    accuracy: dict[str, float] = {}
    groups = by_model(detectors)
    _refuse_reading_twice(groups, data)
    for group in groups:
        correct: list[Tensor] = []

        def look(features: Features, correct: list[Tensor] = correct) -> None:
            if features.labels is not None and features.logits is not None:
                correct.append((features.predicted == features.labels).cpu())

        scores.update(_numpy(_scores([group], data, look)))
        if correct:
            share = float(torch.cat(correct).double().mean())
            accuracy.update(dict.fromkeys(group, share))
    return Seen({name: scores[name] for name in detectors}, accuracy)


def _scores(
    groups: list[dict[str, Detector]], data: Any, look: Callable[[Features], None]
) -> dict[str, list[Tensor]]:
    _refuse_reading_twice(groups, data)
    columns: dict[str, list[Tensor]] = {name: [] for group in groups for name in group}
    for group in groups:
        first = _with_layers(group)
        learnt = {name: detector.ready() for name, detector in group.items()}
        needs = frozenset[str]().union(*(d.recipe.needs() for d in group.values()))
        for features in features_of(first, data, needs, "scoring"):
            look(features)
            shared: dict[str, Features] = {}
            for name, detector in group.items():
                detector.check_shape(features)
                place = detector.place(learnt[name])
                if place not in shared:
                    shared[place] = shaped(features, detector.shapers, learnt[name].shapers)
                with torch.no_grad():
                    scores = scored(shared[place], detector.recipe, learnt[name])
                columns[name].append(scores.cpu())
    return columns


def _numpy(columns: Mapping[str, list[Tensor]]) -> dict[str, Array]:
    return {
        name: torch.cat(parts).numpy() if parts else np.zeros(0) for name, parts in columns.items()
    }


def features_of(
    detector: Detector, data: Any, needs: frozenset[str], title: str, start: int = 0
) -> Iterator[Features]:
    """The features of data, float64 and finite, with labels and ids; inputs only where needed."""
    stream = Stream(
        data,
        batch_size=detector.batch_size,
        num_workers=detector.num_workers,
        adapt=detector.adapt,
        start=start,
    )
    model = detector.model
    for batch in track(stream, title, stream.rows):
        with torch.no_grad():
            features = _features(model, batch)
            if "inputs" not in needs:
                features = replace(features, inputs=None, rerun=None)
            elif features.rerun is not None:
                features = replace(features, rerun=_wide(features.rerun))
            features = features.double().check_finite("features")
        yield features


def _wide(road: Rerun) -> Rerun:
    return lambda inputs, edit=None: road(inputs, edit=edit).double()


def _features(model: FeatureModel | None, batch: Batch | Features) -> Features:
    if isinstance(batch, Features):
        return batch
    if model is not None:
        features = model.forward(batch.inputs)
        return replace(
            features,
            labels=None if batch.labels is None else batch.labels.to(features.device),
            ids=None if batch.ids is None else batch.ids.to(features.device),
        )
    if not isinstance(batch.inputs, Tensor) or batch.inputs.ndim != 2:
        given = list(batch.inputs.shape) if isinstance(batch.inputs, Tensor) else "no tensor"
        raise DataError(
            f"a detector without a model takes embeddings [N, D] or Features, not {given}; "
            "give a model to score anything else"
        )
    return Features(embeddings=batch.inputs.double(), labels=batch.labels, ids=batch.ids)


def fold(fitting: Fitting, detector: Detector, data: Any, held_out: Any) -> None:
    """Stream data (and held-out rows) through a detector's model into a fitting."""
    needs = fitting.needs()
    for features in features_of(detector, data, needs, "fitting", start=fitting.rows):
        fitting.update(features)
    if held_out is not None:
        for features in features_of(detector, held_out, needs, "measuring", fitting.held_rows):
            fitting.update_held_out(features)


def _reread(
    fitting: Fitting, detector: Detector, data: Any, held_out: Any
) -> Callable[[bool], Iterator[Features]]:
    def reread(apart: bool) -> Iterator[Features]:
        rows = held_out if apart else data
        if not Stream(rows).repeatable:
            raise DataError(
                "a part of this scorer is measured through the model, so the data is read again: "
                "give data that comes in the same order twice (a Dataset, arrays)"
            )
        return features_of(detector, rows, fitting.needs(), "measuring")

    return reread


def by_model(detectors: Mapping[str, Detector]) -> list[dict[str, Detector]]:
    """Detectors in groups that can share the passes of one model."""
    groups: list[dict[str, Detector]] = []
    for name, detector in detectors.items():
        for group in groups:
            if _same_model(detector, next(iter(group.values()))):
                group[name] = detector
                break
        else:
            groups.append({name: detector})
    return groups


def _same_model(a: Detector, b: Detector) -> bool:
    if a is b:
        return True
    if a.adapt is not b.adapt or a.extractor != b.extractor or a.device != b.device:
        return False
    if a.extractor is not None:
        return True
    one, two = a.model, b.model
    if one is None or two is None:
        return one is two
    heads = one.head is two.head or (isinstance(one.head, str) and one.head == two.head)
    return one.module is two.module and heads and one.preprocess == two.preprocess


def _with_layers(group: Mapping[str, Detector]) -> Detector:
    """The group's first detector, its model capturing the layers that any of the group needs."""
    first = next(iter(group.values()))
    names = {need for other in group.values() for need in other.recipe.needs(fitting=True)}
    first.capture(sorted(n.partition(".")[2] for n in names if n.startswith("layers.")))
    return first


def _refuse_reading_twice(groups: list[dict[str, Detector]], *data: Any) -> None:
    if len(groups) > 1 and not all(rows is None or Stream(rows).repeatable for rows in data):
        raise DataError(
            f"{len(groups)} models read this data, and it cannot be read twice in the same order; "
            "give a Dataset or arrays"
        )


def class_number(classes: Classes) -> int | None:
    """K, from K itself or from the classes ``0..K-1``.

    Raises:
        ConfigurationError: classes that are not ``0..K-1``.
    """
    if classes is None or isinstance(classes, int):
        return classes
    numbers = sorted(int(label) for label in classes)
    if numbers != list(range(len(numbers))):
        raise ConfigurationError(f"classes must be 0..K-1, not {numbers[:10]}")
    return len(numbers)


def _largest_label(data: Any, detector: Detector) -> int | None:
    """K from the labels of all rows, where there is no model to tell it."""
    stream = Stream(data, adapt=detector.adapt)
    if detector.model is not None or not stream.repeatable:
        return None
    labels = [batch.labels for batch in stream]
    return 1 + max((int(y.max()) for y in labels if y is not None), default=0)


def place_of(shapers: Sequence[Any], held_out: Any, fitting: Any) -> str:
    """The same for detectors that were fitted together and shape features alike."""
    return canonical([[shaper.dump() for shaper in shapers], held_out, id(fitting)])
