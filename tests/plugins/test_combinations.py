"""Combinations: each against a naive computation, normalised and not, weighted and not."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from oodcore import Detector, Features, Head, registry

DRAWN = np.random.default_rng(0)
HEAD = Head(torch.as_tensor(DRAWN.normal(size=(3, 4))))
MEMBERS = ("msp", "energy", "max_norm")


def features(count: int, labelled: bool = True) -> Features:
    rows = torch.as_tensor(DRAWN.normal(size=(count, 4)) * 2)
    labels = torch.as_tensor(DRAWN.integers(0, 3, count)) if labelled else None
    return Features(embeddings=rows, head=HEAD, labels=labels, ids=torch.arange(count))


TRAIN, HELD, TESTED = features(50), features(30), features(12, labelled=False)


def member_scores(rows: Features) -> np.ndarray:
    detectors = [Detector(scorer=kind).fit(TRAIN) for kind in MEMBERS]
    return np.stack([detector.score(rows) for detector in detectors], axis=1)


def normalised(how: str) -> np.ndarray:
    held, tested = member_scores(HELD), member_scores(TESTED)
    if how == "mean":
        return tested / held.mean(axis=0)
    if how == "zscore":
        return (tested - held.mean(axis=0)) / held.std(axis=0)
    if how == "ecdf":
        ranks = np.empty_like(tested)
        for row, column in np.ndindex(*tested.shape):
            below = sum(s < tested[row, column] for s in held[:, column])
            ties = sum(s == tested[row, column] for s in held[:, column])
            ranks[row, column] = (below + ties / 2 + 0.5) / (len(held) + 1)
        return ranks
    return tested


def simes(row, weights) -> float:
    order = np.argsort(row)
    return min(
        row[number] * sum(weights) / sum(weights[k] for k in order[: place + 1])
        for place, number in enumerate(order)
    )


NAIVE = {
    "sum": lambda row, w: sum(a * b for a, b in zip(row, w, strict=True)),
    "product": lambda row, w: math.prod(
        math.copysign(abs(s) ** b, s) for s, b in zip(row, w, strict=True)
    ),
    "minimum": lambda row, w: min(a * b for a, b in zip(row, w, strict=True)),
    "maximum": lambda row, w: max(a * b for a, b in zip(row, w, strict=True)),
    "fisher": lambda row, w: 2 * sum(b * math.log(p) for p, b in zip(row, w, strict=True)),
    "stouffer": lambda row, w: (
        sum(b * NormalDist().inv_cdf(p) for p, b in zip(row, w, strict=True)) / math.hypot(*w)
    ),
    "simes": simes,
}
OF_P_VALUES = ("fisher", "stouffer", "simes")


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0)])
@pytest.mark.parametrize("how", ["none", "mean", "zscore", "ecdf"])
@pytest.mark.parametrize("kind", list(NAIVE))
def test_against_a_naive_computation(kind, how, weights):
    spec = {"kind": kind, "scorers": MEMBERS, "weights": weights, "normalize": how}
    if kind in OF_P_VALUES and how != "ecdf":
        with pytest.raises(ValidationError, match="ecdf"):
            registry.get("scorer", kind).model_validate(spec)
        return
    detector = Detector(scorer=spec).fit(TRAIN, held_out=HELD)
    wanted = [NAIVE[kind](row, weights or (1, 1, 1)) for row in normalised(how)]
    np.testing.assert_allclose(detector.score(TESTED), wanted, rtol=1e-9)


def test_copies_of_a_row_have_one_p_value_whatever_the_batches():
    # Products with matrices of one row and of many differ by rounding.
    drawn = np.random.default_rng(0)
    train, labels = drawn.normal(size=(200, 24)), drawn.integers(0, 3, 200)
    held = drawn.normal(size=(60, 24))
    held[10:40] = held[5]
    scores = []
    for fitted_by in (1, 60):
        spec = {"kind": "sum", "scorers": ["mahalanobis"], "normalize": "ecdf"}
        detector = Detector(scorer=spec, batch_size=fitted_by)
        detector.fit((train, labels), held_out=(held, np.zeros(60, dtype=int)))
        for scored_by in (1, 4, 60):
            detector.batch_size = scored_by
            scores.append(detector.score(held)[5:40])
    assert len(np.unique(np.array(scores)[:, [0, *range(5, 35)]])) == 1


@pytest.mark.parametrize("kind", OF_P_VALUES)
def test_p_values_are_made_where_nothing_is_said(kind):
    assert registry.build("scorer", {"kind": kind, "scorers": MEMBERS}).normalize == "ecdf"


@pytest.mark.parametrize("kind", OF_P_VALUES)
def test_p_values_have_weights_above_0(kind):
    with pytest.raises(ValidationError, match="weights above 0"):
        registry.get("scorer", kind)(scorers=("msp", "energy"), weights=(1, 0))


def test_simes_is_a_p_value():
    part = registry.get("scorer", "simes")(scorers=("msp", "energy"))
    chance = torch.as_tensor(DRAWN.uniform(size=(20_000, 2)))
    found = part.combine(chance)
    assert found.max() <= 1
    for level in (0.05, 0.3):
        assert float((found <= level).double().mean()) == pytest.approx(level, abs=0.015)


def test_fisher_of_uniform_p_values_has_a_chi_squared_mean():
    part = registry.get("scorer", "fisher")(scorers=("msp", "energy"))
    found = part.combine(torch.as_tensor(DRAWN.uniform(size=(20_000, 2))))
    assert float(found.mean()) == pytest.approx(-4, abs=0.1)


def test_stouffer_of_uniform_p_values_is_standard_normal():
    part = registry.get("scorer", "stouffer")(scorers=("msp", "energy"), weights=(1, 3))
    found = part.combine(torch.as_tensor(DRAWN.uniform(size=(20_000, 2))))
    assert float(found.mean()) == pytest.approx(0, abs=0.03)
    assert float(found.std()) == pytest.approx(1, abs=0.03)


def test_one_scorer_is_itself():
    for kind in ("product", "minimum", "maximum"):
        detector = Detector(scorer={"kind": kind, "scorers": ["energy"]}).fit(TRAIN)
        wanted = Detector(scorer="energy").fit(TRAIN).score(TESTED)
        np.testing.assert_allclose(detector.score(TESTED), wanted, rtol=1e-12)
