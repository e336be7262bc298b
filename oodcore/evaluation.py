"""Evaluation: many detectors on many data sets, in one pass."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from oodcore.calibration import Calibration
from oodcore.component import Component
from oodcore.config import BenchmarkConfig, Candidate, candidates, read, validate
from oodcore.data import Adapt, Batch, Source, Stream
from oodcore.detector import Detector
from oodcore.errors import ConfigurationError
from oodcore.extractor import FeatureModel
from oodcore.features import Features
from oodcore.packing import versions
from oodcore.passes import Classes, fit, score, score_labelled
from oodcore.plugins import registry
from oodcore.results import Entry, Results
from oodcore.store import missing_fields

log = logging.getLogger("oodcore")


@dataclass(frozen=True)
class Study:
    """What is compared, and on what.

    Args:
        models: by name; a single one may have the name "".
        candidates: the detectors of each model.
        train: in-distribution rows to fit on.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name.
        held_out: in-distribution rows for what is measured on rows that nothing was fitted on.
        calibrate: in-distribution rows for thresholds.
        groups: names of OOD sets that are averaged, by the group's name.
        false_alarm_rate: the share of in-distribution inputs that may be flagged.
        classes: K, where neither logits nor whole arrays tell.
        installed: whether the candidates are all there are, so that those that these models and
            data cannot serve are left out.
        options: of every detector: device, batch_size, num_workers, seed, adapt.
    """

    models: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    train: Any
    id_test: Any
    ood: Mapping[str, Any]
    held_out: Any = None
    calibrate: Any = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    false_alarm_rate: float = 0.05
    classes: Classes = None
    installed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a study found, and its detectors, fitted and (with rows for it) calibrated."""

    results: Results
    detectors: Mapping[str, Detector]


