"""Scorer, Shaper and Combination: what a post-hoc method defines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from oodcore.component import Component, Slot
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features
from oodcore.statistics import State, Statistic
from oodcore.store import FeatureStore
from oodcore.ties import Ties

Path = tuple[str, ...]


class Scorer(Component):
    """A post-hoc score: a pure function of features and of what was learnt.

    A scorer inside a scorer is a field ``Annotated[Scorer, Slot("scorer")]`` or a tuple of such.
    It is fitted first, and its state is found in the outer one's under the field's name
    (``state["scorer"]``; ``state["scorers"]["0"]`` for a tuple).
    """

    slot: ClassVar[str] = "scorer"
    differentiable: ClassVar[bool] = True
    """Whether the score has a gradient in the features."""
    held_out: ClassVar[bool] = False
    """Whether ``measure`` wants rows on which no part was fitted."""

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The fields of Features that ``score`` reads: "embeddings", "logits", "head",
        "layers.<name>"; "inputs" marks a method that passes through the model again."""

    def statistics(self) -> tuple[Statistic, ...]:
        """What it wants to know of the training data; () if there is nothing to fit."""
        return ()

    def fit(self, store: FeatureStore) -> State:
        """What it learns from those statistics."""
        return {}

    def measure(self, features: Features, state: State) -> Tensor | None:
        """A few numbers per training row, ``[N, M]``, that only the fitted parts can give."""
        return None

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        """The state, with what follows from those numbers of all rows, ``[N, M]``."""
        return state

    @abstractmethod
    def score(self, features: Features, state: State) -> Tensor:
        """``[N]`` float64; higher means more in-distribution. A row's score is its own."""

    def inside(self) -> tuple[tuple[Path, Scorer], ...]:
        """The scorers that are fitted and measured before this one, each with its path in the
        state: those in its fields, unless it fits these itself or has others made of them."""
        found = self.components()
        return tuple((path, part) for path, part in found if isinstance(part, Scorer))

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure; a scorer whose fields decide it says so here."""
        return type(self).measure is not Scorer.measure

    @property
    def learns(self) -> bool:
        """Whether there is anything to fit; a scorer whose fields decide it says so here."""
        return type(self).fit is not Scorer.fit

    @property
    def smooth(self) -> bool:
        """Whether the score, with everything inside it, has a gradient."""
        return self.differentiable and all(part.smooth for _, part in parts(self))


class Shaper(Component):
    """Reshapes features before any scorer sees them.

    One that needs the inputs leaves the head as it is.
    """

    slot: ClassVar[str] = "shaper"

    @abstractmethod
    def needs(self) -> frozenset[str]:
        """The fields of Features that ``apply`` reads."""

    def statistics(self) -> tuple[Statistic, ...]:
        """What it wants to know of the training data, as the shapers before it leave them."""
        return ()

    def fit(self, store: FeatureStore) -> State:
        """What it learns from those statistics."""
        return {}

    @abstractmethod
    def apply(self, features: Features, state: State) -> Features:
        """Features of the same rows."""


class Combination(Scorer):
    """One score from several. A subclass only says how: ``combine(scores [N, M]) -> [N]``.

    Args:
        scorers: what is combined.
        weights: one a scorer; all 1 if not given.
        normalize: what is done to each score first, measured on held-out in-distribution rows:
            ``none``; ``mean``, divided by its mean; ``zscore``, less its mean and divided by its
            standard deviation (population; a constant score becomes 0); ``ecdf``, the share of
            held-out scores below it, ties counted half: ``(below + ties / 2 + 1/2) / (n + 1)``.
            Scores that many rows share up to rounding are tied too, see ``oodcore.ties.Ties``.
    """

    held_out: ClassVar[bool] = True
    scorers: tuple[Annotated[Scorer, Slot("scorer")], ...] = ()
    weights: tuple[float, ...] | None = None
    normalize: Literal["none", "mean", "zscore", "ecdf"] = "none"

    @model_validator(mode="after")
    def _one_weight_each(self) -> Combination:
        if self.weights is not None and self.scorers and len(self.weights) != len(self.scorers):
            raise ValueError(
                f"there are {len(self.weights)} weights for {len(self.scorers)} scorers"
            )
        return self

    @abstractmethod
    def combine(self, scores: Tensor) -> Tensor:
        """``[N]`` from normalised scores ``[N, M]``; see ``weight``."""

    def weight(self, scores: Tensor) -> Tensor:
        """The weights for scores ``[N, M]``, as ``[M]``."""
        if self.weights is None:
            return scores.new_ones(scores.shape[1])
        if len(self.weights) != scores.shape[1]:
            raise ConfigurationError(
                f"there are {len(self.weights)} weights for {scores.shape[1]} scores"
            )
        return scores.new_tensor(self.weights)

    def needs(self) -> frozenset[str]:
        return frozenset()

    @property
    def measures(self) -> bool:
        return self.normalize != "none"

    @property
    def smooth(self) -> bool:
        return self.normalize != "ecdf" and super().smooth

    def member_scores(self, features: Features, state: State) -> Tensor:
        """The scores of the parts, ``[N, M]``."""
        states = state.get("scorers", {})
        columns = [
            scorer.score(features, states.get(str(number), {}))
            for number, scorer in enumerate(self.scorers)
        ]
        return torch.stack(columns, dim=1)

    def measure(self, features: Features, state: State) -> Tensor | None:
        return self.member_scores(features, state) if self.measures else None

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        if self.normalize == "ecdf":
            return {**state, "sorted": rows.sort(dim=0).values}
        mean = rows.mean(dim=0)
        if self.normalize == "zscore":
            spread = rows.std(dim=0, correction=0)
            constant = spread <= 1e-12 * rows.abs().amax(dim=0)
            return {**state, "mean": mean, "spread": spread.masked_fill(constant, 1.0)}
        if bool((mean.abs() <= 1e-12 * rows.abs().amax(dim=0)).any()):
            raise DataError(
                f"{self.kind}: a score with mean 0 cannot be divided by it; use normalize: zscore"
            )
        return {**state, "mean": mean}

    def normalized(self, scores: Tensor, state: State) -> Tensor:
        """Scores ``[N, M]`` after the normalisation that was measured."""
        if self.normalize == "none":
            return scores
        if self.normalize == "mean":
            shares: Tensor = scores / state["mean"]
            return shares
        if self.normalize == "zscore":
            deviations: Tensor = (scores - state["mean"]) / state["spread"]
            return deviations
        columns = zip(state["sorted"].T.cpu(), scores.detach().T.cpu(), strict=True)
        return torch.stack([_ranks(*column) for column in columns], dim=1).to(scores)

    def score(self, features: Features, state: State) -> Tensor:
        return self.combine(self.normalized(self.member_scores(features, state), state))


def _ranks(known: Tensor, asked: Tensor) -> Tensor:
    """The rank of each score among known ones in ascending order, in (0, 1)."""
    ties = Ties(known.numpy())
    given = ties.settled(asked.numpy())
    below = np.searchsorted(ties.scores, given)
    upto = np.searchsorted(ties.scores, given, side="right")
    return torch.from_numpy(((below + upto) / 2 + 0.5) / (len(known) + 1))


def parts(scorer: Scorer) -> list[tuple[Path, Scorer]]:
    """The scorers directly inside a scorer, each with its path in the state."""
    return list(scorer.inside())


def tree(scorer: Scorer, at: Path = ()) -> Iterator[tuple[Path, Scorer]]:
    """A scorer and all inside it, innermost first, each with its path in the state."""
    for path, part in parts(scorer):
        yield from tree(part, at + path)
    yield at, scorer


def depth(scorer: Scorer) -> int:
    """How many rounds of measuring stand between a scorer's statistics and its finished state."""
    inner = max((depth(part) for _, part in parts(scorer)), default=0)
    return inner + int(scorer.measures)


