"""Learning in stages, with scorers and shapers as the contract lets a stranger write them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oodcore
from oodcore import Detector, Features, FeatureStore, Head, Scorer, Shaper, Slot, Statistic
from oodcore.errors import ConfigurationError, DataError
from oodcore.statistics import ClassMoments, State

K, D = 3, 4


def rows(count: int, seed: int = 0, **fields: Any) -> Features:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.rand(count, D, generator=generator)
    labels = torch.arange(count) % K
    head = Head(torch.randn(K, D, generator=torch.Generator().manual_seed(9)))
    return Features(**{"embeddings": embeddings, "labels": labels, "head": head, **fields})


class Scaled(Scorer):
    """Measures where it was given no scale, and returns None where it was."""

    kind = "scaled"
    scale: float | None = None

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def measure(self, features: Features, state: State) -> Tensor | None:
        assert features.logits is not None
        return None if self.scale is not None else features.logits.amax(1, keepdim=True)

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        return {"scale": rows.mean()}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.logits is not None
        scale = state["scale"] if self.scale is None else self.scale
        return features.logits.amax(1) / scale


def test_what_measures_nothing_has_nothing_to_finish() -> None:
    probe = rows(5, seed=1)
    fixed = Detector(scorer=Scaled(scale=2.0)).fit(rows(30)).score(probe)
    assert probe.logits is not None
    np.testing.assert_allclose(fixed, probe.logits.double().amax(1) / 2)
    measured = Detector(scorer=Scaled()).fit(rows(30))
    assert measured.learnt is not None
    np.testing.assert_allclose(
        measured.score(probe) * float(measured.learnt.scorer["scale"]), 2 * fixed
    )


class Measuring(Scorer):
    """Measures what a test says."""

    kind = "measuring"
    held_out: ClassVar[bool] = True
    what: ClassVar[Any] = None
    seen: ClassVar[list[int]] = []

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def measure(self, features: Features, state: State) -> Tensor | None:
        given: Tensor | None = type(self).what(features)
        return given

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        return {"mean": rows.mean(0)}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.embeddings is not None
        return features.embeddings[:, 0]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda f: f.embeddings[:1], r"measured \[1, 4\] for \d+ rows"),
        (lambda f: f.embeddings.sum(), r"measured \[\] for"),
        (lambda f: f.embeddings.numpy(), "measured ndarray"),
        (lambda f: f.embeddings * float("nan"), "measures .* not finite|not finite"),
    ],
)
def test_measures_are_numbers_of_each_row(
    what: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "what", staticmethod(what))
    with pytest.raises(DataError, match=message):
        Detector(scorer=Measuring()).fit(rows(60))


def test_some_batches_cannot_be_measured_and_others_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(features: Features) -> Tensor | None:
        assert features.ids is not None
        return features.embeddings if int(features.ids[0]) < 2048 else None

    monkeypatch.setattr(Measuring, "what", staticmethod(first_only))
    with pytest.raises(DataError, match="all or nothing"):
        Detector(scorer=Measuring()).fit(rows(5000))


class Around(Scorer):
    """A composite that is no combination: with statistics, measures and a part of its own."""

    kind = "around"
    inner: Annotated[Scorer, Slot("scorer")]
    name: ClassVar[str] = "centre"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return [ClassMoments()]  # type: ignore[return-value]

    def fit(self, store: FeatureStore) -> State:
        return {type(self).name: store[ClassMoments()].total_mean}

    def measure(self, features: Features, state: State) -> Tensor | None:
        return self.inner.score(features, state["inner"])[:, None]

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        return {"offset": rows.mean(0)}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.embeddings is not None
        distance = (features.embeddings - state["centre"]).norm(dim=1)
        return self.inner.score(features, state["inner"]) - state["offset"] - distance


def test_a_composite_learns_beside_its_part() -> None:
    train, probe = rows(40), rows(6, seed=1)
    detector = Detector(scorer=Around(inner=oodcore.registry.build("scorer", "mahalanobis")))
    inner = Detector(scorer="mahalanobis").fit(train)
    assert train.embeddings is not None
    assert probe.embeddings is not None
    centre = train.embeddings.double().mean(0)
    distance = (probe.embeddings.double() - centre).norm(dim=1).numpy()
    expected = inner.score(probe) - inner.score(train).mean() - distance
    np.testing.assert_allclose(detector.fit(train).score(probe), expected, rtol=1e-9)


def test_a_part_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Around, "name", "inner")
    inner = oodcore.registry.build("scorer", "mahalanobis")
    with pytest.raises(ConfigurationError, match="'inner', which is that of a scorer inside it"):
        Detector(scorer=Around(inner=inner)).fit(rows(40))


class Projected(Shaper):
    """Fitted from the head alone; changes the width and the head."""

    kind = "projected"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    def fit(self, store: FeatureStore) -> State:
        assert store.head is not None
        return {"basis": torch.linalg.svd(store.head.weight, full_matrices=False)[2][:2].T}

    def apply(self, features: Features, state: State) -> Features:
        assert features.head is not None
        assert features.embeddings is not None
        return Features(
            embeddings=features.embeddings @ state["basis"],
            head=Head(features.head.weight @ state["basis"]),
            labels=features.labels,
            ids=features.ids,
        )


def test_a_shaper_learns_from_the_head_alone() -> None:
    train, probe = rows(40), rows(6, seed=1)
    detector = Detector(scorer="mahalanobis", shapers=[Projected()]).fit(train)
    assert train.head is not None
    basis = torch.linalg.svd(train.head.weight.double(), full_matrices=False)[2][:2].T
    assert train.embeddings is not None
    assert probe.embeddings is not None
    alone = Detector(scorer="mahalanobis").fit((train.embeddings.double() @ basis, train.labels))
    np.testing.assert_allclose(
        detector.score(probe), alone.score(probe.embeddings.double() @ basis), rtol=1e-9
    )
    with pytest.raises(DataError, match="shaper 'projected' needs head"):
        Detector(scorer="mahalanobis", shapers=[Projected()]).fit(rows(40, head=None))


class OfTheHead(Scorer):
    """Keeps the head's weight as it finds it."""

    kind = "of_the_head"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    def fit(self, store: FeatureStore) -> State:
        assert store.head is not None
        return {"weight": store.head.weight}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.embeddings is not None
        product: Tensor = (features.embeddings @ state["weight"].T).amax(1)
        return product


