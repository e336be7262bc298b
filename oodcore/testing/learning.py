"""Laws of scorers and shapers: how they learn, and that a state is all that they learn."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodcore.detector import load
from oodcore.errors import NotFittedError
from oodcore.index import Index
from oodcore.rows import Rows
from oodcore.scorer import tree
from oodcore.store import FeatureStore
from oodcore.testing.check import registered
from oodcore.testing.comparison import (
    SAME,
    apart,
    changed,
    copied,
    ordered,
    tensors,
    unfinite,
)
from oodcore.testing.subject import Subject
from oodcore.testing.toy import labelled, part_of

NAME = re.compile(r"[a-z0-9_]+")


def state(subject: Subject) -> None:
    """What is learnt can be saved, and is all that an output depends on."""
    made = subject.problem()
    # Large rows too, for what only bounds the features leaves usual ones as they are.
    rows = torch.cat([made.tested, 1e3 * made.tested])
    learnt = subject.fit(made)
    for one in (learnt.scorer, *learnt.shapers):
        legal(one)
    expected = subject.outputs(made, rows, learnt)
    kept = copied(learnt)
    other = subject.fit(made, made.other)
    given = subject.outputs(made, rows, other)
    if changed(kept, tensors(other)) and not changed(expected, given):
        raise AssertionError(
            "fitted on other rows it has another state, and gives the same: what is learnt is not "
            "used, or it remembers what it was fitted on first"
        )
    if where := changed(kept, tensors(learnt)):
        raise AssertionError(f"fitting on other rows changes what was learnt before: {where}")
    if where := apart(subject.outputs(made, rows, learnt), expected, SAME):
        raise AssertionError(
            "the same state gives something else after the component was fitted on other rows: "
            f"{where}; keep what is learnt in the state that fit returns, not on the component, "
            "the class or the module"
        )


def legal(state: Any, at: str = "state") -> None:
    """Raise an AssertionError if a state is not what artifacts hold."""
    if isinstance(state, Rows | Index):
        return
    if isinstance(state, Tensor):
        if state.requires_grad:
            raise AssertionError(f"{at} requires a gradient; detach it")
        if state.is_floating_point() and state.dtype != torch.float64:
            raise AssertionError(f"{at} is {state.dtype}; floating numbers in a state are float64")
        if where := unfinite({at: state}):
            raise AssertionError(f"{where}; what is saved is finite")
        return
    if not isinstance(state, Mapping):
        raise AssertionError(
            f"{at} is a {type(state).__name__}; a state holds tensors, Rows, Index and mappings of "
            "these by name"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise AssertionError(f"{at}: the name {name!r} is not made of a-z, 0-9 and _")
        legal(value, f"{at}.{name}")


def streaming(subject: Subject) -> None:
    """Batches of any size and rows in any order teach the same; learning may go on."""
    made = subject.problem()
    expected = subject.outputs(made, made.tested, subject.fit(made, size=len(made.train)))

    def compare(learnt: Any, how: str) -> None:
        if where := apart(subject.outputs(made, made.tested, learnt), expected):
            raise AssertionError(
                f"fitted {how}, it gives something else than fitted at once: {where}"
            )

    compare(subject.fit(made, size=29), "on batches of 29 rows")
    fitting = subject.fitting(made)
    if fitting.again():
        return
    third = len(made.train) // 3
    fitting.update(subject.features(made, part_of(made.train, slice(0, third))))
    fitting.finish()
    fitting.update(subject.features(made, part_of(made.train, slice(third, None))))
    compare(fitting.finish()[""], "in two calls of partial_fit")
    order = torch.randperm(len(made.train), generator=torch.Generator().manual_seed(4))
    compare(subject.fit(made, part_of(made.train, order)), "on the same rows in another order")


def merging(subject: Subject) -> None:
    """Fitted on parts of the rows, put together in any order, it is as if fitted at once."""
    made = subject.problem()
    statistics = subject.statistics
    cut = len(made.train) // 3
    parts = [slice(0, cut), slice(cut, 2 * cut), slice(2 * cut, None)]
    rows = subject.features(made, made.train)
    stores = [
        FeatureStore(rows.head, statistics, made.sizes.classes).update(rows.taken(p)) for p in parts
    ]
    whole = FeatureStore(rows.head, statistics, made.sizes.classes).update(rows)
    first, second, third = stores
    merged = {
        "one after another": first.merge(second).merge(third),
        "from the last to the first": third.merge(second.merge(first)),
    }
    for how, store in merged.items():
        for statistic in statistics:
            if where := apart(ordered(store[statistic]), ordered(whole[statistic])):
                raise AssertionError(
                    f"its statistic '{statistic.kind}' of three parts, merged {how}, shows "
                    f"something else than of all rows at once: {where}; see check_statistic"
                )
        if any(part.measures for _, part in tree(subject.recipe.scorer)):
            continue
        given, expected = (
            subject.outputs(made, made.tested, subject.learnt_from(one)) for one in (store, whole)
        )
        if where := apart(given, expected):
            raise AssertionError(
                f"fitted on three parts merged {how}, it gives something else than fitted on all "
                f"rows at once: {where}; take no more from the store than its statistics"
            )


def refit(subject: Subject) -> None:
    """Fitting again begins anew: nothing is left of the rows before."""
    made = subject.problem()
    detector = subject.detector(made)
    with registered(*subject.components):
        fresh = subject.detector(made).fit(labelled(made.train)).ready()
        detector.fit(labelled(made.other))
        again = detector.fit(labelled(made.train)).ready()
    expected = {**tensors(fresh), **subject.outputs(made, made.tested, fresh)}
    given = {**tensors(again), **subject.outputs(made, made.tested, again)}
    if where := apart(given, expected, SAME):
        raise AssertionError(
            f"fitted for the second time, it is something else than fitted once: {where}; begin "
            "each fit with nothing"
        )


def artifact(subject: Subject) -> None:
    """Saved and loaded, it gives the same, whatever else the process has fitted meanwhile."""
    made = subject.problem()
    with (
        registered(*subject.components),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        detector = subject.detector(made).fit(labelled(made.train))
        expected = subject.outputs(made, made.tested, detector.ready())
        scores = detector.score(made.tested)
        detector.save(Path(folder) / "detector", store=True)
        subject.detector(made).fit(labelled(made.other))
        loaded = load(Path(folder) / "detector", model=made.model)
        part = loaded.scorer if loaded.scorer == subject.part else loaded.shapers[0]
        given = Subject(part).outputs(made, made.tested, loaded.ready())
        if where := apart(given, expected, SAME):
            raise AssertionError(
                f"loaded again, it gives something else than before it was saved: {where}; all "
                "that it learns must be in the state"
            )
        if not np.allclose(loaded.score(made.tested), scores, rtol=SAME, atol=0):
            raise AssertionError("loaded again, it scores otherwise than before it was saved")


def unfitted(subject: Subject) -> None:
    """Before it is fitted, a detector says so, or it needs no fit and scores as after it."""
    made = subject.problem()
    with registered(*subject.components):
        detector = subject.detector(made)
        try:
            given = detector.score(made.tested)
        except NotFittedError:
            return
        fitted = subject.detector(made).fit(labelled(made.train)).score(made.tested)
    if not np.allclose(given, fitted, rtol=1e-6, atol=0):
        raise AssertionError(
            "it can be used before it is fitted, and gives something else then; what it learns "
            "comes from fit(store), or from measure and finish"
        )
