"""GradNorm: the gradient of the head's weight that a uniform target would give."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from oodcore import Features, Head, Paper, Scorer, hookimpl
from oodcore.errors import DataError
from oodcore.features import EPS, required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import State

CHUNK = 2**18
"""Numbers that the sum over rows, classes and dimensions holds at once: they fit the cache."""


class GradNorm(Scorer):
    """The L1 norm of ``d KL(u || softmax(z / T)) / dW``, u uniform, W the head's weight.

    For a linear head ``z = W h + b``, and for a cosine head of scale s with unit vectors h^ and w^,
    it is in closed form, with ``p = softmax(z / T)``:

        linear: (1/T) ||h||_1 sum_k |p_k - 1/K|
        cosine: (s/T) sum_k |p_k - 1/K| ||h^ - (h^' w^_k) w^_k||_1 / ||w_k||

    The second does not depend on the norm of h. The bias has no part in it. It is at least 0: a
    zero embedding, a uniform softmax and a single class give 0; under ``cosine`` a class whose
    weight is zero adds nothing.

    The references give the linear form whatever the head is, and most of them K times this number
    (a target of ones); neither changes the ranking.

    Args:
        head: which head is assumed. ``cosine`` normalises the weight, and the embeddings too unless
            the features' own head normalises nothing but its weight.
        temperature: T; the paper uses 1.
    """

    kind = "gradnorm"
    paper = Paper(
        "On the Importance of Gradients for Detecting Distributional Shifts in the Wild",
        "Rui Huang, Andrew Geng, Yixuan Li",
        "NeurIPS",
        2021,
        "https://arxiv.org/abs/2110.00218",
    )
    head: Literal["linear", "cosine"] = "linear"
    temperature: PositiveFloat = 1.0

    def needs(self) -> frozenset[str]:
        cosine = {"head"} if self.head == "cosine" else set[str]()
        return frozenset({"embeddings", "logits"} | cosine)

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        softmax = (required(features.logits, "logits") / self.temperature).softmax(dim=1)
        excess = (softmax - 1 / softmax.shape[1]).abs()
        if self.head == "linear":
            return rows.abs().sum(dim=1) * excess.sum(dim=1) / self.temperature
        if features.head is None:
            raise DataError("gradnorm: a cosine head is asked for, and these features have none")
        return (excess * slopes(rows, features.head)).sum(dim=1) / self.temperature


def slopes(rows: Tensor, head: Head) -> Tensor:
    """``||d z_k / d w_k||_1`` of a head that normalises its weight, ``[N, K]``."""
    if head.normalize_features or not head.normalize_weight:
        rows = unit(rows)
    weight, norms = unit(head.weight), head.weight.norm(dim=1)
    inverse = torch.where(norms > EPS, 1 / norms.clamp_min(EPS), 0.0)
    size = max(1, CHUNK // max(1, weight.numel()))
    parts = []
    for some in torch.split(rows, size):
        across = torch.addcmul(some[:, None], (some @ weight.T)[:, :, None], weight, value=-1)
        parts.append(torch.linalg.vector_norm(across, 1, dim=2))
    return head.scale * inverse * torch.cat(parts)


@hookimpl
def register_scorers(register: Register) -> None:
    register(GradNorm)
