"""Passes over data: a model sees each row once, however many detectors are fitted or scored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from oodcore.cache import CachedModel
from oodcore.component import canonical
from oodcore.data import Batch, Stream
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import FeatureModel
from oodcore.features import Features, Rerun
from oodcore.fitting import Fitting
from oodcore.progress import track
from oodcore.recipe import Learnt, scored, shaped

if TYPE_CHECKING:
    from oodcore.detector import Detector

Array = np.ndarray[Any, Any]
Classes = int | Sequence[int] | None
Watch = Callable[[Sequence[str], Features], None]
"""What looks on while rows pass: at the names of the detectors of a model, and a batch of its
features, before any shaper."""


def fit(
    detectors: Mapping[str, Detector],
    data: Any,
    held_out: Any = None,
    *,
    classes: Classes = None,
    watch: Watch | None = None,
) -> None:
    """Fit many detectors in the same passes: a model sees each row once, however many use it.

    Args:
        detectors: by name; those that share a model share its passes.
        data: as in ``Detector.fit``.
        held_out: as in ``Detector.fit``.
        classes: as in ``Detector.fit``.
        watch: looks at the rows to fit on as they go by, once each.

    Raises:
        ConfigurationError, DataError: as ``Detector.fit``; no detector is changed then.
    """
    if data is None:
        raise DataError(
            "there are no rows to fit on: give in-distribution ones, in a configuration as 'train'"
        )
    groups = by_model(detectors)
    _refuse_reading_twice(groups, data, held_out)
    done = []
    for group in groups:
        reader = _reader(group, fitting=True)
        count = class_number(classes)
        if count is None:
            count = _largest_label(data, reader)
        recipes = {name: detector.recipe for name, detector in group.items()}
        fitting = Fitting(recipes, count, held_out is not None)
        _fold([fitting], reader, data, held_out, _named(watch, group))
        learnt = fitting.finish(_reread(fitting, reader, data, held_out))
        weights = reader.weights()
        done += [(group[name], learnt[name], fitting, name, weights) for name in group]
    for detector, of_one, fitting, name, weights in done:
        detector.take(of_one, fitting, name, weights)


def partial_fit(
    detectors: Mapping[str, Detector], data: Any, held_out: Any = None, *, classes: Classes = None
) -> None:
    """Go on fitting many detectors in the same passes; none is changed where one fails.

    Arguments and errors as in ``Detector.partial_fit``.
    """
    groups = [part for group in by_model(detectors) for part in _equally_far(group)]
    _refuse_reading_twice(groups, data, held_out)
    done = []
    for group in groups:
        reader = _reader(group, fitting=True)
        count = class_number(classes)
        fittings = {name: d.going_on(count, held_out is not None) for name, d in group.items()}
        _fold(list(fittings.values()), reader, data, held_out)
        for name, detector in group.items():
            fitting, weights = fittings[name], detector.fingerprint or reader.weights()
            done.append((detector, fitting.finish()[detector.name], fitting, weights))
    for detector, learnt, fitting, weights in done:
        detector.take(learnt, fitting, detector.name, weights)


def _equally_far(group: Mapping[str, Detector]) -> list[dict[str, Detector]]:
    """The detectors of a group by how many rows they have seen, which decides the next id."""
    parts: dict[tuple[int, int], dict[str, Detector]] = {}
    for name, detector in group.items():
        fitting = detector.fitting
        seen = (0, 0) if fitting is None else (fitting.rows, fitting.held_rows)
        parts.setdefault(seen, {})[name] = detector
    return list(parts.values())


def score(
    detectors: Mapping[str, Detector],
    data: Any,
    spent: dict[str, float] | None = None,
    watch: Watch | None = None,
) -> dict[str, Array]:
    """The scores of many detectors, ``[N]`` float64 each, from one pass of each model.

    Args:
        detectors: by name.
        data: as in ``Detector.score``.
        spent: to which the seconds are added that each detector's scorer takes.
        watch: looks at the rows as they go by, once each.

    Raises:
        NotFittedError: a detector that has not learnt what it needs.
        DataError: rows that cannot be scored.
    """
    return _numpy(_scores(by_model(detectors), data, spent, watch))


@dataclass(frozen=True)
class Seen:
    """What a pass over labelled rows shows, by detector's name.

    ``accuracy`` is over the rows with a label; ``correct [N]`` says of each row whether its label
    was predicted, and is there where all rows have one.
    """

    scores: Mapping[str, Array]
    accuracy: Mapping[str, float]
    correct: Mapping[str, Array]


def score_labelled(
    detectors: Mapping[str, Detector],
    data: Any,
    spent: dict[str, float] | None = None,
    watch: Watch | None = None,
) -> Seen:
    """Scores, and which rows each detector's model classifies as labelled.

    Where the rows have no labels or the model no logits, there is no accuracy. Arguments as in
    ``score``.
    """
    scores: dict[str, Array] = {}
    accuracy: dict[str, float] = {}
    right: dict[str, Array] = {}
    groups = by_model(detectors)
    _refuse_reading_twice(groups, data)
    for group in groups:
        correct: list[Tensor] = []

        def look(names: Sequence[str], features: Features, correct: list[Tensor] = correct) -> None:
            if watch is not None:
                watch(names, features)
            if features.labels is not None and features.logits is not None:
                correct.append((features.predicted == features.labels).cpu())

        scores.update(_numpy(_scores([group], data, spent, look)))
        if correct:
            every = torch.cat(correct).numpy()
            accuracy.update(dict.fromkeys(group, float(every.mean())))
            if len(every) == len(scores[next(iter(group))]):
                right.update(dict.fromkeys(group, every))
    return Seen({name: scores[name] for name in detectors}, accuracy, right)


def _scores(
    groups: list[dict[str, Detector]],
    data: Any,
    spent: dict[str, float] | None = None,
    watch: Watch | None = None,
) -> dict[str, list[Tensor]]:
    _refuse_reading_twice(groups, data)
    columns: dict[str, list[Tensor]] = {name: [] for group in groups for name in group}
    for group in groups:
        learnt = {name: detector.ready() for name, detector in group.items()}
        places = {name: detector.place(learnt[name]) for name, detector in group.items()}
        needs = frozenset[str]().union(*(d.recipe.needs() for d in group.values()))
        for features in features_of(_reader(group), data, needs, "scoring"):
            shared: dict[str, Features] = {}
            for name, detector in group.items():
                detector.check_shape(features)
                place = places[name]
                if place not in shared:
                    shared[place] = shaped(features, detector.shapers, learnt[name].shapers)
                began = time.perf_counter()
                with torch.no_grad():
                    scores = scored(shared[place], detector.recipe, learnt[name])
                columns[name].append(scores.cpu())
                if spent is not None:
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            if watch is not None:
                watch(list(group), features)
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
    own = detector.model
    model: FeatureModel | CachedModel | None = own
    if own is not None and detector.cache is not None:
        model = detector.cache.of(own, detector.extractor, inputs="inputs" in needs)
    for batch in track(stream, title, stream.rows):
        with torch.no_grad():
            features = _features(model, batch)
            if "inputs" not in needs:
                features = replace(features, inputs=None, rerun=None)
            elif features.rerun is not None:
                features = replace(features, rerun=_wide(features.rerun))
            features = features.double().check_finite("features")
        for name in ("embeddings", "logits"):
            value = getattr(features, name)
            if value is not None and value.shape[1] == 0:
                raise DataError(f"the {name} have no columns")
        yield features


def _wide(road: Rerun) -> Rerun:
    def wide(inputs: Any, edit: Any = None) -> Features:
        return replace(road(inputs, edit=edit).double(), rerun=wide)

    return wide


def _features(model: FeatureModel | CachedModel | None, batch: Batch | Features) -> Features:
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


def _named(watch: Watch | None, group: Mapping[str, Detector]) -> Callable[[Features], None]:
    """What looks at the features of one group."""
    names = list(group)
    return lambda features: None if watch is None else watch(names, features)


def _fold(
    fittings: list[Fitting],
    reader: Detector,
    data: Any,
    held_out: Any,
    look: Callable[[Features], None] = lambda features: None,
) -> None:
    """Stream data (and held-out rows) through a model into fittings that are equally far."""
    needs = frozenset[str]().union(*(fitting.needs() for fitting in fittings))
    for features in features_of(reader, data, needs, "fitting", fittings[0].rows):
        for fitting in fittings:
            fitting.update(features)
        look(features)
    if held_out is not None and any(fitting.holds_out for fitting in fittings):
        for features in features_of(reader, held_out, needs, "measuring", fittings[0].held_rows):
            for fitting in fittings:
                fitting.update_held_out(features)


def _reread(
    fitting: Fitting, detector: Detector, data: Any, held_out: Any
) -> Callable[[bool], Iterator[Features]]:
    def reread(apart: bool) -> Iterator[Features]:
        rows = held_out if apart else data
        if not Stream(rows, adapt=detector.adapt).repeatable:
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
    return one.identity() == two.identity()


def _reader(group: Mapping[str, Detector], *, fitting: bool = False) -> Detector:
    """The group's first detector, with a model that captures the layers that any of them needs."""
    names = {need for d in group.values() for need in d.recipe.needs(fitting=fitting)}
    layers = sorted(name.partition(".")[2] for name in names if name.startswith("layers."))
    reader = next(iter(group.values())).reading(layers)
    reader.cache = next((d.cache for d in group.values() if d.cache is not None), None)
    return reader


