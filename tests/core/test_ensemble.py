"""Ensembles: members on different models, combined, and saved whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oodcore
from oodcore import Detector, Ensemble
from oodcore.data import held_out
from oodcore.errors import ArtifactError, ConfigurationError, DataError, NotFittedError


def network(seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


ONE, TWO = network(1), network(2)
X, Y, PROBE = drawn(120, 0), torch.arange(120) % 3, drawn(30, 1)


def members() -> dict[str, Detector]:
    return {"cosine": Detector(ONE, scorer="max_cosine"), "norm": Detector(TWO, scorer="max_norm")}


def test_dml_plus_is_an_ensemble_that_divides_by_means() -> None:
    ensemble = Ensemble(members(), {"kind": "sum", "normalize": "mean"}).fit((X, Y))
    apart = held_out(torch.arange(len(X)), 0)
    expected = np.zeros(len(PROBE))
    for detector in members().values():
        expected += detector.score(PROBE) / detector.score(X[apart]).mean()
    np.testing.assert_allclose(ensemble.score(PROBE), expected, rtol=1e-12)


def test_no_member_is_fitted_on_the_rows_that_are_measured() -> None:
    knn = Detector(ONE, scorer={"kind": "knn", "k": 1})
    Ensemble({"knn": knn}, {"kind": "sum", "normalize": "zscore"}).fit((X, Y))
    rest = ~held_out(torch.arange(len(X)), 0)
    assert knn.learnt is not None
    assert len(knn.learnt.scorer["bank"]) == int(rest.sum())
    assert knn.score(X[rest]).max() == 0
    assert knn.score(X[~rest]).max() < 0


def test_given_held_out_rows() -> None:
    ensemble = Ensemble(members(), {"kind": "sum", "normalize": "zscore", "weights": [2.0, 1.0]})
    ensemble.fit((X[:80], Y[:80]), X[80:])
    parts = [detector.score(PROBE) for detector in members().values()]
    normal = [detector.score(X[80:]) for detector in members().values()]
    z = [(s - n.mean()) / n.std() for s, n in zip(parts, normal, strict=True)]
    np.testing.assert_allclose(ensemble.score(PROBE), 2 * z[0] + z[1], rtol=1e-9, atol=1e-12)


def test_members_that_share_a_model_share_its_passes() -> None:
    model = oodcore.FeatureModel.wrap(ONE)
    ensemble = Ensemble({n: Detector(model, scorer=n) for n in ("energy", "mahalanobis", "knn")})
    with pytest.warns(UserWarning, match="training rows"):
        ensemble.fit((X[:40], Y[:40]))
    assert model.rows_seen == 40
    ensemble.score(PROBE)
    assert model.rows_seen == 40 + len(PROBE)


def test_partial_fit() -> None:
    def ensemble() -> Ensemble:
        return Ensemble(
            {"a": Detector(ONE, scorer="mahalanobis"), "b": Detector(TWO, scorer="dml")}
        )

    parts = ensemble().partial_fit((X[:50], Y[:50])).partial_fit((X[50:], Y[50:]))
    np.testing.assert_allclose(parts.score(PROBE), ensemble().fit((X, Y)).score(PROBE), rtol=1e-9)
    with pytest.raises(ConfigurationError, match="one call of fit"):
        Ensemble(members(), {"kind": "sum", "normalize": "mean"}).partial_fit((X, Y))


def test_save_and_load(tmp_path: Path) -> None:
    ensemble = Ensemble(members(), {"kind": "sum", "normalize": "ecdf"}, seed=3).fit((X, Y))
    folder = ensemble.calibrate(X, 0.1).save(tmp_path / "a")
    loaded = oodcore.load(folder, model={"cosine": ONE, "norm": TWO})
    np.testing.assert_array_equal(loaded.score(PROBE), ensemble.score(PROBE))
    np.testing.assert_array_equal(loaded.predict(PROBE), ensemble.predict(PROBE))
    with pytest.raises(ArtifactError, match="other weights"):
        oodcore.load(folder, model={"cosine": TWO})
    with pytest.raises(ArtifactError, match="mapping"):
        oodcore.load(folder, model=ONE)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="members"):
        Ensemble({})
    with pytest.raises(ConfigurationError, match="combination"):
        Ensemble(members(), "energy")
    with pytest.raises(ConfigurationError, match="2 weights|3 weights"):
        Ensemble(members(), {"kind": "sum", "weights": [1.0, 2.0, 3.0]})
    unfitted = Ensemble(members(), {"kind": "sum", "normalize": "mean"})
    with pytest.raises(NotFittedError, match="fit"):
        unfitted.score(PROBE)
    with pytest.raises(DataError, match="twice"):
        unfitted.fit(iter([(X, Y)]))


ZSCORE = {"kind": "sum", "normalize": "zscore"}


def test_data_that_is_adapted() -> None:
    batches = [{"x": X[a : a + 40], "y": Y[a : a + 40]} for a in range(0, 120, 40)]

    def adapt(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return batch["x"], batch["y"]

    def made(**options: object) -> Ensemble:
        models = {"cosine": (ONE, "mahalanobis"), "norm": (TWO, "max_norm")}
        return Ensemble(
            {n: Detector(m, scorer=s, **options) for n, (m, s) in models.items()}, ZSCORE
        )

    expected = made().fit((X, Y))
    given = made(adapt=adapt).fit(batches)
    np.testing.assert_allclose(given.score(batches), expected.score(X), rtol=1e-9)
    mixed = Ensemble(
        {"a": Detector(ONE, scorer="msp", adapt=adapt), "b": Detector(TWO, scorer="msp")}, ZSCORE
    )
    with pytest.raises(ConfigurationError, match="adapt="):
        mixed.fit(batches)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, texts: list[str]) -> Tensor:
        output: Tensor = self.fc(torch.tensor([[len(t), t.count("a")] for t in texts]).float())
        return output


def test_texts() -> None:
    texts = ["ab" * (n % 7) + "c" * (n % 5) for n in range(90)]
    ensemble = Ensemble({"a": Detector(Words(), scorer="energy")}, ZSCORE).fit(texts)
    assert ensemble.score(texts).shape == (90,)


@pytest.mark.parametrize("normalize", ["mean", "zscore", "ecdf"])
def test_no_rows_to_measure(normalize: str) -> None:
    combination = {"kind": "sum", "normalize": normalize}
    with pytest.raises(DataError, match="no held-out rows"):
        Ensemble(members(), combination).fit(X[:2])
    with pytest.raises(DataError, match="no held-out rows"):
        Ensemble(members(), combination).fit(X, X[:0])


def test_held_out_rows_that_go_by_once() -> None:
    with pytest.raises(DataError, match="held-out rows are read again"):
        Ensemble({"a": Detector(ONE, scorer="energy")}, ZSCORE).fit(X, iter([X]))


def test_a_failed_fit_changes_no_member() -> None:
    ensemble = Ensemble(
        {"a": Detector(ONE, scorer="mahalanobis"), "b": Detector(TWO, scorer="dml")}, ZSCORE
    ).fit((X, Y))
    before = ensemble.score(PROBE)
    wrong = Y.clone()
    wrong[100] = 7
    for data in ((2 * X, wrong), X[:2]):
        with pytest.raises(DataError):
            ensemble.fit(data)
        np.testing.assert_array_equal(ensemble.score(PROBE), before)


def test_members_that_were_fitted_apart_keep_their_shapers_apart(tmp_path: Path) -> None:
    apart = {
        name: Detector(ONE, scorer="energy", shapers=["react"]).fit(rows)
        for name, rows in {"narrow": X[:60], "wide": 3 * X[60:]}.items()
    }
    ensemble = Ensemble(apart)
    loaded = oodcore.load(ensemble.save(tmp_path / "e"), model=dict.fromkeys(apart, ONE))
    np.testing.assert_array_equal(loaded.score(PROBE), ensemble.score(PROBE))
    np.testing.assert_allclose(
        loaded.score(PROBE), sum(one.score(PROBE) for one in apart.values()), rtol=1e-12
    )


def test_partial_fit_of_what_goes_by_once() -> None:
    def made() -> dict[str, Detector]:
        return {
            "a": Detector(ONE, scorer="mahalanobis"),
            "b": Detector(ONE, scorer={"kind": "knn", "k": 3}, shapers=["react"]),
        }

    ensemble = Ensemble(made())
    for part in (slice(0, 70), slice(70, None)):
        ensemble.partial_fit(iter([(X[part], Y[part])]))
    np.testing.assert_allclose(
        ensemble.score(PROBE), Ensemble(made()).fit((X, Y)).score(PROBE), rtol=1e-9
    )
    two = Ensemble({"a": Detector(ONE, scorer="knn"), "b": Detector(TWO, scorer="knn")})
    with pytest.raises(DataError, match="read twice"):
        two.partial_fit(iter([(X, Y)]))


def test_members_are_detectors() -> None:
    inner = Ensemble(members())
    with pytest.raises(ConfigurationError, match="'a' is a Ensemble"):
        Ensemble({"a": inner})  # type: ignore[dict-item]


# Configurations


NET = {"kind": "torch", "factory": "linear_network:network"}


def configuration(**fields: object) -> dict[str, object]:
    usual = {
        "members": {
            "cosine": {"extractor": NET, "shapers": [], "scorer": "max_cosine"},
            "norm": {"scorer": {"kind": "knn", "k": 3}},
        },
        "extractor": NET | {"arguments": {"seed": 2}},
        "shapers": ["react"],
        "combine": {"kind": "sum", "normalize": "zscore"},
        "batch_size": 7,
        "seed": 4,
        "device": "cpu",
    }
    return usual | fields


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linear_network.py").write_text(
        "from torch import nn\n"
        "def network(seed=0):\n"
        "    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3 + seed))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "linear_network", raising=False)


@pytest.mark.usefixtures("importable")
def test_from_a_mapping_and_from_a_file(tmp_path: Path) -> None:
    ensemble = Ensemble.from_config(configuration())
    (tmp_path / "ensemble.yaml").write_text(json.dumps(configuration()))
    other = Ensemble.from_config(tmp_path / "ensemble.yaml")
    for one in (ensemble, other):
        cosine, norm = one.members["cosine"], one.members["norm"]
        assert [shaper.kind for shaper in cosine.shapers] == []
        assert [shaper.kind for shaper in norm.shapers] == ["react"]
        assert cosine.extractor == oodcore.registry.build("extractor", NET)
        assert norm.extractor != cosine.extractor
        assert (one.seed, norm.recipe.seed, norm.batch_size) == (4, 4, 7)
        assert one.combination.normalize == "zscore"
    np.testing.assert_array_equal(
        ensemble.fit((X, Y), X[:20]).score(PROBE), other.fit((X, Y), X[:20]).score(PROBE)
    )


def test_a_sum_where_nothing_is_said() -> None:
    assert Ensemble.from_config({"members": {"a": {"scorer": "max_norm"}}}).combination == (
        oodcore.registry.build("scorer", "sum")
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"combine": "msp"}, "combine: must be a combination without scorers of its own"),
        ({"combine": {"kind": "sum", "weights": [1.0]}}, "combine.weights: there are 1 weights"),
        ({"members": {}}, "members: must be a mapping of at least 1 item"),
        ({"members": {"a": {"scorer": "sum"}}}, "members.a: 'sum' combines nothing"),
        ({"members": {"a": {"scorer": "mps"}}}, "members.a.scorer: unknown scorer 'mps'"),
        ({"members": {"a": {"model": "x", "scorer": "msp"}}}, "members.a.model: unknown field"),
        ({"scorer": "msp"}, "scorer: unknown field"),
    ],
)
def test_what_is_wrong_with_a_configuration(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Ensemble.from_config(configuration(**fields))
    assert said in str(caught.value)
