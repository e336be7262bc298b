"""Results to make reports of, without a model: scores out of thin air."""

from __future__ import annotations

import numpy as np

from oodcore.calibration import Calibration
from oodcore.component import Paper
from oodcore.picture import Picture
from oodcore.results import Entry, Method, Results, Scored

SETS = [("svhn", "far"), ("cifar100", "near"), ("lsun", "far"), ("x", ""), ("y", ""), ("z", "")]
URL = "https://arxiv.org/abs/1610.02136"


def paper(name):
    return Paper(f"A paper on {name}", "Jane Q. Doe, Erik Müller", "ICLR", 2017, URL)


def entry(name, model=""):
    about = (
        f"The score of {name}: ``log sum_k exp(z_k)``.\n\nIt was tried\non two lines.\n\n- a\n- b"
    )
    return Entry(
        name,
        model,
        {"shapers": [{"kind": "react"}], "scorer": {"kind": "knn", "k": 10}},
        str(paper(name)),
        0.25,
        (Method("shaper", "react", "Clips."), Method("scorer", "knn", about, paper(name))),
    )


def picture(rows, seed):
    rng = np.random.default_rng(seed)

    def points(count):
        return tuple(map(tuple, rng.integers(0, 1001, (count, 2)).tolist()))

    counts = {name: min(count, 1000) for name, count in rows.items()}
    drawn = {name: points(count) for name, count in counts.items()}
    return Picture((0.5, 0.25), (-2.0, -2.0), 4.0, points(500), drawn)


def benchmark(names=("msp", "energy"), sets=4, rows=300, models=None, calibrated=True):
    """Results of a benchmark; ``models`` maps detectors to the models that they stand on."""
    rng = np.random.default_rng(0)
    scores = {}
    for number, name in enumerate(names):
        own = {"id_test": rng.normal(2 + number * 0.1, 1, rows)}
        own |= {data: rng.normal(k * 0.3, 1 + k, rows) for k, (data, _) in enumerate(SETS[:sets])}
        scores[name] = own
    entries = [entry(name, (models or {}).get(name, "")) for name in names]
    calibrations = {names[0]: Calibration(rng.normal(2, 1, 200))} if calibrated else {}
    scored = Scored(scores, {entries[0].model: 0.912}, {}, calibrations)
    drawn = dict.fromkeys(["id_test", *(data for data, _ in SETS[:sets])], rows)
    return Results.from_splits(
        entries,
        {"": scored},
        groups={data: group for data, group in SETS[:sets] if group},
        false_alarm_rate=0.05,
        configuration={"train": {"kind": "digits"}, "seed": 17},
        provenance={"plugins": {"oodcore": "0.1.0", "oodcore-margin": "0.3.1"}, "device": "cpu"},
        pictures={one.model: picture(drawn, k) for k, one in enumerate(entries)},
    )
