"""The overview shows every number at every width, and cuts off nothing."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from oodcore.calibration import Calibration
from oodcore.errors import ConfigurationError
from oodcore.metrics import SEPARATION
from oodcore.overview import Overview
from oodcore.results import Entry, Results
from oodcore.tables import percent

SETS = {"svhn": "far", "cifar100": "near", "textures": "far", "imagenet-resized-to-32-pixels": ""}
LONG = "react + combination(scorers=[energy, mahalanobis, knn(k=200)])"


def benchmark(names=("msp", "knn"), models=("",), sets=SETS, calibrated=True):
    rng = np.random.default_rng(0)
    entries = [
        Entry(f"{model}/{name}" if model else name, model) for model in models for name in names
    ]
    scores = {
        entry.name: {
            "id_test": rng.normal(1 + number, 1, 60),
            **{data: rng.normal(k / 4, 1, 40) for k, data in enumerate(sets)},
        }
        for number, entry in enumerate(entries)
    }
    return Results.from_scores(
        entries,
        scores,
        groups={data: group for data, group in sets.items() if group},
        accuracy=dict.fromkeys(models, 0.98765),
        calibrations={e.name: Calibration(rng.normal(1, 1, 99)) for e in entries}
        if calibrated
        else None,
        false_alarm_rate=0.05 if calibrated else None,
    )


def drawn(results, width, metric="auroc", **options):
    file = io.StringIO()
    Console(file=file, width=width, highlight=False, **options).print(Overview(results, metric))
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 140, 200])
@pytest.mark.parametrize("models", [("",), ("plain", "cross-entropy with a long name")])
def test_everything_is_there_at_every_width(width, models):
    results = benchmark(models=models)
    text = drawn(results, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for entry in results.entries:
        cells = [results.mean(entry.name, metric) for metric in SEPARATION]
        cells += [results.value(entry.name, "auroc", data) for data in SETS]
        cells += [results.value(entry.name, "false_alarm_rate", "id_test")]
        cells += [results.mean(entry.name, "auroc", "far")]
        short = entry.name.removeprefix(f"{entry.model}/")
        shown = re.findall(rf"^{short} +(\S.*)$", text, flags=re.MULTILINE)
        assert {percent(cell) for cell in cells} <= set(" ".join(shown).split())
    flowing = " ".join(text.split())
    for model in models:
        told = f"{model} (accuracy 98.77)" if model else "Accuracy on id_test: 98.77."
        assert told in flowing


def test_a_wide_terminal_has_one_table_and_a_narrow_one_several():
    results = benchmark()
    assert [drawn(results, width).count("detector") for width in (140, 60)] == [1, 3]


def test_long_names_are_folded():
    text = drawn(benchmark(names=("msp", LONG)), 80)
    first = [line[:33].strip() for line in text.splitlines()]
    assert "".join(LONG.split()) in "".join("".join(first).split())
    assert max(map(len, text.splitlines())) <= 80


def test_detectors_are_best_first_within_their_models():
    results = benchmark(models=("worse", "better"))
    lines = [line.split()[0] for line in drawn(results, 200).splitlines() if line.strip()]
    assert lines.index("better") < lines.index("worse")
    for model in ("better", "worse"):
        ranked = [name for name in results.ranked() if name.startswith(model)]
        at = lines.index(model)
        assert lines[at + 1 : at + 3] == [name.partition("/")[2] for name in ranked]


def test_the_best_number_of_a_column_is_bold():
    results = benchmark()
    text = drawn(results, 200, force_terminal=True, color_system="standard")
    best = percent(max(results.mean(entry.name, "auroc") for entry in results.entries))
    worst = percent(min(results.mean(entry.name, "auroc") for entry in results.entries))
    assert re.search(rf"\x1b\[1m *{best}", text)
    assert not re.search(rf"\x1b\[1m *{worst}", text)


def test_one_set_has_no_mean_and_no_column_of_its_own():
    text = drawn(benchmark(sets={"svhn": ""}), 80)
    assert "mean" not in text
    assert text.count("AUROC") == 2
    assert "The OOD set is svhn." in text


def test_a_group_of_one_set_has_no_mean():
    head, _, _ = drawn(benchmark(), 200).partition("─")
    assert "far" in head.split()
    assert "near" not in head.split()


def test_tables_share_their_columns_evenly():
    sets = {f"set number {number}": "" for number in range(7)}
    heads = [
        line for line in drawn(benchmark(sets=sets), 80).splitlines() if line.startswith("detector")
    ]
    assert [len(re.findall(r"set number \d", head)) for head in heads] == [0, 4, 3]


def test_without_calibration_there_are_no_false_alarms():
    assert "alarms" not in drawn(benchmark(calibrated=False), 140)


def test_another_metric_is_shown_of_each_set():
    results = benchmark()
    value = percent(results.value("msp", "fpr95_ood", "svhn"))
    [line] = [line for line in drawn(results, 200, "fpr95_ood").splitlines() if "msp" in line]
    assert value in line
    with pytest.raises(ConfigurationError, match="one of auroc"):
        Overview(results, "accuracy")
