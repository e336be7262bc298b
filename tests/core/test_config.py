from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import PositiveInt

import oodcore
from oodcore.component import Slot
from oodcore.config import BenchmarkConfig, Candidate, DetectorConfig, read, validate
from oodcore.errors import ConfigurationError
from oodcore.extractor import Extractor
from oodcore.plugins import registry
from oodcore.scorer import Combination, Scorer, Shaper


class Flat(Scorer):
    kind = "flat_test"
    k: PositiveInt = 10
    normalize: bool = True

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Any, state: Any) -> Any:
        return features.logits[:, 0]


class Needy(Flat):
    kind = "needy_test"
    scorer: Annotated[Scorer, Slot("scorer")]


class Both(Combination):
    kind = "both_test"

    def combine(self, scores: Any) -> Any:
        return scores.sum(dim=1)


class Clip(Shaper):
    kind = "clip_test"
    percentile: float = 90.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def apply(self, features: Any, state: Any) -> Any:
        return features


class Few(oodcore.Source):
    kind = "few_test"
    rows: PositiveInt = 3

    def open(self) -> Any:
        return []


class Net(Extractor):
    kind = "net_test"

    def load(self) -> Any:
        raise NotImplementedError


class Plugin:
    @oodcore.hookimpl
    def register_scorers(self, register: Any) -> None:
        for cls in (Flat, Needy, Both):
            register(cls)

    @oodcore.hookimpl
    def register_shapers(self, register: Any) -> None:
        register(Clip)

    @oodcore.hookimpl
    def register_sources(self, register: Any) -> None:
        register(Few)

    @oodcore.hookimpl
    def register_extractors(self, register: Any) -> None:
        register(Net)


@pytest.fixture(autouse=True)
def plugged():
    with registry.using(Plugin()):
        yield


def wrong(model: Any, data: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as error:
        validate(model, data)
    return str(error.value).splitlines()


def benchmark(**fields: Any) -> BenchmarkConfig:
    full = {
        "train": "few_test",
        "id_test": "few_test",
        "ood": {"far": "few_test"},
        "scorers": ["flat_test"],
        **fields,
    }
    return validate(BenchmarkConfig, {k: v for k, v in full.items() if v is not None})


def wrong_benchmark(**fields: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as error:
        benchmark(**fields)
    return str(error.value).splitlines()


def test_a_detector_from_a_file(tmp_path):
    path = tmp_path / "detector.yaml"
    path.write_text(
        "extractor: net_test\n"
        "shapers: [clip_test]\n"
        "scorer: {kind: flat_test, k: 3.0}\n"
        "train: {kind: few_test, rows: 5}\n"
        "ood: {noise: few_test}\n"
        "groups: {far: [noise]}\n"
        "false_alarm_rate: 1e-2\n"
    )
    config = validate(DetectorConfig, read(path))
    assert config == DetectorConfig(
        extractor=Net(),
        shapers=(Clip(),),
        scorer=Flat(k=3),
        train=Few(rows=5),
        ood={"noise": Few()},
        groups={"far": ("noise",)},
        false_alarm_rate=0.01,
    )
    assert (config.batch_size, config.num_workers, config.device, config.seed) == (
        256,
        0,
        "auto",
        0,
    )


def test_a_scorer_is_all_that_a_detector_needs():
    config = validate(DetectorConfig, {"scorer": "flat_test"})
    assert config.scorer == Flat()
    assert (config.extractor, config.shapers, config.train, config.ood) == (None, (), None, None)


def test_instances_may_be_given():
    scorer = Flat(k=3)
    assert validate(DetectorConfig, {"scorer": scorer, "shapers": [Clip()]}).scorer is scorer


def test_a_detector_rebuilds_from_its_dump():
    config = validate(
        DetectorConfig,
        {"scorer": {"kind": "both_test", "scorers": ["flat_test"]}, "ood": {"a": "few_test"}},
    )
    assert validate(DetectorConfig, config.model_dump(mode="json")) == config


def test_all_errors_at_once_each_at_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detector.yaml").write_text(
        "shapers:\n"
        "  - kind: clip_test\n"
        "    percentil: 3\n"
        "scorer: flat_tset\n"
        "tain: few_test\n"
        "train:\n"
        "  kind: few_test\n"
        '  rows: "3"\n'
        "seed: -1\n"
        "false_alarm_rate: 1\n"
        "device: GPU\n"
        "held_out: flat_test\n"
        "groups: {near: [a], far: 3}\n"
    )
    lines = wrong(DetectorConfig, read("detector.yaml"))
    assert (
        lines[0]
        == "detector.yaml:3: shapers.0.percentil: unknown field; did you mean 'percentile'?"
    )
    assert lines[1].startswith(
        "detector.yaml:4: scorer: unknown scorer 'flat_tset'; did you mean 'flat_test'? installed: "
    )
    assert lines[2] == "detector.yaml:5: tain: unknown field; did you mean 'train'?"
    assert lines[3] == "detector.yaml:8: train.rows: must be a whole number, not text '3'"
    assert lines[4] == "detector.yaml:9: seed: must be at least 0, not -1"
    assert lines[5] == "detector.yaml:10: false_alarm_rate: must be less than 1, not 1"
    assert lines[6].startswith("detector.yaml:11: device: must be text of the form")
    assert lines[7].startswith(
        "detector.yaml:12: held_out: unknown source 'flat_test' (it is a scorer); installed: "
    )
    assert lines[8:] == ["detector.yaml:13: groups.far: must be a list, not 3"]


def test_plain_mappings_have_the_same_errors_without_a_file():
    assert wrong(DetectorConfig, {"scorer": {"kind": "flat_test", "k": 0}, "tain": 1}) == [
        "scorer.k: must be greater than 0, not 0",
        "tain: unknown field; did you mean 'train'?",
    ]
    assert wrong(DetectorConfig, {}) == ["scorer: is needed"]
    assert wrong(DetectorConfig, ["flat_test"]) == ["must be a mapping, not a list"]


def test_a_missing_field_is_told_with_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.yaml").write_text("seed: 1\n")
    assert wrong(DetectorConfig, read("d.yaml")) == ["d.yaml: scorer: is needed"]


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, "0.05", True, None])
def test_a_rate_is_strictly_between_0_and_1(rate):
    (line,) = wrong(DetectorConfig, {"scorer": "flat_test", "false_alarm_rate": rate})
    assert line.startswith("false_alarm_rate: must be ")


