"""Evaluation: many detectors on many data sets, in one pass."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from oodcore.cache import Cache
from oodcore.calibration import Calibration, check_rows
from oodcore.candidates import Contender
from oodcore.config import BenchmarkConfig, candidates, read, validate
from oodcore.data import Adapt, Batch, Stream
from oodcore.detector import Detector
from oodcore.errors import ConfigurationError
from oodcore.extractor import Extractor
from oodcore.features import Features
from oodcore.packing import versions
from oodcore.participants import Contestant, detectors_of, participants
from oodcore.passes import Array, Classes, fit, score, score_labelled
from oodcore.picture import Album, Picture
from oodcore.protocol import Protocol
from oodcore.protocols import Separation, protocol_of
from oodcore.provenance import cited, configuration, described, methods, taking_part
from oodcore.results import Entry, Results, Scored
from oodcore.splits import check_outputs, divided

log = logging.getLogger("oodcore")


@dataclass(frozen=True)
class Study:
    """What is compared, and on what.

    Args:
        models: by name; a single one may have the name "".
        candidates: the detectors of each model, and the ensembles.
        train: in-distribution rows to fit on.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name.
        held_out: in-distribution rows for what is measured on rows that nothing was fitted on.
        calibrate: in-distribution rows for thresholds.
        groups: names of OOD sets that are averaged, by the group's name.
        false_alarm_rate: the share of in-distribution inputs that may be flagged.
        protocol: what is measured.
        classes: K, where neither logits nor whole arrays tell.
        installed: whether the candidates are all there are, so that those that these models and
            data cannot serve are left out.
        options: of every detector: device, batch_size, num_workers, seed, adapt, cache.
    """

    models: Mapping[str, Any]
    candidates: tuple[Contender, ...]
    train: Any
    id_test: Any
    ood: Mapping[str, Any]
    held_out: Any = None
    calibrate: Any = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    false_alarm_rate: float = 0.05
    protocol: Protocol = field(default_factory=Separation)
    classes: Classes = None
    installed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a study found, and all that was compared, fitted and (with rows for it) calibrated."""

    results: Results
    detectors: Mapping[str, Contestant]


def benchmark(
    model: Any = None,
    *,
    train: Any,
    id_test: Any,
    ood: Mapping[str, Any] | None = None,
    scorers: Any = "installed",
    shapers: Sequence[Any] = (),
    held_out: Any = None,
    calibrate: Any = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    false_alarm_rate: float = 0.05,
    protocol: Any = "separation",
    classes: Classes = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    seed: int = 0,
    adapt: Adapt | None = None,
    cache: str | Path | Cache | None = None,
) -> Results:
    """Fit many detectors, and measure each on every data set; a model sees each row once.

    Args:
        model: as in ``Detector``, or a mapping from names to models: everything is done for each.
            With open-set splits, the names are the splits'.
        train: in-distribution rows to fit on; data as in ``Detector.fit``.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name; nearly every protocol needs some.
        scorers: ``installed`` (every scorer that needs no field and gets what it reads), or a list;
            an item is a scorer as in ``Detector``, a mapping ``{name, shapers, scorer}``, or an
            ensemble, ``{name, members: {name: {model, shapers, scorer}}, combine}``.
        shapers: for every item that names none of its own.
        held_out: as in ``Detector.fit``.
        calibrate: in-distribution rows for thresholds; with them the false-alarm rate is measured.
        groups: names of OOD sets that are averaged, by the group's name.
        false_alarm_rate: the share of in-distribution inputs that may be flagged.
        protocol: what is measured, a kind or a mapping with a ``kind``: separation, openood,
            outlier_exposure, open_set, selective or ssb_osr.
        classes: as in ``Detector.fit``.
        device: as in ``Detector``; so are ``batch_size``, ``num_workers``, ``seed``, ``adapt`` and
            ``cache``.

    Returns:
        Results: one row for each detector, data set and metric, with figures and provenance.

    Raises:
        ConfigurationError: names or components that do not go together.
        DataError: as ``Detector.fit`` and ``Detector.score``.
    """
    several = isinstance(model, Mapping) and "kind" not in model
    study = Study(
        models=model if several else {"": model},
        candidates=candidates(scorers, shapers),
        train=train,
        id_test=id_test,
        ood=ood or {},
        held_out=held_out,
        calibrate=calibrate,
        groups=groups or {},
        false_alarm_rate=false_alarm_rate,
        protocol=protocol_of(protocol),
        classes=classes,
        installed=scorers == "installed",
        options={
            "device": device,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "seed": seed,
            "adapt": adapt,
            "cache": cache,
        },
    )
    return compare(study).results


