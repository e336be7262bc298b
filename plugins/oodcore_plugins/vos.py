"""vos: outliers that are drawn from the tails of the classes, in the space of the embeddings."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import oodcore
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features, required
from oodcore.regularizer import TrainModel
from oodcore.statistics import State

RIDGE = 1e-4
"""Added to the diagonal of the covariance."""
TINY = 1e-12
"""Weights of an energy below this count as this, so that the energy has an end."""

PAPER = oodcore.Paper(
    title="VOS: Learning What You Don't Know by Virtual Outlier Synthesis",
    authors="Xuefeng Du, Zhaoning Wang, Mu Cai, Yixuan Li",
    venue="ICLR",
    year=2022,
    url="https://arxiv.org/abs/2202.01197",
)


class VOS(oodcore.Regularizer):
    """Virtual outlier synthesis: tells rows from outliers that are drawn, by their energies.

    The newest ``queue`` embeddings of each class make a Gaussian of its own mean, with a covariance
    that all share (plus 1e-4 on the diagonal). Of ``samples`` draws from it, the ``select`` least
    likely are the class's virtual outliers v, whose logits are those of the head. With

        E(z) = log sum_k max(0, w_k) exp(z_k)     (higher for rows of a class)

    the term is the cross-entropy, averaged over rows and virtual outliers together, of a logistic
    regression on E that takes rows for 1 and virtual outliers for 0. Rows have a gradient all
    through the network; virtual outliers through the head, for they are drawn from what is
    remembered. The weights w begin uniform in [0, 1] and are trained with the network, as is the
    regression; both are kept in its branch ``vos``.

    Score with ``energy``, as the published code does, or with ``weighted_energy``.

    Departures. The queues end with the batch before, not with the batch itself. The draws are made
    as a direction and a length each (the lengths of all, the directions of the selected), which is
    the same distribution. A weight below 1e-12 counts as that.

    Args:
        start: the first epoch with the term, from 0; there is none before all queues are full.
        queue: embeddings that are kept of each class.
        samples: draws from each class.
        select: outliers of each class in a step.
        weighted: train w; false leaves every w_k at 1, so that E is that of ``energy``.
        weight: of the term.

    Raises a DataError if the features have no embeddings or logits, and a ConfigurationError where
    the term would never begin: ``start`` lies behind the last epoch, or the run has too few rows
    and epochs to fill the queues.
    """

    kind = "vos"
    paper = PAPER

    weight: NonNegativeFloat = 0.1
    start: NonNegativeInt = 40
    queue: Annotated[int, Field(ge=2)] = 1000
    samples: PositiveInt = 10_000
    select: PositiveInt = 1
    weighted: bool = True

    @model_validator(mode="after")
    def _enough_samples(self) -> VOS:
        if self.select > self.samples:
            raise ValueError(f"{self.select} of {self.samples} samples cannot be selected")
        return self

    def prepare_model(self, model: TrainModel, run: oodcore.Run) -> TrainModel:
        model.branches["vos"] = Uncertainty(run.classes, self.weighted)
        return model

    def build(self, run: oodcore.Run) -> nn.Module:
        if self.start >= run.epochs:
            raise ConfigurationError(
                f"vos: the term starts at epoch {self.start}, and the run has {run.epochs}, "
                "counted from 0; lower start"
            )
        if run.rows * run.epochs <= run.classes * self.queue:
            raise ConfigurationError(
                f"vos: {run.epochs} epochs of {run.rows} rows never fill queues of {self.queue} "
                f"rows for each of {run.classes} classes; lower queue"
            )
        return Queues(run.classes, self.queue, run.width)

    def weight_at(self, epoch: int) -> float:
        return self.weight if epoch >= self.start else 0.0

    def before(self, step: oodcore.Step, state: Any) -> None:
        if self.weight_at(step.epoch) and state.full:
            step.memo["outliers"] = state.draw(self.samples, self.select, step.generator)

    def loss(self, step: oodcore.Step, state: Any) -> Tensor | None:
        if "outliers" not in step.memo:
            return None
        model = step.run.model
        rows = required(step.features.logits, "logits")
        branch: Any = model.branches["vos"]
        outliers = model.head(step.memo["outliers"].to(rows))
        energies = branch.energies(torch.cat([rows, outliers]))
        known = torch.arange(len(energies), device=energies.device) < len(rows)
        return cross_entropy(branch.logistic(energies[:, None]), known.long())

    def after(self, step: oodcore.Step, state: Any) -> None:
        rows = required(step.features.embeddings, "embeddings")
        state.push(step.run.gather(rows), step.run.gather(step.labels))

    def finish(self, run: oodcore.Run, state: Any) -> None:
        if not state.full and run.rank == 0:
            logging.getLogger("oodcore").warning(
                "vos: the run ended before all queues were full, so no outlier was ever drawn; "
                "the rarest class gave %d embeddings of %d: lower queue",
                int(state.seen.min()),
                self.queue,
            )


class Uncertainty(nn.Module):
    """Weights of the energy, and the regression on it; as a branch it gives the weights.

    Args:
        classes: K.
        weighted: whether the weights are trained; else they are 1.
    """

    def __init__(self, classes: int, weighted: bool) -> None:
        super().__init__()
        start = torch.rand(classes) if weighted else torch.ones(classes)
        self.weight = nn.Parameter(start, requires_grad=weighted)
        self.logistic = nn.Linear(1, 2)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The weights that count, the same for every row, ``[N, K]``."""
        return self.weight.relu().expand(len(embeddings), -1)

    def energies(self, logits: Tensor) -> Tensor:
        """``log sum_k max(0, w_k) exp(z_k)``, ``[N]``."""
        return energy(logits, self.weight.relu().to(logits))