def benchmark(
    model: Any = None,
    *,
    train: Any,
    id_test: Any,
    ood: Mapping[str, Any],
    scorers: Any = "installed",
    shapers: Sequence[Any] = (),
    held_out: Any = None,
    calibrate: Any = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    false_alarm_rate: float = 0.05,
    classes: Classes = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    seed: int = 0,
    adapt: Adapt | None = None,
) -> Results:
    """Fit many detectors, and measure each on every data set; a model sees each row once.

    Args:
        model: as in ``Detector``, or a mapping from names to models: everything is done for each.
        train: in-distribution rows to fit on; data as in ``Detector.fit``.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name.
        scorers: ``installed`` (every scorer that needs no field and gets what it reads), or a list;
            an item is a scorer as in ``Detector``, or a mapping ``{name, shapers, scorer}``.
        shapers: for every item that names none of its own.
        held_out: as in ``Detector.fit``.
        calibrate: in-distribution rows for thresholds; with them the false-alarm rate is measured.
        groups: names of OOD sets that are averaged, by the group's name.
        false_alarm_rate: the share of in-distribution inputs that may be flagged.
        classes: as in ``Detector.fit``.
        device: as in ``Detector``; so are ``batch_size``, ``num_workers``, ``seed`` and ``adapt``.

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
        ood=ood,
        held_out=held_out,
        calibrate=calibrate,
        groups=groups or {},
        false_alarm_rate=false_alarm_rate,
        classes=classes,
        installed=scorers == "installed",
        options={
            "device": device,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "seed": seed,
            "adapt": adapt,
        },
    )
    return compare(study).results


def study_of(config: Any) -> Study:
    """The study that a YAML file (its path) or a mapping describes.

    Raises:
        ConfigurationError: names the file, the line and the field.
    """
    document = read(config) if isinstance(config, str | Path) else config
    checked = validate(BenchmarkConfig, document)
    return Study(
        models=checked.models or {"": checked.extractor},
        candidates=checked.candidates(),
        train=checked.train,
        id_test=checked.id_test,
        ood=checked.ood,
        held_out=checked.held_out,
        calibrate=checked.calibrate,
        groups=checked.groups or {},
        false_alarm_rate=checked.false_alarm_rate,
        installed=checked.scorers == "installed",
        options={
            "device": checked.device,
            "batch_size": checked.batch_size,
            "num_workers": checked.num_workers,
            "seed": checked.seed,
        },
    )


def compare(study: Study) -> Outcome:
    """Fit, calibrate and measure everything in a study.

    Raises:
        ConfigurationError: no detector is left, or names that do not go together.
        DataError: as ``Detector.fit`` and ``Detector.score``.
    """
    detectors, models, left_out = _detectors(study)
    began = time.perf_counter()
    try:
        fit(detectors, study.train, study.held_out, classes=study.classes)
    except Exception as error:
        failed = _failing(detectors, study) if study.installed else {}
        if not failed or len(failed) == len(detectors):
            raise
        log.warning("left out of the comparison: %s", "; ".join(map(": ".join, failed.items())))
        log.debug("the comparison failed first", exc_info=error)
        left_out |= failed
        detectors = {name: one for name, one in detectors.items() if name not in failed}
        fit(detectors, study.train, study.held_out, classes=study.classes)
    fitted = time.perf_counter()
    calibrations = {}
    if study.calibrate is not None:
        for name, normal in score(detectors, study.calibrate).items():
            calibrations[name] = Calibration(normal)
            calibrations[name].threshold(study.false_alarm_rate)
            detectors[name].calibration = calibrations[name]
            detectors[name].false_alarm_rate = study.false_alarm_rate
    seen = score_labelled(detectors, study.id_test)
    scores: dict[str, dict[str, np.ndarray[Any, Any]]] = {
        name: {"id_test": seen.scores[name]} for name in detectors
    }
    for title, rows in study.ood.items():
        for name, values in score(detectors, rows).items():
            scores[name][title] = values
    entries = [
        Entry(name, models[name], _described(detector), _cited(detector))
        for name, detector in detectors.items()
    ]
    seconds = {
        "fitting": round(fitted - began, 3),
        "scoring": round(time.perf_counter() - fitted, 3),
    }
    results = Results.from_scores(
        entries,
        scores,
        id_name="id_test",
        groups={name: group for group, names in study.groups.items() for name in names},
        accuracy={models[name]: share for name, share in seen.accuracy.items()},
        calibrations=calibrations,
        false_alarm_rate=study.false_alarm_rate if calibrations else None,
        configuration=_configuration(study, left_out),
        provenance={"plugins": versions(_taking_part(study, detectors)), "seconds": seconds},
    )
    return Outcome(results, detectors)


def _detectors(study: Study) -> tuple[dict[str, Detector], dict[str, str], dict[str, str]]:
    """The detectors, the model of each, and those that were left out with the reason."""
    detectors: dict[str, Detector] = {}
    models: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for title, given in study.models.items():
        model = given
        for candidate in study.candidates:
            name = f"{title}/{candidate.name}" if title else str(candidate.name)
            detector = Detector(
                model, scorer=candidate.scorer, shapers=candidate.shapers or (), **study.options
            )
            if study.installed and (reason := _unusable(detector, study.train)):
                left_out[name] = reason
                continue
            if detector.extractor is None:
                model = detector.model
            detectors[name], models[name] = detector, title
    if not detectors:
        raise ConfigurationError(f"no detector takes part; left out: {left_out or 'none'}")
    return detectors, models, left_out


def _unusable(detector: Detector, train: Any) -> str | None:
    """Why a detector cannot work with this data, as far as can be told before reading it."""
    needs = detector.recipe.needs(fitting=True)
    missing: Sequence[str] = ()
    if detector.extractor is None and detector.model is None:
        if "inputs" in needs:
            return "needs a model"
        sample = _sample(train, detector)
        missing = missing_fields(needs, sample) if sample is not None else ()
    elif isinstance(train, Features):
        missing = missing_fields(needs - {"inputs"}, train)
    elif detector.extractor is None and detector.model is not None and detector.model.head is None:
        missing = sorted(needs & {"head", "logits"})
    return f"needs {', '.join(missing)}" if missing else None


def _sample(train: Any, detector: Detector) -> Features | None:
    """A few of the rows to fit on, where there is no model and they can be read again."""
    if isinstance(train, Features):
        return train
    stream = Stream(train, adapt=detector.adapt)
    batch = next(iter(stream), None) if stream.repeatable else None
    if isinstance(batch, Batch) and isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 2:
        return Features(embeddings=batch.inputs, labels=batch.labels, ids=batch.ids)
    return batch if isinstance(batch, Features) else None


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


def _taking_part(study: Study, detectors: Mapping[str, Detector]) -> list[Component]:
    """The components of a study: methods, extractors and sources."""
    parts: list[Component] = []
    for detector in detectors.values():
        parts += [*detector.shapers, detector.scorer]
        parts += [detector.extractor] if detector.extractor is not None else []
    rows = [study.train, study.held_out, study.calibrate, study.id_test, *study.ood.values()]
    for data in rows:
        if isinstance(data, str) or (isinstance(data, Mapping) and "kind" in data):
            data = registry.build("source", data)
        if isinstance(data, Source):
            parts.append(data)
    return parts


def _described(detector: Detector) -> dict[str, Any]:
    return {
        "shapers": [shaper.dump() for shaper in detector.shapers],
        "scorer": detector.scorer.dump(),
    }


def _cited(detector: Detector) -> str | None:
    papers = [part.paper for part in (*detector.shapers, detector.scorer) if part.paper]
    return " ".join(str(paper) for paper in dict.fromkeys(papers)) or None


def _configuration(study: Study, left_out: Mapping[str, str]) -> dict[str, Any]:
    one = {"train": study.train, "held_out": study.held_out, "calibrate": study.calibrate}
    options = {name: value for name, value in study.options.items() if name != "adapt"}
    return {
        "models": {name or "model": _shown(model) for name, model in study.models.items()},
        **{name: _shown(rows) for name, rows in one.items() if rows is not None},
        "id_test": _shown(study.id_test),
        "ood": {name: _shown(rows) for name, rows in study.ood.items()},
        "groups": {group: list(names) for group, names in study.groups.items()},
        "left_out": dict(left_out),
        **options,
    }


def _shown(thing: Any) -> Any:
    """A component as its configuration, anything else as what it is and how large."""
    if isinstance(thing, Component):
        return thing.dump()
    if thing is None or isinstance(thing, str | Mapping):
        return thing
    if isinstance(thing, FeatureModel):
        return {"module": type(thing.module).__name__, "fingerprint": thing.fingerprint()}
    if isinstance(thing, nn.Module):
        return _shown(FeatureModel.wrap(thing))
    try:
        rows = Stream(thing).rows
    except (TypeError, ValueError):
        rows = None
    return {"type": type(thing).__name__, **({} if rows is None else {"rows": rows})}
