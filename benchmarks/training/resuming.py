"""Runs that are stopped or killed at several steps and resumed, against runs that are not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import installed
from measure import Table

from oodcore.errors import OodcoreError
from oodcore.training import train

BATCH, EPOCHS = 64, 3
STEPS = 9
"""Of an epoch: there are 543 rows."""
NETWORK = {
    "factory": "oodcore_plugins.networks:digits_cnn",
    "arguments": {"classes": 6, "width": 4},
}
SAME = "identical"


def table(*, quick: bool = False) -> Table:
    """What each regularizer's run ended with, by where it was stopped."""
    chosen = installed.runs()
    drawn = random.Random(0)
    points = {
        "one before an epoch's last": 2 * STEPS - 1,
        "an epoch's last": 2 * STEPS,
        "one after": 2 * STEPS + 1,
    }
    if quick:
        chosen, points = {"sam": chosen["sam"]}, {"an epoch's last": 2 * STEPS}
    killed = "SIGKILL at a random step"
    about = (
        f"Runs of {EPOCHS} epochs of {STEPS} steps on digits, stopped after a step and resumed, "
        "against one that went through: identical are all weights, bit by bit, and the metrics "
        "of every epoch. A checkpoint is written after each step; where the process was killed, "
        "by SIGKILL, after each epoch only, and the steps since are done again."
    )
    header = ["regularizers", "a random step", *points, *([] if quick else [killed])]
    found = Table("Runs that are resumed", about, header)
    with tempfile.TemporaryDirectory() as place:
        for name, parts in chosen.items():
            within = [s for s in range(2, EPOCHS * STEPS) if s % STEPS and s not in points.values()]
            step = drawn.choice(within)
            last = drawn.choice([s for s in within if s > STEPS])
            folder = Path(place) / name.replace(", ", "-")
            try:
                cells = ended(parts, folder, [step, *points.values()], None if quick else last)
            except OodcoreError as error:
                found.rows.append([f"`{name}`", *[str(error)], *[""] * (len(header) - 2)])
                continue
            title = name if name == installed.WHOLE else f"`{name}`"
            found.rows.append([title, *cells])
    return found


def ended(parts: list[Any], folder: Path, steps: list[int], last: int | None) -> list[str]:
    """For each step, whether a run that was resumed there ended as the one that went through."""
    config = installed.training(parts, network=NETWORK, size=8, batch=BATCH)
    straight = left(train(config, folder / "straight"))
    cells = []
    for number, step in enumerate(steps):
        where = folder / f"stopped-{step}"
        stopped = {**config, "checkpoint_every": 1}
        train(stopped, where, stop_after=step)
        same = left(train(stopped, where, resume=True)) == straight
        cells.append((f"{SAME} ({step})" if number == 0 else SAME) if same else f"other ({step})")
    if last is not None:
        where = folder / "killed"
        kill(config, where, last)
        same = left(train(config, where, resume=True)) == straight
        cells.append(f"{SAME if same else 'other'} ({last})")
    return cells


def left(run: Path) -> Mapping[str, bytes]:
    """The weights and the metrics of a finished run, as they are in their files."""
    return {name: (run / name).read_bytes() for name in ("model.safetensors", "metrics.csv")}


def kill(config: Mapping[str, Any], folder: Path, step: int) -> None:
    """Train in a process of its own, which is killed after a step."""
    command = [sys.executable, __file__, json.dumps(config), str(folder), str(step)]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"the process that was to be killed ended with {done.returncode}")


def _trained_until_killed(config: Mapping[str, Any], folder: str, step: int) -> None:
    import torch

    torch.set_num_threads(1)

    def kill_at(done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, folder, on_progress=kill_at)


if __name__ == "__main__":
    _trained_until_killed(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
