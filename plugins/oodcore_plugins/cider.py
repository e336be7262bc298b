"""cider: directions that are compact within a class and far apart between classes."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import oodcore
from oodcore.discovery import head_of
from oodcore.features import required, unit
from oodcore.regularizer import TrainModel


class Cider(oodcore.Regularizer):
    """Compactness and dispersion on the sphere, for embeddings that are compared by neighbours.

    A projection (two layers with a ReLU between) of the embedding, divided by its norm, is the
    point u of a row; each class has a prototype p_k on the same sphere. With temperature t, the
    term is the mean over classes and the mean over rows, together:

        1/K sum_k log 1/(K-1) sum_{j != k} exp(p_k . p_j / t)
          - compactness * 1/N sum_i log( exp(u_i . p_y / t) / sum_k exp(u_i . p_k / t) )

    The prototypes begin as the mean points of the classes, from a pass over the training rows, and
    follow the rows of each batch, one after another:

        p_y <- unit(momentum * p_y + (1 - momentum) * u_i)

    As in the published code, both parts use the prototypes that the batch has moved already, and
    dispersion has a gradient through that move to the points of the batch; compactness takes the
    prototypes as fixed. Score with ``knn`` on the embeddings: the projection is left behind.

    The paper trains without a classifier and fits a linear one afterwards. Here that happens on the
    way: the classification loss trains the head alone, for the head passes no gradient on to the
    embeddings while the network is trained. Nor does it for terms of other regularizers that read
    the logits. ``joint`` lets it pass.

    Departures. The published code passes two augmented views of each row and takes both for rows;
    here each row has one. It divides compactness by 0.07 where t is meant, which for t = 0.1 is a
    ``compactness`` of 2.86. With several processes, the gradient of dispersion is that of each
    process's own rows, while the prototypes follow those of all.

    Args:
        width: of the projection.
        temperature: t, without unit.
        compactness: the weight of compactness over dispersion.
        momentum: of the prototypes, in [0, 1); the authors' checkpoints have 0.99 for CIFAR-10 and
            0.5 for CIFAR-100.
        joint: let the classification loss train the embeddings too.
        weight: of the term.

    Raises a DataError if the features have no embeddings.
    """

    kind = "cider"
    replaces_head = True
    paper = oodcore.Paper(
        title="How to Exploit Hyperspherical Embeddings for Out-of-Distribution Detection?",
        authors="Yifei Ming, Yiyou Sun, Ousmane Dia, Yixuan Li",
        venue="ICLR",
        year=2023,
        url="https://arxiv.org/abs/2203.04450",
    )

    width: PositiveInt = 128
    temperature: PositiveFloat = 0.1
    compactness: NonNegativeFloat = 2.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    joint: bool = False

    def prepare_model(self, model: TrainModel, run: oodcore.Run) -> TrainModel:
        model.branches["cider"] = nn.Sequential(
            nn.Linear(run.width, run.width), nn.ReLU(), nn.Linear(run.width, self.width)
        )
        if not self.joint and not isinstance(model.head, Probe):
            model.head = Probe(model.head)
        return model

    def build(self, run: oodcore.Run) -> nn.Module:
        state = nn.Module()
        state.register_buffer("prototypes", unit(self._totals(run)))
        return state

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        points = self._points(step)
        prototypes = moved(state.prototypes, points, step.labels, self.momentum)
        alike = points @ prototypes.detach().T / self.temperature
        apart = dispersion(prototypes, self.temperature)
        return apart + self.compactness * cross_entropy(alike, step.labels)

    def after(self, step: oodcore.Step, state: Any) -> None:
        points, labels = step.run.gather(self._points(step)), step.run.gather(step.labels)
        state.prototypes.copy_(moved(state.prototypes, points, labels, self.momentum))

    def _points(self, step: oodcore.Step) -> Tensor:
        return unit(step.features.layers["cider"])

    def _totals(self, run: oodcore.Run) -> Tensor:
        """The sum of the points of each class, of all training rows as they are at test time."""
        totals = torch.zeros(run.classes, self.width, device=run.device)
        modes = [(part, part.training) for part in run.model.modules()]
        run.model.eval()
        try:
            with torch.no_grad():
                for batch in run.batches():
                    points = unit(run.model(batch.inputs).layers["cider"]).to(totals)
                    totals.index_add_(0, required(batch.labels, "labels"), points)
        finally:
            for part, training in modes:
                part.training = training
        return totals


class Probe(nn.Module):
    """A head that learns from embeddings and does not teach them; at test time it is the head.

    Args:
        inner: the head.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def head(self) -> oodcore.Head:
        return head_of(self.inner)

    def forward(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.inner(embeddings.detach() if self.training else embeddings)
        return logits


def moved(prototypes: Tensor, points: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """Prototypes ``[K, W]`` after the points ``[N, W]`` of a batch, one after another.

    The points of different classes do not meet, so that each turn takes one point of every class.
    """
    order = labels.argsort(stable=True)
    counts = labels.bincount(minlength=len(prototypes))
    first = counts.cumsum(0) - counts
    for turn in range(int(counts.max()) if len(labels) else 0):
        classes = (counts > turn).nonzero()[:, 0]
        own = points[order[first[classes] + turn]]
        mean = momentum * prototypes[classes] + (1 - momentum) * own
        prototypes = prototypes.index_copy(0, classes, unit(mean).to(prototypes))
    return prototypes


def dispersion(prototypes: Tensor, temperature: float) -> Tensor:
    """``1/K sum_k log 1/(K-1) sum_{j != k} exp(p_k . p_j / t)`` of prototypes ``[K, W]``."""
    alike = prototypes @ prototypes.T / temperature
    same = torch.eye(len(alike), dtype=torch.bool, device=alike.device)
    others = alike[~same].reshape(len(alike), len(alike) - 1)
    return (others.logsumexp(dim=1) - others.new_tensor(others.shape[1]).log()).mean()


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(Cider)
