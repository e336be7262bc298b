from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parents[2] / "benchmarks" / "training"
SCORES = ("MSP", "MaxLogit", "Energy", "MaxCosine", "MaxNorm", "DML", "RP+GradNorm")


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    """The command, with the modules that it uses as attributes."""
    pytest.importorskip("lightning", reason="the benchmark trains networks")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("training_benchmark", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method, division="low", seed=0, **numbers):
    scores = {"msp": {"auroc": numbers.pop("msp", 0.5)}}
    return {"method": method, "division": division, "seed": seed, "scores": scores, **numbers}


def test_a_quick_run_of_the_digits_leaves_every_table(bench, tmp_path, capsys):
    bench.main(["--quick", "--part", "digits", "--work", str(tmp_path)])
    said = capsys.readouterr().out
    assert all(f"#### {title}" in said for title in ("AUROC", "FPR95", "OSCR", "The networks"))
    assert f"| training | {' | '.join(SCORES)} |" in said
    first = next(line for line in said.splitlines() if line.startswith("| cross-entropy |"))
    numbers = [float(cell) for cell in first.strip("| ").split("|")[1:]]
    assert len(numbers) == len(SCORES)
    assert all(0 <= number <= 100 for number in numbers)
    plus = next(line for line in said.splitlines() if line.startswith("| DML+ (MCF and MNC) |"))
    assert sum(cell.strip() != "" for cell in plus.strip("|").split("|")) == 2
    assert "Measured on" in said
    rows = (tmp_path / "digits" / "rows.jsonl").read_text()
    bench.main(["--quick", "--part", "digits", "--work", str(tmp_path)])
    assert capsys.readouterr().out == said
    assert (tmp_path / "digits" / "rows.jsonl").read_text() == rows


def test_runs_that_are_stopped_and_resumed_end_alike(bench, capsys):
    bench.main(["--quick", "--part", "resume"])
    line = next(x for x in capsys.readouterr().out.splitlines() if "`sam`" in x)
    assert line.count("identical") == 2
    assert "other" not in line


def test_a_run_that_ends_otherwise_is_told(bench, monkeypatch):
    ends = iter(range(10))
    monkeypatch.setattr(bench.resuming, "train", lambda *given, **options: Path())
    monkeypatch.setattr(bench.resuming, "left", lambda run: next(ends))
    assert bench.resuming.ended([], Path(), [3, 5], None) == ["other (3)", "other (5)"]


def test_the_runs_of_three_epochs_have_steps_as_the_table_says(bench):
    from oodcore.plugins import registry

    config = bench.resuming.installed.training([], network={}, size=8, batch=bench.resuming.BATCH)
    rows = len(registry.build("source", config["train"]).open())
    assert -(-rows // bench.resuming.BATCH) == bench.resuming.STEPS


def test_a_step_of_two_passes_is_set_against_one_of_one(bench, capsys):
    bench.main(["--quick", "--part", "cost"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| cross-entropy alone |") for line in lines)
    sam = next(line for line in lines if line.startswith("| `sam` |"))
    assert float(sam.split("|")[3]) > 0


def test_every_installed_regularizer_has_a_short_run(bench):
    from oodcore.plugins import registry
    from oodcore.training import TrainingConfig

    installed = bench.resuming.installed
    runs = installed.runs()
    network = bench.resuming.NETWORK
    for parts in runs.values():
        TrainingConfig.model_validate(installed.training(parts, network=network, size=8, batch=8))
    needy = {
        kind
        for kind, cls in registry.all("regularizer").items()
        if any(field.is_required() for field in cls.model_fields.values())
    }
    assert runs.keys() == {*registry.all("regularizer"), installed.WHOLE} - needy


@pytest.mark.parametrize("method", ["cross_entropy", "logitnorm", "center_weight", "swa", "sure"])
@pytest.mark.parametrize("epochs", [1, 8, 20, 200])
def test_trainings_are_valid_whatever_their_length(bench, method, epochs):
    from oodcore.training import TrainingConfig

    task = bench.recipes.replace(bench.recipes.digits(), epochs=epochs)
    config = TrainingConfig.model_validate(task.training(method, "mixed", 1, 0.1))
    parts = {part.kind: part for part in config.regularizers}
    if method == "sure":
        assert parts.keys() == {"regmixup", "correctness_ranking", "sam", "swa", "cosine_head"}
    if "swa" in parts:
        assert parts["swa"].start < epochs
    if epochs == 200 and method == "center_weight":
        assert parts["center"].starts == (60, 80)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.02, 0.03, 0.025], "**holds** (3 of 3)"),
        ([-0.02, -0.03, -0.025], "**the opposite** (0 of 3)"),
        ([-0.02, 0.03, 0.001], "cannot be told (2 of 3)"),
        ([0.0, 0.0, 0.0], "no difference"),
        ([0.1], "yes, once"),
        ([-0.1], "no, once"),
    ],
)
def test_verdicts_stand_on_the_spread_of_the_differences(bench, differences, verdict):
    assert bench.tables.claims.judged(differences, "auroc")[1] == verdict


