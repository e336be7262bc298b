"""Ensembles among the detectors of a benchmark: the same numbers, no further pass of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_evaluation import OOD, TEST, TRAIN, Net, drawn

import oodcore
from oodcore import Detector, Ensemble
from oodcore.config import BenchmarkConfig, candidates, validate
from oodcore.errors import ConfigurationError
from oodcore.evaluation import Outcome, Study, compare
from oodcore.protocols import protocol_of

HELD = (drawn(35, 8), torch.arange(35) % 3)
NORMAL = drawn(99, 4)
MEMBERS: dict[str, Any] = {
    "cosine": {"model": "one", "scorer": "max_cosine"},
    "norm": {"model": "two", "shapers": ["react"], "scorer": {"kind": "knn", "k": 3}},
}


def compared(models: dict[str, Any], scorers: list[Any], held_out: Any = None) -> Outcome:
    return compare(
        Study(
            models=models,
            candidates=candidates(scorers),
            train=TRAIN,
            id_test=TEST,
            ood=OOD,
            held_out=held_out,
            calibrate=NORMAL,
            false_alarm_rate=0.1,
        )
    )


@pytest.mark.parametrize("held_out", [HELD, None], ids=["held out", "a tenth"])
@pytest.mark.parametrize("normalize", ["none", "mean", "zscore", "ecdf"])
def test_it_is_the_ensemble_that_is_fitted_alone(normalize: str, held_out: Any) -> None:
    models = {"one": Net(0), "two": Net(1)}
    combine = {"kind": "sum", "normalize": normalize, "weights": [2.0, 1.0]}
    joint = {"name": "both", "members": MEMBERS, "combine": combine}
    outcome = compared(models, ["msp", joint, {"kind": "knn", "k": 3}], held_out)
    passed = 150 + 60 + 40 + 50 + 99 + (35 if held_out and normalize != "none" else 0)
    assert models["one"].calls == passed
    assert models["two"].calls == passed

    members = {
        "cosine": Detector(models["one"], scorer="max_cosine"),
        "norm": Detector(models["two"], scorer={"kind": "knn", "k": 3}, shapers=["react"]),
    }
    alone = Ensemble(members, combine).fit(TRAIN, held_out).calibrate(NORMAL, 0.1)
    found = outcome.detectors["both"]
    # A model's float32 numbers depend a little on the batch that a row is in.
    np.testing.assert_allclose(found.score(TEST[0]), alone.score(TEST[0]), rtol=2e-6)
    np.testing.assert_array_equal(found.predict(TEST[0]), alone.predict(TEST[0]))
    results = outcome.results
    flagged = (alone.predict(TEST[0]) == -1).mean()
    assert results.value("both", "false_alarm_rate", "id_test") == pytest.approx(flagged)
    for data, rows in OOD.items():
        scores = [*alone.score(TEST[0]), *alone.score(rows)]
        auroc = roc_auc_score([1] * 60 + [0] * len(rows), scores)
        assert results.value("both", "auroc", data) == pytest.approx(auroc, abs=1e-12)
    accuracy = results.value("both", "accuracy", "id_test")
    assert accuracy == results.value("one/msp", "accuracy", "id_test")
    assert accuracy != results.value("two/msp", "accuracy", "id_test")


def test_the_order_is_that_of_the_configuration_and_models_come_first() -> None:
    joint = {"name": "both", "members": MEMBERS}
    same = {"name": "same", "members": {"a": {"scorer": "msp"}, "b": {"scorer": "energy"}}}
    results = compared({"one": Net(0), "two": Net(1)}, [joint, "msp", same]).results
    assert {entry.name: entry.model for entry in results.entries} == {
        "one/msp": "one",
        "one/same": "one",
        "two/msp": "two",
        "two/same": "two",
        "both": "one + two",
    }
    entry = results.entries[-1]
    assert set(entry.configuration) == {"members", "combine"}
    assert entry.configuration["members"]["norm"]["shapers"][0]["kind"] == "react"
    assert [method.kind for method in entry.methods] == ["max_cosine", "react", "knn", "sum"]
    assert entry.citation is not None
    assert entry.seconds is not None
    assert set(results.pictures) == {"one", "two"}


def test_saved_and_loaded(tmp_path: Any) -> None:
    models = {"one": Net(0), "two": Net(1)}
    combine = {"kind": "sum", "normalize": "zscore"}
    joint = {"name": "both", "members": MEMBERS, "combine": combine}
    found = compared(models, [joint], HELD).detectors["both"]
    folder = found.save(tmp_path / "artifact")
    loaded = oodcore.load(folder, model={"cosine": models["one"], "norm": models["two"]})
    np.testing.assert_array_equal(loaded.predict(TEST[0]), found.predict(TEST[0]))


def test_a_model_that_is_not_there() -> None:
    joint = {"name": "both", "members": MEMBERS}
    with pytest.raises(ConfigurationError, match="no model 'two'; there are: one, three"):
        compared({"one": Net(0), "three": Net(1)}, [joint])
    with pytest.raises(ConfigurationError, match="no model 'one'; there are: one without a name"):
        compared({"": Net(0)}, [joint])
    with pytest.raises(ConfigurationError, match="'one/msp' occurs twice"):
        compared({"one": Net(0), "two": Net(1)}, ["msp", {"name": "one/msp", "members": MEMBERS}])


def test_ensembles_of_every_split() -> None:
    def net(seed: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
            )

    members = {"a": {"model": "x", "scorer": "msp"}, "b": {"model": "y", "scorer": "max_norm"}}
    joint = {"name": "both", "members": members, "combine": {"kind": "sum", "normalize": "zscore"}}
    outcome = compare(
        Study(
            models={"s": {"x": net(0), "y": net(1)}, "t": {"x": net(2), "y": net(3)}},
            candidates=candidates([joint, "energy"]),
            train=TRAIN,
            id_test=TEST,
            ood={},
            protocol=protocol_of(
                {
                    "kind": "open_set",
                    "splits": {"s": {"known": [0, 1]}, "t": {"known": [2, 0]}},
                    "classes": 3,
                }
            ),
        )
    )
    assert {name for name in outcome.detectors if name.endswith("both")} == {"s/both", "t/both"}
    value = outcome.results.row("both", "auroc", "unknown")
    assert value is not None
    assert len(value.values) == 2


# Configurations


def wrong(**fields: Any) -> list[str]:
    given = {"train": "digits", "id_test": "digits", "ood": {"noise": "noise"}, **fields}
    with pytest.raises(ConfigurationError) as caught:
        validate(BenchmarkConfig, given)
    return str(caught.value).splitlines()


RUNS = {"one": {"kind": "run", "path": "a"}, "two": {"kind": "run", "path": "b"}}


def test_what_is_wrong_with_an_ensemble_is_said_at_its_place() -> None:
    def joint(**fields: Any) -> list[Any]:
        return [{"name": "both", "members": MEMBERS, **fields}]

    assert wrong(models=RUNS, scorers=joint(combine="msp")) == [
        "scorers.0.combine: must be a combination without scorers of its own, such as 'sum'"
    ]
    assert wrong(models=RUNS, scorers=joint(combine={"kind": "sum", "scorers": ["msp"]})) == [
        "scorers.0.combine: must be a combination without scorers of its own, such as 'sum'"
    ]
    assert wrong(models=RUNS, scorers=joint(combine={"kind": "sum", "weights": [1.0]})) == [
        "scorers.0.combine.weights: there are 1 weights for 2 members"
    ]
    assert wrong(models={"one": RUNS["one"], "tow": RUNS["two"]}, scorers=joint()) == [
        "scorers.0.members.norm.model: there is no model 'two'; did you mean 'tow'?"
    ]
    assert wrong(extractor=RUNS["one"], scorers=joint())[0] == (
        "scorers.0.members.cosine.model: there is no model 'one': leave model out"
    )
    mixed = {**MEMBERS, "third": {"scorer": "sum"}}
    assert wrong(models=RUNS, scorers=joint(members=mixed)) == [
        "scorers.0.members.third: 'sum' combines nothing; name its scorers",
        "scorers.0.members.third: names no model, and others do: all members name one, or none",
    ]
    assert wrong(models=RUNS, scorers=joint(members={})) == [
        "scorers.0.members: must be a mapping of at least 1 item, not of 0"
    ]
    assert wrong(models=RUNS, scorers=joint(combin="sum")) == [
        "scorers.0.combin: unknown field; did you mean 'combine'?"
    ]
    assert wrong(models=RUNS, scorers=[*joint(), *joint()]) == [
        "scorers.1: 'both' is scorers.0 already; give it another name"
    ]


def test_an_ensemble_without_a_name_is_called_after_its_members() -> None:
    def names(*scorers: Any) -> list[Any]:
        given = {
            "train": "digits",
            "id_test": "digits",
            "ood": {"n": "noise"},
            "models": RUNS,
            "scorers": scorers,
        }
        return [one.name for one in validate(BenchmarkConfig, given).candidates()]

    plain = {"members": {"a": {"scorer": "msp"}, "b": {"scorer": "knn"}}}
    other = {"members": {"a": {"scorer": "msp"}, "b": {"scorer": {"kind": "knn", "k": 3}}}}
    assert names(plain) == ["sum of a: msp, b: knn"]
    assert names(plain, other) == ["sum of a: msp, b: knn", "sum of a: msp, b: knn(k=3)"]


def test_shapers_of_the_benchmark_are_those_of_members_that_name_none() -> None:
    members = {"a": {"scorer": "msp"}, "b": {"scorer": "msp", "shapers": []}}
    (joint,) = candidates([{"members": members}], ["react"])
    assert [len(part.shapers) for part in joint.members.values()] == [1, 0]
