"""The store: statistics kept once, merged, saved, and searched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from oodcore import Features, FeatureStore, Head
from oodcore.errors import ArtifactError, DataError, NotFittedError
from oodcore.statistics import AtLayer, Bank, ClassMoments, Normalized, NormMoments, Sample

ALL = (
    ClassMoments(),
    NormMoments(),
    Bank(),
    Sample(capacity=9),
    Normalized(statistic=ClassMoments()),
    AtLayer(layer="map", statistic=ClassMoments()),
)
K, D = 4, 5


def rows(count: int, first: int = 0, classes: int = K) -> Features:
    generator = torch.Generator().manual_seed(first)
    return Features(
        embeddings=torch.randn(count, D, generator=generator),
        labels=torch.arange(count) % classes,
        ids=torch.arange(first, first + count),
        layers={"map": torch.randn(count, 3, 2, 2, generator=generator)},
        head=Head(torch.randn(K, D, generator=torch.Generator().manual_seed(9))),
    )


def test_each_statistic_is_kept_once() -> None:
    store = FeatureStore(statistics=[ClassMoments(), Bank(), ClassMoments()])
    store.add(Bank())
    assert store.statistics == (ClassMoments(), Bank())
    store.update(rows(10))
    with pytest.raises(DataError, match="cannot begin after 10 rows"):
        store.add(NormMoments())


def test_the_head_is_kept_as_it_was() -> None:
    weight = torch.ones(2, 3, dtype=torch.float64)
    given = Features(embeddings=torch.ones(4, 3, dtype=torch.float64), head=Head(weight))
    store = FeatureStore(statistics=[Bank()]).update(given)
    weight.zero_()
    assert bool((store.head.weight == 1).all())


def test_merging_equals_updating() -> None:
    whole = FeatureStore(statistics=ALL).update(rows(30)).update(rows(20, 100))
    one = FeatureStore(statistics=ALL).update(rows(30))
    other = FeatureStore(statistics=ALL).update(rows(20, 100))
    both = one.merge(other)
    assert (both.rows, one.rows, other.rows) == (50, 30, 20)
    for statistic in (ClassMoments(), Normalized(statistic=ClassMoments())):
        np.testing.assert_allclose(both[statistic].mean, whole[statistic].mean, atol=1e-12)
        np.testing.assert_allclose(both[statistic].scatter, whole[statistic].scatter, atol=1e-10)
    assert sorted(both[Sample(capacity=9)].ids.tensor().tolist()) == sorted(
        whole[Sample(capacity=9)].ids.tensor().tolist()
    )
    assert len(both[Bank()]) == 50
    assert len(one[Bank()]) == 30
    empty = FeatureStore(statistics=ALL)
    assert empty.merge(one).rows == one.merge(empty).rows == 30


def test_places() -> None:
    store = FeatureStore(statistics=ALL).update(rows(40))
    data = rows(40)
    assert data.embeddings is not None
    unit = data.embeddings.double() / data.embeddings.double().norm(dim=1, keepdim=True)
    np.testing.assert_allclose(
        store.normalized()[ClassMoments()].total_mean, unit.mean(0), atol=1e-12
    )
    pooled = data.layers["map"].double().mean((2, 3))
    np.testing.assert_allclose(
        store.at("map")[ClassMoments()].total_mean, pooled.mean(0), atol=1e-6
    )


def test_neighbours_and_nearest_classes() -> None:
    store = FeatureStore(statistics=[ClassMoments(), NormMoments(), Bank()], classes=K)
    data = rows(40, classes=3)
    store.update(data)
    assert data.embeddings is not None
    assert data.labels is not None
    bank, probe = data.embeddings.double(), torch.randn(7, D, dtype=torch.float64)
    distances, ids = store.neighbours(probe, 5)
    naive = torch.cdist(probe, bank).sort(dim=1)
    np.testing.assert_allclose(distances, naive.values[:, :5], rtol=1e-9)
    assert torch.equal(ids, naive.indices[:, :5])

    means = torch.stack([bank[data.labels == k].mean(0) for k in range(3)])
    nearest, classes = store.nearest_class(probe)
    expected = torch.cdist(probe, means).min(dim=1)
    np.testing.assert_allclose(nearest, expected.values, rtol=1e-6)
    assert torch.equal(classes, expected.indices)

    lengths = bank.norm(dim=1)
    for k in range(3):
        np.testing.assert_allclose(store.norms.mean[k], lengths[data.labels == k].mean())
    assert store.norms.count[3] == 0
    store.update(rows(10, 500, classes=3))
    assert len(store[Bank()]) == 50
    assert store.neighbours(bank[:1], 1)[0].item() == 0


def test_save_and_load(tmp_path: Path) -> None:
    store = FeatureStore(statistics=ALL).update(rows(30))
    loaded = FeatureStore.load(store.save(tmp_path / "store"))
    probe = torch.randn(3, D, dtype=torch.float64)
    for one, other in zip(store.neighbours(probe, 4), loaded.neighbours(probe, 4), strict=True):
        assert torch.equal(one, other)
    assert loaded.head is not None
    assert store.head is not None
    assert torch.equal(loaded.head.weight, store.head.weight)
    assert (loaded.rows, loaded.classes, loaded.labelling) == (30, K, "labels")
    more = rows(20, 100)
    np.testing.assert_array_equal(
        loaded.update(more)[ClassMoments()].scatter, store.update(more)[ClassMoments()].scatter
    )
    with pytest.raises(ArtifactError, match="exists"):
        store.save(tmp_path / "store")
    empty = FeatureStore.load(FeatureStore(statistics=ALL).save(tmp_path / "empty"))
    assert empty.rows == 0
    assert empty.statistics == ALL


def test_what_is_refused() -> None:
    store = FeatureStore(statistics=[ClassMoments()])
    with pytest.raises(NotFittedError, match="no rows"):
        store[ClassMoments()]
    with pytest.raises(NotFittedError, match="not collected"):
        store[Bank()]
    store.update(rows(10))
    unlabelled = Features(embeddings=torch.randn(2, D), head=store.head)
    with pytest.raises(DataError, match="predicted"):
        store.update(unlabelled)
    wrong = rows(3)
    assert wrong.labels is not None
    wrong.labels[1] = 9
    with pytest.raises(DataError, match="row 11 has the label 9"):
        store.update(wrong)
    with pytest.raises(DataError, match="different statistics"):
        store.merge(FeatureStore(statistics=[Bank()]))
    one_class = FeatureStore(statistics=[ClassMoments()]).update(
        Features(embeddings=torch.randn(2, D))
    )
    with pytest.raises(DataError, match="cannot be merged"):
        store.merge(one_class)
    with pytest.raises(DataError, match="layers.map"):
        FeatureStore(statistics=[AtLayer(layer="map", statistic=Bank())]).update(
            Features(embeddings=torch.randn(2, D))
        )


def test_later_training_of_the_head_does_not_reach_the_store() -> None:
    weight = torch.randn(K, D, dtype=torch.float64)
    store = FeatureStore(statistics=[ClassMoments()])
    store.update(Features(embeddings=torch.randn(5, D, dtype=torch.float64), head=Head(weight)))
    before = weight.clone()
    weight += 1
    assert store.head is not None
    assert torch.equal(store.head.weight, before)


def test_rows_without_ids_are_numbered_as_they_come() -> None:
    store = FeatureStore(statistics=[Bank()])
    for count in (3, 0, 2):
        store.update(Features(embeddings=torch.randn(count, D)))
    assert store[Bank()].ids.tensor().tolist() == [0, 1, 2, 3, 4]


def test_a_batch_that_is_refused_changes_nothing() -> None:
    good = rows(8)
    bad = [
        replace(good, labels=torch.full((8,), K)),
        replace(good, labels=None),
        replace(good, layers={}),
        replace(good, layers={"map": torch.randn(8, 2, 2, 2)}),
        replace(good, embeddings=torch.randn(8, D + 1), head=None),
    ]
    store = FeatureStore(statistics=ALL)
    for batch in bad[:1] + bad[2:3]:
        with pytest.raises(DataError):
            store.update(batch)
    store.update(good)
    for batch in bad:
        with pytest.raises(DataError):
            store.update(batch)
    expected = FeatureStore(statistics=ALL).update(good)
    assert store.rows == 8
    assert torch.equal(store[ClassMoments()].scatter, expected[ClassMoments()].scatter)
    assert len(store[Bank()].classes) == len(store[Bank()].embeddings) == 8


def test_the_first_batch_that_is_refused_does_not_settle_the_classes() -> None:
    store = FeatureStore(statistics=[ClassMoments()])
    with pytest.raises(DataError, match="row 2 has the label -1"):
        store.update(Features(embeddings=torch.randn(3, D), labels=torch.tensor([0, 1, -1])))
    store.update(Features(embeddings=torch.randn(3, D), labels=torch.tensor([0, 4, 1])))
    assert store.classes == 5


def test_a_batch_without_rows_is_no_batch() -> None:
    store = FeatureStore(statistics=ALL).update(rows(0))
    assert (store.rows, store.classes, store.labelling) == (0, None, None)
    store.update(rows(5)).update(rows(0))
    assert store.rows == 5


def test_the_store_holds_no_graph() -> None:
    embeddings = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    store = FeatureStore(statistics=[ClassMoments(), NormMoments(), Bank()])
    store.update(Features(embeddings=embeddings))
    assert not store[ClassMoments()].mean.requires_grad
    assert not store[NormMoments()].mean.requires_grad


def test_a_view_stays_as_it_was_when_more_rows_come() -> None:
    store = FeatureStore(statistics=ALL).update(rows(9))
    moments, norms = store[ClassMoments()], store.norms
    before = moments.scatter.clone(), moments.mean.clone(), norms.mean.clone()
    store.update(rows(20, 100))
    for one, other in zip(before, (moments.scatter, moments.mean, norms.mean), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(store[ClassMoments()].scatter, before[0])


def test_a_loaded_store_goes_on(tmp_path: Path) -> None:
    whole = FeatureStore(statistics=ALL).update(rows(30)).update(rows(20, 100))
    store = FeatureStore(statistics=ALL).update(rows(30))
    loaded = FeatureStore.load(store.save(tmp_path / "store")).update(rows(20, 100))
    np.testing.assert_allclose(loaded[ClassMoments()].scatter, whole[ClassMoments()].scatter)
    sample = Sample(capacity=9)
    assert loaded[sample].ids.tensor().tolist() == whole[sample].ids.tensor().tolist()
    assert len(loaded[Bank()]) == 50
