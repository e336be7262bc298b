"""Gradients against finite differences, and data at the edge of what there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oodcore.errors import OodcoreError
from oodcore.recipe import Learnt
from oodcore.scorer import Scorer
from oodcore.testing.comparison import unfinite
from oodcore.testing.subject import Subject
from oodcore.testing.toy import Problem, Sizes, features_of

STEP = 1e-5
AGREE = 1e-4
"""Relative difference of a gradient and a finite difference."""
KINK = 1e-3
"""Relative difference of the slopes on both sides, beyond which a row is at a kink."""


def gradient(subject: Subject) -> None:
    """The gradient is that of the function: autograd agrees with finite differences in float64.

    The inputs of the toy network are moved, so that a gradient lost on any way counts. Rows within
    a step of a kink or a jump are left out.
    """
    made = subject.problem()
    learnt = subject.fit(made)
    rows = torch.cat([made.known[:12], made.unknown[:12]]) + 0.05
    generator = torch.Generator().manual_seed(5)
    towards = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    weights: dict[str, Tensor] = {}

    def value(inputs: Tensor) -> Tensor:
        """One number a row: what it gives, weighted at random where that is more than a number."""
        features = features_of(made.model, inputs, subject.reruns)
        total = inputs.new_zeros(len(inputs))
        for name, values in subject.output(features, learnt).items():
            flat = values.flatten(1) if values.ndim > 1 else values[:, None]
            if name not in weights:
                weights[name] = torch.rand(flat.shape[1:], generator=generator, dtype=flat.dtype)
            total = total + flat @ weights[name].to(flat)
        return total

    with torch.no_grad():
        centre, ahead, behind = (
            value(rows),
            value(rows + STEP * towards),
            value(rows - STEP * towards),
        )
    forward, backward = (ahead - centre) / STEP, (centre - behind) / STEP
    slope = (ahead - behind) / (2 * STEP)
    scale = torch.maximum(slope.abs(), slope.abs().median()) + 1e-9 * centre.abs() / STEP
    smooth = (forward - backward).abs() <= KINK * scale + 1e-12
    claims = isinstance(subject.part, Scorer)
    with torch.enable_grad():
        leaf = rows.clone().requires_grad_()
        total = value(leaf)
        if not total.requires_grad:
            if claims or bool((slope.abs() > 1e-9 * centre.abs()).any()):
                raise AssertionError(f"what it gives has no gradient{_cure(claims)}")
            return
        (found,) = torch.autograd.grad(total.sum(), leaf, allow_unused=True)
    if found is None:
        found = torch.zeros_like(rows)
    if not bool(torch.isfinite(found).all()):
        raise AssertionError(f"its gradient is not finite{_cure(claims)}")
    if claims and not bool(found.any()) and bool((centre != centre[0]).any()):
        raise AssertionError(f"its gradient is zero everywhere, it is not constant{_cure(claims)}")
    if claims and int(smooth.sum()) * 2 < len(rows):
        raise AssertionError(
            f"it jumps or has a kink near {len(rows) - int(smooth.sum())} of {len(rows)} rows"
            f"{_cure(claims)}"
        )
    along = (found * towards).flatten(1).sum(1)
    wrong = ((along - slope).abs() > AGREE * scale + 1e-12) & smooth
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise AssertionError(
            f"its gradient is not that of what it gives: along one direction of row {row} autograd "
            f"says {float(along[row]):.6g} and finite differences {float(slope[row]):.6g}"
            f"{_cure(claims)}"
        )


def _cure(claims: bool) -> str:
    if claims:
        return "; leave detach, no_grad, item and numpy out of score, or set differentiable = False"
    return "; leave detach, no_grad, item and numpy out of apply"


def few(subject: Subject) -> None:
    """Few classes, dimensions, rows or places."""
    survive(subject, _few(subject))


def odd(subject: Subject) -> None:
    """Absent classes, rows that are equal, rows of zeros, units that never fire."""
    survive(subject, _odd(subject))


def scales(subject: Subject) -> None:
    """Features a million times larger and smaller."""
    survive(subject, _scales(subject))


def _few(subject: Subject) -> Iterator[tuple[str, Problem]]:
    yield "two classes", subject.problem(Sizes(classes=2))
    if not subject.recipe.needs(fitting=True) & {"logits", "head"}:
        # Without logits, rows without labels are of one class; a classifier has two at least.
        yield "one class", subject.problem(Sizes(classes=1))
    yield "one embedding dimension", subject.problem(Sizes(classes=2, width=1))
    yield "maps of one place", subject.problem(Sizes(side=1))
    made = subject.problem()
    assert made.train.labels is not None
    first = [int((made.train.labels == k).nonzero()[0]) for k in range(made.sizes.classes)]
    yield "one training row of each class", made.with_train(torch.tensor(first))
    yield "one training row", made.with_train(torch.tensor(first[:1]))


def _odd(subject: Subject) -> Iterator[tuple[str, Problem]]:
    made = subject.problem()
    labels = made.train.labels
    assert labels is not None
    every = torch.arange(len(labels))
    yield "a class without training rows", made.with_train((labels != 1).nonzero().flatten())
    yield "each training row four times", made.with_train(every[::4].repeat(4))
    yield "training rows that are all the same", made.with_train(torch.zeros_like(every))

    def half(inputs: Tensor) -> Tensor:
        return torch.where((every % 2 == 0)[:, None, None, None], 0.0, inputs)

    yield "training rows of which half are zero", made.with_train(every, half)
    yield "training rows of zeros", made.with_train(every, torch.zeros_like)

    def dead(inputs: Tensor) -> Tensor:
        return torch.cat([inputs[:, :-3], torch.zeros_like(inputs[:, -3:])], dim=1)

    yield "units that are zero in training", made.with_train(every, dead)


def _scales(subject: Subject) -> Iterator[tuple[str, Problem]]:
    for factor in (1e6, 1e-6):
        yield f"inputs times {factor:g}", subject.problem().scaled(factor)


def survive(subject: Subject, problems: Iterator[tuple[str, Problem]]) -> None:
    """Raise an AssertionError unless each problem gives finite numbers or an error on purpose.

    Rows that are asked about are known, unknown, zero, and a million times as large.
    """
    for name, made in problems:
        asked = {
            "rows like others": made.tested,
            "a row of zeros": torch.zeros_like(made.tested[:1]),
            "rows a million times as large": made.tested[:4] * 1e6,
        }
        fit = partial(subject.fit, made, size=len(made.train))
        learnt = _attempt(fit, f"fitted on {name}")
        if learnt is None or _well(subject, made, learnt, torch.cat(list(asked.values()))):
            continue
        for kind, rows in asked.items():
            where = f"{kind}, fitted on {name}"
            given = _attempt(partial(subject.outputs, made, rows, learnt), where)
            if given is None:
                continue
            if found := unfinite(given):
                raise AssertionError(
                    f"{where}: {found}; define what it is there, or raise an "
                    "oodcore.errors.DataError that says what to do"
                )
            if short := [name for name, values in given.items() if len(values) != len(rows)]:
                raise AssertionError(f"{where}: {short[0]} has not one row a row")


def _well(subject: Subject, made: Problem, learnt: Learnt, rows: Tensor) -> bool:
    """Whether all rows at once give finite numbers, so that none has to be asked about alone."""
    try:
        given = subject.outputs(made, rows, learnt)
    except Exception:  # noqa: BLE001 - whatever it is, it comes again and is told then
        return False
    return not unfinite(given) and all(len(values) == len(rows) for values in given.values())


def _attempt(work: Callable[[], Any], where: str) -> Any:
    """What the work gives, or None where it raises an error on purpose."""
    try:
        return work()
    except OodcoreError as error:
        # The core says this of numbers that a component gave; an error on purpose comes before.
        if "not finite" in str(error):
            raise AssertionError(f"{where}: {error}") from error
        return None
    except Exception as error:
        raise AssertionError(
            f"{where}: {type(error).__name__}: {error}; define what it gives there, or raise an "
            "oodcore.errors.DataError that says what to do"
        ) from error
