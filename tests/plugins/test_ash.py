"""ASH against its definition in NumPy, and what it does with rows of zeros, ties and negatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from oodcore import Features, Head
from oodcore.errors import ConfigurationError
from oodcore_plugins.ash import ASH, kept_of


def shaped(rows, **fields) -> np.ndarray:
    features = Features(embeddings=torch.tensor(np.asarray(rows, dtype=np.float64)))
    return ASH(**fields).apply(features, {}).embeddings.numpy()


def definition(rows, variant, percentile) -> np.ndarray:
    out = np.zeros_like(rows)
    for row, into in zip(rows, out, strict=True):
        k = max(1, len(row) - int(np.round(len(row) * percentile / 100)))
        kept = np.argsort(-row, kind="stable")[:k]
        before, after = row.sum(), row[kept].sum()
        grown = np.exp(before / after) if after > 0 else 1.0
        into[kept] = {"p": row[kept], "b": before / k, "s": row[kept] * grown}[variant]
    return out


activations = arrays.arrays(
    np.float64,
    st.tuples(st.integers(1, 5), st.integers(1, 9)),
    elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0, 3.25, 1e3, 1e-6]),
)


@given(activations, st.sampled_from("pbs"), st.sampled_from([0.0, 35.0, 50.0, 65.0, 90.0, 99.0]))
@settings(max_examples=200, deadline=None)
def test_it_is_its_definition_also_for_ties_and_zeros(rows, variant, percentile):
    np.testing.assert_allclose(
        shaped(rows, variant=variant, percentile=percentile),
        definition(rows, variant, percentile),
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("size", "percentile", "k"), [(32, 65, 11), (32, 85, 5), (32, 90, 3), (48, 90, 5), (1, 99, 1)]
)
def test_how_many_are_kept(size, percentile, k):
    assert kept_of(size, percentile) == k


def test_nothing_is_pruned_at_percentile_zero():
    rows = np.random.default_rng(0).random((4, 6))
    np.testing.assert_array_equal(shaped(rows, variant="p", percentile=0), rows)
    np.testing.assert_allclose(shaped(rows, variant="s", percentile=0), np.e * rows)


@pytest.mark.parametrize("variant", ["p", "b", "s"])
def test_a_row_of_zeros_stays_zero(variant):
    assert not shaped(np.zeros((2, 8)), variant=variant).any()


@pytest.mark.parametrize("variant", ["p", "b", "s"])
def test_negative_activations_give_finite_numbers(variant):
    rows = -np.random.default_rng(1).random((3, 8)) * 1e3
    rows[0, 0] = 1e-9
    assert np.isfinite(shaped(rows, variant=variant, percentile=50)).all()


def test_the_logits_follow_and_the_rows_given_stay():
    rows = torch.rand(3, 6, dtype=torch.float64)
    before = rows.clone()
    features = Features(embeddings=rows, head=Head(torch.rand(2, 6, dtype=torch.float64)))
    out = ASH(variant="b", percentile=50).apply(features, {})
    torch.testing.assert_close(out.logits, out.embeddings @ features.head.weight.T)
    assert torch.equal(rows, before)


def test_no_rows_give_no_rows():
    assert shaped(np.zeros((0, 8))).shape == (0, 8)


def test_an_exponent_beyond_all_numbers_is_refused():
    with pytest.raises(ConfigurationError, match="lower percentile"):
        shaped(np.ones((1, 2048)), percentile=99.99)
    assert np.isfinite(shaped(np.ones((1, 2048)), percentile=99.8)).all()
