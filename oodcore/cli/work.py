"""What takes time: the demonstration, training, fitting, scoring, benchmarks."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.calibration import Calibration
from oodcore.cli import streams
from oodcore.component import Component
from oodcore.config import DetectorConfig, read, validate
from oodcore.data import Batch, Stream
from oodcore.demo import demo
from oodcore.detector import Detector, load
from oodcore.document import parse
from oodcore.errors import ArtifactError, ConfigurationError
from oodcore.evaluation import compare, study_of
from oodcore.features import Features
from oodcore.plugins import registry
from oodcore.report import write
from oodcore.results import Results, write_text
from oodcore.tables import percent
from oodcore.training import train
from oodcore.training_config import TrainingConfig


def demonstrate(out: Path) -> None:
    """Run the demonstration, print its table, the best detector and where everything is."""
    with _one_thread(), streams.bars() as bars:
        reports: dict[str, Any] = {}

        def report(title: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
            if title not in reports:
                reports[title] = bars.steps(f"training {title}")
            reports[title](done, total, numbers)

        outcome = demo(out, on_progress=report)
    best = outcome.detectors[outcome.results.best()]
    streams.draw(outcome.results.table())
    streams.write(f"\n{_verdict(outcome.results)}\n")
    for name, files in {
        "report": ["report.html"],
        "results": ["results.csv", "results.json"],
        "detector": ["detector"],
        "models": [f"models/{title}" for title in sorted({e.model for e in outcome.results.entries})],
    }.items():
        streams.write(f"{name:<9} {', '.join(str(out / file) for file in files)}")
    allowed = "".join(f" --allow {name}" for name in best.extractor.code() if best.extractor)
    streams.write(
        f"\nTry the detector:\noodcore score {out / 'detector'} '{_example(outcome.results)}' "
        f"--out scores.csv{allowed}"
    )


def train_network(config: Path, out: Path, resume: bool, overwrite: bool) -> None:
    """Train a network, and print where it is and how accurate."""
    document = read(config)
    run = validate(TrainingConfig, document)
    with streams.bars() as bars:
        folder = train(
            run, out, resume=resume, overwrite=overwrite, on_progress=bars.steps("training")
        )
    streams.write(f"trained {run.network.factory}: {_accuracy(folder)}")
    streams.write(f"saved to {folder}; as an extractor: {{kind: run, path: {folder}}}")


def fit_detector(config: Path, out: Path, overwrite: bool, store: bool) -> None:
    """Fit and calibrate a detector, save it, and print what was done."""
    document = read(config)
    checked = validate(DetectorConfig, document)
    if checked.train is None:
        raise ConfigurationError(f"{config}: train: is needed to fit; name the rows to fit on")
    if os.path.lexists(out) and not overwrite:
        raise ArtifactError(f"{out} exists; give overwrite=True to replace it")
    detector = Detector.from_config(document)
    with streams.bars():
        detector.fit(checked.train, checked.held_out)
        if checked.calibrate is not None:
            detector.calibrate(checked.calibrate, checked.false_alarm_rate)
        detector.save(out, overwrite=overwrite, store=store)
    streams.write(f"fitted {detector.scorer.kind} on {_rows_of(detector)}; {_threshold(detector)}")
    streams.write(f"saved to {out}")
