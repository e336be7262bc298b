"""What each scorer and shaper costs by itself: of fitting, of scoring, of what it has learnt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from measure import Table, number, timed
from rows import World
from torch import Tensor

import oodcore
from oodcore import Features, Index, Rows
from oodcore.plugins import registry

AFTER = "energy"
"""The scorer behind a shaper."""


def tables(*, quick: bool = False) -> list[Table]:
    """The table."""
    rows, width, classes, repeats = (200, 16, 4, 1) if quick else (10_000, 512, 100, 3)
    world = World(classes, width)
    train, test = world.features(*world.known(rows)), world.features(world.mixed(rows))
    table = Table(
        "What each costs",
        f"{rows:,} rows fitted on and as many scored, of {width} numbers in {classes} classes; "
        "microseconds a row, embeddings and logits being there already, and MiB of what was "
        f"learnt. A shaper is followed by `{AFTER}`, whose own cost is part of its numbers. What "
        "needs a model, layers or fields of its own is not here.",
        ["what", "fit, µs a row", "score, µs a row", "learnt, MiB"],
    )
    left_out = []
    for title, composed in candidates().items():
        try:
            line = measured(composed, train, test, repeats)
        except oodcore.errors.OodcoreError:
            left_out.append(f"`{title}`")
            continue
        table.rows.append([f"`{title}`", *line])
    if left_out:
        table.left_out = f"Not for these rows: {', '.join(left_out)}."
    return [table]


def candidates() -> dict[str, dict[str, Any]]:
    """Every scorer that needs no field, then every shaper, as a detector's arguments by name."""
    found: dict[str, dict[str, Any]] = {}
    for slot in ("scorer", "shaper"):
        for kind, cls in registry.all(slot).items():
            if any(field.is_required() for field in cls.model_fields.values()):
                continue
            needs = cls().needs()
            if "inputs" in needs or any(need.startswith("layers.") for need in needs):
                continue
            shaped = slot == "shaper"
            found[kind] = {"scorer": AFTER, "shapers": [kind]} if shaped else {"scorer": kind}
    return found


def measured(
    composed: Mapping[str, Any], train: Features, test: Features, repeats: int
) -> list[str]:
    """Microseconds a row of fitting and of scoring, and MiB learnt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        detector = oodcore.Detector(**composed).fit(train)
        timing = timed(
            {
                "fit": lambda: oodcore.Detector(**composed).fit(train),
                "score": lambda: detector.score(test),
            },
            repeats,
        )
    each = [1e6 * timing.seconds(name) / len(train) for name in ("fit", "score")]
    learnt = detector.ready()
    held = size(learnt.scorer) + sum(size(state) for state in learnt.shapers)
    return [*map(number, each), f"{held / 2**20:.2f}"]


def size(state: Any) -> int:
    """Bytes of the numbers in a state."""
    if isinstance(state, Tensor):
        return int(state.nbytes)
    if isinstance(state, Index):
        return size(state.rows)
    if isinstance(state, Rows):
        return sum(int(block.nbytes) for block in state.blocks())
    return sum(size(value) for value in state.values())
