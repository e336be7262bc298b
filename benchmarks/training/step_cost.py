"""What each regularizer adds to a step of training, measured in turn with steps without any."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median

import installed
from measure import Table
from recipes import Config

from oodcore.training import train

BATCH, SIZE, STEPS = 32, 16, 16
WARM = 3
"""Steps at the beginning that do not count."""
NETWORK = {
    "factory": "oodcore_plugins.networks:resnet18",
    "arguments": {"classes": 6, "width": 16, "channels": 1},
}
PLAIN = "cross-entropy alone"


def table(*, quick: bool = False) -> Table:
    """Seconds of a step, and how many times those of plain cross-entropy they are."""
    chosen = {PLAIN: [], **installed.runs()}
    repeats, network = 5, NETWORK
    if quick:
        chosen = {name: chosen[name] for name in (PLAIN, "sam")}
        repeats = 1
        network = {**NETWORK, "arguments": {**NETWORK["arguments"], "width": 1}}
    rounds: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        for number in range(repeats):
            names = list(chosen) if number % 2 == 0 else list(reversed(chosen))
            for name in names:
                rounds[name].append(step_seconds(chosen[name], network, folder))
    found = Table(
        "What a step costs",
        f"The median step of {STEPS - WARM}, of {BATCH} digits of {SIZE} pixels through a "
        f"ResNet-18 of width {network['arguments']['width']}; all in turn, {repeats} times. The "
        "ratio is the median over the rounds of that within a round. Loading the rows and "
        "Lightning's loop are in all of them; what happens after an epoch is in none.",
        ["regularizers", "a step, ms", "times cross-entropy alone"],
    )
    for name, times in rounds.items():
        pairs = zip(times, rounds[PLAIN], strict=True)
        ratio = median(one / plain for one, plain in pairs)
        title = name if name in (PLAIN, installed.WHOLE) else f"`{name}`"
        found.rows.append([title, f"{1000 * min(times):.1f}", f"{ratio:.2f}"])
    return found


def step_seconds(parts: list[Config], network: Config, folder: Path) -> float:
    """The median step of a short run."""
    ends: list[float] = []

    def note(done: int, total: int, numbers: Mapping[str, float]) -> None:
        ends.append(time.perf_counter())

    config = installed.training(parts, network=network, size=SIZE, batch=BATCH)
    train(config, folder, overwrite=True, on_progress=note, stop_after=STEPS)
    steps = [after - before for before, after in pairwise(ends)]
    return median(steps[WARM - 1 :])