def test_what_was_learnt_does_not_follow_the_models_weights() -> None:
    model = nn.Linear(D, K).double()
    detector = Detector(model, scorer=OfTheHead()).fit(rows(9).embeddings)
    assert detector.learnt is not None
    before = detector.learnt.scorer["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(detector.learnt.scorer["weight"], before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": None}, "these rows have no labels, and those before have labels"),
        ({"embeddings": torch.rand(8, 5), "head": None}, "embeddings of 5 columns"),
        ({"head": None}, "these rows have no logits"),
        ({"head": Head(torch.rand(7, D))}, "logits of 7 columns"),
    ],
)
@pytest.mark.parametrize("scorer", ["dml", "mahalanobis", {"kind": "knn", "k": 1}])
def test_what_is_fitted_on_is_all_of_one_kind(
    scorer: Any, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Detector(scorer=scorer).fit([rows(8), rows(8, **changed)])
    detector = Detector(scorer=scorer).fit(rows(8))
    with pytest.raises(DataError, match=message):
        detector.partial_fit(rows(8, **changed))


@pytest.mark.parametrize(
    "scorer",
    [
        "energy",
        "dml",
        {"kind": "sum", "scorers": ["mahalanobis"], "normalize": "zscore"},
        {"kind": "sum", "scorers": ["energy"], "normalize": "ecdf"},
    ],
)
def test_a_wrong_label_names_its_row_whoever_fits(scorer: Any) -> None:
    train = rows(90)
    assert train.labels is not None
    labels = train.labels.clone()
    labels[77] = K
    with pytest.raises(DataError, match=f"row 77 has the label {K}"):
        Detector(scorer=scorer, batch_size=32).fit(rows(90, labels=labels))
    if not isinstance(scorer, str):
        with pytest.raises(DataError, match=f"row 77 has the label {K}"):
            Detector(scorer=scorer, batch_size=32).fit(train, rows(90, labels=labels))
        Detector(scorer=scorer).fit(train, rows(90, labels=None))