def study_of(config: Any) -> Study:
    """The study that a YAML file (its path) or a mapping describes.

    Raises:
        ConfigurationError: names the file, the line and the field; trainings, which
            ``oodcore.experiment.carry_out`` takes.
    """
    document = read(config) if isinstance(config, str | Path) else config
    checked = validate(BenchmarkConfig, document)
    if checked.trainings:
        raise ConfigurationError(
            "trainings leave their models in a folder: use oodcore.experiment.carry_out, or "
            "'oodcore benchmark'"
        )
    return study_from(checked)


def study_from(checked: BenchmarkConfig, trained: Mapping[str, Extractor] | None = None) -> Study:
    """The study that a configuration describes.

    Args:
        checked: the configuration.
        trained: the models that its trainings leave, by name.
    """
    models = {**(checked.models or {}), **(trained or {})}
    return Study(
        models=models or {"": checked.extractor},
        candidates=checked.candidates(),
        train=checked.train,
        id_test=checked.id_test,
        ood=checked.ood or {},
        held_out=checked.held_out,
        calibrate=checked.calibrate,
        groups=checked.groups or {},
        false_alarm_rate=checked.false_alarm_rate,
        protocol=checked.protocol,
        installed=checked.scorers == "installed",
        options={
            "device": checked.device,
            "batch_size": checked.batch_size,
            "num_workers": checked.num_workers,
            "seed": checked.seed,
            "cache": checked.cache,
        },
    )


def compare(study: Study) -> Outcome:
    """Fit, calibrate and measure everything in a study.

    Where the protocol divides the classes, that is done for each split; the outcome's detectors are
    then called ``SPLIT/NAME``, and one that is left out of a split is left out of all.

    Raises:
        ConfigurationError: no detector is left, or names that do not go together.
        DataError: as ``Detector.fit`` and ``Detector.score``; too few rows for the protocol.
    """
    _refuse_early(study)
    seen = {}
    for name, part in divided(study).items():
        seen[name] = _observed(part)
        check_outputs(name, part, detectors_of(seen[name].detectors.values()))
    several = len(seen) > 1
    left_out = {
        f"{split}: {name}" if several else name: reason
        for split, one in seen.items()
        for name, reason in one.left_out.items()
    }
    first = next(iter(seen.values()))
    common = [name for name in first.detectors if all(name in o.detectors for o in seen.values())]
    if not common:
        raise ConfigurationError(f"no detector takes part in every split; left out: {left_out}")
    spent = {name: sum(one.spent[name] for one in seen.values()) for name in common}
    entries = [
        Entry(name, first.models[name], described(d), cited(d), round(spent[name], 6), methods(d))
        for name, d in ((name, first.detectors[name]) for name in common)
    ]
    detectors = {
        f"{split}/{name}" if several else name: one.detectors[name]
        for split, one in seen.items()
        for name in common
    }
    seconds = {
        what: round(sum(one.seconds[what] for one in seen.values()), 3) for what in first.seconds
    }
    plugins = versions(taking_part(study, detectors.values()))
    results = Results.from_splits(
        entries,
        {split: one.scored(common) for split, one in seen.items()},
        groups=_group_of(study),
        false_alarm_rate=None if study.calibrate is None else study.false_alarm_rate,
        protocol=study.protocol,
        configuration=configuration(study, left_out),
        provenance={"plugins": plugins, "seconds": seconds},
        pictures={e.model: first.pictures[e.model] for e in entries if e.model in first.pictures},
    )
    return Outcome(results, detectors)


@dataclass(frozen=True, eq=False)
class _Observed:
    """Detectors after a study, and all that they said; ``spent`` are their scorers' seconds."""

    detectors: Mapping[str, Contestant]
    models: Mapping[str, str]
    left_out: Mapping[str, str]
    scores: Mapping[str, Mapping[str, Array]]
    accuracy: Mapping[str, float]
    correct: Mapping[str, Array]
    spent: Mapping[str, float]
    seconds: Mapping[str, float]
    pictures: Mapping[str, Picture]

    def scored(self, names: Sequence[str]) -> Scored:
        """What some of the detectors said."""
        calibrations = {name: self.detectors[name].calibration for name in names}
        return Scored(
            {name: self.scores[name] for name in names},
            {self.models[n]: share for n, share in self.accuracy.items() if n in names},
            {self.models[n]: right for n, right in self.correct.items() if n in names},
            {name: one for name, one in calibrations.items() if one is not None},
        )