def _refuse_reading_twice(groups: list[dict[str, Detector]], *data: Any) -> None:
    adapt = next(iter(groups[0].values())).adapt if groups else None
    if len(groups) > 1 and not all(
        rows is None or Stream(rows, adapt=adapt).repeatable for rows in data
    ):
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
    """K from the labels of all rows, where no logits tell it and the data can be read twice.

    Raises:
        ConfigurationError: numbers so large that they can hardly be those of classes.
    """
    if detector.model is not None and "logits" in detector.model.gives:
        return None
    stream = Stream(data, adapt=detector.adapt)
    if not stream.repeatable:
        return None
    largest, rows = -1, 0
    for batch in stream:
        rows += len(batch)
        if batch.labels is not None:
            largest = max(largest, int(batch.labels.max()))
    if largest >= max(rows, MANY_CLASSES):
        raise ConfigurationError(
            f"the largest label of {rows} rows is {largest}, and labels are the classes' numbers "
            f"0..K-1; number them so, or give classes={largest + 1} if that is meant"
        )
    return max(largest + 1, 1)


MANY_CLASSES = 1000
"""More classes than rows are taken for a mistake from here on: statistics hold numbers of each."""


def place_of(detector: Detector, learnt: Learnt) -> str:
    """The same for detectors that shape features alike: the same shapers, in the same states."""
    source: Any = detector.fitting
    if source is None and any(learnt.shapers):
        source = learnt
    shapers = [shaper.dump() for shaper in detector.shapers]
    return canonical([shapers, learnt.record.get("held_out"), id(source)])
