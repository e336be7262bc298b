"""Shapers and statistics that pass through the model again, wherever in a recipe they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oodcore
from oodcore import Detector, Features, FeatureStore, Head, Scorer, Shape, Shaper, Statistic
from oodcore.errors import ConfigurationError, DataError
from oodcore.recipe import Recipe
from oodcore.statistics import ClassMoments, State
from oodcore.testing import check_shaper, check_statistic

K, D = 3, 4
WEIGHT = torch.randn(K, D, generator=torch.Generator().manual_seed(0)).double()
X = torch.rand(60, D, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(60) % K


class Plain(nn.Module):
    """The embeddings are the inputs; counts the rows that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, K, bias=False)
        self.head.weight = nn.Parameter(WEIGHT)
        self.rows = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.rows += len(inputs)
        logits: Tensor = self.head(inputs)
        return logits


def doubled(features: Features) -> Tensor:
    """The embeddings of twice the inputs, as they come down the road."""
    assert features.rerun is not None
    embeddings = features.rerun(2 * features.inputs).embeddings
    assert embeddings is not None
    return embeddings.to(features.device, torch.float64)


class DoubledSum(Statistic):
    """The sum over rows of their embedding when the input is doubled, in the embedding's units."""

    kind = "doubled_sum"

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    def init(self, shape: Shape) -> State:
        zero = torch.zeros((), dtype=torch.float64, device=shape.device)
        return {"sum": zero, "rows": zero.clone()}

    def update(self, state: State, features: Features) -> State:
        found = doubled(features).sum() if len(features) else 0.0
        return {"sum": state["sum"] + found, "rows": state["rows"] + len(features)}

    def merge(self, a: State, b: State) -> State:
        return {name: value + b[name] for name, value in a.items()}


class Shifted(Shaper):
    """``h' = h + h~ - mean(h~)``, with h~ the embedding of the doubled input, and its mean over
    training rows and dimensions."""

    kind = "shifted"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "inputs"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (DoubledSum(),)

    def fit(self, store: FeatureStore) -> State:
        seen = store[DoubledSum()]
        return {"mean": seen["sum"] / seen["rows"]}

    def apply(self, features: Features, state: State) -> Features:
        assert features.embeddings is not None
        return features.with_embeddings(features.embeddings + doubled(features) - state["mean"])


class Centred(Shaper):
    """``h' = h - mean``, the mean over training rows."""

    kind = "centred"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMoments(),)

    def fit(self, store: FeatureStore) -> State:
        return {"mean": store[ClassMoments()].total_mean}

    def apply(self, features: Features, state: State) -> Features:
        assert features.embeddings is not None
        return features.with_embeddings(features.embeddings - state["mean"])


class Total(Scorer):
    """``sum_d h_d``, less its mean over training rows where ``measured``.

    Args:
        measured: whether.
    """

    kind = "total"
    measured: bool = False

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    @property
    def measures(self) -> bool:
        return self.measured

    def measure(self, features: Features, state: State) -> Tensor | None:
        assert features.embeddings is not None
        return features.embeddings.sum(dim=1) if self.measured else None

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        return {"mean": rows.mean()}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.embeddings is not None
        return features.embeddings.sum(dim=1) - (state["mean"] if self.measured else 0)


class HeadTotal(Scorer):
    """The sum of the logits, and of the head's weight as it was learnt without statistics."""

    kind = "head_total"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits", "head"})

    def fit(self, store: FeatureStore) -> State:
        assert store.head is not None
        return {"weight": store.head.weight}

    def score(self, features: Features, state: State) -> Tensor:
        assert features.logits is not None
        return features.logits.sum(dim=1) + state["weight"].sum()


def naive(names: tuple[str, ...], rows: np.ndarray) -> np.ndarray:
    """Rows after these shapers, fitted on X; each doubling takes the whole road again."""

    def road(inputs: np.ndarray, count: int) -> np.ndarray:
        if count == 0:
            return inputs
        before = road(inputs, count - 1)
        if names[count - 1] == "centred":
            return before - road(X.numpy(), count - 1).mean(axis=0)
        mean = road(2 * X.numpy(), count - 1).sum() / len(X)
        return before + road(2 * inputs, count - 1) - mean

    return road(rows, len(names))


