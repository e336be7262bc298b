"""Recipe: what a detector is made of, what it has learnt, and how the two score features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from oodcore.errors import DataError
from oodcore.features import Features, Rerun, check_finite
from oodcore.scorer import Scorer, Shaper, depth, needed, needed_to_fit, tree
from oodcore.statistics import State
from oodcore.store import missing_fields


@dataclass(frozen=True)
class Recipe:
    """What a detector is made of: shapers in turn, then a scorer."""

    scorer: Scorer
    shapers: tuple[Shaper, ...] = ()
    seed: int = 0

    @property
    def stages(self) -> int:
        """How many folds over the training rows it takes."""
        fitted = sum(1 for shaper in self.shapers if shaper.statistics())
        statistics = any(part.statistics() for _, part in tree(self.scorer))
        return fitted + int(statistics) + depth(self.scorer)

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to learn at all, not even from the head."""
        shaped = any(type(shaper).fit is not Shaper.fit for shaper in self.shapers)
        scored = any(type(part).fit is not Scorer.fit for _, part in tree(self.scorer))
        return self.stages == 0 and not shaped and not scored

    @property
    def holds_out(self) -> bool:
        """Whether some part is measured on rows on which no part was fitted."""
        return any(part.measures and part.held_out for _, part in tree(self.scorer))

    def needs(self, *, fitting: bool = False) -> frozenset[str]:
        """The fields of Features that scoring reads (and fitting too)."""
        names = needed(self.scorer, self.shapers)
        return names | needed_to_fit(self.scorer, self.shapers) if fitting else names


@dataclass(frozen=True)
class Learnt:
    """What a recipe has learnt, and a record of what from (rows, classes, labelling, held_out)."""

    scorer: State
    shapers: tuple[State, ...]
    record: Mapping[str, Any] = field(default_factory=dict)


def shaped(features: Features, shapers: Iterable[Shaper], states: Iterable[State]) -> Features:
    """Features after the shapers; ``rerun`` takes the same road.

    Raises:
        DataError: a field that a shaper needs is missing, or it gave numbers that are not finite.
    """
    for shaper, state in zip(shapers, states, strict=True):
        require(shaper.needs(), features, f"shaper '{shaper.kind}'")
        changed = shaper.apply(features, state)
        changed.check_finite(f"shaper '{shaper.kind}'")
        features = replace(changed, rerun=_longer(features.rerun, shaper, state))
    return features


def _longer(road: Rerun | None, shaper: Shaper, state: State) -> Rerun | None:
    if road is None:
        return None
    return lambda inputs, edit=None: shaper.apply(road(inputs, edit=edit), state)


def require(needs: Iterable[str], features: Features, who: str) -> None:
    """Raise a DataError if these features lack what somebody needs."""
    missing = missing_fields(needs, features)
    if "inputs" in missing:
        raise DataError(
            f"{who} passes through the model again, so it needs a model and its inputs; "
            "stored features are not enough"
        )
    if missing:
        raise DataError(f"{who} needs {', '.join(missing)}, and these features have none")


def scored(features: Features, recipe: Recipe, learnt: Learnt) -> Tensor:
    """The score of features that have been shaped already, ``[N]`` float64.

    Raises:
        DataError: a missing field, a score of another shape, or one that is not finite.
    """
    who = f"scorer '{recipe.scorer.kind}'"
    require(needed(recipe.scorer), features, who)
    scores = recipe.scorer.score(features, learnt.scorer)
    if scores.shape != (len(features),):
        raise DataError(f"{who} gave {list(scores.shape)} for {len(features)} rows, not [N]")
    check_finite(scores, who, features.ids)
    return scores.double()
