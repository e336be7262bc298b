"""margin: the lead of the first class, in probabilities and in logits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from logit_oracles import logit_arrays, score, softmax

from oodcore.errors import DataError
from oodcore_plugins.margin import Margin


@given(logits=logit_arrays)
def test_the_definition(logits):
    assume(logits.shape[1] > 1)
    ordered = [sorted(softmax(row)) for row in logits]
    wanted = [row[-1] - row[-2] for row in ordered]
    np.testing.assert_allclose(score(Margin(), logits), wanted, rtol=1e-9, atol=1e-12)
    ordered = np.sort(logits, axis=1)
    given = score(Margin(of="logits"), logits)
    np.testing.assert_allclose(given, ordered[:, -1] - ordered[:, -2], rtol=1e-12)


def test_the_temperature_divides_the_logits():
    logits = np.array([[1.0, 2.0, 4.0]])
    assert score(Margin(temperature=2), logits) == pytest.approx(score(Margin(), logits / 2))
    assert score(Margin(temperature=2, of="logits"), logits) == pytest.approx([1.0])


def test_a_tie_has_no_lead():
    assert score(Margin(), [[2.0, 2.0, 1.0]]).tolist() == [0]


def test_one_class_has_no_second():
    with pytest.raises(DataError, match="one class"):
        score(Margin(), [[2.0]])
