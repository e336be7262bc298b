"""What a recipe learns is a state of its own, and what it gives is a score."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oodcore import Index, Rows
from oodcore.errors import ConfigurationError, DataError
from oodcore.recipe import checked_scores, own


def test_a_state_shares_nothing_with_what_goes_on_learning() -> None:
    tensor, rows = torch.zeros(3), Rows.of(torch.ones(2, 3))
    learnt = own({"a": {"b": tensor}, "rows": rows, "index": Index(rows)}, "x")
    tensor += 1
    rows.append(torch.ones(4, 3))
    assert learnt["a"]["b"].tolist() == [0, 0, 0]
    assert len(learnt["rows"]) == 2


def test_a_state_learnt_in_inference_mode_can_take_part_in_a_gradient() -> None:
    with torch.inference_mode():
        learnt = own({"a": torch.ones(2)}, "x")
    leaf = torch.ones(2, requires_grad=True)
    (leaf * learnt["a"]).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "is a NoneType; a state holds tensors"),
        ({"alpha": 0.5}, "is 'alpha', a float; a state holds tensors"),
        ({"a": {"b": [torch.ones(1)]}}, r"is 'a\.b', a list"),
        ({"Mean": torch.ones(1)}, "'Mean', which is not made of a-z"),
        ({"a.b": torch.ones(1)}, "'a.b', which is not made of a-z"),
        ({3: torch.ones(1)}, "the name 3"),
    ],
)
def test_what_no_artifact_could_hold_is_no_state(state: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"what scorer 'x' has learnt .*{message}"):
        own(state, "scorer 'x'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_is_finite(value: float) -> None:
    with pytest.raises(DataError, match=r"scorer 'x' has learnt is not finite \('a\.b'\)"):
        own({"a": {"b": torch.tensor([1.0, value])}}, "scorer 'x'")


def test_scores_are_finite_numbers_one_a_row() -> None:
    assert checked_scores(torch.ones(3), 3, "x").dtype == torch.float64
    with pytest.raises(DataError, match=r"gave \[3, 1\] for 3 rows"):
        checked_scores(torch.ones(3, 1), 3, "x")
    with pytest.raises(DataError, match="gave a ndarray"):
        checked_scores(torch.ones(3).numpy(), 3, "x")
    with pytest.raises(DataError, match="row 1"):
        checked_scores(torch.tensor([0.0, float("nan")]), 2, "x")
