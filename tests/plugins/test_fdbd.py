"""fdbd: against a naive computation, and where there is nothing to divide by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding_rows import HEAD, ROWS, TESTED, fitted, logits, score

from oodcore import FeatureStore, Head
from oodcore.errors import DataError
from oodcore_plugins import fdbd
from oodcore_plugins.fdbd import FDBD


def naive(row, centre) -> float:
    z, weight = logits(row), HEAD.weight.numpy()
    first = int(np.argmax(z))
    distances = [
        abs(z[first] - z[k]) / np.linalg.norm(weight[first] - weight[k])
        for k in range(len(z))
        if k != first
    ]
    return sum(distances) / len(distances) / np.linalg.norm(row - centre)


def test_the_definition():
    wanted = [naive(row, ROWS.mean(axis=0)) for row in TESTED]
    np.testing.assert_allclose(score(FDBD()), wanted, rtol=1e-12)


def test_divided_by_the_norm():
    wanted = [naive(row, 0) for row in TESTED]
    np.testing.assert_allclose(score(FDBD(centre=False)), wanted, rtol=1e-12)


def test_each_term_is_the_distance_to_a_boundary():
    row = TESTED[0]
    z = logits(row)
    first, second = np.argsort(z)[::-1][:2]
    across = HEAD.weight.numpy()[first] - HEAD.weight.numpy()[second]
    foot = row - (z[first] - z[second]) * across / (across @ across)
    moved = logits(foot)
    assert moved[first] == pytest.approx(moved[second])
    head = Head(HEAD.weight[[first, second]], HEAD.bias[[first, second]])
    given = score(
        FDBD(centre=False), [row], fitted(FDBD(centre=False), labels=None, head=head), head
    )
    assert given[0] * np.linalg.norm(row) == pytest.approx(np.linalg.norm(row - foot))


def test_classes_of_equal_weight_have_no_boundary():
    head = Head(torch.cat([HEAD.weight, HEAD.weight]))
    once = score(FDBD(), head=Head(HEAD.weight))
    np.testing.assert_allclose(score(FDBD(), head=head), once, rtol=1e-12)
    equal = Head(torch.ones(3, 5).double(), torch.arange(3).double())
    assert score(FDBD(), state=fitted(FDBD(), labels=None, head=equal), head=equal).max() == 0


def test_one_class_has_no_boundary():
    head = Head(HEAD.weight[:1])
    assert score(FDBD(), state=fitted(FDBD(), labels=None, head=head), head=head).max() == 0


def test_a_row_at_the_mean_is_finite():
    assert np.isfinite(score(FDBD(), [ROWS.mean(axis=0)])).all()
    assert np.isfinite(score(FDBD(centre=False), [np.zeros(5)])).all()


def test_a_normalised_weight_is_the_one_that_counts():
    head = replace(HEAD, normalize_weight=True, scale=3.0)
    norms = HEAD.weight.norm(dim=1, keepdim=True)
    plain = Head(3 * HEAD.weight / norms, HEAD.bias)
    np.testing.assert_allclose(score(FDBD(), head=head), score(FDBD(), head=plain), rtol=1e-12)


def test_in_small_pieces_it_is_the_same(monkeypatch):
    whole = score(FDBD())
    monkeypatch.setattr(fdbd, "PAIRS", 1)
    np.testing.assert_array_equal(score(FDBD()), whole)


def test_a_head_is_needed():
    with pytest.raises(DataError, match="head"):
        FDBD(centre=False).fit(FeatureStore(classes=4))
