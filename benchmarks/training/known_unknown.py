"""Networks trained in different ways on some of the classes, and how well scores tell the rest.

Every number comes from rows of the test part; nothing is chosen by them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipes import PARTS_OF_PLUS, TITLES, Task
from torch.utils.data import DataLoader

import oodcore
from oodcore.collapse import cfc, wfc
from oodcore.metrics import accuracy, aurc, auroc, ece, fpr_at_tpr, oscr
from oodcore.plugins import registry
from oodcore.regularizer import Diverged
from oodcore.training import train

Row = dict[str, Any]

SCORERS = {
    "msp": "MSP",
    "max_logit": "MaxLogit",
    "energy": "Energy",
    "max_cosine": "MaxCosine",
    "max_norm": "MaxNorm",
    "dml": "DML",
    "rp_gradnorm": "RP+GradNorm",
}
MODEL_METRICS = ("accuracy", "ece", "aurc", "wfc", "cfc")
CHOOSING_SEED = 100


def rows(task: Task, folder: Path) -> list[Row]:
    """A row for each division, seed and method; what an earlier run has left is not done again.

    A row has ``method``, ``division``, ``seed``, ``rate``, ``seconds`` of training, the metrics of
    the model and, by scorer, ``scores``: ``auroc``, ``fpr95_id`` and ``oscr``.
    """
    kept = Kept(folder / "rows.jsonl")
    rates = {method: chosen(task, method, folder, kept) for method in task.methods}
    for seed in task.seeds:
        for division in task.known:
            runs = {}
            for method in task.methods:
                where = folder / "runs" / f"{division}-{seed}" / method
                config = task.training(method, division, seed, rates[method])
                began = time.perf_counter()
                runs[method] = train(config, where, resume=True)
                seconds = time.perf_counter() - began
                key = {"method": method, "division": division, "seed": seed}
                if not kept.has(key):
                    found = measured(task, division, where)
                    kept.add({**key, "rate": rates[method], "seconds": round(seconds, 2), **found})
                    sys.stderr.write(f"{task.name} {division} {seed} {method}: {seconds:.1f} s\n")
            key = {"method": "dml_plus", "division": division, "seed": seed}
            if runs.keys() >= PARTS_OF_PLUS.keys() and not kept.has(key):
                kept.add({**key, **plus(task, division, runs)})
    order = list(TITLES)
    found = [row for row in kept.rows if "choosing" not in row]
    return sorted(found, key=lambda row: order.index(row["method"]))


def chosen(task: Task, method: str, folder: Path, kept: Kept) -> float:
    """The rate of the highest accuracy on held-out rows; of equal ones, the first."""
    if len(task.rates) == 1:
        return task.rates[0]
    means = []
    for rate in task.rates:
        accuracies = []
        for division in task.choosing:
            key = {"choosing": method, "division": division, "rate": rate}
            if not kept.has(key):
                where = folder / "choosing" / f"{division}-{rate}" / method
                config = task.training(method, division, CHOOSING_SEED, rate)
                try:
                    model = loaded(train(config, where, resume=True))
                    held_out = features(model, task.source("held_out", task.known[division]))
                    value = right(held_out).mean()
                except Diverged:
                    value = 0.0
                kept.add({**key, "accuracy": round(float(value), 6)})
            accuracies.append(kept.find(key)["accuracy"])
        means.append(np.mean(accuracies))
    said = ", ".join(f"{r}: {m:.4f}" for r, m in zip(task.rates, means, strict=True))
    sys.stderr.write(f"{task.name} {method}: accuracy on held-out rows by learning rate: {said}\n")
    return task.rates[int(np.argmax(means))]


def measured(task: Task, division: str, run: Path) -> Row:
    """What one network is worth."""
    model = loaded(run)
    known, unknown = task.known[division], task.unknown(division)
    fitted = features(model, task.source("train", known))
    inside = features(model, task.source("test", known))
    outside = features(model, task.source("test", unknown))
    detectors = {kind: oodcore.Detector(scorer=kind) for kind in SCORERS}
    oodcore.fit(detectors, fitted)
    scores = {kind: (one.score(inside), one.score(outside)) for kind, one in detectors.items()}
    correct = right(inside)
    assert inside.labels is not None
    return {
        "accuracy": rounded(accuracy(inside.predicted.numpy(), inside.labels.numpy())),
        "ece": rounded(ece(scores["msp"][0], correct)),
        "aurc": rounded(aurc(scores["msp"][0], correct)),
        "wfc": rounded(wfc(fitted)),
        "cfc": rounded(cfc(fitted)),
        "scores": {kind: apart(*both, correct) for kind, both in scores.items()},
    }


def plus(task: Task, division: str, runs: Mapping[str, Path]) -> Row:
    """DML+: MaxCosine of one network and MaxNorm of another, each divided by its mean.

    The class is the one that the first network predicts.
    """
    known, unknown = task.known[division], task.unknown(division)
    members = {
        method: oodcore.Detector(loaded(runs[method]), scorer=kind)
        for method, kind in PARTS_OF_PLUS.items()
    }
    both = oodcore.Ensemble(members, {"kind": "sum", "normalize": "mean"})
    both.fit(opened(task, "train", known), held_out=opened(task, "held_out", known))
    inside, outside = (both.score(opened(task, "test", c)) for c in (known, unknown))
    first = loaded(runs[next(iter(PARTS_OF_PLUS))])
    correct = right(features(first, task.source("test", known)))
    return {"accuracy": rounded(correct.mean()), "scores": {"dml": apart(inside, outside, correct)}}


def apart(inside: np.ndarray, outside: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """How well scores tell known from unknown rows."""
    return {
        "auroc": rounded(auroc(inside, outside)),
        "fpr95_id": rounded(fpr_at_tpr(inside, outside)),
        "oscr": rounded(oscr(inside, correct, outside)),
    }


def loaded(run: Path) -> oodcore.FeatureModel:
    """The model that a training run left."""
    model: oodcore.FeatureModel = registry.build(
        "extractor", {"kind": "run", "path": str(run)}
    ).load()
    return model


def opened(task: Task, part: str, classes: tuple[int, ...]) -> oodcore.Source:
    """A source of the task."""
    source: oodcore.Source = registry.build("source", task.source(part, classes))
    return source


def features(model: oodcore.FeatureModel, source: Mapping[str, Any]) -> oodcore.Features:
    """Embeddings, logits and labels of all rows of a source."""
    data = registry.build("source", source).open()
    parts = []
    with torch.no_grad():
        for inputs, labels, _ in DataLoader(data, batch_size=256):
            found = model(inputs)
            parts.append((found.embeddings, found.logits, labels))
            head = found.head
    embeddings, logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return oodcore.Features(embeddings=embeddings, logits=logits, labels=labels, head=head)


def right(rows: oodcore.Features) -> np.ndarray:
    """Which rows are classified as labelled."""
    found: np.ndarray = (rows.predicted == rows.labels).numpy()
    return found


def rounded(value: float) -> float:
    """A number as it is kept."""
    return round(float(value), 6)


class Kept:
    """Rows in a file, one a line, that are found by some of their fields."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = list(self._read())

    def _read(self) -> Iterator[Row]:
        if self.path.exists():
            yield from map(json.loads, self.path.read_text("utf-8").splitlines())

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def has(self, key: Row) -> bool:
        """Whether there is a row with these fields."""
        return any(self._fits(row, key) for row in self.rows)

    def find(self, key: Row) -> Row:
        """The first row with these fields."""
        return next(row for row in self.rows if self._fits(row, key))

    @staticmethod
    def _fits(row: Row, key: Row) -> bool:
        return all(row.get(name) == value for name, value in key.items())
