"""Trials: what sets of values are worth on validation rows, which the model sees once."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodcore.cache import Cache
from oodcore.component import Component
from oodcore.data import Apart, Batch, Stream
from oodcore.detector import Detector
from oodcore.errors import ConfigurationError, DataError, OodcoreError
from oodcore.features import Features
from oodcore.metrics import METRICS, measures
from oodcore.passes import Classes, features_of, fit, score
from oodcore.plugins import registry
from oodcore.progress import watching
from oodcore.recipe import Recipe
from oodcore.scorer import Scorer, Shaper, check_recipe
from oodcore.spool import Spool

REFUSED = -2.0
"""Below the merit of every trial that has a value, which is in [-1, 1]."""


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and on what.

    Args:
        model: as in ``Detector``.
        scorer: the method, with the values that are tried first.
        shapers: what reshapes features before it.
        train: in-distribution rows to fit on.
        validation: in-distribution rows to choose on; None for ``held_out``, or a tenth of
            ``train``.
        ood: rows that are not in-distribution, by name; None for noise.
        held_out: as in ``Detector.fit``.
        metric: one of ``oodcore.metrics.SEPARATION``.
        classes: as in ``Detector.fit``.
        taken: sources with another part to play, which noise must not equal.
        options: of the detector: device, batch_size, num_workers, seed, adapt, cache.
    """

    model: Any
    scorer: Scorer
    shapers: tuple[Shaper, ...]
    train: Any
    validation: Any = None
    ood: Mapping[str, Any] | None = None
    held_out: Any = None
    metric: str = "auroc"
    classes: Classes = None
    taken: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """A set of values, and what came of it.

    Args:
        values: by place, as in ``scorer.k``.
        value: the mean of the metric over the OOD sets; None where the values were refused.
        error: why they were.
        warnings: what was said meanwhile.
    """

    values: Mapping[str, Any]
    value: float | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()

    def dump(self) -> dict[str, Any]:
        """The trial as plain JSON values."""
        told: dict[str, Any] = {"values": dict(self.values), "value": self.value}
        if self.error is not None:
            told["error"] = self.error
        return {**told, "warnings": list(self.warnings)} if self.warnings else told


@dataclass(frozen=True)
class _Rows:
    """What is fitted on, measured on and chosen on."""

    train: Any
    held_out: Any
    validation: Any
    ood: Mapping[str, Any]

    def each(self, change: Callable[[str, Any], Any]) -> _Rows:
        return _Rows(
            change("train", self.train),
            None if self.held_out is None else change("held_out", self.held_out),
            change("validation", self.validation),
            {name: change(f"ood '{name}'", rows) for name, rows in self.ood.items()},
        )


class Trials:
    """Fits and scores recipes. The model sees each row once, in the beginning.

    Methods that pass through the model again get its features from the cache (one of their own, if
    there is none), and ask it for those passes.

    Args:
        tuning: what is tuned, and on what.
        stack: what is cleared up in the end.

    Raises:
        ConfigurationError, DataError: as ``oodcore.tuning.tune``.
    """

    def __init__(self, tuning: Tuning, stack: ExitStack) -> None:
        self._tuning = tuning
        self._base = Detector(
            tuning.model, scorer=tuning.scorer, shapers=tuning.shapers, **tuning.options
        )
        self._again = "inputs" in self._base.recipe.needs(fitting=True)
        if self._again and self._base.cache is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="oodcore-"))
            self._base.cache = Cache(folder)
        self._of_features = Detector(
            scorer=tuning.scorer, shapers=tuning.shapers, seed=self._base.recipe.seed
        )
        rows = _divided(tuning, self._base)
        self.data = {
            "train": _shown(tuning.train),
            "id": _shown(rows.validation),
            "ood": {name: _shown(each) for name, each in rows.ood.items()},
        }
        if tuning.ood is None and self._base.adapt is not None:
            ood = {name: _unadapted(source, self._base) for name, source in rows.ood.items()}
            rows = replace(rows, ood=ood)
        self._rows = rows.each(self._repeatable if self._again else self._seen)
        self.first_error: OodcoreError | None = None

    def run(
        self, values: Mapping[str, Any], build: Callable[[], tuple[Scorer, tuple[Shaper, ...]]]
    ) -> Trial:
        """What comes of some values; ``build`` makes the scorer and the shapers that have them."""
        value = error = None
        with warnings.catch_warnings(record=True) as said, watching(lambda rows, *_: rows):
            warnings.simplefilter("always")
            try:
                value = self._value(*build())
            except OodcoreError as refused:
                self.first_error = self.first_error or refused
                error = f"{type(refused).__name__}: {refused}"
        texts = dict.fromkeys(" ".join(str(one.message).split()) for one in said)
        return Trial(values, value, error, tuple(texts))

    def merit(self, trial: Trial) -> float:
        """The value of a trial, such that higher is better, and refused is worst."""
        if trial.value is None:
            return REFUSED
        return trial.value if METRICS[self._tuning.metric].better == "higher" else -trial.value

    def _value(self, scorer: Scorer, shapers: tuple[Shaper, ...]) -> float:
        check_recipe(scorer, shapers)
        detector = copy.copy(self._base if self._again else self._of_features)
        detector.recipe = Recipe(scorer, shapers, self._base.recipe.seed)
        one, rows = {"trial": detector}, self._rows
        held_out = rows.held_out if detector.recipe.holds_out else None
        fit(one, rows.train, held_out, classes=self._tuning.classes)
        normal = score(one, rows.validation)["trial"]
        strange = [score(one, each)["trial"] for each in rows.ood.values()]
        return float(np.mean([measures(normal, each)[self._tuning.metric] for each in strange]))

    def _seen(self, name: str, data: Any) -> _Again:
        """The features of some rows, in memory up to a limit and memory-mapped past it."""
        needs = self._base.recipe.needs(fitting=True)
        layers = sorted(need.partition(".")[2] for need in needs if need.startswith("layers."))
        reader, spool = self._base.reading(layers), Spool()
        device = torch.device("cpu")
        for features in features_of(reader, data, needs, f"reading {name}"):
            device = features.device
            spool.append(features)
        if not len(spool):
            raise DataError(f"there is no row in {name}")
        return _Again(lambda: spool.batches(device))

    def _repeatable(self, name: str, data: Any) -> Any:
        if not Stream(data, adapt=self._base.adapt).repeatable:
            raise DataError(
                f"every trial passes {name} through the model again, and it cannot be read twice "
                "in the same order: give a Dataset or arrays"
            )
        return data


