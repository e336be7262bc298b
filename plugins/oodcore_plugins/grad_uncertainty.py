"""GradUncertainty: the squared gradient of the head that a target of all classes would give."""

from __future__ import annotations

import torch
from torch import Tensor

from oodcore import Features, Head, Paper, Scorer, hookimpl
from oodcore.errors import DataError
from oodcore.features import EPS, required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import State


class GradUncertainty(Scorer):
    """``||dL / dW||^2 + ||dL / db||^2`` with ``L = -sum_k log p_k``, at least 0.

    W and b are weight and bias of the head, ``p = softmax(z)``, and L is the binary cross-entropy
    between p and a target of ones (all classes at once), as pytorch-ood reads the paper. It is in
    closed form, with g_k = K p_k - 1:

        linear head: ||g||^2 (||h||^2 + 1), without a bias ||g||^2 ||h||^2
        cosine head of scale s: s^2 sum_k g_k^2 (1 - cos(h, w_k)^2) / ||w_k||^2, and ||g||^2 for b

    A head that normalises only its weight, or only the embeddings, has the form in between; a class
    whose weight is zero adds nothing to the first term of a head that normalises it. A uniform
    softmax and a single class give 0.

    The paper takes the gradients of every layer apart and trains a classifier on rows that are
    out-of-distribution, which also learns the direction. Without such rows this is the sum over the
    head alone, and the direction is that of confidence: a certain prediction and a large embedding
    have a large gradient. It is the squared counterpart of ``gradnorm``.
    """

    kind = "grad_uncertainty"
    paper = Paper(
        "Gradients as a Measure of Uncertainty in Neural Networks",
        "Jinsol Lee, Ghassan AlRegib",
        "ICIP",
        2020,
        "https://arxiv.org/abs/2008.08030",
    )

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits", "head"})

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        softmax = required(features.logits, "logits").softmax(dim=1)
        head = features.head
        if head is None:
            raise DataError("grad_uncertainty: the gradient is the head's, and there is no head")
        squares = (softmax.shape[1] * softmax - 1).square()
        slopes = squared_slopes(rows, head)
        return (squares * (slopes if head.bias is None else slopes + 1)).sum(dim=1)


def squared_slopes(rows: Tensor, head: Head) -> Tensor:
    """``||d z_k / d w_k||_2^2`` of a head, ``[N, K]``, or ``[N, 1]`` where all k have the same."""
    rows = unit(rows) if head.normalize_features else rows
    lengths = rows.square().sum(dim=1, keepdim=True)
    if not head.normalize_weight:
        return head.scale**2 * lengths
    norms = head.weight.norm(dim=1)
    across = (lengths - (rows @ unit(head.weight).T).square()).clamp_min(0)
    inverse = torch.where(norms > EPS, 1 / norms.clamp_min(EPS), 0.0)
    return across * (head.scale * inverse).square()


@hookimpl
def register_scorers(register: Register) -> None:
    register(GradUncertainty)
