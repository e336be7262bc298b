"""A benchmark: every model sees each row once, and its numbers are those of detectors alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

import oodcore
from oodcore import Detector, FeatureModel, Features
from oodcore.errors import ConfigurationError
from oodcore.evaluation import compare, study_of


def drawn(count: int, seed: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.calls = 0
        with torch.no_grad():
            for parameter in self.parameters():
                generator = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += len(inputs)
        output: Tensor = self.layers(inputs)
        return output


TRAIN = (drawn(150, 0), torch.arange(150) % 3)
TEST = (drawn(60, 1), torch.arange(60) % 3)
OOD = {"wide": drawn(40, 2, 3.0), "narrow": drawn(50, 3, 0.2)}
SCORERS: list[Any] = [
    "msp",
    "energy",
    "mahalanobis",
    "dml",
    {"kind": "knn", "k": 5},
    {"kind": "knn", "k": 9},
    {"shapers": ["react"], "scorer": "energy"},
    {"name": "mix", "scorer": {"kind": "sum", "scorers": ["dml", "energy"], "normalize": "zscore"}},
]


def test_one_forward_pass_a_row() -> None:
    net = Net(0)
    oodcore.benchmark(
        net, train=TRAIN, id_test=TEST, ood=OOD, scorers=SCORERS, calibrate=drawn(30, 4)
    )
    assert net.calls == 150 + 60 + 40 + 50 + 30


def test_methods_that_pass_again_are_counted_on_top() -> None:
    net = Net(0)
    oodcore.benchmark(net, train=TRAIN, id_test=TEST, ood=OOD, scorers=["msp", "odin"])
    assert net.calls == 150 + 3 * (60 + 40 + 50)


def test_every_number_is_that_of_the_detector_alone() -> None:
    net = Net(0)
    normal = drawn(99, 4)
    results = oodcore.benchmark(
        net,
        train=TRAIN,
        id_test=TEST,
        ood=OOD,
        scorers=SCORERS,
        calibrate=normal,
        groups={"far": ["wide"]},
        false_alarm_rate=0.1,
    )
    names = [entry.name for entry in results.entries]
    assert len(set(names)) == len(SCORERS)
    assert {"mix", "react + energy", "knn(k=5)", "knn(k=9)"} <= set(names)
    for name, spec in zip(names, SCORERS, strict=True):
        recipe = spec if isinstance(spec, dict) and "scorer" in spec else {"scorer": spec}
        recipe = {key: value for key, value in recipe.items() if key != "name"}
        detector = Detector(net, **recipe).fit(TRAIN).calibrate(normal, 0.1)
        known = detector.score(TEST)
        for data, rows in OOD.items():
            strange = detector.score(rows)
            truth = [1] * len(known) + [0] * len(strange)
            scores = [*known, *strange]
            auroc = roc_auc_score(truth, scores)
            assert results.value(name, "auroc", data) == pytest.approx(auroc, abs=1e-12)
            aupr = average_precision_score(truth, scores)
            assert results.value(name, "aupr_id", data) == pytest.approx(aupr, abs=1e-12)
        flagged = (detector.predict(TEST) == -1).mean()
        assert results.value(name, "false_alarm_rate", "id_test") == pytest.approx(flagged)
        assert results.value(name, "accuracy", "id_test") is not None
    assert all(0 <= row.value <= 1 for row in results.rows)


def test_several_models() -> None:
    models = {"one": Net(0), "two": Net(1)}
    results = oodcore.benchmark(
        models, train=TRAIN, id_test=TEST, ood=OOD, scorers=["msp", "energy"]
    )
    assert [entry.name for entry in results.entries] == [
        "one/msp",
        "one/energy",
        "two/msp",
        "two/energy",
    ]
    assert [model.calls for model in models.values()] == [300, 300]
    assert results.value("one/msp", "accuracy", "id_test") != results.value(
        "two/msp", "accuracy", "id_test"
    )


def test_installed_leaves_out_what_the_data_cannot_serve() -> None:
    model = FeatureModel.wrap(Net(0))

    def features(rows: Any) -> Features:
        seen = model(rows[0] if isinstance(rows, tuple) else rows)
        labels = rows[1] if isinstance(rows, tuple) else None
        return Features(embeddings=seen.embeddings.detach(), labels=labels)

    results = oodcore.benchmark(
        train=features(TRAIN),
        id_test=features(TEST),
        ood={name: features(rows) for name, rows in OOD.items()},
    )
    names = {entry.name for entry in results.entries}
    assert {"mahalanobis", "knn", "max_norm"} <= names
    assert {"odin", "energy", "max_cosine"}.isdisjoint(names)
    assert results.configuration["left_out"]["odin"] == "needs a model"
    assert "logits" in results.configuration["left_out"]["energy"]


def test_what_is_recorded() -> None:
    results = oodcore.benchmark(
        Net(0), train=TRAIN, id_test=TEST, ood=OOD, scorers=["energy"], seed=7
    )
    assert results.configuration["seed"] == 7
    assert results.configuration["train"]["rows"] == 150
    assert results.provenance["plugins"]["oodcore"] == oodcore.__version__
    assert "Energy-based" in str(results.entries[0].citation)
    assert results.entries[0].configuration["scorer"] == {"kind": "energy", "temperature": 1.0}


def test_the_same_again_gives_the_same() -> None:
    def run() -> Any:
        return oodcore.benchmark(Net(0), train=TRAIN, id_test=TEST, ood=OOD, scorers=SCORERS).rows

    assert run() == run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scorers": []}, "no detector"),
        ({"scorers": "energy"}, "list"),
        ({"scorers": ["energy", "energy"]}, "twice"),
        ({"scorers": ["nonesuch"]}, "unknown scorer"),
        ({"scorers": ["energy"], "groups": {"far": ["nowhere"]}}, "nowhere"),
        ({"scorers": ["energy"], "calibrate": TEST[0][:5]}, "19"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        oodcore.benchmark(Net(0), train=TRAIN, id_test=TEST, ood=OOD, **arguments)


def test_a_configuration() -> None:
    digits = {"kind": "digits", "classes": [0, 1, 2]}
    study = study_of(
        {
            "extractor": {
                "kind": "torch",
                "factory": "oodcore_plugins.networks:digits_cnn",
                "arguments": {"classes": 3},
            },
            "scorers": ["msp", {"kind": "knn", "k": 5}],
            "train": {**digits, "split": "train"},
            "id_test": {**digits, "split": "test"},
            "ood": {"other digits": {"kind": "digits", "split": "test", "classes": [7, 8]}},
            "groups": {"near": ["other digits"]},
        }
    )
    outcome = compare(study)
    assert set(outcome.detectors) == {"msp", "knn"}
    assert outcome.results.configuration["ood"]["other digits"]["classes"] == [7, 8]
    with pytest.raises(ConfigurationError, match="id_test"):
        study_of({"scorers": ["msp"], "train": digits, "ood": {"x": digits}})


def test_installed_leaves_out_what_arrays_and_encoders_cannot_serve() -> None:
    rows = oodcore.benchmark(train=TRAIN, id_test=TEST, ood=OOD)
    encoder = FeatureModel.wrap(Net(0).layers[:2], head=None)
    encoded = oodcore.benchmark(encoder, train=TRAIN, id_test=TEST, ood=OOD)
    for results in (rows, encoded):
        names = {entry.name for entry in results.entries}
        assert {"mahalanobis", "max_norm"} <= names
        assert {"energy", "max_cosine"}.isdisjoint(names)
        assert "needs" in results.configuration["left_out"]["energy"]


class Failing(oodcore.Scorer):
    """Fails where a test says."""

    kind = "failing"

    def needs(self) -> frozenset[str]:
        return frozenset({"layers.nowhere"})

    def score(self, features: Features, state: Any) -> Tensor:
        raise AssertionError("never reached")


class FailingPlugin:
    @oodcore.hookimpl
    def register_scorers(self, register: Any) -> None:
        register(Failing)


def test_an_installed_scorer_that_fails_is_left_out_with_its_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with oodcore.registry.using(FailingPlugin()):
        results = oodcore.benchmark(Net(0), train=TRAIN, id_test=TEST, ood=OOD)
        assert "no layer 'nowhere'" in results.configuration["left_out"]["failing"]
        assert "failing" in caplog.text
        assert "energy" in {entry.name for entry in results.entries}
        with pytest.raises(ConfigurationError, match="no layer 'nowhere'"):
            oodcore.benchmark(
                Net(0), train=TRAIN, id_test=TEST, ood=OOD, scorers=["energy", "failing"]
            )


class Rows(oodcore.Source):
    """A few rows."""

    kind = "some_rows"

    def open(self) -> Any:
        return torch.utils.data.TensorDataset(*TRAIN)


class RowsPlugin:
    @oodcore.hookimpl
    def register_sources(self, register: Any) -> None:
        register(Rows)


def test_every_plugin_that_took_part_is_recorded() -> None:
    with oodcore.registry.using(RowsPlugin()) as plugin:
        results = oodcore.benchmark(
            Net(0), train="some_rows", id_test=TEST, ood=OOD, scorers=["energy"]
        )
    assert results.provenance["plugins"][plugin.distribution] == plugin.version
