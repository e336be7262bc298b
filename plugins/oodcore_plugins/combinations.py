"""Combinations: one score from several."""

from __future__ import annotations

from torch import Tensor

from oodcore import Combination, hookimpl
from oodcore.hookspecs import Register


class Sum(Combination):
    """``sum_i w_i s_i`` of the normalised scores."""

    kind = "sum"

    def combine(self, scores: Tensor) -> Tensor:
        return scores @ self.weight(scores)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Sum)
