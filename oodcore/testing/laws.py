"""The laws that scorers and shapers share: what they read, what they leave alone, what they give."""

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
from oodcore.index import Index, Rows
from oodcore.metrics import auroc
from oodcore.testing.check import registered
from oodcore.testing.comparison import (
    apart,
    changed,
    copied,
    other_seeds,
    tensors,
    unfinite,
    untouched_generators,
)
from oodcore.testing.subject import Subject, stripped
from oodcore.testing.toy import batch

FIELDS = re.compile(r"embeddings|logits|head|inputs|layers\..+")
NAME = re.compile(r"[a-z0-9_]+")
SAME = 1e-9
"""Relative; between runs that differ in nothing that should matter."""


def needs(subject: Subject) -> None:
    """What ``needs`` declares is enough, to fit and to give an output."""
    part = subject.part
    declared = part.needs()
    if not isinstance(declared, frozenset):
        raise AssertionError(f"needs() gives a frozenset of names, not {declared!r}")
    if odd := [name for name in sorted(declared) if not FIELDS.fullmatch(name)]:
        raise AssertionError(
            f"needs() names {odd}; there are embeddings, logits, head, inputs and layers.<name>"
        )
    made = subject.problem()
    recipe = subject.recipe
    allowed = recipe.needs() if recipe.scorer is part else part.needs()
    to_fit = allowed | frozenset[str]().union(*(s.needs() for s in _statistics(subject)))
    whole = subject.fit(made)
    bare = subject.fit(made, edit=lambda features: stripped(features, to_fit))
    expected = subject.outputs(made, made.tested, whole)
    with torch.no_grad():
        features = stripped(subject.features(made, made.tested), allowed)
        given = subject.output(features, bare)
    shared = given.keys() & expected.keys()
    if not shared:
        raise AssertionError(f"of features with {sorted(allowed)} alone it gives nothing")
    if where := apart({n: given[n] for n in shared}, {n: expected[n] for n in shared}):
        raise AssertionError(
            f"it gives something else of features with {sorted(allowed)} alone than of whole ones: "
            f"{where}; declare what it reads in needs(), and in that of its statistics"
        )
    labelled = subject.features(made, batch(made.train.inputs, made.train.labels))  # type: ignore[arg-type]
    with torch.no_grad():
        informed = subject.output(labelled, whole)
    if where := apart(informed, subject.outputs(made, made.train.inputs, whole)):
        raise AssertionError(f"it reads the labels or ids of rows that it is asked about: {where}")


def sign(subject: Subject) -> None:
    """Known rows score higher than unknown ones."""
    assert subject.floor is not None
    made = subject.problem()
    learnt = subject.fit(made)
    known = subject.scores(made, made.known, learnt)
    unknown = subject.scores(made, made.unknown, learnt)
    area = auroc(known.cpu().numpy(), unknown.cpu().numpy())
    if area >= subject.floor:
        return
    advice = (
        "turn the sign: a higher score means more in-distribution"
        if area <= 1 - subject.floor
        else "if the toy problem says nothing about it, say so with floor=None"
    )
    raise AssertionError(f"its AUROC on the toy problem is {area:.3f}, below {subject.floor}; {advice}")


def output(subject: Subject) -> None:
    """Shapes, types, and finite numbers."""
    made = subject.problem()
    learnt = subject.fit(made)
    for rows in (made.tested, made.known[:1]):
        expected = subject.features(made, rows)
        with torch.no_grad():
            given = subject.output(expected, learnt)
        for name, values in given.items():
            if not isinstance(values, Tensor):
                raise AssertionError(f"{name} is a tensor, not a {type(values).__name__}")
            if name == "score" and values.shape != (len(rows),):
                raise AssertionError(
                    f"the score of {len(rows)} rows is {list(values.shape)}; give [N], one number a row"
                )
            if values.shape[:1] != (len(rows),):
                raise AssertionError(f"{name} of {len(rows)} rows is {list(values.shape)}")
            if values.dtype != torch.float64 and not name.startswith("layers."):
                raise AssertionError(
                    f"{name} is {values.dtype}; features come as float64 and stay so: cast what "
                    "they meet, as in state['x'].to(rows)"
                )
            if values.device != expected.device:
                raise AssertionError(f"{name} is on {values.device}, the features on {expected.device}")
        if where := unfinite(given):
            raise AssertionError(f"it gives numbers that are not finite: {where}")


