"""The class prior in place of the uniform distribution: RP+MSP, RP+GradNorm and reweighting."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Slot, Statistic, hookimpl
from oodcore.errors import ConfigurationError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import LogitMoments, State

PAPER = Paper(
    "Detecting Out-of-distribution Data through In-distribution Class Prior",
    "Xue Jiang, Feng Liu, Zhen Fang, Hong Chen, Tongliang Liu, Feng Zheng, Bo Han",
    "ICML",
    2023,
    "https://proceedings.mlr.press/v202/jiang23e.html",
)


class WithPrior(Scorer):
    """A score that compares the softmax with ``pi``, the class prior.

    Args:
        prior: pi, or numbers in proportion to it, one a class; where left out, the share of each
            class among the training rows, by label (by prediction where there are no labels).
    """

    prior: tuple[NonNegativeFloat, ...] | None = None

    @model_validator(mode="after")
    def _some_class_occurs(self) -> WithPrior:
        if self.prior is not None and sum(self.prior) <= 0:
            raise ValueError("a prior needs one number a class, at least one of them above 0")
        return self

    def statistics(self) -> tuple[Statistic, ...]:
        return (LogitMoments(),) if self.prior is None else ()

    def fit(self, store: FeatureStore) -> State:
        return {"prior": store[LogitMoments()].prior} if self.prior is None else {}

    def shares(self, softmax: Tensor, state: State) -> Tensor:
        """The prior as ``[K]``, for a softmax ``[N, K]``.

        Raises:
            ConfigurationError: the prior that was given is of another number of classes.
        """
        if self.prior is None:
            known: Tensor = state["prior"]
            return known
        if len(self.prior) != softmax.shape[1]:
            raise ConfigurationError(
                f"{self.kind}: the prior has {len(self.prior)} numbers, and there are "
                f"{softmax.shape[1]} classes"
            )
        given = softmax.new_tensor(self.prior)
        return given / given.sum()


class RPMSP(WithPrior):
    """``max_k (p_k - pi_k)`` with ``p = softmax(z)`` and the class prior ``pi``, in [0, 1].

    MSP less the prior of each class: with a uniform prior it is MSP - 1/K. With one class it is 0
    for every row. A class that never occurs has prior 0.
    """

    kind = "rp_msp"
    paper = PAPER

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        softmax = required(features.logits, "logits").softmax(dim=1)
        return (softmax - self.shares(softmax, state)).amax(dim=1)


class RPGradNorm(WithPrior):
    """``||h||_1 sum_k |p_k - pi_k|`` with ``p = softmax(z)`` and the class prior pi, at least 0.

    GradNorm with the prior as its target, by the closed form of a linear head, whatever the head
    is, as in the authors' code (which divides by constants besides). With a uniform prior it is
    ``gradnorm``. A zero embedding gives 0, and so does every row where there is one class.
    """

    kind = "rp_gradnorm"
    paper = PAPER

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"})

    def score(self, features: Features, state: State) -> Tensor:
        softmax = required(features.logits, "logits").softmax(dim=1)
        excess = (softmax - self.shares(softmax, state)).abs().sum(dim=1)
        return required(features.embeddings, "embeddings").abs().sum(dim=1) * excess


class Reweighted(WithPrior):
    """``(1 - cos(p, pi)) s`` with ``p = softmax(z)``, the class prior ``pi`` and any score s.

    The weight is 0 where the prediction is the prior itself and at most 1; with a uniform prior it
    is ``1 - 1 / (sqrt(K) ||p||)``. p is taken at temperature 1, from the input as it is, whatever
    the score inside does. A weight shrinks a score towards 0, so this is meant for scores that are
    positive, as those of the paper: energy (of logits not all negative), ODIN, MSP. A negative one
    is raised by a small weight. With one class every row gets 0.

    Args:
        scorer: the score s; the paper has ``energy`` and ``odin``.
    """

    kind = "reweighted"
    paper = PAPER
    scorer: Annotated[Scorer, Slot("scorer")] = Field("energy", validate_default=True)

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        softmax = required(features.logits, "logits").softmax(dim=1)
        apart = unit(softmax) - unit(self.shares(softmax, state))
        # Half the squared distance of unit vectors is one less their cosine, without cancellation.
        weight = apart.square().sum(dim=1) / 2
        return weight * self.scorer.score(features, state.get("scorer", {}))


@hookimpl
def register_scorers(register: Register) -> None:
    register(RPMSP)
    register(RPGradNorm)
    register(Reweighted)
