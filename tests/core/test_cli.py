"""Commands do what they say, and say what went wrong in a line."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from rich.console import Console
from rich.progress import Progress

import oodcore
from oodcore import demo
from oodcore.cli import catalogue, description, run, streams
from oodcore.cli.program import app
from oodcore.document import Document
from oodcore.errors import DataError
from oodcore.plugins import SLOTS, Registry
from oodcore.results import Results

PROGRAM = [sys.executable, "-c", "from oodcore.cli import main; main()"]
FACTORY = "oodcore_plugins.networks:digits_cnn"
SIX = "classes: [0, 1, 2, 3, 4, 5]"
ROWS = f"""\
train: {{kind: digits, split: train, {SIX}}}
calibrate: {{kind: digits, split: calibrate, {SIX}}}
id_test: {{kind: digits, split: test, {SIX}}}
ood:
  digits 6-9: {{kind: digits, split: test, classes: [6, 7, 8, 9]}}
  noise: {{kind: noise, rows: 50, shape: [1, 8, 8]}}
"""
TRAINING = f"""\
network: {{factory: "{FACTORY}", arguments: {{classes: 6, width: 4}}}}
train: {{kind: digits, split: train, {SIX}}}
validation: {{kind: digits, split: held_out, {SIX}}}
regularizers: [logitnorm]
epochs: EPOCHS
batch_size: 64
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(capsys):
    """Run a command; its exit code, and the lines on stdout and stderr."""

    def say(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, lines=out.splitlines(), err=err)

    return say


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with configurations, a trained network and a calibrated detector."""
    folder = tmp_path_factory.mktemp("place")
    model = f"extractor: {{kind: run, path: {json.dumps(str(folder / 'run'))}}}\n"
    texts = {
        "training.yaml": TRAINING.replace("EPOCHS", "2"),
        "detector.yaml": f"{model}scorer: {{kind: knn, k: 5}}\n{ROWS}",
        "bare.yaml": f"{model}scorer: msp\ntrain: {{kind: digits, split: train, {SIX}}}\n",
        "benchmark.yaml": f"{model}scorers: [msp, {{kind: knn, k: 5}}]\n{ROWS}",
        "ensemble.yaml": f"""\
{model}members:
  one: {{scorer: {{kind: knn, k: 5}}}}
  two: {{{model.strip()}, shapers: [react], scorer: energy}}
combine: {{kind: sum, normalize: zscore}}
{ROWS}""",
        "trained.yaml": f"""\
trainings:
  fresh:
    network: {{factory: "{FACTORY}", arguments: {{classes: 6, width: 4}}}}
    train: {{kind: digits, split: train, {SIX}}}
    epochs: 1
models: {{old: {{kind: run, path: {json.dumps(str(folder / "run"))}}}}}
scorers:
  - msp
  - name: both
    members: {{a: {{model: old, scorer: msp}}, b: {{model: fresh, scorer: energy}}}}
    combine: {{kind: sum, normalize: mean}}
  - {{name: same, members: {{a: {{scorer: msp}}, b: {{scorer: max_norm}}}}}}
{ROWS}""",
        "source.yaml": "kind: digits\nsplit: test\nclasses: [6, 7, 8, 9]\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert run(["train", str(folder / "training.yaml"), "--out", str(folder / "run")]) == 0
    assert run(["fit", str(folder / "detector.yaml"), "--out", str(folder / "artifact")]) == 0
    return folder


def only_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.strip()


# Help, usage and what goes wrong


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["score", "--help"], []], ids=" ".join
)
def test_help_imports_nothing_slow(arguments):
    code = f"""
import sys, time
began = time.perf_counter()
from oodcore.cli import run
code = run({arguments!r})
took = time.perf_counter() - began
slow = {{"torch", "pydantic", "numpy", "rich", "oodcore.plugins", "oodcore_plugins"}}
if len(sys.argv) > 1:
    slow.discard("pydantic")  # which typer itself reads numbers with