class Queues(nn.Module):
    """The newest embeddings of each class.

    Args:
        classes: K.
        size: of each queue.
        width: D.
    """

    def __init__(self, classes: int, size: int, width: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.seen: Tensor
        self.register_buffer("rows", torch.zeros(classes, size, width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.int64))

    @property
    def full(self) -> bool:
        """Whether no place of any queue is empty."""
        return bool((self.seen >= self.rows.shape[1]).all())

    def push(self, rows: Tensor, labels: Tensor) -> None:
        """Embeddings ``[N, D]`` in the order in which they came; the oldest of a class go."""
        size = self.rows.shape[1]
        order = labels.argsort(stable=True)
        labels, rows = labels[order], rows[order]
        counts = labels.bincount(minlength=len(self.seen))
        turn = torch.arange(len(labels), device=labels.device)
        turn = turn - (counts.cumsum(0) - counts)[labels]
        # No place is written twice, for which of both would stay is left open.
        kept = turn >= counts[labels] - size
        place = (self.seen[labels] + turn) % size
        self.rows[labels[kept], place[kept]] = rows[kept].to(self.rows)
        self.seen += counts

    def draw(self, samples: int, select: int, generator: torch.Generator) -> Tensor:
        """The least likely of many draws from each class, ``[K * select, D]`` float64."""
        rows = self.rows.double()
        classes, _, width = rows.shape
        means = rows.mean(dim=1)
        apart = (rows - means[:, None]).flatten(0, 1)
        covariance = apart.T @ apart / len(apart)
        covariance.diagonal().add_(RIDGE)
        factor = torch.linalg.cholesky(covariance)
        # A Gaussian's squared length is twice a Gamma number, and tells nothing of its direction.
        half = means.new_full((classes, samples), width / 2)
        squares = 2 * torch._standard_gamma(half, generator=generator)
        lengths = squares.topk(select, dim=1).values.sqrt()
        shape = (classes, select, width)
        noise = torch.randn(shape, generator=generator, device=rows.device, dtype=rows.dtype)
        steps = lengths[:, :, None] * noise / noise.norm(dim=2, keepdim=True)
        drawn: Tensor = means[:, None] + steps @ factor.T
        return drawn.flatten(0, 1)


class WeightedEnergy(oodcore.Scorer):
    """``log sum_k w_k exp(z_k)`` with weights that a network learnt, in nats.

    The weights are those of the regularizer ``vos``, which keeps them in a branch of the network:
    the extractor ``run`` gives it with ``layers: [vos]``. Weights below 1e-12 count as that. The
    authors of VOS report that ``energy`` itself scores better, and use that.

    Args:
        layer: the layer that holds the weights of each row, ``[N, K]``.

    Raises a DataError if the layer is missing, or has another shape than the logits.
    """

    kind = "weighted_energy"
    paper = PAPER

    layer: str = "vos"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits", f"layers.{self.layer}"})

    def score(self, features: Features, state: State) -> Tensor:
        logits = required(features.logits, "logits")
        weights = features.layers.get(self.layer)
        if weights is None or weights.shape != logits.shape:
            given = "no such layer" if weights is None else f"shape {list(weights.shape)}"
            raise DataError(
                f"weighted_energy: layer '{self.layer}' must hold weights {list(logits.shape)}, "
                f"and there is {given}; the regularizer 'vos' trains a network that has it"
            )
        return energy(logits, weights.to(logits))


def energy(logits: Tensor, weights: Tensor) -> Tensor:
    """``log sum_k w_k exp(z_k)`` of logits ``[N, K]`` and weights ``[K]`` or ``[N, K]``."""
    return (logits + weights.clamp_min(TINY).log()).logsumexp(dim=1)


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(VOS)


@oodcore.hookimpl
def register_scorers(register: Any) -> None:
    register(WeightedEnergy)