def test_differences_are_paired_and_point_to_the_better_end(bench):
    claims = bench.tables.claims
    rows = [
        row("cross_entropy", seed=0, msp=0.5, aurc=0.3),
        row("cross_entropy", seed=1, msp=0.6, aurc=0.2),
        row("logitnorm", seed=1, msp=0.7, aurc=0.1),
        row("logitnorm", seed=2, msp=0.9, aurc=0.1),
    ]
    higher = claims.Claim("", "", ("logitnorm", "msp"), ("cross_entropy", "msp"), "auroc")
    assert higher.differences(rows) == pytest.approx([0.1])
    lower = claims.Claim("", "", ("logitnorm", ""), ("cross_entropy", ""), "aurc")
    assert lower.differences(rows) == pytest.approx([0.1])
    assert [line[0] for line in claims.table(rows).rows] == ["LogitNorm makes MSP better"]


def archive(path, jpeg=False):
    """Ten images of each of three classes, flat and of a grey of their own, and two of the test."""
    values = {}
    for part, count in (("train", 10), ("test", 2)):
        labels = np.repeat(np.arange(3), count).astype(np.uint8)
        images = np.empty((len(labels), 32, 32, 3), np.uint8)
        images[:] = (8 * np.arange(len(labels)))[:, None, None, None]
        values[f"y_{part}"] = labels
        if not jpeg:
            values[f"x_{part}"] = images
            continue
        files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=95)
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        values[f"jpeg_{part}"] = np.concatenate(files)
        values[f"offsets_{part}"] = np.cumsum([0, *map(len, files)])
    np.savez(path, **values)
    return path


@pytest.mark.parametrize("jpeg", [False, True])
def test_archives_are_divided_by_class_without_a_row_in_two_parts(bench, tmp_path, jpeg):
    amount = bench.archives.Amount(train=4, held_out=3, size=16)
    path = archive(tmp_path / "all.npz", jpeg)
    found = bench.archives.prepared(path, tmp_path / "parts", amount)
    greys = {}
    for part, count in (("train", 4), ("held_out", 3), ("test", 2)):
        rows = np.load(found[part]["path"])
        assert rows["x"].shape == (3 * count, 16, 16, 3)
        assert rows["x"].dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(rows["y"]), [count] * 3)
        greys[part] = np.round(rows["x"].mean(axis=(1, 2, 3)) / 8).astype(int)
        per_class = 2 if part == "test" else 10
        np.testing.assert_array_equal(greys[part] // per_class, rows["y"])
    assert not set(greys["train"]) & set(greys["held_out"])


def test_an_archive_that_cannot_serve_is_refused(bench, tmp_path):
    amount = bench.archives.Amount(train=9, held_out=3)
    with pytest.raises(SystemExit, match="there is no archive"):
        bench.archives.prepared(tmp_path / "none.npz", tmp_path, amount)
    with pytest.raises(SystemExit, match="12 images of class 0 are asked for, of 10"):
        bench.archives.prepared(archive(tmp_path / "all.npz"), tmp_path, amount)
    np.savez(tmp_path / "odd.npz", y_train=np.repeat([0, 1], 20), y_test=np.arange(2))
    with pytest.raises(SystemExit, match="neither x_train nor jpeg_train"):
        bench.archives.prepared(tmp_path / "odd.npz", tmp_path, amount)


def test_a_part_is_written_where_its_mark_is(bench, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(bench, "PAGE", page)
    page.write_text("above\n<!-- trained: cost -->\nold\n<!-- trained: end cost -->\nbelow\n")
    table = {"title": "T", "about": "", "header": ["a", "b"], "rows": [["1", "2"]]}
    bench.write("cost", {"made": "Measured.", "table": {**table, "left_out": ""}})
    text = page.read_text()
    assert "old" not in text
    assert "| 1 | 2 |" in text
    assert text.startswith("above\n<!-- trained: cost -->\n")
    assert text.endswith("<!-- trained: end cost -->\nbelow\n")
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="has no <!-- trained: cost -->"):
        bench.write("cost", {"made": "", "table": {**table, "left_out": ""}})


def test_what_is_quick_is_never_written(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--write"])
    assert "not the quick one" in capsys.readouterr().err


def test_a_part_without_its_archive_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--part", "mnist"])
    assert "--mnist PATH" in capsys.readouterr().err
