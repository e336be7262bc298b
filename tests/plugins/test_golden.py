"""Reference scores that independent implementations gave: every method agrees with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from torch import Tensor, nn

import oodcore
from oodcore import Detector, Features, Head

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden"
CASES: list[dict[str, Any]] = YAML(typ="safe").load(TESTS / "golden.yaml")
MATCHED = [case for case in CASES if "key" in case]
SETS = ("test_id", "ood_near", "ood_far")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.fc2(self.fc1(inputs).relu())
        return hidden.relu()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = Backbone(), nn.Linear(32, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.backbone(inputs))
        return logits


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "inputs.npz") as inputs, np.load(GOLDEN / "scores.npz") as scores:
        return {**inputs, **scores}


def features(name: str, labelled: bool = False) -> Features:
    given = arrays()
    return Features(
        embeddings=torch.from_numpy(given[f"{name}_features"]),
        logits=torch.from_numpy(given[f"{name}_logits"]),
        labels=torch.from_numpy(given[f"{name}_labels"]).long() if labelled else None,
        head=Head(torch.from_numpy(given["head_weight"]), torch.from_numpy(given["head_bias"])),
    )


def our_scores(case: dict[str, Any]) -> np.ndarray:
    given = arrays()
    model: nn.Module | None = None
    train: Any = features("train", labelled=True)
    test: Any = Features.cat([features(name) for name in SETS])
    if case.get("inputs"):
        model = Network()
        model.load_state_dict(load_file(GOLDEN / "model.safetensors"))
        train = (given["train_x"], given["train_labels"])
        test = np.concatenate([given[f"{name}_x"] for name in SETS])
    held_out = features("test_id", labelled=True) if case.get("held_out") else None
    detector = Detector(
        model, scorer=case.get("scorer", case["kind"]), shapers=case.get("shapers", ())
    )
    scores = detector.fit(train, held_out).score(test)
    if case.get("transform") == "negative square":
        return -np.square(scores)
    if case.get("transform") == "times classes":
        return scores * given["head_weight"].shape[0]
    assert case.get("transform", "identity") == "identity"
    return scores


@pytest.mark.parametrize("case", MATCHED, ids=[case["key"] for case in MATCHED])
def test_agreement(case: dict[str, Any]) -> None:
    reference = arrays()[case["key"]]
    rows = np.ones(len(reference), dtype=bool)
    if "mask" in case:
        rows &= ~arrays()[case["mask"]]
        assert rows.sum() > 0.9 * len(rows)
    tolerance = 1e-6 * np.maximum(np.abs(reference), np.median(np.abs(reference)))
    error = np.abs(our_scores(case) - reference)[rows] / tolerance[rows]
    assert error.max() <= 1, f"{error.max():.3g} times the tolerance in row {error.argmax()}"


def test_every_method_has_its_line() -> None:
    named = {case["kind"] for case in CASES}
    ours = {
        kind
        for slot in ("scorer", "shaper")
        for kind, cls in oodcore.registry.all(slot).items()
        if cls.__module__.startswith("oodcore_plugins.")
    }
    assert ours - named == set()
    assert named - ours == set()
    for case in CASES:
        assert ("key" in case) != bool(case.get("unmatched"))


def test_the_lines_can_fail() -> None:
    wrong = {**MATCHED[0], "key": "maxlogit@ref64"}
    with pytest.raises(AssertionError, match="tolerance"):
        test_agreement(wrong)
