"""entropic_open_set and objectosphere: known unknowns that get no class, and no magnitude."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeFloat
from torch import Tensor

import oodcore
from oodcore.errors import DataError
from oodcore.features import Features, required

PAPER = oodcore.Paper(
    title="Reducing Network Agnostophobia",
    authors="Akshay Raj Dhamija, Manuel Günther, Terrance E. Boult",
    venue="NeurIPS",
    year=2018,
    url="https://arxiv.org/abs/1811.04110",
)


class EntropicOpenSet(oodcore.Regularizer):
    """Entropic open-set loss: a term that is smallest where outliers get all K classes alike,

        -1/K sum_k log softmax(z)_k     (at least log K)

    averaged over the step's outliers, which pass through the network with the batch. It needs the
    run's ``outliers``, called known unknowns in the paper. Their augmentation is their source's
    business: regularizers augment the rows of the batch alone.

    The paper sums over known and unknown rows; here each kind has its mean, so that the number of
    outliers in a step does not weigh them. With a weight of 1/K they count as one class more, as in
    the published code for MNIST. It is the term of Outlier Exposure, under another weight.

    Args:
        weight: of the term, in nats.

    Raises a DataError if the features have no logits, or a step has no outliers.
    """

    kind = "entropic_open_set"
    needs_outliers = True
    paper = PAPER

    def before(self, step: oodcore.Step, state: Any) -> Any:
        return step.outliers

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        return uniform_cross_entropy(outliers_of(step))


class Objectosphere(oodcore.Regularizer):
    """The entropic open-set term, and another that keeps known rows far from the origin and
    outliers near it, h being the embedding:

        mean over outliers of -1/K sum_k log softmax(z)_k
          + magnitude_weight * (mean over rows of max(0, radius - ||h||_2)^2
                                + mean over outliers of ||h||_2^2)

    A row beyond ``radius`` is left alone. It needs the run's ``outliers``, and passes them through
    the network with the batch; regularizers augment the rows of the batch alone. The head should
    have no bias, as in the paper: then an embedding at the origin has equal logits.

    The paper scores with the softmax probability, or with its product with the norm of the
    embedding: ``{kind: product, scorers: [msp, max_norm]}``. As with ``entropic_open_set``, each
    kind of rows has its own mean, where the paper sums over both.

    Args:
        radius: xi, in units of the embeddings; 50 is the published code's for MNIST.
        magnitude_weight: lambda, per squared unit of the embeddings.
        weight: of both parts together.

    Raises a DataError if the features have no logits or embeddings, or a step has no outliers.
    """

    kind = "objectosphere"
    needs_outliers = True
    paper = PAPER

    radius: NonNegativeFloat = 50.0
    magnitude_weight: NonNegativeFloat = 1e-4

    def before(self, step: oodcore.Step, state: Any) -> Any:
        return step.outliers

    def loss(self, step: oodcore.Step, state: Any) -> Tensor:
        outliers = outliers_of(step)
        known = required(step.features.embeddings, "embeddings").norm(dim=1)
        # The square needs no root, whose slope at the origin is undefined.
        unknown = required(outliers.embeddings, "embeddings").square().sum(dim=1)
        short = (self.radius - known).clamp_min(0).square().mean()
        magnitudes: Tensor = short + unknown.mean()
        return uniform_cross_entropy(outliers) + self.magnitude_weight * magnitudes


def outliers_of(step: oodcore.Step) -> Features:
    """The features of the outliers that ``before`` had join the forward.

    Raises:
        DataError: there are none.
    """
    if step.extra is None:
        raise DataError(f"{step.kind} needs outliers, and this step has none; name a source of "
                        "'outliers' for the run")  # fmt: skip
    return step.extra


def uniform_cross_entropy(rows: Features) -> Tensor:
    """The mean over rows of ``-1/K sum_k log softmax(z)_k``, a scalar."""
    return -required(rows.logits, "logits").log_softmax(dim=1).mean()


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(EntropicOpenSet)
    register(Objectosphere)
