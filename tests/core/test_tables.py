"""Tables put the best detector first and say what every column is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from oodcore import tables
from oodcore.errors import ConfigurationError
from oodcore.results import Entry, Results


def benchmark(groups=None, models=("", ""), sets=("a", "b"), **options):
    scores = {}
    for number, name in enumerate(("low", "high|er")):
        rng = np.random.default_rng(7)
        scores[name] = {
            "id_test": rng.normal(1 + 2 * number, 1, 80),
            **{name: rng.normal(0, 1, 40) for name in sets},
        }
    entries = [Entry(name, model) for name, model in zip(scores, models, strict=True)]
    return Results.from_scores(entries, scores, groups=groups, **options)


@pytest.mark.parametrize(
    ("sets", "groups", "titles"),
    [
        (("a",), {}, ["a"]),
        (("a",), {"a": "far"}, ["a"]),
        (("a", "b"), {}, ["mean", "a", "b"]),
        (("a", "b"), {"a": "far", "b": "far"}, ["mean", "a", "b"]),
        (("a", "b"), {"a": "far"}, ["mean", "far mean", "a", "b"]),
        (("a", "b"), {"a": "far", "b": "near"}, ["mean", "near mean", "far mean", "b", "a"]),
    ],
)
def test_columns_are_means_then_sets(sets, groups, titles):
    results = benchmark(groups, sets=sets)
    assert [column.title for column in tables.columns(results)] == titles
    assert results.table_rows()[0] == ["detector", *titles]


@pytest.mark.parametrize("metric", ["auroc", "fpr95_id"])
def test_lines_are_best_first_in_percent(metric):
    header, best, worst = benchmark().table_rows(metric)
    assert header == ["detector", "mean", "a", "b"]
    assert (best[0], worst[0]) == ("high|er", "low")
    for better, worse in zip(best[1:], worst[1:], strict=True):
        assert 0 <= float(worse) <= 100
        assert (float(better) > float(worse)) is (metric == "auroc")


def test_models_accuracies_and_gaps_show():
    results = benchmark(models=("m", "n"), accuracy={"n": 0.987654})
    header, best, worst = results.table_rows()
    assert header == ["detector", "model", "mean", "a", "b", "accuracy"]
    assert (best[:2], best[-1]) == (["high|er", "n"], "98.77")
    assert (worst[:2], worst[-1]) == (["low", "m"], "")


def test_a_model_that_begins_the_name_is_not_said_twice():
    results = benchmark(models=("m", "n"))
    named = [replace(entry, name=f"{entry.model}/{entry.name}") for entry in results.entries]
    scores = {e.name: {"id_test": [1.0, 2.0], "a": [0.0]} for e in named}
    assert Results.from_scores(named, scores).table_rows()[0] == ["detector", "a"]


def test_markdown_is_a_table_whose_names_are_escaped():
    lines = benchmark(models=("m", "n")).markdown().splitlines()
    assert lines[0] == "| detector | model | mean | a | b |"
    assert lines[1] == "| --- | --- | ---: | ---: | ---: |"
    assert lines[2].startswith(r"| high\|er | n | ")
    assert len(lines) == 4


def test_the_best_of_a_column():
    assert tables.best_of([0.2, 0.7], "auroc") == 0.7
    assert tables.best_of([0.2, 0.7], "fpr95_ood") == 0.2
    assert tables.best_of([0.2, 0.7], "false_alarm_rate") is None
    assert tables.best_of([], "auroc") is None


def test_a_table_of_what_compares_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"one of auroc, fpr95_id.* not 'accuracy'"):
        benchmark().table_rows("accuracy")