def _observed(study: Study) -> _Observed:
    """Fit, calibrate and score everything in a study whose classes are not divided further."""
    everyone = participants(study)
    seed = int(study.options.get("seed", 0))
    album = Album(seed)
    began = time.perf_counter()
    learn = partial(fit, data=study.train, held_out=study.held_out, classes=study.classes)
    try:
        learn(everyone.detectors, watch=album.training)
    except Exception as error:
        failed = _failing(everyone.detectors, study) if study.installed else {}
        if not failed or len(failed) == len(everyone.detectors):
            raise
        log.warning("left out of the comparison: %s", "; ".join(map(": ".join, failed.items())))
        log.debug("the comparison failed first", exc_info=error)
        everyone = everyone.without(failed)
        album = Album(seed)
        learn(everyone.detectors, watch=album.training)
    detectors, compared = everyone.detectors, everyone.fitted(seed)
    fitted = time.perf_counter()
    if study.calibrate is not None:
        for name, normal in everyone.scores(compared, score(detectors, study.calibrate)).items():
            calibration = Calibration(normal)
            calibration.threshold(study.false_alarm_rate)
            compared[name].calibration = calibration
            compared[name].false_alarm_rate = study.false_alarm_rate
    spent: dict[str, float] = {}
    seen = score_labelled(detectors, study.id_test, spent, album.of("id_test"))
    found = everyone.scores(compared, seen.scores)
    scores = {name: {"id_test": values} for name, values in found.items()}
    for title, rows in study.ood.items():
        said = score(detectors, rows, spent, album.of(title))
        for name, values in everyone.scores(compared, said).items():
            scores[name][title] = values
    return _Observed(
        compared,
        {name: everyone.models[name] for name in compared},
        everyone.left_out,
        scores,
        {n: seen.accuracy[d] for n in compared if (d := everyone.alone(n)) in seen.accuracy},
        {n: seen.correct[d] for n in compared if (d := everyone.alone(n)) in seen.correct},
        {name: everyone.spent(name, spent) for name in compared},
        {"fitting": fitted - began, "scoring": time.perf_counter() - fitted},
        album.pictures(everyone.models, ["id_test", *study.ood]),
    )


def _group_of(study: Study) -> dict[str, str]:
    return {name: group for group, names in study.groups.items() for name in names}


def _refuse_early(study: Study) -> None:
    """Refuse what would fail after everything was fitted, as far as it can be told before.

    Raises:
        ConfigurationError: OOD sets that the protocol does not take, too few calibration rows.
        DataError: too few rows for the protocol.
    """
    groups = _group_of(study)
    if faults := study.protocol.faults({name: groups.get(name, "") for name in study.ood}):
        raise ConfigurationError("; ".join(f"{'.'.join(map(str, r))}: {t}" for r, t in faults))
    for part in divided(study).values():
        if part.calibrate is not None and (rows := _rows(part, part.calibrate)) is not None:
            check_rows(rows, part.false_alarm_rate)
    if study.protocol.counts_rows and (inside := _rows(study, study.id_test)) is not None:
        sizes = {name: _rows(study, rows) for name, rows in study.ood.items()}
        known = {name: rows for name, rows in sizes.items() if rows is not None}
        study.protocol.check_rows(inside, known)


def _rows(study: Study, data: Any) -> int | None:
    """How many rows there are, where that is known before they are read."""
    return Stream(data, adapt=study.options.get("adapt")).rows


def _failing(detectors: Mapping[str, Detector], study: Study) -> dict[str, str]:
    """Why detectors cannot be fitted, each alone, on some of the rows."""
    failed: dict[str, str] = {}
    for name, detector in detectors.items():
        stream = Stream(study.train, batch_size=detector.batch_size, adapt=detector.adapt)
        if not stream.repeatable:
            return {}
        rows: list[Batch | Features] = []
        for batch in stream:
            rows.append(batch)
            if sum(map(len, rows)) >= TRIAL_ROWS:
                break
        trial = copy.copy(detector)
        largest = [int(batch.labels.max()) for batch in rows if batch.labels is not None]
        classes = study.classes if study.classes is not None else max(largest, default=0) + 1
        try:
            fit({name: trial}, rows, rows, classes=classes)
            trial.score(rows)
        except Exception as error:  # noqa: BLE001 - whatever a plugin does, the others go on
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


TRIAL_ROWS = 2048
