"""How far a recipe has come in learning, and the parts of it that are being measured."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from oodcore import selection
from oodcore.component import canonical
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features, Head, check_finite
from oodcore.recipe import Recipe, own, require, shaped
from oodcore.scorer import Path, Scorer, Shaper, needed, parts, put_state, state_at, tree
from oodcore.statistics import State, Statistic
from oodcore.store import FeatureStore


@dataclass
class Progress:
    """How far a recipe has come.

    Args:
        recipe: what is fitted.
        split: whether a tenth of the rows is set apart.
        known: what shapers have learnt already, for other recipes that are fitted together.
    """

    recipe: Recipe
    split: bool
    known: dict[str, State]
    shapers: list[State] = field(default_factory=list)
    scorer: State | None = None
    measured: set[Path] = field(default_factory=set)

    def statistics(self) -> tuple[Statistic, ...]:
        """What the next part to be fitted wants to know."""
        if len(self.shapers) < len(self.recipe.shapers):
            return self.recipe.shapers[len(self.shapers)].statistics()
        return tuple(s for _, part in tree(self.recipe.scorer) for s in part.statistics())

    def learn(self, store: FeatureStore) -> None:
        """Fit the next part."""
        if len(self.shapers) < len(self.recipe.shapers):
            shaper = self.recipe.shapers[len(self.shapers)]
            key = canonical([self.place(), shaper.dump()])
            if key not in self.known:
                self.known[key] = _fitted(shaper, store)
            self.shapers.append(self.known[key])
            return
        self.scorer = {}
        for path, part in tree(self.recipe.scorer):
            self.scorer = put_state(self.scorer, path, _fitted(part, store))

    def to_measure(self) -> list[tuple[Path, Scorer]]:
        """The parts that can be measured next: everything inside them is finished."""
        waiting = {
            path: part
            for path, part in tree(self.recipe.scorer)
            if part.measures and path not in self.measured
        }
        return [
            (path, part)
            for path, part in waiting.items()
            if not any(other != path and other[: len(path)] == path for other in waiting)
        ]

    def place(self) -> str:
        """What decides whether two recipes see the same features and rows at this point."""
        before = [shaper.dump() for shaper in self.recipe.shapers[: len(self.shapers)]]
        return canonical([before, self.recipe.seed if self.split else None])

    def apply(self, features: Features) -> Features:
        """Features as the part that is next in turn sees them."""
        return shaped(features, self.recipe.shapers[: len(self.shapers)], self.shapers)

    def head(self, example: Features) -> Head | None:
        """The head that the part that is next in turn sees.

        Shapers that need the inputs leave it alone; an example has none.
        """
        done = list(zip(self.recipe.shapers, self.shapers, strict=False))
        given = [(shaper, state) for shaper, state in done if "inputs" not in shaper.needs()]
        return shaped(example, [s for s, _ in given], [state for _, state in given]).head

    @property
    def reruns(self) -> bool:
        """Whether the statistics of the next part, or a shaper before it, need the inputs."""
        shapers = self.recipe.shapers[: len(self.shapers)]
        needs = [each.needs() for each in shapers] + [each.needs() for each in self.statistics()]
        return any("inputs" in names for names in needs)

    def kept(self, features: Features, *, held_out: bool = False) -> Features:
        """The rows to fit on, or those set apart."""
        if not self.split:
            return features
        assert features.ids is not None
        apart = selection.held_out(features.ids, self.recipe.seed)
        return features.taken((apart == held_out).to(features.device).nonzero().flatten())


def _fitted(part: Scorer | Shaper, store: FeatureStore) -> State:
    """What a scorer or a shaper learns from a store.

    Raises:
        DataError: it learns from a head that is not there, or numbers that are not finite.
        ConfigurationError: what it has learnt is no state.
    """
    who = f"{part.slot} '{part.kind}'"
    learns = type(part).fit not in (Scorer.fit, Shaper.fit)
    if learns and store.head is None and "head" in part.needs():
        raise DataError(f"{who} needs head, and these features have none")
    state: State = own(part.fit(store), who)
    inside = {path[0] for path, _ in parts(part)} if isinstance(part, Scorer) else set()
    if taken := sorted(inside & state.keys()):
        raise ConfigurationError(
            f"what {who} has learnt has the name '{taken[0]}', which is that of a scorer inside it"
        )
    return state


@dataclass
class Measuring:
    """One part that is being measured."""

    progress: Progress
    path: Path
    part: Scorer
    rows: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    silent: bool = False

    @property
    def who(self) -> str:
        return f"scorer '{self.part.kind}'"

    @property
    def inputs(self) -> bool:
        return "inputs" in needed(self.part, self.progress.recipe.shapers)

    def update(self, features: Features, *, held_out: bool) -> None:
        progress = self.progress
        assert progress.scorer is not None
        features = progress.kept(progress.apply(features), held_out=held_out)
        if not len(features):
            return
        require(needed(self.part), features, self.who)
        rows = self.part.measure(features, state_at(progress.scorer, self.path))
        if rows is None:
            self.silent = True
            return
        if not isinstance(rows, Tensor) or rows.ndim == 0 or len(rows) != len(features):
            given = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise DataError(f"{self.who} measured {given} for {len(features)} rows, not [N, M]")
        check_finite(rows, f"what {self.who} measures", features.ids)
        self.rows.append(rows.double())
        if features.labels is not None:
            self.labels.append(features.labels)

    def finish(self) -> None:
        progress = self.progress
        assert progress.scorer is not None
        progress.measured.add(self.path)
        if self.silent and not self.rows:
            return
        if self.silent or not self.rows:
            raise DataError(
                f"{self.who} measured some batches and not others: it is all or nothing"
                if self.silent
                else f"{self.who} is measured on held-out rows, and there are none; give held_out= "
                "rows, or more data to set a tenth apart from"
            )
        state = state_at(progress.scorer, self.path)
        labels = torch.cat(self.labels) if self.labels else None
        done = own(self.part.finish(state, torch.cat(self.rows), labels), self.who)
        progress.scorer = put_state(progress.scorer, self.path, done)
