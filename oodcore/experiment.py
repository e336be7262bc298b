"""Experiment: a benchmark's file carried out, its trainings first, then the comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from oodcore.config import BenchmarkConfig, read, validate
from oodcore.data import Source
from oodcore.errors import ArtifactError, ConfigurationError
from oodcore.evaluation import Outcome, compare, study_from
from oodcore.extractor import Extractor
from oodcore.plugins import registry
from oodcore.report import write
from oodcore.run_folder import RunFolder
from oodcore.training import train
from oodcore.training_config import TrainingConfig

MODELS, REPORT = "models", "report.html"

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with a training's name and what ``train`` reports of it."""


def carry_out(
    config: Any,
    out: str | Path,
    *,
    overwrite: bool = False,
    again: bool = False,
    cache: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Train what a benchmark's file says is to be trained, then compare its detectors.

    It leaves ``models/NAME`` (the training runs), ``results.json``, ``results.csv`` and
    ``report.html``. Called again, it goes on: a run that is finished stays, one that was
    interrupted is resumed from its newest checkpoint.

    Args:
        config: a YAML file (its path) or a mapping.
        out: the folder.
        overwrite: train again what the folder holds of another configuration.
        again: train everything again.
        cache: in place of the configuration's.
        on_progress: called after every step of a training.

    Raises:
        ConfigurationError: names the file, the line and the field.
        ArtifactError: a run of another configuration, or something that is no run.
        OodcoreError: as ``oodcore.training.train`` and ``oodcore.evaluation.compare``.
    """
    out = Path(out)
    if os.path.lexists(out) and not out.is_dir():
        raise ConfigurationError(f"{out} is no folder; give --out another")
    document = read(config) if isinstance(config, str | Path) else config
    checked = validate(BenchmarkConfig, document)
    trainings = checked.trainings or {}
    runs = {name: RunFolder(out / MODELS / name) for name in trainings}
    stale = set(runs) if again else _changed(trainings, runs, overwrite)
    study = study_from(checked, {name: _extractor(run) for name, run in runs.items()})
    if stale or not all(run.finished for run in runs.values()):
        _refuse_missing_rows(checked)
    if cache is not None:
        study = replace(study, options={**study.options, "cache": cache})
    for name, training in trainings.items():
        train(
            training,
            runs[name].path,
            resume=name not in stale,
            overwrite=name in stale,
            on_progress=None if on_progress is None else _named(on_progress, name),
        )
    outcome = compare(study)
    outcome.results.save(out)
    write(outcome.results, out / REPORT)
    return outcome


def _changed(
    trainings: Mapping[str, TrainingConfig], runs: Mapping[str, RunFolder], overwrite: bool
) -> set[str]:
    """The runs that were begun with another configuration.

    Raises:
        ArtifactError: there are some, and they are not to be replaced.
    """
    changed = set()
    for name, training in trainings.items():
        try:
            if runs[name].started:
                runs[name].refuse_another(training)
        except ArtifactError as error:
            if not overwrite:
                raise ArtifactError(
                    f"trainings.{name}: {error}; give --overwrite to train it again, or another "
                    "--out"
                ) from None
            changed.add(name)
    return changed


def _refuse_missing_rows(checked: BenchmarkConfig) -> None:
    """Open everything that is read after the trainings, which may take days.

    Raises:
        DataError: as ``Source.open``.
    """
    sources: list[Source | None] = [checked.train, checked.held_out, checked.calibrate]
    sources += [checked.id_test, *(checked.ood or {}).values()]
    for training in (checked.trainings or {}).values():
        sources += [training.train, training.validation, training.outliers]
    for source in dict.fromkeys(source for source in sources if source is not None):
        source.open()


def _extractor(run: RunFolder) -> Extractor:
    built: Any = registry.build("extractor", {"kind": "run", "path": str(run.path)})
    return built  # type: ignore[no-any-return]


def _named(on_progress: OnProgress, name: str) -> Callable[[int, int, Mapping[str, float]], None]:
    return lambda done, total, numbers: on_progress(name, done, total, numbers)
