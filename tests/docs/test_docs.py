"""The documentation says what is so: its code runs, its generated parts are current."""

from __future__ import annotations

import importlib
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
from oodcore.plugins import registry
from oodcore.results import Entry, Results
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


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    skipped = [block for page in PAGES for block in blocks(page) if block.skipped]
    assert len(skipped) <= 8, [block.where for block in skipped]
    known = {"not run: ", "varies", "example", "wrong on purpose"}
    for block in (block for page in PAGES for block in blocks(page)):
        assert all(any(note.startswith(word) for word in known) for note in block.notes), block


def test_runner_notices_what_a_page_gets_wrong(tmp_path: Path) -> None:
    wrong = {
        "raises": "```python\n1 / 0\n```\n",
        "prints": "```python\nprint(1)\n```\n\n```output\n2\n```\n",
        "raises nothing": "```python\n1\n```\n\n```output\nDataError: no\n```\n",
        "raises another": "```python\n1 / 0\n```\n\n```output\nDataError: no\n```\n",
        "yaml": "```yaml\nscorer: enrgy\n```\n",
        "fragment": "```yaml\nregularizers: [logitnrm]\n```\n",
        "command": "```sh\noodcore lst\n```\n",
        "command's output": "```console\n$ oodcore --version\noodcore 9.9.9\n```\n",
        "program": "```sh\nrm file\n```\n",
        "json": "```json\n{,}\n```\n",
    }
    for name, text in wrong.items():
        page = tmp_path / f"{name}.md"
        page.write_text(text)
        with pytest.raises((AssertionError, ValueError)):
            run_page(page, {})


def test_output_that_varies_is_compared_without_its_numbers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "```python\nprint('a 1.5 [ -2. ]')\n```\n\n<!-- varies -->\n```output\na 7 [-0.25]\n```\n"
    )
    page.write_text(text)
    run_page(page, {})
    page.write_text(text.replace("\na 7", "\nb 7"))
    with pytest.raises(AssertionError, match="prints"):
        run_page(page, {})


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("generate")


def test_check_finds_a_page_that_is_not_current(
    generate: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- begin: metrics -->\n<!-- end: metrics -->\nafter\n")
    monkeypatch.setattr(generate, "DOCS", page.parent)
    monkeypatch.setenv("OODCORE_PLUGINS", "")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    assert "docs/page.md is not current" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert re.fullmatch(r"before\n.*\| `auroc` \|.*\nafter\n", page.read_text(), re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_readme_shows_the_best_of_a_demonstration(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {
        f"net/{name}": {"id_test": [2.0, 3.0], "x": [shift, 0.0], "y": [0.0, shift]}
        for name, shift in {"worst": 4.0, "best": 1.0, "b": 2.5, "c": 2.5, "d": 2.5}.items()
    }
    entries = [Entry(name, "net") for name in scores]
    groups = {"x": "near", "y": "far"}
    Results.from_scores(entries, scores, groups=groups).save(tmp_path / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- begin: demo -->\n<!-- end: demo -->\n")
    monkeypatch.setattr(generate, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--results", str(tmp_path / "results")])
    monkeypatch.setenv("OODCORE_PLUGINS", "")
    assert generate.main() == 0
    table = (tmp_path / "README.md").read_text()
    assert "The 4 best of 5 detectors" in table
    assert "| net | best | 100.00 | 100.00 | 100.00 | 0.00 |  |" in table
    assert "worst" not in table


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(
            r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
        )
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"``?[^`]*``?", "", text)):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
