"""Tuning: the best declared values on validation rows, from one pass of the model over each."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor, nn

import oodcore
from oodcore import Detector, FeatureModel, Features, Scorer, hookimpl
from oodcore.capture import Call
from oodcore.cli import run
from oodcore.config import BenchmarkConfig, DetectorConfig, read, validate
from oodcore.errors import ConfigurationError, DataError, ExtraError
from oodcore.metrics import auroc, fpr_at_tpr
from oodcore.samplers import Grid, size_of, tree
from oodcore.space import Choice, Range, spaces
from oodcore.tuning import Tuned, searched, tune, tuning_of


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        for number, parameter in enumerate(self.parameters()):
            parameter.data = drawn(*parameter.shape, seed=number)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs)
        return output


def model() -> FeatureModel:
    return FeatureModel.wrap(Net())


def images(count: int, seed: int, spread: float = 0.3) -> Tensor:
    return (0.5 + spread * drawn(count, 1, 4, 4, seed=seed)).clamp(0, 1)


TRAIN = (images(80, 1), torch.arange(80) % 3)
VALIDATION = images(30, 2)
OOD = {"wide": images(25, 3, 1.0), "narrow": images(20, 4, 0.05)}
KNN = {"kind": "knn", "k": 3}


class Dial(Scorer):
    """The nearer its number to 0.3, the better it tells far rows from near ones."""

    kind = "dial"
    search = spaces(number=Range(0.0, 1.0, "this test"), other=Choice((1, 2, 3), "this test"))
    number: float = 0.9
    other: int = 7

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def score(self, features: Features, state: Any) -> Tensor:
        assert features.embeddings is not None
        noise = torch.sin(1e3 * features.embeddings.sum(dim=1))
        return 60 * abs(self.number - 0.3) * noise - features.embeddings.norm(dim=1)


class Picky(Dial):
    """Takes one value only."""

    kind = "picky"
    search = spaces(other=Choice((1, 2, 3), "this test"))

    def score(self, features: Features, state: Any) -> Tensor:
        if self.other != 2:
            warnings.warn(f"other is {self.other}", stacklevel=2)
            raise DataError("other is not 2")
        warnings.warn("other is right", stacklevel=2)
        return super().score(features, state)


class Never(Picky):
    kind = "never"
    search = spaces(other=Choice((1, 3), "this test"))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    def register_scorers(register: Any) -> None:
        for cls in (Dial, Picky, Never):
            register(cls)

    with oodcore.registry.using(SimpleNamespace(register_scorers=hookimpl(register_scorers))):
        yield


def value(tuned_with: dict[str, Any], metric: Any = auroc) -> float:
    """What a configuration is worth, by a detector alone."""
    detector = Detector(model(), **tuned_with).fit(TRAIN)
    normal = detector.score(VALIDATION)
    return sum(float(metric(normal, detector.score(rows))) for rows in OOD.values()) / len(OOD)


def tuned(scorer: Any, **how: Any) -> Tuned:
    given = {"train": TRAIN, "validation": VALIDATION, "ood": OOD, **how}
    return tune(given.pop("model", None) or model(), scorer=scorer, **given)


# What is chosen


def test_grid_is_tried_whole_and_its_best_is_chosen() -> None:
    found = tuned({"kind": "she"}, shapers=["react"])
    worth = {
        (metric, percentile): value(
            {
                "scorer": {"kind": "she", "metric": metric},
                "shapers": [{"kind": "react", "percentile": percentile}],
            }
        )
        for metric in ("inner_product", "euclidean", "cosine")
        for percentile in (85, 90, 95, 99)
    }
    assert found.sampler == "grid"
    assert len(found.trials) == 12
    for trial in found.trials:
        key = trial.values["scorer.metric"], trial.values["shapers.0.percentile"]
        assert trial.value == pytest.approx(worth[key], abs=1e-12)
    assert found.best.value == pytest.approx(max(worth.values()), abs=1e-12)
    best = found.best.values
    assert found.scorer.metric == best["scorer.metric"]  # type: ignore[attr-defined]
    assert found.shapers[0].percentile == best["shapers.0.percentile"]  # type: ignore[attr-defined]


def test_what_is_written_is_tried_first_and_wins_a_tie() -> None:
    found = tuned({"kind": "nci", "alpha": 0.37}, metric="auroc")
    assert found.trials[0].values == {"scorer.alpha": 0.37}
    assert len(found.trials) == 5
    assert found.best.value is not None
    assert found.trials[0].value is not None
    assert found.best.value >= found.trials[0].value
    ties = tuned({"kind": "knn", "k": 500})
    assert ties.trials[0].values["scorer.k"] == 500
    full = [trial for trial in ties.trials if trial.values["scorer.k"] >= 80]
    assert len({trial.value for trial in full}) == 1
    if ties.best.value == full[0].value:
        assert ties.best.values["scorer.k"] == 500


@pytest.mark.parametrize("metric", ["fpr95_id", "fpr95_ood"])
def test_metrics_of_which_lower_is_better(metric: str) -> None:
    found = tuned("relation", metric=metric)
    values = [trial.value for trial in found.trials]
    assert found.best.value == min(values)  # type: ignore[type-var]
    own = value(
        {"scorer": found.scorer},
        lambda a, b: fpr_at_tpr(a, b, positive=metric.rpartition("_")[2]),  # type: ignore[arg-type]
    )
    assert found.best.value == pytest.approx(own, abs=1e-12)


def test_range_is_searched_towards_its_best() -> None:
    near, far = drawn(200, 5, seed=1), {"far": 4 * drawn(200, 5, seed=2)}
    found = tune(scorer="dial", train=near[:100], validation=near[100:], ood=far, trials=40)
    assert found.sampler == "tpe"
    assert len(found.trials) == 40
    numbers = [trial.values["scorer.number"] for trial in found.trials]
    assert abs(found.best.values["scorer.number"] - 0.3) < 0.05
    assert sum(abs(n - 0.3) < 0.15 for n in numbers[20:]) > sum(
        abs(n - 0.3) < 0.15 for n in numbers[:20]
    )
    assert all(float(f"{number:.4g}") == number for number in numbers)
    assert "optuna" in found.versions


def test_the_same_again_is_the_same_and_another_seed_is_not() -> None:
    def values(seed: int) -> list[Any]:
        return [trial.values for trial in tuned("dial", trials=8, seed=seed).trials]

    assert values(3) == values(3)
    assert values(3) != values(4)


def test_places_of_what_is_inside_and_before() -> None:
    scorer = {
        "kind": "sum",
        "scorers": [KNN, "msp", {"kind": "temperature_scaled", "scorer": "gen"}],
        "normalize": "zscore",
    }
    detector = Detector(scorer=scorer, shapers=["ash", "react"])
    assert [".".join(map(str, route)) for route in searched(detector.scorer, detector.shapers)] == [
        "shapers.0.percentile",
        "shapers.1.percentile",
        "scorer.scorers.0.k",
        "scorer.scorers.2.scorer.gamma",
        "scorer.scorers.2.scorer.top",
    ]
    found = tuned(scorer, shapers=["ash"], trials=4)
    assert len(found.trials) == 4
    parts: Any = found.scorer
    assert parts.scorers[0].k == found.best.values["scorer.scorers.0.k"]
    assert parts.scorers[2].scorer.top == found.best.values["scorer.scorers.2.scorer.top"]
    assert parts.normalize == "zscore"
    assert found.values["scorer", "scorers", 2, "scorer", "kind"] == "gen"


# The rows


def test_model_sees_each_row_once() -> None:
    seen = model()
    tuned("she", shapers=["react", "ash"], model=seen, held_out=images(40, 9))
    assert seen.rows_seen == 80 + 30 + 25 + 20 + 40


def test_method_that_passes_again_asks_for_those_passes_alone() -> None:
    seen = model()
    found = tuned({"kind": "odin", "temperature": 10.0}, model=seen)
    assert len(found.trials) == 8
    assert seen.rows_seen == 80 + (30 + 25 + 20) * (1 + 2 * 8)
    assert found.best.value == pytest.approx(value({"scorer": found.scorer}), abs=1e-12)


def test_cache_serves_a_second_time(tmp_path: Path) -> None:
    for scorer, passes in (("she", 0), ("odin", 75 * 16)):
        tuned(scorer, cache=tmp_path / scorer)
        seen = model()
        tuned(scorer, cache=tmp_path / scorer, model=seen)
        assert seen.rows_seen == passes


def test_without_validation_rows_a_tenth_is_set_apart() -> None:
    many = (images(400, 1), torch.arange(400) % 3)
    seen = model()
    found = tuned(
        {"kind": "sum", "scorers": ["knn", "energy"], "normalize": "zscore"},
        model=seen,
        train=many,
        validation=None,
    )
    assert seen.rows_seen == 400 + 45
    assert found.data["id"] == "a tenth of train"
    assert found.best.value is not None


def test_held_out_rows_are_chosen_on_if_no_others_are_named() -> None:
    found = tuned("she", validation=None, held_out=VALIDATION)
    assert [trial.value for trial in found.trials] == [trial.value for trial in tuned("she").trials]


def test_without_ood_rows_it_is_noise_in_the_shape_of_the_inputs() -> None:
    seen = model()
    found = tuned("she", ood=None, model=seen, seed=5)
    noise = found.data["ood"]["noise"]
    assert (noise["kind"], noise["shape"], noise["seed"]) == ("noise", [1, 4, 4], 6)
    assert seen.rows_seen == 80 + 30 + 1000


def test_noise_is_not_fed_to_adapt() -> None:
    adapted: list[int] = []

    def adapt(batch: Any) -> Any:
        adapted.append(len(batch["image"]))
        return batch["image"]

    rows = [{"image": images(20, 7)}, {"image": images(20, 8)}]
    found = tuned("nci", train=rows, validation=rows[:1], ood=None, adapt=adapt)
    assert found.best.value is not None
    assert set(adapted) == {20}


def test_loader_that_is_read_once_is_enough() -> None:
    batches = iter([(TRAIN[0][:40], TRAIN[1][:40]), (TRAIN[0][40:], TRAIN[1][40:])])
    assert tuned("she", train=batches).best.value == tuned("she").best.value
    with pytest.raises(DataError, match="cannot be read twice"):
        tuned("odin", validation=iter([VALIDATION]))
    with pytest.raises(DataError, match="a tenth of train"):
        tuned("she", train=iter([TRAIN]), validation=None)


def test_features_and_embeddings() -> None:
    features = model()
    seen = {
        "train": Features(embeddings=features(TRAIN[0]).embeddings.detach(), labels=TRAIN[1]),  # type: ignore[union-attr]
        "validation": features(VALIDATION).embeddings.detach(),  # type: ignore[union-attr]
        "ood": {name: features(rows).embeddings.detach() for name, rows in OOD.items()},  # type: ignore[union-attr]
    }
    found = tune(scorer=KNN, **seen)
    assert found.best.value == pytest.approx(value({"scorer": found.scorer}), abs=1e-6)
    with pytest.raises(ConfigurationError, match="give ood rows"):
        tune(scorer=KNN, train=seen["train"], validation=seen["validation"])


# What goes wrong


def test_values_that_are_refused_are_recorded_and_not_chosen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = tuned("picky")
    assert found.best.values == {"scorer.other": 2}
    refused = [trial for trial in found.trials if trial.value is None]
    assert [trial.values["scorer.other"] for trial in refused] == [7, 1, 3]
    assert all(trial.error == "DataError: other is not 2" for trial in refused)
    assert found.best.warnings == ("other is right",)
    assert "with the chosen values: other is right" in caplog.text
    assert found.dump()["written"] is None
    with pytest.raises(DataError, match="other is not 2"):
        tuned("never")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scorer": "msp"}, "nothing to search: msp declares no"),
        ({"scorer": KNN, "metric": "accuracy"}, "metric is one of auroc"),
        ({"scorer": KNN, "trials": 0}, "at least 1"),
        ({"scorer": KNN, "validation": TRAIN}, "validation is what is fitted on"),
        ({"scorer": KNN, "ood": {"x": TRAIN}}, "x is what is fitted on"),
        ({"scorer": KNN, "ood": {}}, "names no rows"),
        ({"scorer": "nonesuch"}, "unknown scorer"),
    ],
)
def test_what_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tuned(**how)


def test_errors_that_nobody_meant_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Dial, "score", broken)
    with pytest.raises(ZeroDivisionError):
        tuned("dial", trials=2)


def test_without_optuna_small_grids_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert len(tuned("she").trials) == 3
    with pytest.raises(ExtraError, match=r"pip install 'oodcore\[tune\]'"):
        tuned("dial")


def test_optuna_says_nothing_and_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    tuned("dial", trials=5)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


# Samplers


def test_grid_and_its_size() -> None:
    fields: Any = {("a",): Choice((1, 2, 3), "x"), ("b",): Choice((True, False), "x")}
    grid = Grid(fields)
    points = [tuple(grid.draw().values()) for _ in range(6)]
    assert len(set(points)) == 6
    assert size_of(fields, {("a",): 2, ("b",): True}) == 6
    assert size_of(fields, {("a",): 9, ("b",): True}) == 7
    assert size_of({**fields, ("c",): Range(0, 1, "x")}, {}) == float("inf")


def test_values_that_a_tree_draws_are_in_the_space() -> None:
    fields: Any = {
        ("none",): Choice((None, 3, "text"), "x"),
        ("one",): Choice((5,), "x"),
        ("log",): Range(1e-5, 1e-1, "x", log=True),
        ("whole",): Range(2, 9, "x"),
        ("narrow",): Range(0.123456, 0.1234561, "x"),
    }
    drawn_values: list[Any] = []
    with tree(fields, 0) as sampler:
        for number in range(30):
            drawn_values.append(sampler.draw())
            sampler.tell(-2.0 if number % 3 else 0.5)
    for point in drawn_values:
        assert point["none",] in (None, 3, "text")
        assert point["one",] == 5
        assert 1e-5 <= point["log",] <= 1e-1
        assert type(point["whole",]) is int
        assert 2 <= point["whole",] <= 9
        assert 0.123456 <= point["narrow",] <= 0.1234561
    assert sum(point["log",] < 1e-3 for point in drawn_values) > 5


# Configurations and the command

SIX = "classes: [0, 1, 2, 3, 4, 5]"
CONFIG = f"""\
# Digits 0 to 5.
extractor:
  kind: torch
  factory: "oodcore_plugins.networks:digits_cnn"   # not trained
  arguments: {{classes: 6, width: 4}}
