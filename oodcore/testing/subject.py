"""Subject: a scorer or a shaper under examination, and how it is fitted and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oodcore.component import Component
from oodcore.data import Batch
from oodcore.detector import Detector
from oodcore.features import Features
from oodcore.fitting import Fitting
from oodcore.recipe import Learnt, Recipe, shaped
from oodcore.scorer import Scorer, Shaper, put_state, tree
from oodcore.statistics import State, Statistic
from oodcore.store import FeatureStore
from oodcore.testing.toy import USUAL, Network, Problem, Sizes, features_of, in_parts, problem

Edit = Callable[[Features], Features]


class LargestLogit(Scorer):
    """``max_k z_k``: what shaped features are scored with, where a shaper is examined."""

    kind = "testing_largest_logit"

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def score(self, features: Features, state: State) -> Tensor:
        assert features.logits is not None
        return features.logits.amax(dim=1)


@dataclass(frozen=True)
class Subject:
    """A scorer or a shaper under examination.

    Args:
        part: the component.
        floor: the least AUROC on the toy problem, or None.
        network: see ``toy.Network``; None for the toy network.
        sizes: of the toy problem.
    """

    part: Scorer | Shaper
    floor: float | None = None
    network: Network | None = None
    sizes: Sizes = USUAL

    @property
    def recipe(self) -> Recipe:
        """The smallest recipe that it can be fitted in."""
        if isinstance(self.part, Scorer):
            return Recipe(self.part)
        return Recipe(LargestLogit(), (self.part,))

    @property
    def components(self) -> tuple[Component, ...]:
        """Everything in that recipe."""
        return (self.recipe.scorer, *self.recipe.shapers)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What it and its parts are fitted on."""
        parts = [self.part] if isinstance(self.part, Shaper) else [p for _, p in tree(self.part)]
        return tuple(statistic for part in parts for statistic in part.statistics())

    @property
    def reruns(self) -> bool:
        """Whether it passes through the model again."""
        return "inputs" in self.recipe.needs()

    @property
    def learns(self) -> bool:
        """Whether there is anything to fit."""
        return not self.recipe.fixed

    def problem(self, sizes: Sizes | None = None) -> Problem:
        """A toy problem with the layers that it needs, of its own sizes where left out."""
        needs = sorted(self.recipe.needs(fitting=True))
        layers = [need.partition(".")[2] for need in needs if need.startswith("layers.")]
        return problem(layers, self.network, sizes or self.sizes)

    def detector(self, made: Problem) -> Detector:
        """An unfitted detector of it."""
        recipe = self.recipe
        return Detector(made.model, scorer=recipe.scorer, shapers=recipe.shapers, batch_size=64)

    def features(self, made: Problem, rows: Batch | Tensor) -> Features:
        """What the model says of rows; inputs only where it needs them."""
        with torch.no_grad():
            return features_of(made.model, rows, self.reruns)

    def fitting(self, made: Problem) -> Fitting:
        """A fitting of it alone."""
        return Fitting({"": self.recipe}, made.sizes.classes)

    def fit(
        self, made: Problem, rows: Batch | None = None, size: int = 160, edit: Edit | None = None
    ) -> Learnt:
        """What it learns.

        Args:
            made: the problem.
            rows: to fit on; the problem's training rows where left out.
            size: rows of a batch.
            edit: applied to all features first.
        """
        rows = made.train if rows is None else rows

        def batches() -> Iterator[Features]:
            for part in in_parts(rows, size):
                features = self.features(made, part)
                yield features if edit is None else edit(features)

        fitting = self.fitting(made)
        for features in batches():
            fitting.update(features)
        return fitting.finish(lambda held_out: batches())[""]

    def learnt_from(self, store: FeatureStore) -> Learnt:
        """What it learns from a store, where nothing has to be measured besides."""
        if isinstance(self.part, Shaper):
            return Learnt({}, (self.part.fit(store),))
        state: State = {}
        for path, part in tree(self.part):
            state = put_state(state, path, part.fit(store))
        return Learnt(state, ())

    def output(self, features: Features, learnt: Learnt) -> dict[str, Tensor]:
        """What it gives for rows, each tensor with one row a row: scores or shaped features."""
        if isinstance(self.part, Scorer):
            return {"score": self.part.score(features, learnt.scorer)}
        changed = self.part.apply(features, learnt.shapers[0])
        named = {"embeddings": changed.embeddings, "logits": changed.logits}
        named.update({f"layers.{name}": value for name, value in changed.layers.items()})
        return {name: value for name, value in named.items() if value is not None}

    def outputs(
        self, made: Problem, rows: Tensor, learnt: Learnt, size: int | None = None
    ) -> dict[str, Tensor]:
        """What it gives for inputs, ``size`` rows at a time (all at once where left out)."""
        parts = in_parts(Batch(rows), size or max(1, len(rows)))
        with torch.no_grad():
            given = [self.output(self.features(made, part), learnt) for part in parts]
        return {name: torch.cat([one[name] for one in given]) for name in given[0]}

    def scores(self, made: Problem, rows: Tensor, learnt: Learnt) -> Tensor:
        """One number a row: the score, of shaped features where it is a shaper."""
        recipe = self.recipe
        with torch.no_grad():
            features = shaped(self.features(made, rows), recipe.shapers, learnt.shapers)
            return recipe.scorer.score(features, learnt.scorer)


def stripped(features: Features, needs: frozenset[str]) -> Features:
    """Features with what is needed alone; the logits stay where nothing else would be left."""
    layers = {n: v for n, v in features.layers.items() if f"layers.{n}" in needs}
    bare = not layers and not needs & {"embeddings", "logits"}
    return replace(
        features,
        embeddings=features.embeddings if "embeddings" in needs else None,
        logits=features.logits if "logits" in needs or bare else None,
        layers=layers,
        head=features.head if "head" in needs else None,
        inputs=features.inputs if "inputs" in needs else None,
        rerun=features.rerun if "inputs" in needs else None,
    )
