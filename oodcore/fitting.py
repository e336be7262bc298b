"""How detectors learn: stages, each one fold over features, shared by all fitted together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from oodcore import data
from oodcore.component import canonical
from oodcore.data import HELD_OUT_SHARE
from oodcore.errors import ConfigurationError, DataError, NotFittedError
from oodcore.features import Features, check_finite
from oodcore.recipe import Learnt, Recipe, require, shaped
from oodcore.scorer import Path, Scorer, depth, needed, put_state, state_at, tree
from oodcore.spool import Spool
from oodcore.statistics import State, Statistic
from oodcore.store import FeatureStore, class_count, labelling

Reread = Callable[[bool], Iterator[Features]]
"""``reread(held_out)``: the training rows again (or the held-out ones), with their inputs."""


@dataclass
class _Progress:
    """How far a recipe has come."""

    recipe: Recipe
    split: bool
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
            self.shapers.append(self.recipe.shapers[len(self.shapers)].fit(store))
            return
        self.scorer = {}
        for path, part in tree(self.recipe.scorer):
            self.scorer = put_state(self.scorer, path, part.fit(store))

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

    def kept(self, features: Features, *, held_out: bool = False) -> Features:
        """The rows to fit on, or those set apart."""
        if not self.split:
            return features
        assert features.ids is not None
        apart = data.held_out(features.ids, self.recipe.seed)
        rows = (apart == held_out).to(features.device).nonzero().flatten()
        inputs = None if features.inputs is None else _taken(features.inputs, rows)
        return replace(features[rows], inputs=inputs, rerun=features.rerun)


class Fitting:
    """Fits recipes on a stream of features, in as few folds as their stages need.

    The first fold happens as the stream goes by. Where some recipe has more than one stage, the
    features are spooled for the others. ``finish`` may be called, rows added, and ``finish`` called
    again: the result is that of all rows at once.

    Args:
        recipes: what to fit, by name.
        classes: K, where neither head nor logits tell.
        held_out: whether held-out rows will be given; else a tenth is set apart where needed.
    """

    def __init__(
        self, recipes: Mapping[str, Recipe], classes: int | None = None, held_out: bool = False
    ) -> None:
        self.recipes = dict(recipes)
        self.held_out = held_out
        self.classes = classes
        self.rows = 0
        self.stores: dict[str, FeatureStore] = {}
        self.spool: Spool | None = None
        self.held_spool: Spool | None = None
        if any(self._later_stages(recipe) for recipe in self.recipes.values()):
            self.spool = Spool()
            self.held_spool = Spool() if held_out else None
        self._example: Features | None = None
        self._folds: dict[str, tuple[FeatureStore, _Progress]] | None = None

    def needs(self) -> frozenset[str]:
        """Every field of Features that fitting reads."""
        names = frozenset[str]()
        for recipe in self.recipes.values():
            if not recipe.fixed:
                names |= recipe.needs(fitting=True)
        return names

    def again(self) -> bool:
        """Whether a later stage needs the inputs, so that the data is read more than once."""
        return any(
            "inputs" in needed(part)
            for recipe in self.recipes.values()
            for _, part in tree(recipe.scorer)
            if part.measures
        )

    @torch.no_grad()
    def update(self, features: Features) -> None:
        """Take in a batch of training rows, float64 and with ids."""
        if self._example is None:
            self._begin(features)
        for key, store, progress in self._first_fold():
            rows = progress.kept(progress.apply(features))
            if len(rows):
                store.update(rows)
                self.stores[key] = store
        if self.spool is not None:
            self.spool.append(features)
        self.rows += len(features)

    @torch.no_grad()
    def update_held_out(self, features: Features) -> None:
        """Take in a batch of held-out rows."""
        if self.held_spool is not None:
            self.held_spool.append(features)

    @torch.no_grad()
    def finish(self, reread: Reread | None = None) -> dict[str, Learnt]:
        """What every recipe has learnt from the rows so far.

        Raises:
            DataError: no rows, or none left to fit on or to hold out.
        """
        if self._example is None:
            raise DataError("there is no row to fit on")
        at_work = {name: self._progress(recipe) for name, recipe in self.recipes.items()}
        for progress in at_work.values():
            self._learn_without_rows(progress)
            if progress.scorer is None:
                progress.learn(self._store_of(progress))
                self._learn_without_rows(progress)
        while open_ends := [p for p in at_work.values() if p.scorer is None or p.to_measure()]:
            self._round(open_ends, reread)
        return {name: self._learnt(progress) for name, progress in at_work.items()}

    def only(self, name: str) -> Fitting:
        """The same for one recipe alone, going on apart from this one."""
        other = Fitting({name: self.recipes[name]}, self.classes, self.held_out)
        other.rows, other._example = self.rows, self._example
        other.stores = {key: store.copy() for key, store in self.stores.items()}
        if other.spool is not None and self.spool is not None:
            other.spool = self.spool.copy()
        if other.held_spool is not None and self.held_spool is not None:
            other.held_spool = self.held_spool.copy()
        return other

    def packed(self) -> dict[str, Any]:
        """What is needed to go on fitting, in the form that artifacts hold."""
        assert self._example is not None
        example = Spool()
        example.append(self._example)
        return {
            "rows": self.rows,
            "classes": self.classes,
            "held_out": self.held_out,
            "stores": {str(n): s.packed() for n, s in enumerate(self.stores.values())},
            "places": list(self.stores),
            "spool": None if self.spool is None else self.spool.packed(),
            "held_spool": None if self.held_spool is None else self.held_spool.packed(),
            "example": example.packed(),
        }

    @classmethod
    def unpacked(cls, packed: Mapping[str, Any], recipes: Mapping[str, Recipe]) -> Fitting:
        """The fitting that ``packed`` described."""
        fitting = cls(recipes, packed["classes"], packed["held_out"])
        fitting.rows = packed["rows"]
        fitting.stores = {
            place: FeatureStore.unpacked(store)
            for place, store in zip(packed["places"], packed["stores"].values(), strict=True)
        }
        fitting._example = next(Spool.unpacked(packed["example"]).batches(torch.device("cpu")))
        if fitting.spool is not None and packed["spool"] is not None:
            fitting.spool = Spool.unpacked(packed["spool"])
        if fitting.held_spool is not None and packed["held_spool"] is not None:
            fitting.held_spool = Spool.unpacked(packed["held_spool"])
        return fitting

    @staticmethod
    def _later_stages(recipe: Recipe) -> bool:
        return recipe.stages > 1 or depth(recipe.scorer) > 0

    @property
    def held_rows(self) -> int:
        """How many held-out rows have been given."""
        return len(self.held_spool) if self.held_spool is not None else 0

    def shape(self) -> dict[str, Any]:
        """The sizes of the features that were fitted on: K, D and layers."""
        assert self._example is not None
        rows = self._example
        return {
            "K": None if rows.logits is None else rows.logits.shape[1],
            "D": None if rows.embeddings is None else rows.embeddings.shape[1],
            "layers": {name: list(value.shape[1:]) for name, value in rows.layers.items()},
            "head": rows.head is not None,
        }

    def _begin(self, features: Features) -> None:
        if features.logits is None and features.labels is not None and self.classes is None:
            raise ConfigurationError(
                "how many classes there are cannot be told from these batches: give classes="
            )
        self._example = features[:1].detach()
        self.classes = class_count(features, self.classes)

    def _progress(self, recipe: Recipe) -> _Progress:
        progress = _Progress(recipe, split=recipe.holds_out and not self.held_out)
        self._learn_without_rows(progress)
        return progress

    def _learn_without_rows(self, progress: _Progress) -> None:
        """Fit the parts in turn that want no statistics: they may still want the head."""
        assert self._example is not None
        while progress.scorer is None and not progress.statistics():
            progress.learn(FeatureStore(progress.apply(self._example).head, (), self.classes))

    def _first_fold(self) -> Iterator[tuple[str, FeatureStore, _Progress]]:
        if self._folds is None:
            self._folds = {}
            for recipe in self.recipes.values():
                progress = self._progress(recipe)
                if progress.scorer is None:
                    key = progress.place()
                    store = self.stores.get(key) or FeatureStore(classes=self.classes)
                    store, progress = self._folds.setdefault(key, (store, progress))
                    if not store.rows:
                        for statistic in self._progress(recipe).statistics():
                            store.add(statistic)
        for key, (store, progress) in self._folds.items():
            yield key, store, progress

    def _store_of(self, progress: _Progress) -> FeatureStore:
        store = self.stores.get(progress.place())
        if store is None:
            raise DataError(
                "no row is left to fit on after a tenth was set apart; give held_out= rows"
            )
        return store

    def _round(self, open_ends: list[_Progress], reread: Reread | None) -> None:
        """One fold over the rows set aside, for whatever is next in turn in each recipe."""
        stores: dict[str, tuple[FeatureStore, _Progress]] = {}
        tasks: list[_Measuring] = []
        for progress in open_ends:
            if progress.scorer is None:
                store, _ = stores.setdefault(
                    progress.place(), (FeatureStore(classes=self.classes), progress)
                )
                for statistic in progress.statistics():
                    store.add(statistic)
            else:
                tasks += [_Measuring(progress, *part) for part in progress.to_measure()]
        inputs = any(task.inputs for task in tasks)
        for features in self._rows_again(inputs, False, reread):
            for store, progress in stores.values():
                rows = progress.kept(progress.apply(features))
                if len(rows):
                    store.update(rows)
            for task in tasks:
                if not (task.part.held_out and self.held_out):
                    task.update(features, held_out=task.part.held_out)
        if any(task.part.held_out for task in tasks) and self.held_out:
            for features in self._rows_again(inputs, True, reread):
                for task in tasks:
                    if task.part.held_out:
                        task.update(features, held_out=False)
        for progress in open_ends:
            if progress.scorer is None:
                progress.learn(stores[progress.place()][0])
                self._learn_without_rows(progress)
        for task in tasks:
            task.finish()

    def _rows_again(
        self, inputs: bool, held_out: bool, reread: Reread | None
    ) -> Iterator[Features]:
        if inputs:
            if reread is None:
                raise ConfigurationError(
                    "a part inside this scorer is measured and passes through the model again: "
                    "fit it on data that can be read twice in the same order, in one call of fit"
                )
            return reread(held_out)
        spool = self.held_spool if held_out else self.spool
        assert spool is not None
        assert self._example is not None
        return spool.batches(self._example.device)

    def _learnt(self, progress: _Progress) -> Learnt:
        assert progress.scorer is not None
        assert self._example is not None
        held: dict[str, Any] | None = None
        if progress.recipe.holds_out:
            held = (
                {"rows": len(self.held_spool)}
                if self.held_spool is not None
                else {"share": HELD_OUT_SHARE, "seed": progress.recipe.seed}
            )
        record = {
            "rows": self.rows,
            "classes": self.classes,
            "labelling": labelling(self._example),
            "held_out": held,
        }
        return Learnt(progress.scorer, tuple(progress.shapers), record)


@dataclass
class _Measuring:
    """One part that is being measured."""

    progress: _Progress
    path: Path
    part: Scorer
    rows: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @property
    def inputs(self) -> bool:
        return "inputs" in needed(self.part)

    def update(self, features: Features, *, held_out: bool) -> None:
        progress = self.progress
        assert progress.scorer is not None
        features = progress.kept(progress.apply(features), held_out=held_out)
        if not len(features):
            return
        require(needed(self.part), features, f"scorer '{self.part.kind}'")
        rows = self.part.measure(features, state_at(progress.scorer, self.path))
        if rows is None:
            raise NotFittedError(f"scorer '{self.part.kind}' says that it measures, and does not")
        check_finite(rows, f"what scorer '{self.part.kind}' measures", features.ids)
        self.rows.append(rows.double())
        if features.labels is not None:
            self.labels.append(features.labels)

    def finish(self) -> None:
        if not self.rows:
            raise DataError(
                f"scorer '{self.part.kind}' is measured on held-out rows, and there are none; "
                "give held_out= rows, or more data to set a tenth apart from"
            )
        progress = self.progress
        assert progress.scorer is not None
        state = state_at(progress.scorer, self.path)
        labels = torch.cat(self.labels) if self.labels else None
        done = self.part.finish(state, torch.cat(self.rows), labels)
        progress.scorer = put_state(progress.scorer, self.path, done)
        progress.measured.add(self.path)


def _taken(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[rows.to(inputs.device)]
    if isinstance(inputs, Mapping):
        return {name: _taken(value, rows) for name, value in inputs.items()}
    return [inputs[int(row)] for row in rows]
