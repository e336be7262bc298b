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

BATCH, SIZE, STEPS = 32, 16, 13
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
    alone: dict[str, list[float]] = {name: [] for name in chosen}
    own: dict[str, list[float]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        for number in range(repeats):
            for name, parts in chosen.items():
                # Each beside a run without any, for a machine is slow at times; in turn, the one
                # or the other first.
                pair = [(alone[name], []), (own[name], parts)]
                for times, acting in pair if number % 2 == 0 else reversed(pair):
                    times.append(step_seconds(acting, network, folder))
    found = Table(
        "What a step costs",
        f"The median step of {STEPS - WARM}, in CPU time of one thread, of {BATCH} digits of "
        f"{SIZE} pixels through a ResNet-18 of width {network['arguments']['width']}. Each is "
        f"measured next to a run of cross-entropy alone, {repeats} times; the ratio is the median "
        "over these pairs, beside the least and the most. Reading the rows and Lightning's "
        "loop are in all of them; what happens after an epoch is in none.",
        ["regularizers", "a step, ms", "times cross-entropy alone", "least", "most"],
    )
    for name, times in own.items():
        pairs = zip(times, alone[name], strict=True)
        ratios = [one / plain for one, plain in pairs]
        title = name if name in (PLAIN, installed.WHOLE) else f"`{name}`"
        spread = [f"{ratio:.2f}" for ratio in (median(ratios), min(ratios), max(ratios))]
        found.rows.append([title, f"{1000 * min(times):.1f}", *spread])
    return found


def step_seconds(parts: list[Config], network: Config, folder: Path) -> float:
    """The median step of a short run."""
    ends: list[float] = []

    def note(done: int, total: int, numbers: Mapping[str, float]) -> None:
        ends.append(time.process_time())

    config = installed.training(parts, network=network, size=SIZE, batch=BATCH)
    train(config, folder, overwrite=True, on_progress=note, stop_after=STEPS)
    steps = [after - before for before, after in pairwise(ends)]
    return median(steps[WARM - 1 :])