@pytest.fixture(autouse=True)
def parts() -> Any:
    class Plugin:
        @oodcore.hookimpl
        def register_shapers(self, register: Any) -> None:
            register(Shifted)
            register(Centred)

        @oodcore.hookimpl
        def register_statistics(self, register: Any) -> None:
            register(DoubledSum)

        @oodcore.hookimpl
        def register_scorers(self, register: Any) -> None:
            register(Total)
            register(HeadTotal)

    with oodcore.registry.using(Plugin()):
        yield


ROADS = [
    ("shifted",),
    ("centred", "shifted"),
    ("shifted", "centred"),
    ("shifted", "shifted"),
    ("centred", "shifted", "centred"),
]


@pytest.mark.parametrize("names", ROADS, ids="-".join)
@pytest.mark.parametrize("measured", [False, True])
def test_every_part_sees_what_those_before_it_leave(names, measured):
    scorer = {"kind": "total", "measured": measured}
    detector = Detector(Plain(), scorer=scorer, shapers=names, batch_size=16)
    given = detector.fit((X, LABELS)).score(3 * X)
    wanted = naive(names, 3 * X.numpy()).sum(axis=1)
    wanted -= naive(names, X.numpy()).sum(axis=1).mean() if measured else 0
    np.testing.assert_allclose(given, wanted, rtol=1e-9)


@pytest.mark.parametrize("names", ROADS, ids="-".join)
def test_a_head_is_learnt_without_reading_the_data_again(names):
    model = Plain()
    detector = Detector(model, scorer="head_total", shapers=names).fit((X, LABELS))
    wanted = (naive(names, X.numpy()) @ WEIGHT.numpy().T).sum(axis=1) + float(WEIGHT.sum())
    np.testing.assert_allclose(detector.score(X), wanted, rtol=1e-9)
    # Each row once, and once more doubled for the statistic of the one shaper.
    if names == ("shifted",):
        fresh = Plain()
        Detector(fresh, scorer="head_total", shapers=names).fit((X, LABELS))
        assert fresh.rows == 2 * len(X)


@pytest.mark.parametrize(
    ("names", "measured", "rereads"),
    [
        ((), False, False),
        (("centred",), True, False),
        (("shifted",), False, False),
        (("shifted",), True, True),
        (("centred", "shifted"), False, True),
        (("shifted", "centred"), False, True),
    ],
)
def test_what_is_read_once_can_be_fitted_in_parts(names, measured, rereads):
    shapers = tuple(oodcore.registry.build("shaper", name) for name in names)
    assert Recipe(Total(measured=measured), shapers).rereads == rereads
    detector = Detector(Plain(), scorer={"kind": "total", "measured": measured}, shapers=names)
    if rereads:
        with pytest.raises(ConfigurationError, match="in one call of fit"):
            detector.partial_fit((X, LABELS))
        return
    whole = Detector(Plain(), scorer={"kind": "total", "measured": measured}, shapers=names)
    whole.fit((X, LABELS))
    detector.partial_fit((X[:20], LABELS[:20])).partial_fit((X[20:], LABELS[20:]))
    np.testing.assert_allclose(detector.score(X), whole.score(X), rtol=1e-9)


def test_saved_with_its_store_it_goes_on(tmp_path):
    model = Plain()
    detector = Detector(model, scorer="total", shapers=["shifted"])
    detector.partial_fit((X[:20], LABELS[:20])).save(tmp_path / "saved", store=True)
    loaded = oodcore.load(tmp_path / "saved", model=model)
    loaded.partial_fit((X[20:], LABELS[20:]))
    wanted = naive(("shifted",), X.numpy()).sum(axis=1)
    np.testing.assert_allclose(loaded.score(X), wanted, rtol=1e-9)


def test_stored_features_are_refused():
    rows = Features(embeddings=X, head=Head(WEIGHT))
    with pytest.raises(DataError, match="needs inputs"):
        Detector(scorer="total", shapers=["shifted"]).fit(rows)


def test_a_row_that_is_taken_keeps_its_inputs():
    rows = Features(embeddings=X, inputs={"a": X, "b": ["x"] * 60}, rerun=lambda _: None)
    some = rows.taken(torch.tensor([5, 2]))
    assert torch.equal(some.inputs["a"], X[[5, 2]])
    assert some.inputs["b"] == ["x", "x"]
    assert some.rerun is rows.rerun
    assert rows.taken(slice(3, 5)).inputs["b"] == ["x", "x"]
    assert rows[torch.tensor([5])].inputs is None


def test_the_kit_examines_them():
    check_statistic(DoubledSum())
    check_shaper(Shifted(), floor=None)
