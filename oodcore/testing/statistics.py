"""The laws of statistics: one summary, however the rows were divided, ordered and put together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import OodcoreError
from oodcore.features import Features
from oodcore.statistics import Shape, State, Statistic, copy_state
from oodcore.store import FeatureStore
from oodcore.testing.check import Check, Law, checks_of, examine, instance, registered
from oodcore.testing.comparison import (
    TOLERANCE,
    Tensors,
    apart,
    changed,
    copied,
    ordered,
    other_seeds,
    tensors,
    untouched_generators,
    written,
)
from oodcore.testing.description import configured, documented
from oodcore.testing.learning import legal
from oodcore.testing.subject import stripped
from oodcore.testing.toy import USUAL, Network, Sizes, features_of, problem


@dataclass(frozen=True)
class Summary:
    """A statistic under examination.

    Args:
        statistic: the component.
        tolerance: relative, between ways to the same summary.
        network: see ``toy.Network``; None for the toy network.
        sizes: of the toy problem.
    """

    statistic: Statistic
    tolerance: float = TOLERANCE
    network: Network | None = None
    sizes: Sizes = USUAL

    def features(self, sizes: Sizes | None = None, device: str = "cpu") -> Features:
        """The training rows of a toy problem."""
        needs = sorted(self.statistic.needs())
        layers = [need.partition(".")[2] for need in needs if need.startswith("layers.")]
        made = problem(layers, self.network, sizes or self.sizes).on(device)
        with torch.no_grad():
            return features_of(made.model, made.train, inputs="inputs" in needs)

    def begin(self, rows: Features) -> State:
        """The state before any row."""
        layers = {name: tuple(value.shape[1:]) for name, value in rows.layers.items()}
        classes = 1 if rows.head is None else rows.head.weight.shape[0]
        width = 0 if rows.embeddings is None else rows.embeddings.shape[1]
        return self.statistic.init(Shape(classes, width, layers, rows.device))

    @torch.no_grad()
    def state(self, parts: Sequence[Features]) -> State:
        """The state after some batches."""
        state = self.begin(parts[0])
        for part in parts:
            state = self.statistic.update(state, part)
        return state

    def merged(self, a: State, b: State) -> State:
        """The state of both; neither is changed, whatever ``merge`` does to what it is given."""
        return self.statistic.merge(copy_state(a), copy_state(b))

    def view(self, state: State) -> dict[str, Tensor]:
        """What scorers see, rows that were kept in an order of their own."""
        return ordered(self.statistic.view(copy_state(state)))

    def compare(self, state: State, expected: State, how: str) -> None:
        """Raise an AssertionError unless both states show the same."""
        if where := apart(self.view(state), self.view(expected), self.tolerance):
            raise AssertionError(f"{how}, it shows something else: {where}")


def batches(summary: Summary) -> None:
    """Batches of any size and rows in any order give one summary."""
    rows = summary.features().taken(slice(150))
    whole = summary.state([rows])
    singly = summary.state([*_split(rows.taken(slice(20)), 1), rows.taken(slice(20, None))])
    summary.compare(singly, whole, "updated one row at a time")
    for size in (7, 100):
        summary.compare(summary.state(_split(rows, size)), whole, f"updated {size} rows at a time")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(6))
    summary.compare(
        summary.state(_split(rows.taken(order), 50)), whole, "updated in another order of rows"
    )


@torch.no_grad()
def merging(summary: Summary) -> None:
    """States merged in any way give the summary of all rows, an untouched state among them too."""
    rows = summary.features()
    assert rows.labels is not None
    whole = summary.state([rows])
    by_class = [
        rows.taken((rows.labels == k).nonzero().flatten()) for k in range(summary.sizes.classes)
    ]
    for how, parts in (
        ("in three parts", _split(rows, 1 + len(rows) // 3)),
        ("by class", by_class),
    ):
        states = [summary.state([part]) for part in parts]
        forward = states[0]
        backward = states[-1]
        for one, other in zip(states[1:], states[-2::-1], strict=True):
            forward, backward = summary.merged(forward, one), summary.merged(backward, other)
        tail = states[-1]
        for one in states[-2::-1]:
            tail = summary.merged(one, tail)
        summary.compare(forward, whole, f"merged {how}")
        summary.compare(backward, whole, f"merged {how} from the last to the first")
        summary.compare(tail, whole, f"merged {how}, the later ones first")
    nothing = summary.begin(rows)
    summary.compare(summary.merged(whole, nothing), whole, "merged with the state before any row")
    nothing = summary.begin(rows)
    summary.compare(summary.merged(nothing, whole), whole, "merged into the state before any row")
    first, *others = _split(rows, 1 + len(rows) // 4)
    grown = summary.merged(
        summary.state([first]), summary.state(others[:-1] or [rows.taken(slice(0))])
    )
    grown = summary.statistic.update(copy_state(grown), others[-1])
    summary.compare(grown, whole, "merged and then updated")


def empty_batches(summary: Summary) -> None:
    """A batch without rows changes nothing."""
    rows = summary.features()
    whole = summary.state([rows])
    none, first, rest = (rows.taken(s) for s in (slice(0), slice(100), slice(100, None)))
    with_empty = summary.state([none, first, none, rest, none])
    summary.compare(with_empty, whole, "updated with empty batches in between")


def far(summary: Summary) -> None:
    """Rows far from the origin lose no digits: sums of squares do, updated scatters do not."""
    rows = summary.features().taken(slice(150))
    moved = replace(
        rows,
        embeddings=None if rows.embeddings is None else rows.embeddings + 1e6,
        layers={name: value + 1e6 for name, value in rows.layers.items()},
    )
    whole = summary.state([moved])
    summary.compare(summary.state(_split(moved, 7)), whole, "updated 7 rows at a time, far from 0")
    half = len(moved) // 2
    halves = [summary.state([moved.taken(s)]) for s in (slice(half), slice(half, None))]
    summary.compare(summary.merged(*halves), whole, "merged, far from 0")


def odd_rows(summary: Summary) -> None:
    """Few classes and dimensions, equal rows, rows of zeros and large ones: a finite state."""
    usual = summary.features()
    cases = {
        "one class and one dimension": summary.features(Sizes(classes=1, width=1)),
        "one row": usual.taken(slice(1)),
        "equal rows": usual.taken(torch.zeros(20, dtype=torch.int64)),
        "rows of zeros": _times(usual, 0.0),
        "large rows": _times(usual, 1e6),
    }
    for name, rows in cases.items():
        rows = replace(rows, ids=torch.arange(len(rows)))
        state = summary.state([rows])
        legal(state, f"the state of {name}")
        summary.statistic.view(state)
        summary.compare(summary.state(_split(rows, 3)), state, f"updated 3 rows at a time, {name}")


@torch.no_grad()
def needs(summary: Summary) -> None:
    """What ``needs`` declares is enough; labels may be missing."""
    rows = summary.features()
    declared = summary.statistic.needs()
    bare = stripped(rows, declared)
    state = summary.begin(rows)
    state = summary.statistic.update(state, bare)
    summary.compare(state, summary.state([rows]), f"of rows with {sorted(declared)} alone")
    try:
        unlabelled = summary.statistic.update(summary.begin(rows), replace(rows, labels=None))
    except OodcoreError:
        return
    legal(unlabelled)


@torch.no_grad()
def unchanged(summary: Summary) -> None:
    """Features stay as they are, and what was shown stays as it was when more rows come."""
    rows = summary.features()
    before, writes = copied(rows), written(rows)
    state = summary.state(_split(rows.taken(slice(120)), 40))
    view = summary.statistic.view(state)
    shown = copied(view)
    state = summary.statistic.update(state, rows.taken(slice(120, None)))
    summary.statistic.view(state)
    if where := changed(before, tensors(rows)) or changed(writes, written(rows)):
        raise AssertionError(f"update changes the features it is given, in place: {where}")
    if where := changed(shown, tensors(view)):
        raise AssertionError(
            f"a view that was taken changes when more rows come: {where}; update may reuse the "
            "state's storage, so view must not hand it out"
        )


def saved(summary: Summary) -> None:
    """A state holds what artifacts hold, and goes on where it was when it is loaded."""
    rows = summary.features()
    state = summary.state([rows.taken(slice(120))])
    legal(state)
    with (
        registered(summary.statistic),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        store = FeatureStore(statistics=[summary.statistic]).update(rows.taken(slice(120)))
        store.save(Path(folder) / "store")
        loaded = FeatureStore.load(Path(folder) / "store")
        for each in (store, loaded):
            each.update(rows.taken(slice(120, None)))
        expected, given = ordered(store[summary.statistic]), ordered(loaded[summary.statistic])
    if where := apart(given, expected, summary.tolerance):
        raise AssertionError(f"saved, loaded and updated, it shows something else: {where}")


def pure(summary: Summary) -> None:
    """Chance comes from a seed in the fields alone; other instances remember nothing."""
    rows = summary.features()
    with untouched_generators():
        expected: Tensors = summary.view(summary.state([rows]))
    with other_seeds():
        given = summary.view(summary.state([rows]))
    if where := apart(given, expected, summary.tolerance):
        raise AssertionError(f"the same rows give another summary the second time: {where}")


def cuda(summary: Summary, device: str = "cuda") -> None:
    """On a GPU it gives the summary that it gives on the CPU."""
    here, there = summary.features(), summary.features(device=device)
    given = summary.view(summary.state(_split(there, 50)))
    if where := apart(given, summary.view(summary.state([here])), summary.tolerance):
        raise AssertionError(f"it gives another summary on {device} than on the CPU: {where}")


LAWS: dict[str, Law[Summary]] = {
    "documentation": lambda summary: documented(summary.statistic),
    "configuration": lambda summary: configured(summary.statistic),
    "needs": needs,
    "batches": batches,
    "merging": merging,
    "empty batches": empty_batches,
    "far from the origin": far,
    "odd rows": odd_rows,
    "unchanged input": unchanged,
    "saving": saved,
    "purity": pure,
}


def laws() -> dict[str, Law[Summary]]:
    """The laws that can be examined on this machine."""
    return {**LAWS, "cuda": cuda} if torch.cuda.is_available() else LAWS


def _times(rows: Features, factor: float) -> Features:
    return replace(
        rows,
        embeddings=None if rows.embeddings is None else rows.embeddings * factor,
        logits=None if rows.logits is None else rows.logits * factor,
        layers={name: value * factor for name, value in rows.layers.items()},
        inputs=None if rows.inputs is None else rows.inputs * factor,
    )


def _split(rows: Features, size: int) -> list[Features]:
    return [rows.taken(slice(i, i + size)) for i in range(0, len(rows), size)]


def statistic_checks(
    *components: Any, tolerance: float = TOLERANCE, network: Network | None = None
) -> list[Check]:
    """The checks of statistics, one by one, for ``pytest.mark.parametrize``.

    Args:
        components: instances, or classes without required fields.
        tolerance: relative, between ways to the same summary; sketches may need more.
        network: makes another network than the toy network, for layers that it has not.
    """
    found: list[Check] = []
    for component in components:
        statistic = instance(component, Statistic)
        found += checks_of(statistic, Summary(statistic, tolerance, network), laws())
    return found


def check_statistic(
    statistic: Any, *, tolerance: float = TOLERANCE, network: Network | None = None
) -> None:
    """Examine a statistic; arguments as in ``statistic_checks``.

    Raises:
        AssertionError: lists every law that it breaks, and what to do.
    """
    examine(statistic_checks(statistic, tolerance=tolerance, network=network))
