"""correctness_ranking: confidence in the order of how often a row was right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import oodcore
from oodcore.features import required


class CorrectnessRanking(oodcore.Regularizer):
    """The correctness ranking loss: the mean over a batch, each row i with its neighbour j, of

        max(0, -sign(c_i - c_j) (s_i - s_j) + |c_i - c_j|),   0 where c_i = c_j

    ``s`` is the largest softmax probability. ``c`` is how often the row was classified correctly
    while training: ``(count - least) / (epochs so far - least)``, where least is the smallest count
    of any row, 1 counts as the epochs of the first two, and c is 0 where all rows were always
    right. Neighbours are next to each other in the batch, the last and the first too.

    Args:
        weight: of the term; SURE takes 0.5 on CIFAR-10 and 1 on CIFAR-100.

    Raises a DataError if the features have no logits.
    """

    kind = "correctness_ranking"
    paper = oodcore.Paper(
        title="Confidence-Aware Learning for Deep Neural Networks",
        authors="Jooyoung Moon, Jihyo Kim, Younghak Shin, Sangheum Hwang",
        venue="ICML",
        year=2020,
        url="https://arxiv.org/abs/2007.01458",
    )

    def build(self, run: oodcore.Run) -> nn.Module:
        history = nn.Module()
        history.register_buffer("count", torch.zeros(run.rows, dtype=torch.int64))
        return history

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        logits = required(step.features.logits, "logits")
        confidence = logits.softmax(dim=1).amax(dim=1)
        least, most = state.count.min(), max(1, step.epoch)
        right = (state.count[step.ids] - least).to(confidence)
        right = right / (most - least).clamp_min(1)
        ahead = right - right.roll(-1)
        gap = confidence - confidence.roll(-1)
        # Where the history is equal, the sign is 0 and so is the loss.
        return (ahead.abs() - ahead.sign() * gap).clamp_min(0).mean()

    def after(self, step: oodcore.Step, state: Any) -> None:
        correct = step.features.predicted == step.labels
        state.count[step.run.gather(step.ids[correct])] += 1


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(CorrectnessRanking)
