"""Ensembles: members on different models, combined, and saved whole."""

from __future__ import annotations

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
