"""she: against a naive computation, in each metric, and classes without a pattern of their own."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_rows import LABELS, ROWS, TESTED, fitted, logits, score

from oodcore_plugins.she import SHE

PREDICTED = np.array([int(np.argmax(logits(row))) for row in ROWS])


def patterns() -> np.ndarray:
    right = LABELS == PREDICTED
    return np.stack([ROWS[right & np.equal(LABELS, k)].mean(axis=0) for k in range(4)])


def naive(row, metric: str) -> float:
    pattern = patterns()[int(np.argmax(logits(row)))]
    if metric == "euclidean":
        return -np.linalg.norm(row - pattern)
    length = np.linalg.norm(row) * np.linalg.norm(pattern) if metric == "cosine" else 1
    return row @ pattern / length


@pytest.mark.parametrize("metric", ["inner_product", "euclidean", "cosine"])
def test_the_definition(metric):
    assert (PREDICTED != LABELS).any()
    wanted = [naive(row, metric) for row in TESTED]
    np.testing.assert_allclose(score(SHE(metric=metric)), wanted, rtol=1e-12)


def test_a_class_that_is_never_classified_right_has_the_mean_of_its_rows():
    kept = (LABELS != 2) | (PREDICTED != 2)
    state = fitted(SHE(), ROWS[kept], LABELS[kept])
    wanted = ROWS[kept & (LABELS == 2)].mean(axis=0)
    np.testing.assert_allclose(state["patterns"][2].numpy(), wanted, rtol=1e-12)
    np.testing.assert_allclose(state["patterns"][0].numpy(), patterns()[0], rtol=1e-12)


def test_a_class_without_rows_has_the_mean_of_all():
    kept = LABELS != 2
    state = fitted(SHE(), ROWS[kept], LABELS[kept])
    np.testing.assert_allclose(state["patterns"][2].numpy(), ROWS[kept].mean(axis=0), rtol=1e-12)


@pytest.mark.parametrize(("metric", "wanted"), [("inner_product", 0), ("cosine", 0)])
def test_a_zero_row(metric, wanted):
    assert score(SHE(metric=metric), [np.zeros(5)]).tolist() == [wanted]
