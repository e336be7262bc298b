"""Open-set splits: known classes are renumbered, each split has its model, and means are taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oodcore
from oodcore import Detector, Features
from oodcore.data import Stream
from oodcore.errors import ConfigurationError, DataError
from oodcore.evaluation import compare, study_of
from oodcore.metrics import auroc, oscr
from oodcore.protocols import protocol_of
from oodcore.splits import restricted

SPLITS = {"a": {"known": [0, 1, 2], "unknown": [3]}, "b": {"known": [3, 1, 0]}}
OPEN_SET = {"kind": "open_set", "classes": 4, "splits": SPLITS}


def rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % 4
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.one_hot(labels, 4) * 2.0 + noise, labels


TRAIN, TEST, NORMAL = rows(160, 0), rows(120, 1), rows(100, 2)


class Net(nn.Module):
    """Knows some classes: its logits are their coordinates, in their order."""

    def __init__(self, known: list[int]) -> None:
        super().__init__()
        self.head = nn.Linear(4, len(known))
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(4)[known])
            self.head.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs)
        return output


def nets() -> dict[str, Net]:
    return {name: Net(split["known"]) for name, split in SPLITS.items()}


def unknown(name: str) -> list[int]:
    return [3] if name == "a" else [2]


def test_a_split_is_a_benchmark_of_its_own() -> None:
    models = nets()
    results = oodcore.benchmark(
        models,
        train=TRAIN,
        id_test=TEST,
        calibrate=NORMAL,
        ood={"far": torch.full((30, 4), -3.0)},
        scorers=["msp", {"kind": "knn", "k": 3}],
        protocol=OPEN_SET,
        false_alarm_rate=0.1,
    )
    assert results.repeats == ("a", "b")
    assert [one.name for one in results.ood_data] == ["unknown", "far"]
    assert results.id_data.rows == 180
    for scorer in ("msp", {"kind": "knn", "k": 3}):
        name = scorer if isinstance(scorer, str) else "knn"
        values, areas, shares, alarms = [], [], [], []
        for split, model in models.items():
            known = SPLITS[split]["known"]
            own = torch.isin(TEST[1], torch.tensor(known))
            others = torch.isin(TEST[1], torch.tensor(unknown(split)))
            training = torch.isin(TRAIN[1], torch.tensor(known))
            labels = torch.tensor([known.index(int(c)) for c in TRAIN[1][training]])
            detector = Detector(model, scorer=scorer).fit((TRAIN[0][training], labels))
            normal = torch.isin(NORMAL[1], torch.tensor(known))
            detector.calibrate(NORMAL[0][normal], 0.1)
            inside, outside = detector.score(TEST[0][own]), detector.score(TEST[0][others])
            right = np.array(known)[model(TEST[0][own]).argmax(1)] == TEST[1][own].numpy()
            values.append(auroc(inside, outside))
            areas.append(oscr(inside, right, outside))
            shares.append(right.mean())
            alarms.append((detector.predict(TEST[0][own]) == -1).mean())
        assert 0.5 < np.mean(shares) < 1
        for metric, data, expected in (
            ("auroc", "unknown", values),
            ("oscr", "unknown", areas),
            ("accuracy", "id_test", shares),
            ("false_alarm_rate", "id_test", alarms),
        ):
            row = results.row(name, metric, data)
            assert row is not None
            assert row.values == pytest.approx(expected, abs=1e-12)
            assert row.value == pytest.approx(np.mean(expected))


def test_a_configuration_brings_a_model_for_each_split() -> None:
    def extractor(classes: int) -> dict[str, Any]:
        factory = "oodcore_plugins.networks:digits_cnn"
        arguments = {"classes": classes, "width": 4}
        return {"kind": "torch", "factory": factory, "arguments": arguments}

    splits: dict[str, Any] = {
        "even": {"known": [0, 2, 4, 6, 8], "unknown": [1, 3], "extractor": extractor(5)},
        "low": {"known": [0, 1, 2], "extractor": extractor(3)},
    }
    config = {
        "protocol": {"kind": "open_set", "classes": 10, "splits": splits},
        "train": {"kind": "digits", "split": "train"},
        "id_test": {"kind": "digits", "split": "test"},
        "scorers": ["energy", "mahalanobis"],
    }
    outcome = compare(study_of(config))
    results = outcome.results
    assert set(outcome.detectors) == {"even/energy", "even/mahalanobis", "low/energy"} | {
        "low/mahalanobis"
    }
    assert [entry.name for entry in results.entries] == ["energy", "mahalanobis"]
    assert all(entry.seconds is not None and entry.seconds > 0 for entry in results.entries)
    recorded = results.protocol["splits"]["even"]["extractor"]
    assert recorded["arguments"]["classes"] == 5
    assert "oodcore" in results.provenance["plugins"]
    row = results.row("energy", "auroc", "unknown")
    assert row is not None
    assert len(row.values) == 2
    detector = outcome.detectors["low/energy"]
    scores = [
        detector.score({"kind": "digits", "split": "test", "classes": classes})
        for classes in ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9])
    ]
    assert row.values[1] == pytest.approx(auroc(*scores), abs=1e-12)


def test_several_models_of_a_split_and_one_model_for_all() -> None:
    several = {name: {"plain": net, "again": net} for name, net in nets().items()}
    results = oodcore.benchmark(
        several, train=TRAIN, id_test=TEST, scorers=["msp"], protocol=OPEN_SET
    )
    assert [entry.name for entry in results.entries] == ["plain/msp", "again/msp"]
    alike = [results.value(entry.name, "auroc", "unknown") for entry in results.entries]
    assert alike[0] == alike[1]
    one = {"kind": "open_set", "splits": {"only": SPLITS["a"]}}
    results = oodcore.benchmark(
        Net([0, 1, 2]), train=TRAIN, id_test=TEST, scorers=["msp"], protocol=one
    )
    assert results.repeats == ()
    assert results.value("msp", "auroc", "unknown") is not None


def test_features_are_divided_too() -> None:
    def seen(data: tuple[Tensor, Tensor]) -> Features:
        return Features(embeddings=data[0], labels=data[1], logits=None)

    kept = restricted(seen(TEST), [3, 1], "id_test")
    batches = list(Stream(kept))
    assert torch.cat([b.labels for b in batches]).unique().tolist() == [0, 1]
    for batch in batches:
        assert isinstance(batch, Features)
        original = TEST[1][batch.ids]
        assert torch.equal(torch.tensor([3, 1])[batch.labels], original)
        assert torch.equal(batch.embeddings, TEST[0][batch.ids])
    with pytest.raises(DataError, match="which predictions are right"):
        oodcore.benchmark(
            train=seen(TRAIN), id_test=seen(TEST), scorers=["mahalanobis"], protocol=OPEN_SET
        )


def test_a_data_set_is_divided_with_its_ids() -> None:
    data = torch.utils.data.TensorDataset(*TEST)
    kept = restricted(data, [2, 0], "id_test")
    found = [(int(i), int(label)) for b in Stream(kept) for i, label in zip(b.ids, b.labels)]  # noqa: B905
    wanted = [(row, [2, 0].index(int(c))) for row, c in enumerate(TEST[1]) if int(c) in (2, 0)]
    assert found == wanted
    again = [(int(i), int(label)) for b in Stream(kept) for i, label in zip(b.ids, b.labels)]  # noqa: B905
    assert again == wanted
    source = restricted({"kind": "digits", "split": "test"}, [7, 1], "id_test")
    assert source.classes == (7, 1)


def refused(message: str, error: type[Exception] = ConfigurationError, **change: Any) -> None:
    given = {"train": TRAIN, "id_test": TEST, "scorers": ["msp"], "protocol": OPEN_SET, **change}
    model = given.pop("model", None) or nets()
    with pytest.raises(error, match=message):
        oodcore.benchmark(model, **given)


def test_what_is_refused() -> None:
    refused("one for each split .a, b., not for a, c", model={"a": Net([0]), "c": Net([0])})
    refused("ood.unknown: .* rename yours", ood={"unknown": TEST[0]})
    refused("id_test: the protocol's splits", id_test={"kind": "digits", "classes": [1]})
    refused("id_test is read for every split", DataError, id_test=iter([TEST]))
    refused("rows without a label", DataError, train=TRAIN[0])
    splits = {"a": {"known": [0, 7], "unknown": [9]}}
    lone = {"kind": "open_set", "splits": splits}
    refused(r"id_test has no row of the classes \[9\]", DataError, model=Net([0, 1]), protocol=lone)
    both = {"a": {**SPLITS["a"], "extractor": "run"}}
    with pytest.raises(ConfigurationError, match=r"splits\.a\.extractor\.path: is needed"):
        protocol_of({"kind": "open_set", "splits": both})


def test_a_model_must_have_one_output_for_each_known_class() -> None:
    refused("the split a knows 3 classes, and its model has 4 outputs", model=Net([0, 1, 2, 3]))


def test_a_split_with_a_model_leaves_no_place_for_another() -> None:
    extractor = {"kind": "torch", "factory": "oodcore_plugins.networks:digits_cnn"}
    own = {"a": {**SPLITS["a"], "extractor": extractor}}
    refused("splits.a brings its own model", protocol={"kind": "open_set", "splits": own})


def test_too_few_calibration_rows_are_found_before_fitting() -> None:
    class Never(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise AssertionError("fitting began")

    few = torch.utils.data.TensorDataset(NORMAL[0][:5], NORMAL[1][:5])
    with pytest.raises(ConfigurationError, match="at least 19 calibration scores and there are 5"):
        oodcore.benchmark(
            oodcore.FeatureModel.wrap(Never(), head=None),
            train=TRAIN,
            id_test=TEST,
            ood={"x": TEST[0]},
            calibrate=few,
            scorers=["msp"],
        )


def test_too_few_rows_for_draws_are_found_before_fitting() -> None:
    class Never(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise AssertionError("fitting began")

    with pytest.raises(DataError, match="a draw takes 24 rows of x"):
        oodcore.benchmark(
            oodcore.FeatureModel.wrap(Never(), head=None),
            train=TRAIN,
            id_test=TEST,
            ood={"x": TEST[0][:23]},
            protocol="outlier_exposure",
            scorers=["msp"],
        )
