"""The demonstration: trainings, a benchmark of what came out, an artifact of the best detector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from oodcore.component import Settings
from oodcore.config import Name, read, validate
from oodcore.errors import ConfigurationError
from oodcore.evaluation import Outcome, compare, study_of
from oodcore.report import write
from oodcore.training import train
from oodcore.training_config import TrainingConfig

GROUP = "oodcore.demo"
"""Entry points of this group are configurations that ship with plugins: ``package:file.yaml``."""

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]


class DemoConfig(Settings):
    """Networks to train, and a benchmark that has them as its models.

    Args:
        trainings: by the name of the model.
        benchmark: as in ``oodcore benchmark``, without extractor and models.
    """

    trainings: Annotated[Mapping[Name, TrainingConfig], Field(min_length=1)]
    benchmark: Mapping[str, Any]


def demo(
    out: str | Path, name: str | None = None, on_progress: OnProgress | None = None
) -> Outcome:
    """Run a demonstration that ships with a plugin.

    It leaves ``models/NAME`` (the training runs), ``detector`` (the artifact of the best detector),
    ``results.json``, ``results.csv`` and ``report.html``; what an earlier run left is replaced.

    Args:
        out: the folder.
        name: of the demonstration; the only one, or oodcore's own, if not given.
        on_progress: called with the model's name and what ``train`` reports.

    Raises:
        ConfigurationError: no demonstration of that name, or one that is ill-formed.
    """
    out = Path(out)
    document = _shipped(name)
    config = validate(DemoConfig, document)
    models = {}
    for title, training in config.trainings.items():
        report = None if on_progress is None else _named(on_progress, title)
        folder = train(training, out / "models" / title, overwrite=True, on_progress=report)
        models[title] = {"kind": "run", "path": str(folder)}
    outcome = compare(study_of({**document.data["benchmark"], "models": models}))
    outcome.results.save(out)
    write(outcome.results, out / "report.html")
    outcome.detectors[outcome.results.best()].save(out / "detector", overwrite=True)
    return outcome


def _named(on_progress: OnProgress, title: str) -> Callable[[int, int, Mapping[str, float]], None]:
    return lambda done, total, numbers: on_progress(title, done, total, numbers)


def _shipped(name: str | None) -> Any:
    found = sorted(
        entry_points(group=GROUP),
        key=lambda entry: (entry.dist is None or entry.dist.name != "oodcore", entry.name),
    )
    for entry in found:
        if name in (None, entry.name):
            with as_file(files(entry.module) / entry.attr) as path:
                return read(path)
    known = ", ".join(entry.name for entry in found) or "none"
    raise ConfigurationError(f"there is no demonstration '{name}'; installed: {known}")