shapers: [react]   # clipped
scorer:
  kind: she  # per class
train: {{kind: digits, split: train, {SIX}}}
calibrate: {{kind: digits, split: calibrate, {SIX}}}
id_test: {{kind: digits, split: test, {SIX}}}
ood:
  others: {{kind: digits, split: test, classes: [6, 7, 8, 9]}}
  noise: {{kind: noise, shape: [1, 8, 8], seed: 1}}
tune:
  id: {{kind: digits, split: held_out, {SIX}}}
seed: 0
"""


def config_with(**fields: Any) -> dict[str, Any]:
    digits = {"kind": "digits", "classes": [0, 1, 2]}
    return {
        "scorer": "knn",
        "scorers": None,
        "train": {**digits, "split": "train"},
        "calibrate": {**digits, "split": "calibrate"},
        "id_test": {**digits, "split": "test"},
        "ood": {"others": {"kind": "digits", "split": "test", "classes": [7]}},
        **fields,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"id": {"kind": "digits", "split": "test", "classes": [0, 1, 2]}}, "tune.id: is id_test"),
        ({"id": {"kind": "digits", "split": "train", "classes": [0, 1, 2]}}, "tune.id: is train"),
        (
            {"id": {"kind": "digits", "split": "calibrate", "classes": [0, 1, 2]}},
            "tune.id: is calibrate",
        ),
        (
            {"ood": {"x": {"kind": "digits", "split": "test", "classes": [7]}}},
            "tune.ood.x: is ood.others",
        ),
        ({"ood": {}}, "tune.ood: must be a mapping of at least 1 item"),
        ({"metric": "accuracy"}, "tune.metric: must be 'auroc'"),
        ({"rows": "digits"}, "tune.rows: unknown field"),
    ],
)
def test_rows_of_a_benchmark_are_refused(rows: dict[str, Any], message: str) -> None:
    for form in (DetectorConfig, BenchmarkConfig):
        config = config_with(tune=rows)
        if form is DetectorConfig:
            del config["scorers"]
        with pytest.raises(ConfigurationError, match=message):
            validate(form, config)


def test_noise_of_the_benchmark_is_not_chosen_on() -> None:
    path = {"kind": "noise", "shape": [1, 8, 8], "seed": 1}
    config = config_with(
        extractor={
            "kind": "torch",
            "factory": "oodcore_plugins.networks:digits_cnn",
            "arguments": {"classes": 3, "width": 4},
        },
        ood={"n": path},
    )
    del config["scorers"]
    tuning = tuning_of(config)
    assert tuning.taken == tuple(validate(DetectorConfig, config).ood.values())  # type: ignore[union-attr]
    found = oodcore.tuning.choose(tuning, 2)  # type: ignore[attr-defined]
    assert found.data["ood"]["noise"]["seed"] == 2
    with pytest.raises(ConfigurationError, match="train: is needed"):
        tuning_of({"scorer": "knn"})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "detector.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    yield tmp_path  # type: ignore[misc]
    torch.set_num_threads(before)


def test_command_writes_a_configuration_and_the_record(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", "detector.yaml", "--out", "tuned.yaml", "--cache", "cache"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "12 trials" in out
    assert "saved to tuned.yaml; how it was found is in tuned.study.json" in out
    record = json.loads((place / "tuned.study.json").read_text())
    chosen = record["chosen"]
    written = (place / "tuned.yaml").read_text()
    expected = CONFIG.replace(
        "[react]", f"[{{kind: react, percentile: {chosen['shapers.0.percentile']}}}]"
    ).replace(
        "  kind: she  # per class\n",
        f"  kind: she  # per class\n  metric: {chosen['scorer.metric']}\n",
    )
    if chosen["scorer.metric"] == "inner_product":
        assert "metric: inner_product" in written
    assert written == expected
    assert record["best"] == max(t["value"] for t in record["trials"])
    assert record["searched"]["scorer.metric"]["values"] == ["inner_product", "euclidean", "cosine"]
    assert record["data"]["ood"]["noise"]["seed"] == 2
    detector = Detector.from_config(read("tuned.yaml"))
    rows = validate(DetectorConfig, read("tuned.yaml"))
    detector.fit(rows.train)
    noise = oodcore.registry.build("source", record["data"]["ood"]["noise"])
    assert rows.tune is not None
    own = auroc(detector.score(rows.tune.id), detector.score(noise))
    assert own == pytest.approx(record["best"], abs=1e-12)
    assert list((place / "cache").rglob("*.features"))


def test_command_prints_json_and_does_not_overwrite(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "detector.yaml", "--out", "tuned.yaml", "--trials", "2", "--json"]
    assert run(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sampler"] == "tpe"
    assert len(printed["trials"]) == 2
    before = (place / "tuned.yaml").read_text()
    assert run(command) == 2
    assert "tuned.yaml exists; give --overwrite" in capsys.readouterr().err
    assert (place / "tuned.yaml").read_text() == before
    assert run([*command, "--overwrite"]) == 0
    (place / "alone.study.json").write_text("{}")
    assert run(["tune", "detector.yaml", "--out", "alone.yaml"]) == 2
    assert not (place / "alone.yaml").exists()
    assert sorted(path.name for path in place.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detector.yaml", "--out", "tuned.txt"], ".yaml, .yml or .json"),
        (["detector.yaml", "--out", "folder.yaml"], "is a folder"),
        (["detector.yaml", "--out", "x.yaml", "--trials", "0"], "trials"),
        (["none.yaml", "--out", "x.yaml"], "no such file"),
        (["msp.yaml", "--out", "x.yaml"], "nothing to search"),
        (["leak.yaml", "--out", "x.yaml"], "leak.yaml:16: tune.id: is id_test as well"),
    ],
)
def test_command_says_what_is_wrong(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (place / "folder.yaml").mkdir()
    msp = CONFIG.replace("kind: she  # per class", "kind: msp").replace("[react]", "[]")
    (place / "msp.yaml").write_text(msp)
    (place / "leak.yaml").write_text(CONFIG.replace("split: held_out", "split: test"))
    assert run(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (place / "x.yaml").exists()


@pytest.mark.parametrize("command", ["fit", "benchmark"])
def test_other_commands_take_a_cache(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    passes = []
    for number in range(2):
        with _counted() as seen:
            arguments = [command, "detector.yaml", "--out", f"o{number}", "--cache", "cache"]
            assert run(arguments) == 0, capsys.readouterr().err
        passes.append(seen.rows)
    assert passes[0] > 0
    assert passes[1] == 0
    if command == "fit":
        artifact = ["score", "o1", json.dumps({"kind": "digits", "split": "train"}), "--allow"]
        artifact += ["oodcore_plugins.networks:digits_cnn", "--cache", "cache"]
        for number, expected in enumerate((True, False)):
            with _counted() as seen:
                assert run([*artifact, "--out", f"{number}.csv"]) == 0
            assert (seen.rows > 0) == expected
        assert (place / "0.csv").read_bytes() == (place / "1.csv").read_bytes()


class _counted:
    """Counts the rows that models see in a block."""

    def __enter__(self) -> _counted:
        self.rows, self._run = 0, Call.run

        def run(call: Call, inputs: Any) -> Any:
            self.rows += call.rows
            return self._run(call, inputs)

        Call.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Call.run = self._run  # type: ignore[method-assign]
