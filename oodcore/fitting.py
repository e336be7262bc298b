"""How detectors learn: stages, each one fold over features, shared by all fitted together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features
from oodcore.recipe import Learnt, Recipe
from oodcore.scorer import depth
from oodcore.selection import HELD_OUT_SHARE
from oodcore.spool import Spool
from oodcore.stages import Measuring, Progress
from oodcore.statistics import State
from oodcore.store import FeatureStore, check_labels, class_count, labelling

Reread = Callable[[bool], Iterator[Features]]
"""``reread(held_out)``: the training rows again (or the held-out ones), with their inputs."""


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
        if held_out and self.holds_out:
            self.held_spool = Spool()
        # Of fixed recipes too: what is kept of a row must be enough to try a saved detector.
        needed = frozenset[str]().union(
            *(recipe.needs(fitting=True) for recipe in self.recipes.values())
        )
        self._layers = frozenset(n.partition(".")[2] for n in needed if n.startswith("layers."))
        self._example: Features | None = None
        self._folds: dict[str, tuple[FeatureStore, Progress]] | None = None

    def needs(self) -> frozenset[str]:
        """Every field of Features that fitting reads."""
        names = frozenset[str]()
        for recipe in self.recipes.values():
            if not recipe.fixed:
                names |= recipe.needs(fitting=True)
        return names

    @property
    def holds_out(self) -> bool:
        """Whether some part is measured on rows on which no part was fitted."""
        return any(recipe.holds_out for recipe in self.recipes.values())

    def again(self) -> bool:
        """Whether a later stage needs the inputs, so that the data is read more than once."""
        return any(recipe.rereads for recipe in self.recipes.values())

    @torch.no_grad()
    def update(self, features: Features) -> None:
        """Take in a batch of training rows, float64 and with ids.

        Raises:
            DataError: a label outside ``0..K-1``, or rows of another kind than those before.
        """
        features = self._stripped(features)
        if self._example is None:
            self._begin(features)
        self._refuse_others(features)
        assert self._example is not None
        assert self.classes is not None
        check_labels(features.labels, self.classes, self.rows)
        features = replace(features, head=self._example.head)
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
        """Take in a batch of held-out rows, with labels or without.

        Raises:
            DataError: as ``update``.
        """
        if self.held_spool is None:
            return
        if self._example is None or self.classes is None:
            raise DataError("there is no row to fit on before those held out")
        features = self._stripped(features)
        self._refuse_others(features, labels=False)
        check_labels(features.labels, self.classes, self.held_rows)
        self.held_spool.append(replace(features, head=self._example.head))

    @torch.no_grad()
    def finish(self, reread: Reread | None = None) -> dict[str, Learnt]:
        """What every recipe has learnt from the rows so far.

        Raises:
            DataError: no rows, or none left to fit on or to hold out.
        """
        if self._example is None:
            raise DataError("there is no row to fit on")
        known: dict[str, State] = {}
        at_work = {name: self._progress(recipe, known) for name, recipe in self.recipes.items()}
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
        assert self._example is not None
        other.rows, other._example = self.rows, other._stripped(self._example)
        progress = other._progress(self.recipes[name])
        if store := self.stores.get(progress.place()):
            other.stores = {progress.place(): store.copy(progress.statistics())}
        if other.spool is not None and self.spool is not None:
            other.spool = self.spool.copy(other._layers)
        if other.held_spool is not None and self.held_spool is not None:
            other.held_spool = self.held_spool.copy(other._layers)
        return other

    def rehearse(self) -> None:
        """Take in the very first row once more, and look at what was kept of the others.

        Raises:
            DataError: rows set aside that cannot be those of this fitting.
        """
        assert self._example is not None
        self.update(self._example)
        for store in self.stores.values():
            for statistic in store.statistics:
                store[statistic]
        for spool in (self.spool, self.held_spool):
            for row in spool.batches(torch.device("cpu"), size=1) if spool is not None else ():
                self._refuse_others(row, labels=spool is self.spool)
                break
            if spool is not None and "labels" in spool.columns and self.classes is not None:
                for labels in spool.columns["labels"].blocks():
                    check_labels(labels, self.classes)

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
        for name in ("spool", "held_spool"):
            if (getattr(fitting, name) is None) != (packed[name] is None):
                raise DataError(f"'{name}' is not what these components need to go on")
            if packed[name] is not None:
                setattr(fitting, name, Spool.unpacked(packed[name]))
        if fitting.spool is not None and len(fitting.spool) != fitting.rows:
            raise DataError(f"{len(fitting.spool)} rows were set aside, of {fitting.rows}")
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
            "types": {
                name: str(value.dtype).removeprefix("torch.") for name, value in rows.layers.items()
            },
            "head": rows.head is not None,
        }

    def _begin(self, features: Features) -> None:
        if features.logits is None and features.labels is not None and self.classes is None:
            raise ConfigurationError(
                "how many classes there are cannot be told from these batches: give classes="
            )
        self._example = _owned(features[:1].detach())
        self.classes = class_count(features, self.classes)

    def _stripped(self, features: Features) -> Features:
        """Features without the layers that only others need."""
        kept = {name: value for name, value in features.layers.items() if name in self._layers}
        if len(kept) == len(features.layers):
            return features
        bare = features.embeddings is None and features.logits is None and not kept
        return features if bare else replace(features, layers=kept)

    def _refuse_others(self, features: Features, labels: bool = True) -> None:
        """Raise a DataError if these rows are not of the kind of the first ones."""
        assert self._example is not None
        given, before = _kind(features), _kind(self._example)
        names = (given.keys() | before.keys()) - (set() if labels else {"labels"})
        for name in sorted(names):
            if given.get(name) != before.get(name):
                raise DataError(
                    f"these rows have {_told(given, name)}, and those before have "
                    f"{_told(before, name)}: what a detector is fitted on is all of one kind"
                )

    def _progress(self, recipe: Recipe, known: dict[str, State] | None = None) -> Progress:
        split = recipe.holds_out and not self.held_out
        progress = Progress(recipe, split, {} if known is None else known)
        self._learn_without_rows(progress)
        return progress

    def _learn_without_rows(self, progress: Progress) -> None:
        """Fit the parts in turn that want no statistics: they may still want the head."""
        assert self._example is not None
        while progress.scorer is None and not progress.statistics():
            progress.learn(FeatureStore(progress.head(self._example), (), self.classes))

    def _first_fold(self) -> Iterator[tuple[str, FeatureStore, Progress]]:
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

    def _store_of(self, progress: Progress) -> FeatureStore:
        store = self.stores.get(progress.place())
        if store is None:
            raise DataError(
                "no row is left to fit on after a tenth was set apart; give held_out= rows"
            )
        return store

    def _round(self, open_ends: list[Progress], reread: Reread | None) -> None:
        """One fold over the rows set aside, for whatever is next in turn in each recipe."""
        stores: dict[str, tuple[FeatureStore, Progress]] = {}
        tasks: list[Measuring] = []
        for progress in open_ends:
            if progress.scorer is None:
                store, _ = stores.setdefault(
                    progress.place(), (FeatureStore(classes=self.classes), progress)
                )
                for statistic in progress.statistics():
                    store.add(statistic)
            else:
                tasks += [Measuring(progress, *part) for part in progress.to_measure()]
        inputs = any(task.inputs for task in tasks)
        inputs |= any(progress.reruns for _, progress in stores.values())
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
                    "a part of this detector passes through the model again once others are "
                    "fitted: fit it on data that can be read twice in the same order, in one call "
                    "of fit"
                )
            return reread(held_out)
        spool = self.held_spool if held_out else self.spool
        assert spool is not None
        assert self._example is not None
        return spool.batches(self._example.device)

    def _learnt(self, progress: Progress) -> Learnt:
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


def _owned(features: Features) -> Features:
    """Features whose head has storage of its own: the model's weights may change later."""
    head = features.head
    return features if head is None else replace(features, head=head.owned())


def _kind(features: Features) -> dict[str, int]:
    """The fields that some rows have, each with its width."""
    kind = {f"layer '{name}'": 1 for name in features.layers}
    if features.labels is not None:
        kind["labels"] = 1
    for name, value in (("embeddings", features.embeddings), ("logits", features.logits)):
        if value is not None:
            kind[name] = value.shape[1]
    return kind


def _told(kind: Mapping[str, int], name: str) -> str:
    if name not in kind:
        return f"no {name}"
    return f"{name} of {kind[name]} columns" if name in ("embeddings", "logits") else name
