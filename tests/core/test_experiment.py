"""A benchmark with trainings: they become its models, go on where they stopped, and never change
unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy_runs import Clusters, registered, same, weights

from oodcore.config import BenchmarkConfig, validate
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.evaluation import study_of
from oodcore.experiment import carry_out
from oodcore.results import Results


@pytest.fixture(autouse=True)
def plugin():
    with registered():
        yield


def training(**fields: Any) -> dict[str, Any]:
    usual = {
        "network": {"factory": "toy_runs:net", "arguments": {"dropout": 0.0}},
        "train": Clusters().dump(),
        "epochs": 2,
        "batch_size": 14,
        "device": "cpu",
        "checkpoint_every": 1,
    }
    return {**usual, **fields}


def experiment(**trainings: Any) -> dict[str, Any]:
    return {
        "trainings": trainings,
        "train": Clusters().dump(),
        "id_test": Clusters(seed=1).dump(),
        "ood": {"far": Clusters(seed=2, rows=30).dump()},
        "scorers": ["msp"],
        "device": "cpu",
    }


def models(out: Path) -> dict[str, Any]:
    return {path.name: weights(path) for path in sorted((out / "models").iterdir())}


def test_trainings_become_models(tmp_path: Path) -> None:
    config = experiment(one=training(), two=training(seed=1))
    config["scorers"] += [
        {
            "name": "both",
            "members": {
                "a": {"model": "one", "scorer": "max_cosine"},
                "b": {"model": "two", "scorer": "max_norm"},
            },
            "combine": {"kind": "sum", "normalize": "mean"},
        }
    ]
    seen = []
    outcome = carry_out(
        config, tmp_path, on_progress=lambda name, done, total, numbers: seen.append((name, done))
    )
    assert seen == [(name, step) for name in ("one", "two") for step in range(1, 7)]
    assert list(outcome.detectors) == ["one/msp", "two/msp", "both"]
    assert Results.load(tmp_path).rows == outcome.results.rows
    assert (tmp_path / "report.html").is_file()
    run = outcome.results.configuration["models"]["two"]
    assert run["kind"] == "run"
    assert run["path"] == str(tmp_path / "models" / "two")


def test_what_is_finished_stays(tmp_path: Path) -> None:
    config = experiment(one=training())
    first = carry_out(config, tmp_path).results
    before = (tmp_path / "models" / "one" / "model.safetensors").stat().st_mtime_ns

    def never(*told: Any) -> None:
        raise AssertionError(told)

    again = carry_out(config, tmp_path, on_progress=never).results
    assert (tmp_path / "models" / "one" / "model.safetensors").stat().st_mtime_ns == before
    assert again.rows == first.rows
    carry_out(config, tmp_path, overwrite=True, on_progress=never)


@pytest.mark.parametrize("stop", [("one", 2), ("two", 4)], ids=["in the first", "in the second"])
def test_what_was_interrupted_goes_on(stop: tuple[str, int], tmp_path: Path) -> None:
    config = experiment(one=training(), two=training(seed=1))
    carry_out(config, tmp_path / "whole")

    def interrupt(name: str, done: int, total: int, numbers: Any) -> None:
        if (name, done) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(config, tmp_path / "killed", on_progress=interrupt)
    seen: list[tuple[str, int]] = []
    carry_out(
        config, tmp_path / "killed", on_progress=lambda name, done, *_: seen.append((name, done))
    )
    assert 1 < seen[0][1] <= stop[1] + 1
    assert seen[0][0] == stop[0]
    whole, killed = models(tmp_path / "whole"), models(tmp_path / "killed")
    assert all(same(whole[name], killed[name]) for name in ("one", "two"))


def test_a_run_of_another_configuration_is_replaced_only_where_that_is_said(tmp_path: Path) -> None:
    carry_out(experiment(one=training(), two=training(seed=1)), tmp_path)
    before = models(tmp_path)
    changed = experiment(one=training(), two=training(seed=5), three=training())
    with pytest.raises(ArtifactError) as caught:
        carry_out(changed, tmp_path)
    said = str(caught.value)
    assert said.startswith("trainings.two: ")
    assert "seed was 1 and is 5" in said
    assert "--overwrite" in said
    assert models(tmp_path).keys() == {"one", "two"}
    assert all(same(before[name], models(tmp_path)[name]) for name in before)

    trained = []
    carry_out(changed, tmp_path, overwrite=True, on_progress=lambda name, *_: trained.append(name))
    assert set(trained) == {"two", "three"}
    assert same(before["one"], models(tmp_path)["one"])
    assert not same(before["two"], models(tmp_path)["two"])


def test_everything_again(tmp_path: Path) -> None:
    config = experiment(one=training())
    carry_out(config, tmp_path)
    trained = []
    carry_out(config, tmp_path, again=True, on_progress=lambda name, *_: trained.append(name))
    assert trained == ["one"] * 6


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "models" / "one").mkdir(parents=True)
    (tmp_path / "models" / "one" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds thesis\.txt"):
        carry_out(experiment(one=training()), tmp_path, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is no folder"):
        carry_out(experiment(one=training()), tmp_path / "file")


def test_rows_that_are_missing_are_noticed_before_anything_is_trained(tmp_path: Path) -> None:
    missing = {"kind": "npz", "path": str(tmp_path / "none.npz")}

    def never(*told: Any) -> None:
        raise AssertionError(told)

    for config in (
        {**experiment(one=training()), "ood": {"far": missing}},
        experiment(one=training(), two=training(train=missing)),
    ):
        with pytest.raises(DataError, match=r"none\.npz"):
            carry_out(config, tmp_path / "out", on_progress=never)


def test_a_study_alone_trains_nothing() -> None:
    with pytest.raises(ConfigurationError, match="carry_out"):
        study_of(experiment(one=training()))


def wrong(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        validate(BenchmarkConfig, config)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", ["a/b", "..", ".", ".hidden", "/tmp", "a\\b", "a/"])
def test_a_training_is_named_as_a_folder_is(name: str) -> None:
    assert wrong(experiment(**{name: training()})) == [
        f"trainings.{name}: is to be the name of a folder; give it another name"
    ]


def test_what_is_wrong_with_trainings_is_said_at_its_place() -> None:
    run = {"kind": "run", "path": "elsewhere"}
    assert wrong({**experiment(one=training()), "extractor": run}) == [
        "extractor: is in the way of trainings; keep one of the two"
    ]
    assert wrong({**experiment(one=training()), "models": {"one": run}}) == [
        "trainings.one: is one of models already; give it another name"
    ]
    assert wrong(experiment(one=training(epochs=0))) == [
        "trainings.one.epochs: must be greater than 0, not 0"
    ]
    assert wrong(experiment(one={**training(), "epoch": 3}))[0] == (
        "trainings.one.epoch: unknown field; did you mean 'epochs'?"
    )
    assert wrong(experiment()) == ["trainings: must be a mapping of at least 1 item, not of 0"]