def rows_apart(subject: Subject) -> None:
    """A row's output is its own: alone, in any batch, in any order."""
    made = subject.problem()
    learnt = subject.fit(made)
    rows = torch.cat([made.known[:12], made.unknown[:12]])
    whole = subject.outputs(made, rows, learnt)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))
    twice = subject.outputs(made, torch.cat([rows, rows]), learnt)
    forms: dict[str, dict[str, Tensor]] = {
        "alone": subject.outputs(made, rows, learnt, 1),
        "in batches of 7": subject.outputs(made, rows, learnt, 7),
        "in another order": {
            name: values[order.argsort()]
            for name, values in subject.outputs(made, rows[order], learnt).items()
        },
        "in a batch that has each row twice": {n: v[: len(rows)] for n, v in twice.items()},
    }
    for form, given in forms.items():
        if where := apart(given, whole):
            raise AssertionError(
                f"a row gives something else {form} than among {len(rows)} others: {where}; look for "
                "softmax, mean, sort, cumsum or normalisation along dimension 0"
            )


def unchanged(subject: Subject) -> None:
    """Features, the model and what was learnt stay as they are."""
    made = subject.problem()
    module = made.model.module
    weights = copied(module)
    modes = [part.training for part in module.modules()]
    fitting = subject.fitting(made)
    rows = subject.features(made, made.train)
    before = copied(rows)
    fitting.update(rows)
    learnt = fitting.finish(lambda held_out: iter([subject.features(made, made.train)]))[""]
    if where := changed(before, tensors(rows)):
        raise AssertionError(f"fitting changes the features it is given, in place: {where}")
    state, asked = copied(learnt), subject.features(made, made.tested)
    before = copied(asked)
    with torch.no_grad():
        subject.output(asked, learnt)
    if where := changed(before, tensors(asked)):
        raise AssertionError(
            f"it changes the features it is given, in place: {where}; work on a copy (no trailing "
            "underscore, no slice assignment)"
        )
    if where := changed(state, tensors(learnt)):
        raise AssertionError(f"it changes what was learnt when it is used: {where}")
    if where := changed(weights, tensors(module)):
        raise AssertionError(f"it changes the model: {where}")
    if any(parameter.grad is not None for parameter in module.parameters()):
        raise AssertionError(
            "it leaves gradients on the model's parameters; take torch.autograd.grad in place of "
            "backward"
        )
    if modes != [part.training for part in module.modules()]:
        raise AssertionError("it leaves the model in another mode (train or eval)")