def test_a_combination_of_nothing_is_refused():
    text = "scorer: 'both_test' combines nothing; name its scorers"
    assert wrong(DetectorConfig, {"scorer": "both_test"}) == [text]
    assert wrong_benchmark(scorers=None, scorer="both_test") == [text]
    assert wrong_benchmark(scorers=["flat_test", {"scorer": "both_test"}]) == [
        "scorers.1: 'both_test' combines nothing; name its scorers"
    ]


def test_groups_name_what_is_in_ood():
    assert wrong(
        DetectorConfig,
        {
            "scorer": "flat_test",
            "ood": {"svhn": "few_test"},
            "groups": {"far": ["svhn", "svnh"], "near": ["cifar"]},
        },
    ) == [
        "groups.far.1: there is no 'svnh' in ood; did you mean 'svhn'?",
        "groups.near.0: there is no 'cifar' in ood",
    ]


# A benchmark


def test_a_benchmark_needs_rows_to_fit_and_to_evaluate_on():
    assert wrong(BenchmarkConfig, {"scorer": "flat_test"}) == [
        "train: is needed",
        "id_test: is needed",
    ]
    assert wrong(
        BenchmarkConfig, {"scorer": "flat_test", "train": "few_test", "id_test": "few_test"}
    ) == [
        "ood: is needed: rows that are not in-distribution, by name",
    ]
    assert wrong_benchmark(ood={}) == ["ood: must be a mapping of at least 1 item, not of 0"]


