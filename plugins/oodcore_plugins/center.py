"""center: embeddings near the centre of their class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn

import oodcore
from oodcore.errors import ConfigurationError
from oodcore.features import required

TINY = 1e-12


class Center(oodcore.Regularizer):
    """Center loss: the mean over a batch of ``||h - c_y||_2^2``, h the embedding and c_y the centre
    of its class.

    The centres begin as standard normal numbers and follow the embeddings after each step in which
    the term has weight:

        learned      a step of SGD with rate ``lr`` along the gradient of the unweighted term
        batch_mean   c_k -= lr * sum_{i: y_i = k} (c_k - h_i) / (1 + n_k), as in the paper
        ema          c_k = (1 - lr) c_k + lr * (mean of the batch's embeddings of class k)

    The network of MaxNorm in DML+ is trained so, on embeddings that are not normalised (a
    ``cosine_head`` with ``normalize: weight``), with weights 0, 0.001 and 0.005 from epochs 0, 60
    and 80 of 200: these are the defaults; a shorter run names its own.

    Args:
        weights: of the term, from the epochs ``starts`` on; before the first it is 0.
        starts: as many epochs, from 0, ascending.
        centers: how the centres follow: "learned", "batch_mean" or "ema".
        lr: how fast, in (0, 1].
        squared: the squared distance, as in papers' code; false takes the distance itself, as the
            text of Decoupling MaxLogit does.
        weight: a factor on all ``weights``; 0 switches it off.

    Raises a DataError if the features have no embeddings, and a ConfigurationError where the first
    of ``starts`` lies behind the last epoch.
    """

    kind = "center"
    paper = oodcore.Paper(
        title="A Discriminative Feature Learning Approach for Deep Face Recognition",
        authors="Yandong Wen, Kaipeng Zhang, Zhifeng Li, Yu Qiao",
        venue="ECCV",
        year=2016,
        url="https://doi.org/10.1007/978-3-319-46478-7_31",
    )

    weights: tuple[NonNegativeFloat, ...] = (0.001, 0.005)
    starts: tuple[NonNegativeInt, ...] = (60, 80)
    centers: Literal["learned", "batch_mean", "ema"] = "learned"
    lr: Annotated[PositiveFloat, Field(le=1)] = 0.5
    squared: bool = True

    @model_validator(mode="after")
    def _one_start_each(self) -> Center:
        if not self.weights or len(self.weights) != len(self.starts):
            raise ValueError(f"{len(self.weights)} weights need as many starts, not {self.starts}")
        if list(self.starts) != sorted(set(self.starts)):
            raise ValueError(f"starts must ascend: {self.starts}")
        return self

    def weight_at(self, epoch: int) -> float:
        begun = [
            own for own, start in zip(self.weights, self.starts, strict=True) if epoch >= start
        ]
        return self.weight * begun[-1] if begun else 0.0

    def build(self, run: oodcore.Run) -> oodcore.Memory:
        if self.starts[0] >= run.epochs:
            raise ConfigurationError(
                f"center: the term has weight from epoch {self.starts[0]} on, and the run has "
                f"{run.epochs}, counted from 0; give starts of this run"
            )
        state = oodcore.Memory()
        state.centers = nn.Parameter(torch.randn(run.classes, run.width))
        if self.centers == "learned":
            state.own["centers"] = torch.optim.SGD([state.centers], lr=self.lr)
        return state

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        return self._distances(_rows(step), step.labels, state.centers.detach()).mean()

    def after(self, step: oodcore.Step, state: Any) -> None:
        if not self.weight_at(step.epoch):
            return
        # All processes take the same step, with the rows of all.
        rows, labels = step.run.gather(_rows(step)), step.run.gather(step.labels)
        if self.centers == "learned":
            state.centers.grad = None
            with torch.enable_grad():
                self._distances(rows, labels, state.centers).mean().backward()
            state.own["centers"].step()
            return
        count = torch.bincount(labels, minlength=len(state.centers)).to(rows)[:, None]
        total = torch.zeros_like(state.centers).index_add_(0, labels, rows)
        with torch.no_grad():
            if self.centers == "batch_mean":
                state.centers -= self.lr * (count * state.centers - total) / (1 + count)
            else:
                there = (count > 0).to(rows)
                state.centers += self.lr * there * (total / count.clamp_min(1) - state.centers)

    def _distances(self, rows: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        squares = (rows - centers[labels]).square().sum(dim=1)
        # The root has no gradient at 0.
        return squares if self.squared else squares.clamp_min(TINY).sqrt()


def _rows(step: oodcore.Step) -> Tensor:
    return required(step.features.embeddings, "embeddings")


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(Center)