def state(subject: Subject) -> None:
    """What is learnt can be saved, and is all that an output depends on."""
    made = subject.problem()
    learnt = subject.fit(made)
    for one in (learnt.scorer, *learnt.shapers):
        legal(one)
    expected = subject.outputs(made, made.tested, learnt)
    kept = copied(learnt)
    subject.outputs(made, made.tested, subject.fit(made, made.other))
    if where := changed(kept, tensors(learnt)):
        raise AssertionError(f"fitting on other rows changes what was learnt before: {where}")
    if where := apart(subject.outputs(made, made.tested, learnt), expected, SAME):
        raise AssertionError(
            "the same state gives something else after the component was fitted on other rows: "
            f"{where}; keep what is learnt in the state that fit returns, not on the component, the "
            "class or the module"
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
            raise AssertionError(f"fitted {how}, it gives something else than fitted at once: {where}")

    compare(subject.fit(made, size=13), "on batches of 13 rows")
    fitting = subject.fitting(made)
    if fitting.again():
        return
    for part in (slice(0, 100), slice(100, None)):
        fitting.update(subject.features(made, _part(made.train, part)))
        if part.stop:
            first = fitting.finish()[""]
            kept = copied(first)
    compare(fitting.finish()[""], "in two calls of partial_fit")
    if where := changed(kept, tensors(first)):
        raise AssertionError(
            f"what was learnt from the first rows changes when learning goes on: {where}; copy what "
            "a statistic shows before keeping it"
        )
    order = torch.randperm(len(made.train), generator=torch.Generator().manual_seed(4))
    compare(subject.fit(made, _part(made.train, order)), "on the same rows in another order")


def refit(subject: Subject) -> None:
    """Fitting again begins anew: nothing is left of the rows before."""
    made = subject.problem()
    detector = subject.detector(made)
    with registered(*_parts(subject)):
        fresh = subject.detector(made).fit(_data(made.train)).ready()
        detector.fit(_data(made.other))
        again = detector.fit(_data(made.train)).ready()
    expected = subject.outputs(made, made.tested, fresh)
    if where := apart(subject.outputs(made, made.tested, again), expected, SAME):
        raise AssertionError(
            f"fitted for the second time, it gives something else than fitted once: {where}; begin "
            "each fit with nothing"
        )


def pure(subject: Subject) -> None:
    """Chance comes from a seed in the fields alone, and nothing global is touched."""
    made = subject.problem()
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    with untouched_generators():
        expected = subject.outputs(made, made.tested, subject.fit(made))
    if before != (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()):
        raise AssertionError("it leaves torch's gradient mode, default type or threads changed")
    with other_seeds():
        learnt = subject.fit(made)
        given = subject.outputs(made, made.tested, learnt)
        again = subject.outputs(made, made.tested, learnt)
    if where := apart(given, expected, SAME):
        raise AssertionError(f"the same rows teach something else the second time: {where}")
    if where := apart(again, given, SAME):
        raise AssertionError(f"the same rows give something else when asked again: {where}")


def artifact(subject: Subject) -> None:
    """Saved and loaded, it gives the same, whatever else the process has fitted meanwhile."""
    made = subject.problem()
    with registered(*_parts(subject)), tempfile.TemporaryDirectory() as folder:
        detector = subject.detector(made).fit(_data(made.train))
        expected = subject.outputs(made, made.tested, detector.ready())
        scores = detector.score(made.tested)
        detector.save(Path(folder) / "detector", store=not detector.fitting or not subject.reruns)
        subject.detector(made).fit(_data(made.other))
        loaded = load(Path(folder) / "detector", model=made.model)
        part = loaded.scorer if loaded.scorer == subject.part else loaded.shapers[0]
        given = Subject(part).outputs(made, made.tested, loaded.ready())
        if where := apart(given, expected, SAME):
            raise AssertionError(
                f"loaded again, it gives something else than before it was saved: {where}; all that "
                "it learns must be in the state"
            )
        if not np.allclose(loaded.score(made.tested), scores, rtol=SAME, atol=0):
            raise AssertionError("loaded again, it scores otherwise than before it was saved")


def unfitted(subject: Subject) -> None:
    """Before it is fitted, a detector says so, or it needs no fit and scores as after it."""
    made = subject.problem()
    with registered(*_parts(subject)):
        detector = subject.detector(made)
        try:
            given = detector.score(made.tested)
        except NotFittedError:
            return
        fitted = subject.detector(made).fit(_data(made.train)).score(made.tested)
    if not np.allclose(given, fitted, rtol=1e-6, atol=0):
        raise AssertionError(
            "it can be used before it is fitted, and gives something else then; what it learns comes "
            "from fit(store), or from measure and finish"
        )


def cuda(subject: Subject) -> None:
    """On a GPU it learns and gives the same as on the CPU, and stays there."""
    here, there = subject.problem(), subject.problem().on("cuda")
    expected = subject.outputs(here, here.tested, subject.fit(here))
    learnt = subject.fit(there)
    features = subject.features(there, there.tested)
    with torch.no_grad():
        given = subject.output(features, learnt)
    if any(values.device != features.device for values in given.values()):
        raise AssertionError(f"features are on {features.device}, and what it gives is not")
    if where := apart(given, expected, 1e-5):
        raise AssertionError(f"it gives something else on a GPU than on the CPU: {where}")


def _parts(subject: Subject) -> tuple[Any, ...]:
    scorer, shapers = subject.components()
    return scorer, *shapers


def _data(rows: Any) -> Any:
    return rows.inputs, rows.labels


def _part(rows: Any, chosen: Any) -> Any:
    from oodcore.testing.toy import part_of

    return part_of(rows, chosen)


def _statistics(subject: Subject) -> list[Any]:
    from oodcore.scorer import tree

    recipe = subject.recipe
    parts: list[Any] = [part for _, part in tree(recipe.scorer)] + list(recipe.shapers)
    return [statistic for part in parts for statistic in part.statistics()]
