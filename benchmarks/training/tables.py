"""The tables of a task's rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import mean, pstdev
from typing import Any

import claims
from known_unknown import SCORERS
from measure import Table
from recipes import TITLES, Task

Row = dict[str, Any]

SCORE_METRICS = {
    "auroc": ("AUROC", "in percent"),
    "fpr95_id": (
        "FPR95",
        "in percent: the unknown rows that are accepted when 95 % of the known are",
    ),
    "oscr": ("OSCR", "in percent"),
}
PUBLISHED = [
    ["Gaussian noise", "14.39", "94.72", "70.00"],
    ["Rademacher noise", "47.55", "79.93", "32.29"],
    ["blobs", "16.20", "94.54", "73.71"],
    ["textures", "42.82", "88.37", "58.44"],
    ["SVHN", "28.82", "91.83", "66.93"],
    ["Places365", "47.54", "87.80", "57.49"],
    ["LSUN", "38.74", "89.08", "58.58"],
    ["CIFAR-100", "43.47", "87.88", "55.81"],
    ["mean", "34.94", "89.27", "59.16"],
]
"""FPR95, AUROC and AUPR of Outlier Exposure's baseline, as its authors published them."""


def of(task: Task, rows: Sequence[Row]) -> list[Table]:
    """A table for each metric of scores, one of the networks, and one of the papers' claims."""
    found = [scores(task, rows, metric) for metric in SCORE_METRICS]
    return [*found, networks(rows), claims.table(rows)]


def about(task: Task, rows: Sequence[Row]) -> str:
    """What was trained, and how, in a paragraph."""
    trained = [row for row in rows if "seconds" in row]
    seeds = ", ".join(str(seed) for seed in task.seeds)
    known = "; ".join(f"{name}: {', '.join(map(str, c))}" for name, c in task.known.items())
    arguments = json.dumps(dict(task.network["arguments"])) if task.network["arguments"] else "none"
    name = task.network["factory"].partition(":")[2]
    rates = (
        f"The learning rate is the best of {', '.join(map(str, task.rates))} by accuracy on "
        f"held-out rows ({', '.join(task.choosing)}), of trainings of another seed"
        if len(task.rates) > 1
        else f"The learning rate is {task.rates[0]}"
    )
    minutes = sum(row["seconds"] for row in trained) / 60
    return (
        f"Known classes: {known}. Seeds {seeds}. The network is `{name}` (arguments beside the "
        f"classes: {arguments}), trained by SGD for {task.epochs} epochs in batches of "
        f"{task.batch}. {rates}; every other field is that of the paper, with epochs as shares of "
        f"the run. The {len(trained)} trainings that are measured took {minutes:.0f} minutes."
    )


def scores(task: Task, rows: Sequence[Row], metric: str) -> Table:
    """A metric of every score, by training."""
    title, unit = SCORE_METRICS[metric]
    runs = len(task.known) * len(task.seeds)
    spread = f"; mean ± standard deviation over {runs} runs" if runs > 1 else "; of one run"
    table = Table(title, f"{title} {unit}{spread}.", ["training", *SCORERS.values()])
    for method, own in by_method(rows).items():
        cells = [
            cell([row["scores"][kind][metric] for row in own if kind in row["scores"]])
            for kind in SCORERS
        ]
        table.rows.append([TITLES[method], *cells])
    if any(row["method"] == "dml_plus" for row in rows):
        table.left_out = "DML+ is one score of two networks; it stands under DML."
    return table


def networks(rows: Sequence[Row]) -> Table:
    """What the networks themselves are worth, and how far their features have collapsed."""
    table = Table(
        "The networks",
        "Accuracy, ECE (15 bins) and AURC of MSP on the known test rows, AURC times 1000; WFC and "
        "CFC on the training rows; seconds of one training.",
        ["training", "accuracy, %", "ECE, %", "AURC", "WFC", "CFC", "learning rate", "seconds"],
    )
    for method, own in by_method(rows).items():
        if method == "dml_plus":
            continue
        columns = {name: [row[name] for row in own] for name in ("accuracy", "ece", "aurc")}
        table.rows.append(
            [
                TITLES[method],
                cell(columns["accuracy"]),
                cell(columns["ece"]),
                cell(columns["aurc"], 1000),
                *(cell([row[name] for row in own], 1, 3) for name in ("wfc", "cfc")),
                str(own[0]["rate"]),
                f"{mean(row['seconds'] for row in own):.0f}",
            ]
        )
    return table


def published() -> Table:
    """The CIFAR-10 baseline of Outlier Exposure, from its authors."""
    return Table(
        "Published, not measured here: the CIFAR-10 baseline of Outlier Exposure",
        "WRN-40-2 trained with cross-entropy on all ten classes (error 5.16 %), MSP, with OOD as "
        "the positive class and one OOD row for every five of CIFAR-10's; in percent. From the "
        "logs in the repository of Hendrycks, Mazeika and Dietterich, Deep Anomaly Detection with "
        "Outlier Exposure, ICLR 2019. Other data, another protocol and a far larger network than "
        "above: it says what such numbers look like after a full schedule, and can be compared "
        "with nothing above.",
        ["OOD data", "FPR95", "AUROC", "AUPR"],
        PUBLISHED,
    )


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each training, in the order of the tables."""
    found = {method: [row for row in rows if row["method"] == method] for method in TITLES}
    return {method: own for method, own in found.items() if own}


def cell(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """Mean and standard deviation of some runs, or the number of one."""
    if not values:
        return ""
    middle = f"{scale * mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ± {scale * pstdev(values):.{digits}f}"
