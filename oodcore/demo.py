"""The demonstration: a benchmark that ships with a plugin, and an artifact of its best detector."""

from __future__ import annotations

from importlib.metadata import entry_points
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from oodcore.config import read
from oodcore.errors import ConfigurationError
from oodcore.evaluation import Outcome
from oodcore.experiment import OnProgress, carry_out

GROUP = "oodcore.demo"
"""Entry points of this group are benchmarks that ship with plugins: ``package:file.yaml``."""


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
    outcome = carry_out(_shipped(name), out, again=True, on_progress=on_progress)
    best = outcome.detectors[outcome.results.best()]
    best.save(Path(out) / "detector", overwrite=True)
    return outcome


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
