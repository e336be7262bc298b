"""How time and memory are measured, and what a table of measurements is."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

Work = Callable[[], Any]
PATIENCE = 200.0
"""Seconds after which no further round of a measurement begins."""

PACKAGES = ("oodcore", "torch", "faiss-cpu", "faiss-gpu", "numpy", "scikit-learn", "pytorch-ood")


@dataclass
class Table:
    """Measurements: rows of text under a header, with what to know about them above.

    Args:
        title: in a few words.
        about: what was measured, in a sentence or more.
        header: the names of the columns.
        rows: as many texts each; the first column is aligned to the left.
        left_out: what could not be measured, and why.
    """

    title: str
    about: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left_out: str = ""

    def markdown(self) -> str:
        """The table under its title, as Markdown."""
        rules = ["---"] + ["---:"] * (len(self.header) - 1)
        lines = [self.header, rules, *self.rows] if self.rows else []
        drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(filter(None, [f"### {self.title}", self.about, drawn, self.left_out]))


@dataclass(frozen=True)
class Timing:
    """Seconds of several works, measured in turn, round by round."""

    rounds: Mapping[str, list[float]]

    def seconds(self, name: str) -> float:
        """The shortest run: what a work takes when nothing else disturbs it."""
        return min(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """How many times as long one takes as the other: the median over the rounds.

        Both ran right after one another in a round, so that a machine that is slow for a while
        is slow for both.
        """
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return median(one / two for one, two in pairs)


def timed(
    works: Mapping[str, Work], repeats: int, *, warm: bool = True, patience: float = PATIENCE
) -> Timing:
    """Run works in turn, round by round, and note how long each takes.

    Args:
        works: by name.
        repeats: rounds, of which there is one at least.
        warm: run each once before; off where that has been done.
        patience: seconds after which no further round begins.
    """
    for work in works.values() if warm else ():
        work()
    rounds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    first = time.perf_counter()
    for number in range(repeats):
        if number and time.perf_counter() - first > patience:
            break
        # Forwards and backwards in turn, so that none always follows the same other.
        for name in names if number % 2 == 0 else reversed(names):
            start = time.perf_counter()
            works[name]()
            rounds[name].append(time.perf_counter() - start)
    return Timing(rounds)


def status(name: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this system's /proc/self/status has no {name}: the benchmark needs Linux")


def peak(work: Work) -> float:
    """How far the resident memory of this process rises above where it is, in MiB."""
    gc.collect()
    # Writing 5 makes the peak that of this moment.
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    before = status("VmRSS")
    kept = work()
    most = status("VmHWM") - before
    del kept
    return max(most, 0.0)


def threads() -> int:
    """How many threads torch computes with."""
    import torch

    return torch.get_num_threads()


def provenance() -> str:
    """Where, when and with what was measured, in a sentence."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = os.cpu_count() or 1
    used = threads()
    return (
        f"Measured on {date.today().isoformat()} on {_processor()} with {cores} "
        f"core{'s' * (cores > 1)}, {used} of them used; Python {platform.python_version()}, "
        f"{', '.join(versions)}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def number(value: float) -> str:
    """A number in as many digits as a reader wants."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    places = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.01 else 4
    return f"{value:.{places}f}"


def seconds(value: float) -> str:
    """Seconds with three digits that count."""
    return f"{value:.3g}"


def joined(names: Iterable[str]) -> str:
    """Names as code, with commas between."""
    return ", ".join(f"`{name}`" for name in names)