def state_at(state: State, path: Path) -> State:
    """The state of the part at a path; an empty one where there is nothing learnt."""
    for name in path:
        state = state.get(name, {})
    return state


def put_state(state: State, path: Path, value: State) -> State:
    """A state in which the part at a path has learnt ``value``; what is inside it stays."""
    if not path:
        inner = {name: part for name, part in state.items() if name not in value}
        return {**inner, **value}
    name, *rest = path
    return {**state, name: put_state(state.get(name, {}), tuple(rest), value)}


def needed(scorer: Scorer, shapers: tuple[Shaper, ...] = ()) -> frozenset[str]:
    """Every field of Features that scoring reads."""
    names = frozenset[str]().union(*(part.needs() for _, part in tree(scorer)))
    return names.union(*(shaper.needs() for shaper in shapers))


def needed_to_fit(scorer: Scorer, shapers: tuple[Shaper, ...] = ()) -> frozenset[str]:
    """Every field of Features that fitting reads, besides those that scoring does."""
    statistics: list[Any] = [s for _, part in tree(scorer) for s in part.statistics()]
    statistics += [s for shaper in shapers for s in shaper.statistics()]
    return frozenset[str]().union(*(statistic.needs() for statistic in statistics))


def check_recipe(scorer: Scorer, shapers: tuple[Shaper, ...] = ()) -> None:
    """Refuse what no data could make work, before any is read.

    Raises:
        ConfigurationError: a combination of nothing.
    """
    for _, part in tree(scorer):
        if isinstance(part, Combination) and not part.scorers:
            raise ConfigurationError(f"scorer: '{part.kind}' combines nothing; name its scorers")
