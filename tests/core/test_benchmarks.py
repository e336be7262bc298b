"""The benchmarks run, agree with themselves, and write their tables where they belong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def part(monkeypatch):
    """A module of the benchmarks, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def numbers(table) -> list[list[float]]:
    """What a table holds behind its first column, as numbers."""
    return [[float(cell.replace(",", "")) for cell in row[1:] if cell] for row in table.rows]


FEW = ("mahalanobis", "knn", "react", "sum")


@pytest.mark.parametrize("name", ["scoring", "metrics", "costs"])
def test_a_part_runs_and_every_cell_is_a_number(name, part, monkeypatch):
    costs = part("costs")
    few = {kind: costs.candidates()[kind] for kind in FEW}
    monkeypatch.setattr(costs, "candidates", lambda: few)
    for table in part(name).tables(quick=True):
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
        assert np.isfinite([x for row in numbers(table) for x in row]).all()
        assert table.markdown().startswith(f"### {table.title}\n\n")


def test_the_scorers_beside_the_model_are_installed_and_keep_no_rows(part):
    scoring = part("scoring")
    from oodcore.plugins import registry

    assert len(set(scoring.SCORERS)) == 22
    for kind in scoring.SCORERS:
        statistics = registry.build("scorer", kind).statistics()
        assert not {statistic.kind for statistic in statistics} & {"bank", "sample"}, kind
    assert {"knn", "nnguide", "relation"} <= set(scoring.banks())


def test_what_cannot_be_measured_is_named(part, monkeypatch):
    costs = part("costs")
    monkeypatch.setattr(costs, "candidates", lambda: {"sum": {"scorer": "sum"}})
    (table,) = costs.tables(quick=True)
    assert not table.rows
    assert table.left_out == "Not for these rows: `sum`."


def test_each_scorer_and_shaper_of_features_is_a_candidate(part):
    found = part("costs").candidates()
    assert found["msp"] == {"scorer": "msp"}
    assert found["react"] == {"scorer": "energy", "shapers": ["react"]}
    assert not {"odin", "perturbed", "multilayer"} & found.keys()


def test_scikit_learn_measures_the_same(part):
    (table,) = part("metrics").tables(quick=True)
    assert all(row[-1] < 1e-12 for row in numbers(table))


@pytest.mark.parametrize("name", ["mahalanobis-100", "knn", "vim", "gradnorm", "dice", "react"])
def test_a_method_beside_itself_agrees(name, part):
    peers = part("peers")
    method = peers.METHODS[name]
    itself = replace(method, theirs=method.ours, factor=lambda rows: 1.0)
    fit, score = peers.compared(itself, quick=True)
    assert float(score[-1]) == 0
    assert len(fit) == len(score) == len(peers.TIMES)


@pytest.mark.parametrize("name", ["mahalanobis-100", "knn", "vim", "gradnorm", "dice", "react"])
def test_both_libraries_give_the_same_scores(name, part):
    peers = part("peers")
    if not peers.available():
        pytest.skip(
            "pytorch-ood is installed for `make bench` alone, whose table says how far both agree"
        )
    method = peers.METHODS[name]
    rows = method.size.small().rows()
    theirs = method.theirs.score(method.theirs.fit(rows), rows) * method.factor(rows)
    ours = method.ours.score(method.ours.fit(rows), rows)
    assert peers.disagreement(ours, theirs) < 1e-4


def test_disagreement_is_the_largest_difference_over_the_size(part):
    off = part("peers").disagreement
    assert off(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 5.0])) == pytest.approx(0.2)
    assert off(np.array([0.5, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])) == pytest.approx(0.25)


def test_a_stream_is_fitted(part):
    part("memory").stream(1500)


def test_the_peak_is_that_of_the_work():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak is read from Linux's /proc")
    # A process of its own: one that ran other tests has freed memory to reuse.
    code = "import measure, torch; print(measure.peak(lambda: torch.ones(64 * 2**18).sum()))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, check=True
    )
    assert 60 < float(found.stdout) < 90


def test_works_take_turns_and_the_ratio_is_of_the_same_round(part):
    measure = part("measure")
    order: list[str] = []
    timing = measure.timed({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ab" + "ab" + "ba"
    assert len(timing.rounds["a"]) == 2
    slow = measure.Timing({"a": [2.0, 40.0, 3.0], "b": [1.0, 10.0, 1.0]})
    assert slow.ratio("a", "b") == 3.0
    assert slow.seconds("a") == 2.0


def test_impatience_leaves_one_round(part):
    timing = part("measure").timed({"a": lambda: None}, 5, patience=0.0)
    assert len(timing.rounds["a"]) == 1


def test_what_is_measured_goes_between_the_marks(part):
    run = part("run")
    page = f"# Title\n\n{run.BEGIN}\nold\n{run.END}\n\nrest\n"
    once = run.filled(page, "new")
    assert once == f"# Title\n\n{run.BEGIN}\n\nnew\n\n{run.END}\n\nrest\n"
    assert run.filled(once, "new") == once
    with pytest.raises(SystemExit, match="no <!-- measured"):
        run.filled("# Title\n", "new")
    assert run.BEGIN in run.PAGE.read_text("utf-8")


def test_the_command_line(part, capsys, monkeypatch):
    run = part("run")
    monkeypatch.setattr("sys.argv", ["run.py", "--quick", "metrics"])
    before = torch.get_num_threads()
    try:
        run.main()
    finally:
        torch.set_num_threads(before)
    assert "### Measures" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["run.py", "everything"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no part 'everything'" in capsys.readouterr().err
