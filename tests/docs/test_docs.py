"""The documentation says what is so: its code runs, its generated parts are current."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from blocks import blocks, run_page

import oodcore
from oodcore import hookspecs
from oodcore.plugins import SLOTS, registry
from oodcore.scorer import Combination
from oodcore.testing.description import documented
from oodcore.training import train
from oodcore_plugins.networks import digits_cnn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
SIX = (0, 1, 2, 3, 4, 5)


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = registry.build("source", {"kind": "digits", "split": split, "classes": SIX}).open()
    images, labels, _ = zip(*(rows[row] for row in range(len(rows))), strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``oodcore demo`` leaves, of a network that was trained for a moment."""
    folder = tmp_path_factory.mktemp("demo")
    rows = {"kind": "digits", "split": "train", "classes": list(SIX)}
    factory = "oodcore_plugins.networks:digits_cnn"
    network = {"factory": factory, "arguments": {"classes": 6, "width": 8}}
    config = {"network": network, "train": rows, "epochs": 2, "batch_size": 64}
    train(config, folder / "models" / "cross-entropy")
    shutil.copytree(folder / "models" / "cross-entropy", folder / "models" / "logitnorm")
    return folder


@pytest.fixture
def given() -> dict[str, Any]:
    """The names that pages use for what a reader has already."""

    def make_network() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return digits_cnn(6, width=8)

    return {
        "oodcore": oodcore,
        "make_network": make_network,
        "model": make_network(),
        "train": digits("train"),
        "calibration": digits("calibrate")[0],
        "held_out": digits("held_out"),
        "test": digits("test"),
        "inputs": digits("test")[0][:32],
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_code_of_page_runs(
    page: Path,
    given: dict[str, Any],
    demonstration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(demonstration, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    try:
        run_page(page, given)
    finally:
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]