class _Again:
    """Batches that are made anew whenever they are read."""

    def __init__(self, batches: Callable[[], Iterator[Batch | Features]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch | Features]:
        return self._batches()


def _divided(tuning: Tuning, base: Detector) -> _Rows:
    """The rows for each purpose, of those that were given.

    Raises:
        ConfigurationError: rows that are fitted on and chosen on; nothing to make noise like.
        DataError: rows that a tenth cannot be set apart from.
    """
    options = {
        "batch_size": base.batch_size,
        "num_workers": base.num_workers,
        "adapt": base.adapt,
    }
    train, validation, held_out = tuning.train, tuning.validation, tuning.held_out
    for name, given in {"validation": validation, **(tuning.ood or {})}.items():
        if given is not None and _same(given, train):
            raise ConfigurationError(
                f"{name} is what is fitted on: choose values on rows that have no other part to "
                "play"
            )
    if validation is None and held_out is not None:
        # What is measured on held-out rows is measured on a tenth of the others.
        validation, held_out = held_out, None
    elif validation is None:
        if not Stream(train, adapt=base.adapt).repeatable:
            raise DataError(
                "a tenth of train is to be set apart, and it cannot be read twice in the same "
                "order: give a Dataset or arrays, or validation rows"
            )
        # Not with the seed itself, for detectors hold out the tenth that it names.
        train, validation = (
            Apart(tuning.train, base.recipe.seed + 1, inside=inside, **options)
            for inside in (False, True)
        )
    ood = tuning.ood
    if ood is not None and not ood:
        raise ConfigurationError("ood names no rows; leave it out to choose against noise")
    if ood is None:
        ood = {"noise": _noise(validation, tuning, base)}
    return _Rows(train, held_out, validation, ood)


def _unadapted(source: Any, base: Detector) -> _Again:
    """The batches of a source that is not the caller's, and so no matter for ``adapt``."""
    size, workers = base.batch_size, base.num_workers
    return _Again(lambda: iter(Stream(source, batch_size=size, num_workers=workers)))


def _noise(validation: Any, tuning: Tuning, base: Detector) -> Any:
    """Noise in the shape of images, which is none of the rows that have another part to play."""
    stream = Stream(validation, batch_size=base.batch_size, adapt=base.adapt)
    first = next(iter(stream), None) if stream.repeatable else None
    inputs = first.inputs if isinstance(first, Batch) else None
    if not isinstance(inputs, Tensor) or inputs.ndim != 4:
        raise ConfigurationError(
            "without ood rows values are chosen against noise, which is made for images "
            "[C, H, W] that can be read twice; give ood rows to choose on"
        )
    seed = base.recipe.seed + 1
    while True:
        spec = {"kind": "noise", "shape": list(inputs.shape[1:]), "seed": seed}
        source = registry.build("source", spec)
        if not any(_same(source, other) for other in tuning.taken):
            return source
        seed += 1


def _same(one: Any, other: Any) -> bool:
    """Whether two things are the same rows, as far as their names tell."""
    if one is other:
        return True
    one, other = (
        registry.build("source", each)
        if isinstance(each, str) or (isinstance(each, Mapping) and "kind" in each)
        else each
        for each in (one, other)
    )
    return isinstance(one, Component) and one == other


def _shown(data: Any) -> Any:
    """Rows in words: a source's configuration, else what they are."""
    if isinstance(data, Component):
        return data.dump()
    if isinstance(data, Apart):
        return "a tenth of train"
    if isinstance(data, str | Mapping):
        return _shown(registry.build("source", data)) if "kind" in data else str(type(data))
    return type(data).__name__