def test_a_detectors_file_serves_a_benchmark(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(
        "scorer: flat_test\nshapers: [clip_test]\ntrain: few_test\nid_test: few_test\n"
        "ood: {far: few_test}\n"
    )
    assert validate(DetectorConfig, read(path)).scorer == Flat()
    config = validate(BenchmarkConfig, read(path))
    assert config.candidates() == (
        Candidate(name="clip_test + flat_test", shapers=(Clip(),), scorer=Flat()),
    )


def test_scorers_may_be_kinds_mappings_and_candidates():
    config = benchmark(
        shapers=["clip_test"],
        scorers=[
            "flat_test",
            {"kind": "flat_test", "k": 3},
            {"scorer": "flat_test", "shapers": []},
            {"name": "mine", "scorer": {"kind": "flat_test", "k": 3}},
            {"scorer": {"kind": "needy_test", "scorer": "flat_test"}},
            Flat(k=5),
            Candidate(scorer=Flat(k=6), shapers=()),
        ],
    )
    found = [(c.name, [s.kind for s in c.shapers or ()], c.scorer) for c in config.candidates()]
    assert found == [
        ("clip_test + flat_test", ["clip_test"], Flat()),
        ("clip_test + flat_test(k=3)", ["clip_test"], Flat(k=3)),
        ("flat_test", [], Flat()),
        ("mine", ["clip_test"], Flat(k=3)),
        ("clip_test + needy_test", ["clip_test"], Needy(scorer=Flat())),
        ("clip_test + flat_test(k=5)", ["clip_test"], Flat(k=5)),
        ("flat_test(k=6)", [], Flat(k=6)),
    ]


def test_names_tell_fields_and_parts_apart():
    names = [
        candidate.name
        for candidate in benchmark(
            scorers=[
                {"kind": "flat_test", "normalize": False, "k": 3},
                "flat_test",
                {"kind": "both_test", "scorers": ["flat_test", {"kind": "flat_test", "k": 2}]},
                {"kind": "both_test", "scorers": ["flat_test"], "weights": [2.5]},
                {"kind": "needy_test", "scorer": {"kind": "flat_test", "k": 4}, "k": 1},
                {"kind": "needy_test", "scorer": "flat_test"},
            ]
        ).candidates()
    ]
    assert names == [
        "flat_test(k=3, normalize=false)",
        "flat_test",
        "both_test(flat_test flat_test(k=2))",
        "both_test(flat_test, weights=[2.5])",
        "needy_test(k=1, flat_test(k=4))",
        "needy_test(flat_test)",
    ]


def test_a_name_is_given_once():
    assert wrong_benchmark(
        scorers=["flat_test", {"name": "x", "scorer": "flat_test"}, {"kind": "flat_test"}]
    ) == ["scorers.2: 'flat_test' is scorers.0 already; give it another name"]
    assert wrong_benchmark(
        scorers=[{"name": "x", "scorer": "flat_test"}, {"name": "x", "scorer": "flat_test"}]
    ) == ["scorers.1: 'x' is scorers.0 already; give it another name"]


def test_installed_is_every_scorer_that_its_kind_alone_makes():
    candidates = benchmark(scorers="installed").candidates()
    names = [candidate.name for candidate in candidates]
    assert "flat_test" in names
    assert "needy_test" not in names
    assert "both_test" not in names
    assert names == sorted(names)
    assert all(candidate.scorer == type(candidate.scorer)() for candidate in candidates)


def test_what_is_wrong_with_scorers_is_said_at_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.yaml").write_text(
        "train: few_test\n"
        "id_test: few_test\n"
        "ood: {far: few_test}\n"
        "scorers:\n"
        "  - flat_test\n"
        "  - {kind: flat_test, k: x}\n"
        "  - {kind: flat_tset}\n"
        "  - {scorer: flat_test, shaper: []}\n"
        "  - {scorer: {kind: flat_test, nomalize: 1}}\n"
        "  - {name: x}\n"
        "  - 3\n"
        "  - {kind: needy_test}\n"
    )
    lines = wrong(BenchmarkConfig, read("b.yaml"))
    assert lines[0] == "b.yaml:6: scorers.1.k: must be a whole number, not text 'x'"
    assert lines[1].startswith(
        "b.yaml:7: scorers.2: unknown scorer 'flat_tset'; did you mean 'flat"
    )
    assert lines[2:] == [
        "b.yaml:8: scorers.3.shaper: unknown field; did you mean 'shapers'?",
        "b.yaml:9: scorers.4.scorer.nomalize: unknown field; did you mean 'normalize'?",
        "b.yaml:10: scorers.5.scorer: is needed",
        "b.yaml:11: scorers.6: write a scorer as its kind ('name') or as a mapping with a 'kind'",
        "b.yaml:12: scorers.7.scorer: is needed",
    ]


def test_one_of_scorer_and_scorers():
    assert wrong_benchmark(scorers=None) == [
        "scorers: is needed: a list of scorers, or 'installed'"
    ]
    assert wrong_benchmark(scorer="flat_test") == [
        "scorer: is in the way of scorers; keep one of the two"
    ]
    assert wrong_benchmark(scorers=[]) == [
        "scorers: must be a list of at least 1 item or 'installed', not of 0"
    ]
    assert wrong_benchmark(scorers="instaled") == [
        "scorers: must be a list or 'installed', not 'instaled'; did you mean 'installed'?"
    ]


def test_one_of_extractor_and_models():
    config = benchmark(models={"a": "net_test", "b": {"kind": "net_test"}})
    assert config.models == {"a": Net(), "b": Net()}
    assert wrong_benchmark(models={"a": "net_test"}, extractor="net_test") == [
        "extractor: is in the way of models; keep one of the two"
    ]
    assert wrong_benchmark(models={}) == ["models: must be a mapping of at least 1 item, not of 0"]
    (line,) = wrong_benchmark(models={"a": "net_tset"})
    assert line.startswith("models.a: unknown extractor 'net_tset'; did you mean 'net_test'?")


def test_all_broken_rules_are_told():
    assert wrong_benchmark(
        scorers=["flat_test", "flat_test"],
        scorer="both_test",
        groups={"g": ["nothing"]},
        extractor="net_test",
        models={"a": "net_test"},
    ) == [
        "groups.g.0: there is no 'nothing' in ood",
        "scorer: is in the way of scorers; keep one of the two",
        "scorer: 'both_test' combines nothing; name its scorers",
        "extractor: is in the way of models; keep one of the two",
        "scorers.1: 'flat_test' is scorers.0 already; give it another name",
    ]


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        benchmark().seed = 1
