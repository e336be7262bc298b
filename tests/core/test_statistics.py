"""Statistics equal a naive computation over all rows, however these are divided and merged."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oodcore import Features, Shape, Statistic
from oodcore.data import hashed
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry
from oodcore.statistics import (
    AtLayer,
    Bank,
    ClassMeans,
    ClassMoments,
    CorrectMeans,
    LogitMoments,
    Normalized,
    NormMoments,
    Sample,
)

MOMENTS: list[Statistic] = [
    ClassMoments(),
    ClassMeans(),
    NormMoments(),
    LogitMoments(),
    CorrectMeans(),
]
KEEPING: list[Statistic] = [
    Bank(fields=("embeddings", "logits")),
    Sample(capacity=7),
    Sample(capacity=2, per_class=True),
    Sample(fraction=0.4, seed=3),
]
OTHERS: list[Statistic] = [
    Normalized(statistic=ClassMoments()),
    AtLayer(layer="map", statistic=NormMoments()),
    AtLayer(layer="map", statistic=ClassMoments(), pool="flatten"),
]


def drawn(
    count: int, classes: int = 3, width: int = 4, seed: int = 0, offset: float = 0.0
) -> Features:
    generator = torch.Generator().manual_seed(seed)
    wide = {"generator": generator, "dtype": torch.float64}
    return Features(
        embeddings=torch.randn(count, width, **wide) + offset,
        logits=torch.randn(count, classes, **wide),
        labels=torch.randint(0, classes, (count,), generator=generator),
        ids=torch.randperm(1000, generator=generator)[:count],
        layers={"map": torch.randn(count, 2, 3, 3, generator=generator)},
    )


@pytest.mark.parametrize("width", [127, 128, 129, 300])
def test_the_scatter_of_wide_rows_is_whole(width: int) -> None:
    rows = drawn(40, width=width, offset=3.0)
    moments = ClassMoments().view(taken(ClassMoments(), [rows[:13], rows[13:14], rows[14:]], rows))
    assert rows.embeddings is not None
    assert rows.labels is not None
    inside = rows.embeddings - moments.mean[rows.labels]
    assert torch.equal(moments.scatter, moments.scatter.T)
    torch.testing.assert_close(moments.scatter, inside.T @ inside, rtol=1e-10, atol=1e-10)


def shape(rows: Features) -> Shape:
    assert rows.logits is not None
    assert rows.embeddings is not None
    return Shape(rows.logits.shape[1], rows.embeddings.shape[1], {"map": (2, 3, 3)})


def taken(statistic: Statistic, parts: list[Features], whole: Features) -> Any:
    state = statistic.init(shape(whole))
    for part in parts:
        state = statistic.update(state, part)
    return state


def numbers(view: Any) -> dict[str, np.ndarray]:
    """The fields of a view as arrays; kept rows in the order of their ids."""
    fields = {name: value for name, value in vars(view).items() if value is not None}
    plain = {n: (v.tensor() if hasattr(v, "tensor") else v).numpy() for n, v in fields.items()}
    if "ids" in plain:
        order = np.argsort(plain["ids"])
        plain = {name: value[order] for name, value in plain.items()}
    return plain


def assert_same(one: Any, other: Any) -> None:
    a, b = numbers(one), numbers(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


def pieces(rows: Features, draw: random.Random) -> list[Features]:
    order = list(range(len(rows)))
    draw.shuffle(order)
    cuts = sorted(draw.sample(range(len(rows) + 1), min(3, len(rows))))
    bounds = [0, *cuts, len(rows)]
    parts = [torch.tensor(order[a:b], dtype=torch.int64) for a, b in pairwise(bounds)]
    return [rows[part] for part in parts if len(part)]


@pytest.mark.parametrize("statistic", [*MOMENTS, *KEEPING, *OTHERS], ids=str)
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    classes=st.integers(1, 6),
    width=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_order_division_and_merging_do_not_matter(
    statistic: Statistic, count: int, classes: int, width: int, seed: int
) -> None:
    rows = drawn(count, classes, width, seed)
    whole = statistic.view(taken(statistic, [rows], rows))
    draw = random.Random(seed)
    assert_same(statistic.view(taken(statistic, pieces(rows, draw), rows)), whole)
    states = [taken(statistic, [part], rows) for part in pieces(rows, draw)]
    states.append(statistic.init(shape(rows)))
    draw.shuffle(states)
    while len(states) > 1:
        one = states.pop(draw.randrange(len(states)))
        other = states.pop(draw.randrange(len(states)))
        states.append(statistic.merge(one, other))
    assert_same(statistic.view(states[0]), whole)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    classes=st.integers(1, 6),
    width=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_moments_equal_a_naive_computation(count: int, classes: int, width: int, seed: int) -> None:
    rows = drawn(count, classes, width, seed)
    assert rows.embeddings is not None
    assert rows.labels is not None
    assert rows.logits is not None
    h, y, z = rows.embeddings.numpy(), rows.labels.numpy(), rows.logits.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    predicted = z.argmax(1)
    moments, means, norms, logits, correct = (
        statistic.view(taken(statistic, pieces(rows, random.Random(seed)), rows))
        for statistic in MOMENTS
    )
    inside = np.zeros((width, width))
    np.testing.assert_allclose(means.total_mean, h.mean(0), atol=1e-12)
    for k in range(classes):
        own = h[y == k]
        assert moments.count[k] == means.count[k] == len(own)
        np.testing.assert_allclose(means.mean[k], own.mean(0) if len(own) else 0.0, atol=1e-12)
        length = np.linalg.norm(own, axis=1)
        if len(own):
            np.testing.assert_allclose(moments.mean[k], own.mean(0), atol=1e-12)
            inside += (own - own.mean(0)).T @ (own - own.mean(0))
            np.testing.assert_allclose(norms.mean[k], length.mean(), rtol=1e-12)
            np.testing.assert_allclose(norms.variance[k], length.var(), atol=1e-12)
            assert norms.minimum[k] == pytest.approx(length.min(), rel=1e-15)
            assert norms.maximum[k] == pytest.approx(length.max(), rel=1e-15)
            np.testing.assert_allclose(logits.mean_by_class[k], p[y == k].mean(0), atol=1e-12)
        else:
            assert not moments.mean[k].any()
            assert norms.minimum[k] == float("inf")
            assert norms.maximum[k] == float("-inf")
        if (predicted == k).any():
            np.testing.assert_allclose(
                logits.mean_by_predicted[k], p[predicted == k].mean(0), atol=1e-12
            )
        right = h[(y == k) & (predicted == k)]
        assert correct.count[k] == len(right)
        if len(right):
            np.testing.assert_allclose(correct.mean[k], right.mean(0), atol=1e-12)
    np.testing.assert_allclose(moments.scatter, inside, atol=1e-10)
    np.testing.assert_allclose(moments.total_mean, h.mean(0), atol=1e-12)
    centred = h - h.mean(0)
    np.testing.assert_allclose(moments.total_covariance, centred.T @ centred / count, atol=1e-10)
    np.testing.assert_allclose(logits.prior, np.bincount(y, minlength=classes) / count)


def test_a_large_offset_costs_no_precision() -> None:
    near, far = drawn(200, seed=1), drawn(200, seed=1, offset=1e7)
    parts = [far[slice(a, a + 9)] for a in range(0, 200, 9)]
    one = ClassMoments().view(taken(ClassMoments(), [near], near))
    other = ClassMoments().view(taken(ClassMoments(), parts, far))
    np.testing.assert_allclose(other.covariance, one.covariance, rtol=1e-6)


def test_without_labels_the_class_is_predicted_and_without_logits_there_is_one() -> None:
    rows = drawn(30)
    plain = Features(embeddings=rows.embeddings, logits=rows.logits, ids=rows.ids)
    by_prediction = Features(embeddings=rows.embeddings, labels=rows.predicted, logits=rows.logits)
    assert_same(
        ClassMoments().view(taken(ClassMoments(), [plain], rows)),
        ClassMoments().view(taken(ClassMoments(), [by_prediction], rows)),
    )
    bare = Features(embeddings=rows.embeddings)
    count = ClassMoments().view(taken(ClassMoments(), [bare], rows)).count
    assert count.tolist() == [30, 0, 0]


def test_a_sample_has_the_rows_of_smallest_hash_in_their_order() -> None:
    rows = drawn(100)
    assert rows.ids is not None
    assert rows.embeddings is not None
    statistic = Sample(capacity=10, seed=5)
    parts = [rows[slice(a, a + 7)] for a in range(0, 100, 7)]
    kept = statistic.view(taken(statistic, parts, rows))
    order = hashed(rows.ids, 5, "sample").argsort()[:10]
    assert kept.ids.tensor().tolist() == rows.ids[order].tolist()
    assert torch.equal(kept.embeddings.tensor(), rows.embeddings[order])


def test_a_sample_of_each_class_and_of_a_fraction() -> None:
    rows = drawn(300, classes=3)
    each = Sample(capacity=4, per_class=True)
    parts = [rows[slice(a, a + 50)] for a in range(0, 300, 50)]
    kept = each.view(taken(each, parts, rows))
    assert kept.classes.tensor().bincount().tolist() == [4, 4, 4]
    some = Sample(fraction=0.3)
    assert 60 < len(some.view(taken(some, parts, rows))) < 120
    assert len(Sample(fraction=1.0).view(taken(Sample(fraction=1.0), parts, rows))) == 300


def test_samples_that_share_rows_cannot_be_merged() -> None:
    rows = drawn(20)
    statistic = Sample(capacity=15)
    states = [taken(statistic, [rows], rows) for _ in range(2)]
    with pytest.raises(DataError, match="share ids"):
        statistic.merge(*states)


@pytest.mark.parametrize(
    "fields",
    [{}, {"capacity": 3, "fraction": 0.5}, {"fraction": 0.5, "per_class": True}, {"fraction": 1.5}],
)
def test_a_sample_has_one_size(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        registry.build("statistic", {"kind": "sample", **fields})


def test_hashes_are_uniform_and_independent_of_each_other() -> None:
    ids = torch.arange(100_000)
    for seed, purpose in ((0, ""), (1, ""), (0, "sample"), (0, "held out")):
        shares = hashed(ids, seed, purpose).double() / 2.0**63
        counts = np.histogram(shares.numpy(), bins=50, range=(0, 1))[0]
        # The 99.99 % quantile of chi-square with 49 degrees of freedom is 93.
        assert ((counts - 2000.0) ** 2 / 2000.0).sum() < 93
    one, other = hashed(ids, 0, "sample").double(), hashed(ids, 0, "held out").double()
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.015


def test_a_view_does_not_grow_with_the_state() -> None:
    rows = drawn(20)
    state = taken(Bank(), [rows[slice(0, 10)]], rows)
    view = Bank().view(state)
    Bank().update(state, rows[slice(10, 20)])
    assert len(view) == 10


def test_what_a_statistic_needs() -> None:
    assert ClassMoments().needs() == {"embeddings"}
    assert Bank(fields=("logits",)).needs() == {"logits"}
    assert AtLayer(layer="a.b", statistic=CorrectMeans()).needs() == {"layers.a.b", "logits"}
    rows = drawn(3)
    state = ClassMoments().init(shape(rows))
    with pytest.raises(DataError, match="embeddings"):
        ClassMoments().update(state, Features(logits=rows.logits))


@pytest.mark.parametrize("statistic", [*MOMENTS, *KEEPING, *OTHERS], ids=str)
def test_a_view_does_not_change_when_more_rows_come(statistic: Statistic) -> None:
    rows = drawn(30)
    state = taken(statistic, [rows[slice(0, 10)]], rows)
    view = statistic.view(state)
    before = {name: value.copy() for name, value in numbers(view).items()}
    statistic.update(state, rows[slice(10, 30)])
    after = numbers(view)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize("statistic", [*MOMENTS, *OTHERS], ids=str)
def test_merging_leaves_both_as_they_were(statistic: Statistic) -> None:
    rows = drawn(30)
    states = [taken(statistic, [rows[part]], rows) for part in (slice(0, 9), slice(9, 30))]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    statistic.merge(*states)
    for state, kept in zip(states, before, strict=True):
        assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.parametrize("per_class", [False, True])
def test_a_sample_of_a_long_stream_keeps_few_rows_on_the_way(per_class: bool) -> None:
    statistic = Sample(capacity=5, per_class=per_class)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (4000,), generator=generator)
    rows = Features(embeddings=torch.randn(4000, 1), labels=labels, ids=torch.arange(4000))
    state = statistic.init(Shape(3, 1))
    most = 0
    for first in range(0, 4000, 8):
        state = statistic.update(state, rows[slice(first, first + 8)])
        most = max(most, len(state["ids"]))
    assert most <= 2 * 5 * (3 if per_class else 1) + 8
    assert (state["limits"] < 2**58).all(), "later rows are kept for nothing"
    hashes = hashed(rows.ids, 0, "sample")
    groups = [labels == k for k in range(3)] if per_class else [labels >= 0]
    wanted = [rows.ids[group][hashes[group].argsort()[:5]] for group in groups]
    kept = statistic.view(state).ids.tensor()
    assert sorted(kept.tolist()) == sorted(torch.cat(wanted).tolist())
    assert hashes[kept].diff().gt(0).all()


def test_a_sample_is_uniform() -> None:
    counts = np.zeros(20)
    rows = Features(embeddings=torch.zeros(20, 1), ids=torch.arange(20))
    for seed in range(600):
        statistic = Sample(capacity=5, seed=seed)
        counts[statistic.view(taken(statistic, [rows], drawn(1, 1, 1))).ids.tensor().numpy()] += 1
    # 150 of 600 are expected for each; the 99.99 % quantile of chi-square with 19 degrees is 51,
    # and drawing without replacement only narrows it.
    assert ((counts - 150) ** 2 / 150).sum() < 51