print(f"{{took:.3f}}", *sorted(slow & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""
    command = [sys.executable, "-c", code, *(["a command"] if "score" in arguments else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "oodcore" in done.stdout
    seconds, *imported = done.stderr.split()
    print(f"oodcore {' '.join(arguments)}: {seconds} s after Python's own start")
    assert imported == []


def test_every_command_says_what_it_is_for(said):
    listed = said("--help").out
    commands = {command.name for command in app.registered_commands}
    assert commands == {
        *("demo", "plugins", "list", "show", "check", "schema", "train", "fit", "score"),
        *("tune", "benchmark", "report", "new-plugin"),
    }
    for name in commands:
        [line] = [line for line in listed.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith("."), f"the help of {name} is cut off: {line}"
        assert not line.endswith("..")
        assert said(name, "--help").code == 0


def test_the_version(said):
    assert said("--version").lines == [f"oodcore {oodcore.__version__}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "error: Missing argument 'CONFIG'. See 'oodcore fit --help'."),
        (["fit", "x.yaml"], "--out"),
        (["fot"], "error: No such command 'fot'"),
        (["list", "--jsn"], "--jsn"),
        (
            ["score", "a", "b", "--out", "c.csv", "--rate", "low"],
            "error: Invalid value for '--rate'",
        ),
    ],
)
def test_wrong_usage_is_a_line(said, arguments, message):
    done = said(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in only_line(done.err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("row 3 is odd"), 1, "error: row 3 is odd"),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 1, "error: x.npz: No such"),
        (ValueError("one\n two"), 1, "error: ValueError: one two (unexpected; run again with --d"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: Broken pipe"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_are_a_line_and_a_code(said, monkeypatch, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(catalogue, "kinds", fail)
    done = said("list")
    assert (done.code, done.out) == (code, "")
    assert only_line(done.err).startswith(message)
    shown = said("list", "--debug")
    assert shown.code == code
    assert "Traceback" in shown.err


def test_a_configuration_has_a_line_for_each_mistake(said, tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("scorer: {kind: knn, k: 0}\nbatch_sise: 3\n")
    done = said("check", path)
    assert done.code == 2
    assert done.err.splitlines() == [
        f"error: {path}:1: scorer.k: must be greater than 0, not 0",
        f"       {path}:2: batch_sise: unknown field; did you mean 'batch_size'?",
    ]


def test_messages_name_options_as_they_are_typed(said, place):
    done = said("fit", place / "detector.yaml", "--out", place / "artifact")
    assert done.code == 1
    assert "give --overwrite to replace it" in only_line(done.err)


def test_warnings_are_a_line_said_once(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with streams.readable_warnings():
            for _ in range(2):
                warnings.warn("left\n  out", UserWarning, stacklevel=1)
        assert warnings.showwarning.__module__ == "warnings"
    assert only_line(capsys.readouterr().err) == "warning: left out"


def test_a_closed_pipe_is_no_error():
    reader = subprocess.Popen(
        [*PROGRAM, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert reader.stdout is not None
    reader.stdout.close()
    assert reader.wait() == 141
    assert reader.stderr is not None
    assert reader.stderr.read() == b""
    reader.stderr.close()


def test_an_interrupted_run_leaves_what_can_be_resumed(said, place, tmp_path, monkeypatch):
    def interrupting(self, title):
        def report(done, total, numbers):
            if done == total - 2:
                signal.raise_signal(signal.SIGINT)

        return report

    command = ["train", place / "training.yaml", "--out", tmp_path / "run"]
    # Where these tests run in the background of a shell, the signal would be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(streams.Bars, "steps", interrupting)
        done = said(*command)
    signal.signal(signal.SIGINT, before)
    assert (done.code, done.out) == (130, "")
    assert only_line(done.err) == "error: interrupted"
    assert not (tmp_path / "run" / "run.json").exists()
    assert "can go on with --resume" in said(*command).err
    assert said(*command, "--resume").code == 0
    weights = [folder / "model.safetensors" for folder in (tmp_path / "run", place / "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_characters_that_a_terminal_lacks_are_no_error():
    settings = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run([*PROGRAM, "größe"], capture_output=True, env=settings)
    assert done.returncode == 2
    assert b"No such command 'gr\\xf6\\xdfe'" in done.stderr


# What is installed


def test_plugins_are_listed_with_what_they_bring(said):
    told = json.loads(said("plugins", "--json").out)
    [knn] = [plugin for plugin in told if plugin["name"] == "knn"]
    assert knn["components"] == [{"slot": "scorer", "kind": "knn"}]
    assert knn["distribution"] == "oodcore"
    text = said("plugins").out
    assert all(plugin["name"] in text for plugin in told)


@pytest.fixture
def broken(monkeypatch):
    """A registry that finds oodcore's own plugins, and one that cannot be imported."""
    own = metadata.entry_points(group="oodcore")
    missing = metadata.EntryPoint("broken", "oodcore_that_is_missing", "oodcore")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [*own, missing])
    registry = Registry()
    for room in (catalogue, description):
        monkeypatch.setattr(room, "registry", registry)
    # Set and taken away again, so that what the program sets is undone.
    monkeypatch.setenv("OODCORE_PLUGINS", "")
    monkeypatch.delenv("OODCORE_PLUGINS")


def test_a_broken_plugin_is_shown_as_left_out(said, broken):
    done = said("plugins")
    assert done.code == 0
    assert done.err == ""
    text = " ".join(done.out.split())
    assert "left out: ModuleNotFoundError" in text
    assert "scorer knn" in text


@pytest.mark.filterwarnings("always")
def test_a_broken_plugin_does_not_stop_the_others(said, broken):
    done = said("list", "scorer", "--json")
    assert done.code == 0
    assert "knn" in {one["kind"] for one in json.loads(done.out)}
    assert only_line(done.err).startswith("warning: plugin broken (unknown unknown) is left out")


def test_other_plugins_can_be_switched_off(said, broken):
    told = json.loads(said("plugins", "--json", "--no-plugins").out)
    assert "broken" not in {plugin["name"] for plugin in told}
    assert "knn" in {plugin["name"] for plugin in told}


def test_kinds_are_listed_by_slot(said):
    everything = json.loads(said("list", "--json").out)
    assert {one["slot"] for one in everything} <= set(SLOTS)
    scorers = json.loads(said("list", "scorer", "--json").out)
    assert [one["kind"] for one in scorers] == list(oodcore.registry.all("scorer"))
    [knn] = [one for one in scorers if one["kind"] == "knn"]
    assert knn["paper"] == "ICML 2022"
    assert knn["summary"].startswith("-||h - h_(k)||")
    done = said("list", "scorers")
    assert done.code == 2
    assert "unknown slot 'scorers'" in done.err


def every_kind():
    return [f"{slot}.{kind}" for slot in SLOTS for kind in oodcore.registry.all(slot)]


@pytest.mark.parametrize("columns", ["80", "140"])
def test_nothing_is_cut_off_on_a_narrow_terminal(said, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    commands = [("plugins",), ("list",), *(("show", kind) for kind in every_kind())]
    for command in commands:
        done = said(*command)
        assert (done.code, done.err) == (0, "")
        assert "…" not in done.out
        assert max(map(len, done.lines)) <= int(columns), command
    for kind in every_kind():
        cls = oodcore.registry.get(*kind.split("."))
        shown = said("show", kind).out
        assert all(re.search(rf"^{field} ", shown, re.MULTILINE) for field in cls.model_fields)


def test_a_kind_is_shown_in_full(said):
    [knn] = json.loads(said("show", "knn", "--json").out)
    assert knn["needs"] == ["embeddings"]
    assert knn["search"]["k"]["values"] == list(
        oodcore.registry.get("scorer", "knn").search["k"].values
    )
    assert knn["citation"] == str(oodcore.registry.get("scorer", "knn").paper)
    assert (knn["plugin"], knn["distribution"]) == ("knn", "oodcore")
    k = knn["fields"][0]
    assert (k["name"], k["type"], k["default"]) == ("k", "whole number > 0", 50)
    text = " ".join(said("show", "knn").out.split())
    for piece in ("scorer knn", "k whole number > 0 50", "needs embeddings", "2204.06507"):
        assert piece in text
    assert "Args:" not in text


def test_a_kind_in_two_slots_is_shown_twice(said):
    class Twin(oodcore.Source):
        """Rows of another kind."""

        kind = "knn"

        def open(self):
            return []

    class Plugin:
        @oodcore.hookimpl
        def register_sources(self, register):
            register(Twin)

    with oodcore.registry.using(Plugin()):
        assert [one["slot"] for one in json.loads(said("show", "knn", "--json").out)] == [
            "scorer",
            "source",
        ]
        [one] = json.loads(said("show", "source.knn", "--json").out)
        assert one["summary"] == "Rows of another kind"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("knm", "there is no kind 'knm'; did you mean knn?"),
        ("qqqqqq", "see 'oodcore list'"),
        ("scorer.knm", "did you mean 'knn'?"),
        ("slot.knn", "unknown slot 'slot'"),
    ],
)
def test_a_kind_that_nobody_brings(said, kind, message):
    done = said("show", kind)
    assert done.code == 2
    assert message in only_line(done.err)


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | None, "whole number or null"),
        (tuple[float, ...], "list of number"),
        (tuple[int, str], "[whole number, text]"),
        (oodcore.Extractor.model_fields["preprocess"].annotation, "mapping of size, crop, "),
    ],
)
def test_types_are_told_in_the_words_of_a_configuration(annotation, text):
    assert description.type_of(annotation).startswith(text)


# Files


def test_check_says_what_a_file_is(said, place):
    for name, told in {
        "training": [f"a training run: {FACTORY} on digits, 2 epochs, logitnorm"],
        "benchmark": ["a benchmark: 2 detectors, 2 OOD sets: msp, knn"],
        "detector": [
            "a detector: knn on run, with train, calibrate",
            "a benchmark: 1 detector, 2 OOD sets: knn",
        ],
        "bare": ["a detector: msp on run, with train"],
        "ensemble": ["an ensemble: sum of one: knn, two: react + energy, with train, calibrate"],
        "trained": [
            "a benchmark: 3 detectors on 2 models, 1 to be trained, 2 OOD sets: msp, both, same"
        ],
    }.items():
        path = place / f"{name}.yaml"
        done = said("check", path)
        assert (done.code, done.err) == (0, "")
        assert done.lines == [f"{path} is {one}" for one in told]


def test_check_runs_nothing_unless_it_is_allowed(said, place, tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("scorer: msp\nextractor: {kind: torch, factory: 'no_such_package:net'}\n")
    assert said("check", path).code == 0
    done = said("check", path, "--allow")
    assert done.code == 2
    assert "cannot import 'no_such_package:net'" in only_line(done.err)
    told = said("check", place / "detector.yaml", "--allow").lines
    assert "  ood.noise: 50 rows of [1, 8, 8]" in told
    assert told[-1] == "  extractor: DigitsCNN, 16 embeddings and 6 logits"


def test_check_of_what_is_no_configuration(said, tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("scoer: msp\n")
    done = said("check", path)
    assert done.code == 2
    assert "a detector has a 'scorer'" in only_line(done.err)
    assert "this has scoer" in done.err


def test_check_opens_what_trainings_and_members_name(said, place):
    told = said("check", place / "trained.yaml", "--allow")
    assert told.code == 0
    assert re.search(
        r"^  trainings\.fresh\.train: \d+ rows of \[1, 8, 8\]$", told.out, re.MULTILINE
    )
    assert any(line.startswith("  trainings.fresh.network: DigitsCNN, ") for line in told.lines)
    assert "  models.old: DigitsCNN, 16 embeddings and 6 logits" in told.lines
    told = said("check", place / "ensemble.yaml", "--allow").lines
    assert "  members.two: DigitsCNN, 16 embeddings and 6 logits" in told


@pytest.mark.parametrize("target", ["detector", "ensemble", "benchmark", "training"])
def test_schemas_are_schemas(said, target):
    done = said("schema", target)
    schema = json.loads(done.out)
    Draft202012Validator.check_schema(schema)
    needed = {"detector": "scorer", "benchmark": "id_test", "training": "network"}
    needed["ensemble"] = "members"
    assert needed[target] in schema["required"]
    assert done.err == ""


def test_there_is_no_other_schema(said):
    assert said("schema", "detecter").code == 2


def test_a_plugin_is_begun(said, tmp_path):
    folder = tmp_path / "mine"
    done = said("new-plugin", "wide-margin", "--folder", folder)
    assert done.code == 0
    assert str(folder) in done.out
    assert (folder / "pyproject.toml").is_file()
    assert said("new-plugin", "wide-margin", "--folder", folder).code == 2


# Work


def test_training_says_how_it_went(said, place, tmp_path):
    folder = tmp_path / "run"
    done = said("train", place / "training.yaml", "--out", folder)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(
        rf"trained {FACTORY}: 2 epochs, accuracy [\d.]+ %, on validation rows [\d.]+ %",
        done.lines[0],
    )
    assert str(folder) in done.lines[1]
    measured = tmp_path / "measured.yaml"
    measured.write_text(f"{(place / 'training.yaml').read_text()}collapse: true\n")
    line = said("train", measured, "--out", tmp_path / "measured").lines[0]
    assert re.search(r" %, wfc [\d.e-]+, cfc [\d.]+$", line)
    assert said("train", place / "training.yaml", "--out", folder, "--resume").code == 0
    assert said("train", place / "training.yaml", "--out", folder).code == 1
    assert said("train", place / "training.yaml", "--out", folder, "--overwrite").code == 0
    both = said("train", place / "training.yaml", "--out", folder, "--overwrite", "--resume")
    assert both.code == 2


def test_fitting_says_what_it_did(said, place, tmp_path):
    done = said("fit", place / "detector.yaml", "--out", tmp_path / "a", "--store")
    assert (done.code, done.err) == (0, "")
    assert len(done.lines) == 2
    detector = oodcore.load(tmp_path / "a", allow=[FACTORY])
    threshold = detector.calibration.threshold(0.05)
    rows = oodcore.registry.build("source", {"kind": "digits", "split": "train"}).open()
    six = sum(label < 6 for _, label, _ in (rows[row] for row in range(len(rows))))
    assert f"fitted knn on {six} rows; flags scores below {threshold:.6g}" in done.lines[0]
    assert detector.fitting is not None, "--store keeps the statistics"
    assert said("fit", place / "detector.yaml", "--out", tmp_path / "a", "--overwrite").code == 0
    assert oodcore.load(tmp_path / "a", allow=[FACTORY]).fitting is None


def test_fitting_needs_rows(said, tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text("scorer: msp\n")
    done = said("fit", path, "--out", tmp_path / "a")
    assert done.code == 2
    assert "train: is needed to fit" in only_line(done.err)


def test_nothing_is_fitted_where_it_could_not_be_calibrated(said, place, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("fitting began")

    monkeypatch.setattr(oodcore.Detector, "fit", never)
    text = (place / "detector.yaml").read_text()
    (tmp_path / "rate.yaml").write_text(f"{text}false_alarm_rate: 0.0001\n")
    done = said("fit", tmp_path / "rate.yaml", "--out", tmp_path / "artifact")
    assert done.code == 2
    assert "a false-alarm rate of 0.0001 needs at least 9999 calibration scores" in done.err
    assert not (tmp_path / "artifact").exists()


def test_a_benchmark_shows_its_protocol(said, place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = (place / "benchmark.yaml").read_text()
    (tmp_path / "b.yaml").write_text(
        f"{text}protocol: {{kind: outlier_exposure, draws: 3, id_per_ood: 6}}\n"
    )
    done = said("benchmark", tmp_path / "b.yaml", "--out", tmp_path / "b")
    assert (done.code, done.err) == (0, "")
    assert "Protocol outlier_exposure: 3 draws (seed 0)" in done.out
    assert " ± " in done.out
    assert "protocol outlier_exposure" in said("check", tmp_path / "b.yaml").out
    text = re.sub(r"^ood:.*?(?=^\w|\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "s.yaml").write_text(f"{text}protocol: selective\n")
    done = said("benchmark", tmp_path / "s.yaml", "--out", tmp_path / "s")
    assert (done.code, done.err) == (0, "")
    assert "Protocol selective: right predictions against wrong ones" in done.out
    assert re.search(r"^Best: \w+, AURC \d", done.out, re.MULTILINE)
    assert Results.load(tmp_path / "s").metrics == ()


def test_nothing_is_fitted_where_it_could_not_be_saved(said, place, tmp_path, monkeypatch):
    monkeypatch.setattr(oodcore.Detector, "fit", lambda *_: pytest.fail("it was fitted"))
    (tmp_path / "thesis.tex").write_text("years of work")
    done = said("fit", place / "detector.yaml", "--out", tmp_path, "--overwrite")
    assert done.code == 1
    assert "thesis.tex" in only_line(done.err)


SOURCES = [
    "source.yaml",
    "{kind: digits, split: test, classes: [6, 7, 8, 9]}",
    '{"kind": "digits", "split": "test", "classes": [6, 7, 8, 9]}',
]


def read_scores(path):
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return {name: [row[k] for row in rows] for k, name in enumerate(header)}


@pytest.mark.parametrize("source", SOURCES)
def test_scores_are_those_of_the_detector(said, place, tmp_path, source, monkeypatch):
    monkeypatch.chdir(place)
    out = tmp_path / "deep" / "scores.csv"
    done = said("score", "artifact", source, "--out", out, "--allow", FACTORY)
    assert (done.code, done.err) == (0, "")
    columns = read_scores(out)
    assert list(columns) == ["id", "score", "p_value", "prediction"]
    detector = oodcore.load(place / "artifact", allow=[FACTORY])
    given = {"kind": "digits", "split": "test", "classes": [6, 7, 8, 9]}
    rows = oodcore.registry.build("source", given).open()
    assert columns["id"] == [str(rows[row][2]) for row in range(len(rows))]
    scores = np.array(columns["score"], dtype=float)
    np.testing.assert_allclose(scores, detector.score(given), rtol=1e-6)
    np.testing.assert_array_equal(
        np.array(columns["p_value"], dtype=float), detector.calibration.p_values(scores)
    )
    predicted = np.array(columns["prediction"], dtype=int)
    np.testing.assert_array_equal(predicted == -1, detector.calibration.flagged(scores, 0.05))
    assert done.lines == [
        f"scored {len(rows)} rows, {(predicted == -1).sum()} flagged at a false-alarm rate of "
        f"0.05: {out}"
    ]


def test_another_rate_needs_no_other_fit(said, place, tmp_path):
    counts = {}
    for rate in ("0.01", "0.5"):
        done = said(
            *("score", place / "artifact", SOURCES[1], "--out", tmp_path / "s.csv"),
            *("--allow", FACTORY, "--rate", rate, "--json"),
        )
        told = json.loads(done.out)
        assert (told["false_alarm_rate"], told["out"]) == (float(rate), str(tmp_path / "s.csv"))
        counts[rate] = told["flagged"]
        assert read_scores(tmp_path / "s.csv")["prediction"].count("-1") == told["flagged"]
    assert counts["0.01"] < counts["0.5"]
    wrong = said(
        *("score", place / "artifact", SOURCES[1], "--out", tmp_path / "s.csv"),
        *("--allow", FACTORY, "--rate", "1.5"),
    )
    assert wrong.code == 2


def test_without_calibration_there_are_scores_alone(said, place, tmp_path):
    done = said("fit", place / "bare.yaml", "--out", tmp_path / "a")
    assert "no rows to calibrate on, so no threshold" in done.out
    command = ["score", tmp_path / "a", "digits", "--out", tmp_path / "s.csv", "--allow", FACTORY]
    done = said(*command)
    assert "1797 rows, not calibrated" in only_line(done.out)
    assert list(read_scores(tmp_path / "s.csv")) == ["id", "score"]
    assert json.loads(said(*command, "--json").out) == {
        "out": str(tmp_path / "s.csv"),
        "rows": 1797,
    }
    done = said(*command, "--rate", "0.1")
    assert done.code == 2
    assert "not calibrated" in only_line(done.err)


def test_an_artifact_runs_no_code_that_is_not_allowed(said, place, tmp_path):
    done = said("score", place / "artifact", "digits", "--out", tmp_path / "s.csv")
    assert done.code == 1
    assert f"--allow {FACTORY}" in only_line(done.err)
    command = ["score", place / "artifact", SOURCES[1], "--out", tmp_path / "s.csv"]
    done = said(*command, "--allow", FACTORY, "--sha256", "0" * 64)
    assert done.code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_scoring_leaves_what_was_there(said, place, tmp_path, monkeypatch):
    out = tmp_path / "s.csv"
    out.write_text("precious")

    def fail(*_):
        raise DataError("row 7 is not finite")

    monkeypatch.setattr(oodcore.Detector, "score", fail)
    done = said("score", place / "artifact", "digits", "--out", out, "--allow", FACTORY)
    assert done.code == 1
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "unknown source 'digit'; did you mean 'digits'?"),
        ("{kind: digits, size: 0}", "source.size: must be greater than 0, not 0"),
        ("{kind: digits", "not YAML"),
        ("{split: test}", "'kind'"),
        ("missing.yaml", "missing.yaml: there is no such file"),
        ("wrong.yaml", "wrong.yaml: source.size: must be greater than 0, not 0"),
    ],
)
def test_what_is_no_source(said, place, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("kind: digits\nsize: 0\n")
    done = said("score", place / "artifact", source, "--out", "s.csv", "--allow", FACTORY)
    assert done.code == 2
    assert message in only_line(done.err)


@pytest.mark.parametrize("name", ["scores.txt", "folder.csv"])
def test_scores_go_to_a_csv_file(said, place, tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    done = said("score", place / "artifact", "digits", "--out", tmp_path / name)
    assert done.code == 2
    assert name in only_line(done.err)


def test_a_benchmark_leaves_results_and_a_report(said, place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = said("benchmark", place / "benchmark.yaml", "--out", tmp_path / "b")
    assert (done.code, done.err) == (0, "")
    results = Results.load(tmp_path / "b")
    assert {entry.name for entry in results.entries} == {"msp", "knn"}
    report = tmp_path / "b" / "report.html"
    assert str(report) in done.lines[-1]
    assert "Best: " + results.best() in done.out
    assert "asked for were 5 %" in done.out
    assert all(len(line) <= 80 for line in done.lines if not line.startswith(("Best", "/")))

    told = json.loads(said("benchmark", place / "benchmark.yaml", "--out", tmp_path, "--json").out)
    assert told["best"] == results.best()
    assert len(told["rows"]) == len(results.rows)
    assert set(told["rows"][0]) == {
        *("detector", "model", "data", "group", "metric", "value", "values")
    }
    assert told["protocol"]["kind"] == "separation"
    assert told["repeats"] == []

    before = report.read_text()
    report.unlink()
    assert said("report", tmp_path / "b").lines == [str(report)]
    assert report.read_text() == before


def test_an_ensemble_is_fitted_and_scores(said, place, tmp_path):
    done = said("fit", place / "ensemble.yaml", "--out", tmp_path / "e")
    assert (done.code, done.err) == (0, "")
    assert done.lines[0].startswith("fitted sum of one on ")
    assert "a false-alarm rate of 0.05" in done.lines[0]
    loaded = oodcore.load(tmp_path / "e", allow=[FACTORY])
    assert list(loaded.members) == ["one", "two"]
    source = place / "source.yaml"
    command = ("score", tmp_path / "e", source, "--out", tmp_path / "s.csv", "--allow", FACTORY)
    assert said(*command).code == 0
    with (tmp_path / "s.csv").open(newline="") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    rows = oodcore.registry.build("source", {"kind": "digits", "split": "test",
                                             "classes": [6, 7, 8, 9]})  # fmt: skip
    np.testing.assert_allclose(scores, loaded.score(rows), rtol=1e-9)


def test_a_benchmark_trains_its_models(said, place, tmp_path):
    done = said("benchmark", place / "trained.yaml", "--out", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert [entry.name for entry in Results.load(tmp_path).entries] == [
        *("old/msp", "old/same", "fresh/msp", "fresh/same", "both")
    ]
    weights = (tmp_path / "models" / "fresh" / "model.safetensors").read_bytes()
    other = tmp_path / "other.yaml"
    other.write_text((place / "trained.yaml").read_text().replace("epochs: 1", "epochs: 2"))
    refused = said("benchmark", other, "--out", tmp_path)
    assert refused.code == 1
    assert "trainings.fresh: " in only_line(refused.err)
    assert "epochs was 1 and is 2" in refused.err
    assert "--overwrite" in refused.err
    assert (tmp_path / "models" / "fresh" / "model.safetensors").read_bytes() == weights
    assert said("benchmark", other, "--out", tmp_path, "--overwrite").code == 0
    assert (tmp_path / "models" / "fresh" / "model.safetensors").read_bytes() != weights


def test_results_go_to_a_folder(said, place, tmp_path):
    (tmp_path / "file").touch()
    done = said("benchmark", place / "benchmark.yaml", "--out", tmp_path / "file")
    assert done.code == 2
    assert "is no folder" in only_line(done.err)
    missing = said("report", tmp_path / "none")
    assert missing.code == 1
    assert "results.json cannot be read" in only_line(missing.err)


def test_the_demonstration_says_where_everything_is(said, tmp_path, monkeypatch):
    data = json.loads(json.dumps(demo._shipped(None).data))
    for training in data["trainings"].values():
        training |= {"epochs": 3}
        training["network"]["arguments"]["width"] = 4
    data["scorers"] = ["msp", "energy"]
    monkeypatch.setattr(demo, "_shipped", lambda name: Document(data))
    done = said("demo", "--out", tmp_path)
    assert (done.code, done.err) == (0, "")
    results = Results.load(tmp_path)
    for model in data["trainings"]:
        assert f"{model} (accuracy " in done.out
    alarms = 100 * results.value(results.best(), "false_alarm_rate", "id_test")
    assert f"Best: {results.best()}, mean AUROC" in done.out
    assert f"It flags {alarms:.2f} % of {results.id_data.rows} in-distribution" in done.out
    for name in ("report.html", "results.csv", "results.json", "detector", "models/logitnorm"):
        assert str(tmp_path / name) in done.out
        assert (tmp_path / name).exists()

    monkeypatch.chdir(tmp_path)
    program, *command = shlex.split(done.lines[-1])
    assert program == "oodcore"
    assert said(*command).code == 0
    assert (tmp_path / "scores.csv").is_file()


# Bars


@pytest.fixture
def progress():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(console=console, auto_refresh=False) as progress:
        yield progress


def test_a_bar_counts_rows_and_changes_nothing(progress, monkeypatch):
    monkeypatch.setattr(streams, "PATIENCE", -1.0)
    batches = [torch.zeros(4), torch.zeros(3)]
    seen = []
    for batch in streams.Bars(progress).watch(batches, "scoring", 7):
        seen.append(batch)
        [task] = progress.tasks
        assert task.total == 7
        assert task.completed == sum(map(len, seen[:-1]))
        assert task.visible == (len(seen) > 1)
    assert all(one is other for one, other in zip(seen, batches, strict=True))
    assert progress.tasks == []


def test_what_is_done_at_once_has_no_bar(progress):
    for _ in streams.Bars(progress).watch([torch.zeros(4)] * 3, "scoring", None):
        assert not progress.tasks[0].visible


def test_a_training_bar_shows_accuracies(progress):
    report = streams.Bars(progress).steps("training")
    report(1, 2, {"accuracy": 0.5, "validation/accuracy": 0.25, "loss/total": 3.0})
    [task] = progress.tasks
    assert (task.completed, task.total) == (1, 2)
    assert task.fields["note"] == "accuracy 0.500, validation 0.250"
    report(2, 2, {})
    assert progress.tasks == []


def test_without_a_terminal_there_are_no_bars(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(streams, "PATIENCE", -1.0)
    with streams.bars() as bars:
        for _ in bars.watch([torch.zeros(4)] * 3, "scoring", 12):
            time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_passes_show_themselves(place, monkeypatch):
    titles = []
    watch = streams.Bars.watch

    def noted(self, batches, title, rows):
        titles.append((title, rows))
        return watch(self, batches, title, rows)

    monkeypatch.setattr(streams.Bars, "watch", noted)
    assert run(["benchmark", str(place / "benchmark.yaml"), "--out", str(place / "b")]) == 0
    assert ("fitting", 541) in titles
    assert ("scoring", 50) in titles
