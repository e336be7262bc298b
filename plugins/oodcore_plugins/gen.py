"""GEN: the generalised entropy of the largest softmax probabilities."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import State


class GEN(Scorer):
    """``-sum_k p_k^gamma (1 - p_k)^gamma`` over the ``top`` largest probabilities, at most 0.

    With ``p = softmax(z)``. It is 0 for a certain prediction, and for every row where there is one
    class. 1 - p is computed as the sum of the other probabilities, so that confident rows do not
    tie. The sum is the paper's; some implementations take the mean, a constant factor. Equal
    probabilities at the cut are interchangeable.

    Args:
        gamma: the exponent; the paper uses 0.1.
        top: how many of the largest probabilities count, at most K; the paper uses 100 of 1000.
    """

    kind = "gen"
    paper = Paper(
        "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
        "Xixi Liu, Yaroslava Lochman, Christopher Zach",
        "CVPR",
        2023,
        "https://openreview.net/forum?id=Sie7oeTABS",
    )
    search = spaces(
        gamma=Choice((0.01, 0.1, 0.5, 1.0), "OpenOOD's sweep, which goes on to 10"),
        top=Choice((10, 50, 100, 200, 500, 1000), "OpenOOD's sweep"),
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    top: PositiveInt = 100

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        largest = logits.detach().topk(min(self.top, logits.shape[1]), dim=1).indices
        logs = log_variance(logits).gather(1, largest)
        return -(self.gamma * logs).exp().sum(dim=1)


def log_variance(logits: Tensor) -> Tensor:
    """``log(p (1 - p))`` with ``p = softmax(z)``, ``[N, K]``, right where p is near 1 too.

    With one class it is minus infinity.
    """
    logs = logits.log_softmax(dim=1)
    if logits.shape[1] == 1:
        return torch.full_like(logs, -torch.inf)
    first = logits.detach().argmax(dim=1, keepdim=True)
    largest = torch.zeros_like(logs, dtype=torch.bool).scatter(1, first, True)
    others = logits.masked_fill(largest, -torch.inf).logsumexp(dim=1, keepdim=True)
    # Only the largest probability can be near 1; the others are at most a half.
    complement = torch.log1p(-logs.masked_fill(largest, -torch.inf).exp())
    return logs + torch.where(largest, others - logits.logsumexp(dim=1, keepdim=True), complement)


@hookimpl
def register_scorers(register: Register) -> None:
    register(GEN)
