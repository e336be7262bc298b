"""Results are tidy, complete, and read back as they were written."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from oodcore import __version__
from oodcore.calibration import Calibration
from oodcore.component import Paper
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.metrics import METRICS, SEPARATION, measures
from oodcore.picture import Picture
from oodcore.results import DataSet, Entry, Method, Results, Row, write_text

GROUPS = {"near one": "near", "near two": "near", "far": "far"}


def scored(seed=0, shift=1.0):
    rng = np.random.default_rng(seed)
    return {
        "far": rng.normal(-3 * shift, 1, 90),
        "other": rng.normal(-shift, 1, 50),
        "id_test": rng.normal(0, 1, 200),
        "near one": rng.normal(-shift, 1, 60),
        "near two": rng.normal(-0.5 * shift, 1, 70),
    }


@pytest.fixture(name="scores")
def _scores():
    return {"weak": scored(0, 0.5), "strong": scored(1, 2.0), "[bold]|odd": scored(2, 1.0)}


@pytest.fixture(name="results")
def _results(scores):
    found = Results.from_scores(
        [
            Entry(
                "weak",
                "one",
                {"scorer": {"kind": "msp"}, "shapers": ()},
                "A paper",
                0.5,
                (Method("scorer", "msp", "Says ``max p``.", Paper("T", "A", "V", 1, "u")),),
            ),
            Entry("strong", "two"),
            Entry("[bold]|odd", "one"),
        ],
        scores,
        groups=GROUPS,
        accuracy={"one": 0.75},
        calibrations={"weak": Calibration(np.random.default_rng(5).normal(size=99))},
        false_alarm_rate=0.1,
        configuration={"batch_size": 256, "scorers": ("msp",)},
        provenance={"plugins": {"oodcore": "0.1.0"}},
    )
    points = {data.name: ((0, 1000), (3, 4)) for data in found.data}
    return replace(found, pictures={"one": Picture((0.5, 0.5), (-1.0, 0.0), 2.0, (), points)})


def test_rows_are_tidy_and_hold_the_measures(results, scores):
    values = {(r.detector, r.data, r.group, r.metric): r.value for r in results.rows}
    assert len(values) == len(results.rows)
    groups = {**GROUPS, "other": ""}
    for detector, own in scores.items():
        expected = {name: measures(own["id_test"], own[name]) for name in groups}
        for metric in SEPARATION:
            for name, group in groups.items():
                assert values[detector, name, group, metric] == expected[name][metric]
            near = (expected["near one"][metric] + expected["near two"][metric]) / 2
            assert values[detector, "mean", "near", metric] == pytest.approx(near)
            assert values[detector, "mean", "far", metric] == expected["far"][metric]
            every = np.mean([expected[name][metric] for name in groups])
            assert values[detector, "mean", "all", metric] == pytest.approx(every)
    alone = {key: value for key, value in values.items() if key[1] == "id_test"}
    flagged = np.mean(scores["weak"]["id_test"] < np.sort(calibrated())[9])
    assert alone == {
        ("weak", "id_test", "id", "accuracy"): 0.75,
        ("[bold]|odd", "id_test", "id", "accuracy"): 0.75,
        ("weak", "id_test", "id", "false_alarm_rate"): flagged,
    }
    assert len(values) == 3 * 7 * 5 + 3
    assert {row.model for row in results.rows if row.detector == "strong"} == {"two"}


def calibrated():
    return np.random.default_rng(5).normal(size=99)


def test_data_sets_come_by_group_near_first(results):
    assert [(item.name, item.group, item.rows) for item in results.data] == [
        ("id_test", "id", 200),
        ("near one", "near", 60),
        ("near two", "near", 70),
        ("far", "far", 90),
        ("other", "", 50),
    ]
    assert results.groups == ("near", "far")
    assert results.id_data.name == "id_test"
    assert len(results.ood_data) == 4


def test_what_was_asked_and_what_it_ran_on_are_recorded(results):
    assert results.configuration == {
        "batch_size": 256,
        "scorers": ["msp"],
        "false_alarm_rate": 0.1,
    }
    assert results.entries[0].configuration == {"scorer": {"kind": "msp"}, "shapers": []}
    versions = results.provenance["versions"]
    assert versions["oodcore"] == __version__
    assert {"python", "torch", "numpy"} <= versions.keys()
    assert results.provenance["plugins"] == {"oodcore": "0.1.0"}
    assert results.provenance["calibration_rows"] == {"": 99}
    assert results.calibration_rows == 99
    assert results.figures["weak"].threshold == np.sort(calibrated())[9]
    assert results.figures["strong"].threshold is None


def test_looking_up(results):
    assert results.value("weak", "accuracy", "id_test") == 0.75
    assert results.value("strong", "accuracy", "id_test") is None
    assert results.value("weak", "auroc", "nowhere") is None
    near = [results.value("weak", "auroc", name) for name in ("near one", "near two")]
    assert results.mean("weak", "auroc", "near") == pytest.approx(np.mean(near))
    assert results.mean("weak", "auroc", "nowhere") is None


def test_ranking_knows_which_end_is_better(results):
    assert results.best() == "strong"
    assert results.ranked() == ("strong", "[bold]|odd", "weak")
    assert results.ranked("fpr95_id") == ("strong", "[bold]|odd", "weak")
    assert results.best("accuracy") == "weak"  # equal ones in the order given, unmeasured ones last
    assert results.ranked("accuracy") == ("weak", "[bold]|odd", "strong")
    with pytest.raises(ConfigurationError, match="neither end is best"):
        results.best("false_alarm_rate")
    for name in ("aurok", "oscr"):
        with pytest.raises(ConfigurationError, match=f"unknown metric '{name}'; there are: auroc"):
            results.best(name)


def test_saved_results_read_back_equal(results, tmp_path):
    folder = results.save(tmp_path / "deep" / "run")
    assert sorted(file.name for file in folder.iterdir()) == ["results.csv", "results.json"]
    assert Results.load(folder) == results
    content = json.loads((folder / "results.json").read_text())
    assert content["schema"] == 3
    measured = {row.metric for row in results.rows}
    assert content["conventions"] == {name: METRICS[name].meaning for name in measured}
    lines = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert list(lines[0]) == ["detector", "model", "data", "group", "metric", "value", "sd"]
    assert {line.pop("sd") for line in lines} == {""}
    assert [Row(**{**line, "value": float(line["value"])}) for line in lines] == list(results.rows)
    results.save(folder)
    assert len(list(folder.iterdir())) == 2


def test_results_of_the_first_schema_are_read(results, tmp_path):
    path = results.save(tmp_path) / "results.json"
    content = json.loads(path.read_text())
    content |= {"schema": 1}
    for name in ("protocol", "repeats", "pictures"):
        del content[name]
    for row in content["rows"]:
        del row["values"]
    for entry in content["entries"]:
        del entry["seconds"], entry["methods"]
        entry |= {"seconds_fit": None, "seconds_score": None}
    for figure in content["figures"].values():
        del figure["coverage"]
    path.write_text(json.dumps(content))
    untimed = tuple(replace(entry, seconds=None, methods=()) for entry in results.entries)
    assert Results.load(tmp_path) == replace(results, entries=untimed, pictures={})


def test_results_of_the_second_schema_are_read(results, tmp_path):
    path = results.save(tmp_path) / "results.json"
    content = json.loads(path.read_text())
    content |= {"schema": 2}
    del content["pictures"]
    for entry in content["entries"]:
        del entry["methods"]
    path.write_text(json.dumps(content))
    plain = tuple(replace(entry, methods=()) for entry in results.entries)
    assert Results.load(tmp_path) == replace(results, entries=plain, pictures={})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_bytes() == b"old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old\n")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def damaged(change):
    def apply(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


def first_row(**values):
    return damaged(lambda content: content["rows"][0].update(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "is not JSON"),
        (lambda text: "[" * 100_000, "is not JSON"),
        (
            lambda text: '{"schema": 1, "configuration": ' + '{"a":' * 500 + "1" + "}" * 501,
            "recursion",
        ),
        (lambda text: b"\xff\xfe\x00", "is not JSON"),
        (lambda text: "[1]", "no schema number"),
        (lambda text: "{}", "no schema number"),
        (damaged(lambda c: c.update(schema="1")), "no schema number"),
        (damaged(lambda c: c.update(schema=True)), "no schema number"),
        (damaged(lambda c: c.update(schema=4)), "schema 4 and this oodcore reads schema 3"),
        (damaged(lambda c: c.pop("rows")), "rows"),
        (damaged(lambda c: c.update(extra=1)), "extra"),
        (damaged(lambda c: c.update(entries=[])), "at least one detector"),
        (damaged(lambda c: c["entries"].append(c["entries"][0])), "the same name"),
        (damaged(lambda c: c["data"].append(c["data"][1])), "the same name"),
        (damaged(lambda c: c["data"].reverse()), "first data set"),
        (damaged(lambda c: c["entries"][0].update(name="a\nb")), "cannot name a detector"),
        (damaged(lambda c: c["entries"][0].update(seconds="1")), "seconds"),
        (damaged(lambda c: c["rows"].append(c["rows"][0])), "given twice"),
        (damaged(lambda c: c["figures"].pop("weak")), "figures do not match"),
        (damaged(lambda c: c["figures"]["weak"]["counts"].pop("far")), "histograms of weak"),
        (damaged(lambda c: c["figures"]["weak"]["roc"].pop("far")), "ROC curves of weak"),
        (damaged(lambda c: c["figures"]["weak"]["edges"].reverse()), "figure of weak is damaged"),
        (
            damaged(lambda c: c["figures"]["weak"].update(coverage=[[0.5, 1.5]])),
            "figure of weak is damaged",
        ),
        (damaged(lambda c: c.update(repeats=[1])), "repeats.0"),
        (damaged(lambda c: c["pictures"].update(nobody=c["pictures"]["one"])), "unknown model"),
        (damaged(lambda c: c["pictures"]["one"]["points"].pop("far")), "points in the picture"),
        (damaged(lambda c: c["pictures"]["one"].update(side=-1.0)), "picture of one is damaged"),
        (damaged(lambda c: c["pictures"]["one"].update(train=[[0, 1001]])), "picture of one is"),
        (damaged(lambda c: c["pictures"]["one"].update(train=[[0.5, 1]])), "pictures.one.train"),
        (damaged(lambda c: c["entries"][0]["methods"][0].update(about=1)), "methods.0.about"),
        (damaged(lambda c: c["entries"][0]["methods"][0].update(more=1)), "methods.0.more"),
        (first_row(values=[0.5]), "a value for each of the repeats"),
        (first_row(value=1.5), r"no share in \[0, 1\]"),
        (first_row(value="0.5"), "rows.0.value"),
        (first_row(value=float("nan")), "no share|finite"),
        (first_row(metric="aurok"), "known metric"),
        (first_row(detector="nobody"), "about nothing"),
        (first_row(model="nobody"), "about nothing"),
        (first_row(data="mean", group="nowhere"), "about nothing"),
        (damaged(lambda c: c["configuration"].update(a=float("inf"))), "recorded as JSON"),
    ],
)
def test_damaged_results_are_refused(results, tmp_path, damage, message):
    path = results.save(tmp_path) / "results.json"
    broken = damage(path.read_text())
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with pytest.raises(ArtifactError, match=message):
        Results.load(tmp_path)


def test_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ArtifactError, match=r"results\.json cannot be read: No such file"):
        Results.load(tmp_path / "nothing")


def test_scores_and_names_must_fit_together(scores):
    entries = [Entry(name) for name in scores]

    def refused(message, error=ConfigurationError, entries=entries, scores=scores, **options):
        with pytest.raises(error, match=message):
            Results.from_scores(entries, scores, **options)

    refused("detectors do not match.*weak", entries=entries[1:])
    refused("only one side has more", entries=[*entries, Entry("more")])
    refused("the same name", entries=[*entries, entries[0]])
    refused("no detector", entries=[], scores={})
    refused("scores on 'id' and on at least one OOD set", id_name="id")
    alone = {name: {"id_test": own["id_test"]} for name, own in scores.items()}
    refused("at least one OOD set", scores=alone)
    refused("unknown OOD set 'fat'; there are: far", groups={"fat": "far"})
    refused("unknown OOD set 'id_test'", groups={"id_test": "far"})
    refused("no group 'all'", groups={"far": "all"})
    refused("no other, is of the group 'id'", groups={"far": "id"})
    refused("unknown model 'resnet'", accuracy={"resnet": 0.5})
    refused("no share", accuracy={"": 93.0})
    refused("unknown detector 'nobody'", calibrations={"nobody": Calibration([0.0])})
    refused("need the false_alarm_rate", calibrations={"weak": Calibration([0.0])})
    refused(
        "at least 19 calibration scores",
        calibrations={"weak": Calibration([0.0])},
        false_alarm_rate=0.05,
    )
    refused("recorded as JSON", configuration={"path": object()})
    refused("recorded as JSON", provenance={"loss": float("nan")})

    def spoilt(data, values):
        return {**scores, "strong": {**scores["strong"], data: values}}

    refused("far: row 1 is nan", DataError, scores=spoilt("far", [0, np.nan]))
    refused("weak scored 90 rows of far, and strong 2", DataError, scores=spoilt("far", [0, 1]))
    refused("data sets of weak and strong do not match", scores=spoilt("more", [0.0]))
    refused("called 'mean'", scores={n: {**own, "mean": [0.0]} for n, own in scores.items()})


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31m", "\ud800", "\u202egpj"])
def test_names_can_be_printed(name):
    with pytest.raises(ConfigurationError, match="cannot name"):
        Entry(name)
    if name:
        with pytest.raises(ConfigurationError, match="cannot name"):
            DataSet("far", name, 3)
    with pytest.raises(ConfigurationError, match="cannot name"):
        DataSet(name, "far", 3)


def test_a_citation_must_be_text_that_can_be_written():
    with pytest.raises(ConfigurationError, match="citation of msp"):
        Entry("msp", citation="\udfff")


def test_nothing_given_is_modified(scores):
    before = {name: {d: v.copy() for d, v in own.items()} for name, own in scores.items()}
    for own in scores.values():
        for values in own.values():
            values.flags.writeable = False
    Results.from_scores([Entry(name) for name in scores], scores)
    for name, own in scores.items():
        for data, values in own.items():
            np.testing.assert_array_equal(values, before[name][data])


def test_results_of_other_parts_are_not_equal(results):
    assert results != replace(results, configuration={})


def test_the_terminal_table_has_a_line_for_each_detector(results):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results.table())
    text = console.export_text()
    assert "AUROC and AUPR: higher is better" in text
    assert "[bold]|odd" in text
    assert f"{100 * results.mean('strong', 'auroc'):.2f}" in text
