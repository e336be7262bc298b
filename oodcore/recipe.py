"""Recipe: what a detector is made of, what it has learnt, and how the two score features."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features, Rerun, check_finite
from oodcore.index import Index
from oodcore.rows import Rows
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
        scored = any(part.learns for _, part in tree(self.scorer))
        return self.stages == 0 and not shaped and not scored

    @property
    def rereads(self) -> bool:
        """Whether some stage after the first passes through the model again."""
        needs, stages = frozenset[str](), []
        for shaper in self.shapers:
            if shaper.statistics():
                stages.append(needs.union(*(s.needs() for s in shaper.statistics())))
            needs |= shaper.needs()
        parts = [part for _, part in tree(self.scorer)]
        if any(part.statistics() for part in parts):
            stages.append(needs | needed_to_fit(self.scorer))
        measured = [needs | needed(part) for part in parts if part.measures]
        return any("inputs" in stage for stage in stages[1:] + measured)

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

    def longer(inputs: Any, edit: Any = None) -> Features:
        # What comes at its end takes all of it once more, and not only the part before the shaper.
        return replace(shaper.apply(road(inputs, edit=edit), state), rerun=longer)

    return longer


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
    return checked_scores(scores, len(features), who, features.ids)


def checked_scores(scores: Any, rows: int, who: str, ids: Tensor | None = None) -> Tensor:
    """What somebody gave for some rows, if it is a score: finite numbers ``[N]``, as float64.

    Raises:
        DataError: it is not.
    """
    if not isinstance(scores, Tensor):
        raise DataError(f"{who} gave a {type(scores).__name__}, not a tensor [N]")
    if scores.shape != (rows,):
        raise DataError(f"{who} gave {list(scores.shape)} for {rows} rows, not [N]")
    check_finite(scores, who, ids)
    return scores.double()


def own(state: Any, who: str, name: str = "") -> Any:
    """A state with storage of its own, which nothing that goes on learning can change.

    Args:
        state: what a component has learnt.
        who: the component, for messages.
        name: where in the state this is.

    Raises:
        ConfigurationError: something that an artifact cannot hold.
        DataError: numbers that are not finite.
    """
    if isinstance(state, Tensor):
        if state.is_floating_point() and not bool(torch.isfinite(state).all()):
            raise DataError(
                f"what {who} has learnt is not finite ('{name}'): the numbers that it was fitted "
                "on are too large, too small or too few"
            )
        # What is made in inference mode cannot take part in a gradient later.
        with torch.inference_mode(False):
            return state.detach().clone()
    if isinstance(state, Rows):
        return state.copy()
    if isinstance(state, Index):
        return state
    if not isinstance(state, Mapping):
        place = f"'{name}', a" if name else "a"
        raise ConfigurationError(
            f"what {who} has learnt is {place} {type(state).__name__}; a state holds tensors, "
            "Rows, Index and mappings of these by name"
        )
    if odd := [key for key in state if not isinstance(key, str) or not _NAME.fullmatch(key)]:
        raise ConfigurationError(
            f"what {who} has learnt has the name {odd[0]!r}, which is not made of a-z, 0-9 and _"
        )
    return {key: own(value, who, f"{name}.{key}" if name else key) for key, value in state.items()}


_NAME = re.compile(r"[a-z0-9_]+")
