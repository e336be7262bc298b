"""How networks are trained here: the methods that are compared, and the tasks they are compared on.

All of a task's networks are trained alike, by SGD with a cosine schedule, a warm-up and a clipped
gradient. The fields of the methods are those of their papers, with epochs counted as shares of the
run; only the learning rate is chosen, by the accuracy on held-out rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Config = dict[str, Any]

LENGTH = 200
"""Epochs of the papers' runs, in which their schedules are given."""

TITLES = {
    "cross_entropy": "cross-entropy",
    "logitnorm": "LogitNorm",
    "focal_cosine": "focal + cosine (MCF)",
    "center_weight": "center + weight-normalised (MNC)",
    "dml_plus": "DML+ (MCF and MNC)",
    "regmixup": "RegMixup",
    "crl": "CRL",
    "sam": "SAM",
    "swa": "SWA",
    "cosine": "cosine head",
    "sure": "SURE, whole",
}
"""The methods in the order of the tables. DML+ is no training of its own."""

PARTS_OF_PLUS = {"focal_cosine": "max_cosine", "center_weight": "max_norm"}
"""The two trainings of DML+, and the score that it takes of each."""


@dataclass(frozen=True)
class Task:
    """A data set, the divisions of its classes, and how long a network is trained on it.

    Args:
        name: of the task, and of its folder.
        title: for readers.
        network: the importable factory of the classifier, and its arguments but for the classes.
        sources: by split of the rows, "train", "held_out" and "test", without classes.
        epochs: of every training.
        batch: rows of a step.
        known: by name of the division, the classes that the network is trained on.
        classes: of the whole data set, K.
        seeds: of the trainings that are measured.
        rates: learning rates to choose from; of equally good ones, the first.
        choosing: the divisions whose held-out rows choose, by trainings of another seed.
        methods: the trainings.
    """

    name: str
    title: str
    network: Mapping[str, Any]
    sources: Mapping[str, Config]
    epochs: int
    batch: int
    known: Mapping[str, tuple[int, ...]]
    classes: int = 10
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (0.1, 0.03, 0.3)
    choosing: tuple[str, ...] = ("low",)
    methods: tuple[str, ...] = tuple(name for name in TITLES if name != "dml_plus")

    def unknown(self, division: str) -> tuple[int, ...]:
        """The classes that the network of a division is not trained on."""
        return tuple(c for c in range(self.classes) if c not in self.known[division])

    def source(self, part: str, classes: tuple[int, ...]) -> Config:
        """The configuration of a source of these classes."""
        return {**self.sources[part], "classes": list(classes)}

    def training(self, method: str, division: str, seed: int, rate: float) -> Config:
        """The configuration of one training."""
        known = self.known[division]
        arguments = {**self.network["arguments"], "classes": len(known)}
        return {
            "network": {**self.network, "arguments": arguments},
            "train": self.source("train", known),
            "validation": self.source("held_out", known),
            "regularizers": regularizers(method, self.epochs, rate),
            "epochs": self.epochs,
            "batch_size": self.batch,
            "optimizer": {"kind": "sgd", "lr": rate, "momentum": 0.9, "weight_decay": 5e-4},
            "schedule": {"kind": "cosine", "warmup": min(1.0, self.epochs / 4)},
            "gradient_clip": 1.0,
            "seed": seed,
            "device": "cpu",
        }

    def quick(self) -> Task:
        """So little of it that it says nothing, and runs in seconds."""
        first = next(iter(self.known))
        return replace(
            self,
            epochs=1,
            batch=256,
            known={first: self.known[first]},
            seeds=(0,),
            rates=self.rates[:1],
            choosing=(first,),
            methods=("cross_entropy", *PARTS_OF_PLUS),
        )


def regularizers(method: str, epochs: int, rate: float) -> list[Config]:
    """The regularizers of a method, in a run of so many epochs at a rate."""

    def at(epoch: int) -> int:
        return round(epoch * epochs / LENGTH)

    start = min(at(120), epochs - 1)
    swa = {"kind": "swa", "lr": rate / 2, "start": start, "anneal": max(1, at(10))}
    starts = [at(60), max(at(80), at(60) + 1)]
    parts: dict[str, list[Config]] = {
        "cross_entropy": [],
        "logitnorm": [{"kind": "logitnorm", "temperature": 0.04}],
        "focal_cosine": [{"kind": "focal", "gamma": 2.0}, {"kind": "cosine_head", "scale": 40.0}],
        "center_weight": [
            {"kind": "center", "weights": [0.001, 0.005], "starts": starts},
            {"kind": "cosine_head", "normalize": "weight"},
        ],
        "regmixup": [{"kind": "regmixup", "weight": 0.5, "alpha": 10.0}],
        "crl": [{"kind": "correctness_ranking", "weight": 0.5}],
        "sam": [{"kind": "sam", "rho": 0.05}],
        "swa": [swa],
        "cosine": [{"kind": "cosine_head", "scale": 8.0}],
    }
    parts["sure"] = [
        part for name in ("regmixup", "crl", "sam", "swa", "cosine") for part in parts[name]
    ]
    return parts[method]


DIVISIONS = {"low": (0, 1, 2, 3, 4, 5), "mixed": (9, 7, 5, 3, 1, 0), "high": (4, 5, 6, 7, 8, 9)}
"""Three ways to divide ten classes into six known and four unknown ones."""


def digits() -> Task:
    """The digits that come with scikit-learn."""
    return Task(
        name="digits",
        title="Digits, 6 known and 4 unknown classes",
        network={"factory": "oodcore_plugins.networks:digits_cnn", "arguments": {"width": 16}},
        sources={part: {"kind": "digits", "split": part} for part in ("train", "held_out", "test")},
        epochs=20,
        batch=32,
        known=DIVISIONS,
        choosing=tuple(DIVISIONS),
    )


def mnist(sources: Mapping[str, Config]) -> Task:
    """MNIST, from archives that ``archives.prepared`` wrote."""
    return Task(
        name="mnist",
        title="MNIST, 6 known and 4 unknown classes",
        network={"factory": "oodcore_plugins.networks:mnist_convnet", "arguments": {}},
        sources=sources,
        epochs=8,
        batch=32,
        known=DIVISIONS,
    )


def cifar(sources: Mapping[str, Config]) -> Task:
    """CIFAR-10 in small, from archives that ``archives.prepared`` wrote."""
    return Task(
        name="cifar",
        title="CIFAR-10, 6 known and 4 unknown classes",
        network={
            "factory": "oodcore_plugins.networks:wide_resnet",
            "arguments": {"depth": 16, "widen": 1},
        },
        sources=sources,
        epochs=10,
        batch=64,
        known={"low": DIVISIONS["low"]},
        seeds=(0,),
        rates=(0.1,),
        methods=(
            "cross_entropy",
            "logitnorm",
            "focal_cosine",
            "center_weight",
            "cosine",
            "regmixup",
            "sure",
        ),
    )
