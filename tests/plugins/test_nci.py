"""nci: against a naive computation, and rows at the mean."""

from __future__ import annotations

import numpy as np
import pytest
from embedding_rows import HEAD, ROWS, TESTED, features, fitted, logits, score

from oodcore.errors import DataError
from oodcore_plugins.nci import NCI


def naive(row, alpha: float) -> float:
    weight = HEAD.weight.numpy()[int(np.argmax(logits(row)))]
    centred = row - ROWS.mean(axis=0)
    return weight @ centred / np.linalg.norm(centred) + alpha * np.abs(row).sum()


@pytest.mark.parametrize("alpha", [0, 1e-4, 0.1])
def test_the_definition(alpha):
    wanted = [naive(row, alpha) for row in TESTED]
    np.testing.assert_allclose(score(NCI(alpha=alpha)), wanted, rtol=1e-12)


def test_a_row_at_the_mean_has_its_norm_alone():
    state = fitted(NCI())
    mean = state["centre"].numpy()
    given = score(NCI(alpha=0.5), [mean], state)
    assert given[0] == pytest.approx(0.5 * np.abs(mean).sum())


def test_the_mean_is_that_of_all_rows_and_not_of_classes():
    labels = np.array([0] * 50 + [1] * 10)
    state = fitted(NCI(), labels=labels)
    np.testing.assert_allclose(state["centre"].numpy(), ROWS.mean(axis=0), rtol=1e-12)


def test_a_head_is_needed():
    rows = features(TESTED)
    bare = type(rows)(embeddings=rows.embeddings, logits=rows.logits)
    with pytest.raises(DataError, match="head"):
        NCI().score(bare, fitted(NCI()))
