"""Laws of scorers and shapers: what they read, what they give, what they leave alone."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from oodcore.metrics import auroc
from oodcore.scorer import Shaper
from oodcore.testing.comparison import (
    SAME,
    apart,
    changed,
    copied,
    other_seeds,
    tensors,
    unfinite,
    untouched_generators,
    written,
)
from oodcore.testing.subject import Subject, stripped

_WITH = "; use features.with_embeddings, with_logits or with_head"
FIELDS = re.compile(r"embeddings|logits|head|inputs|layers\..+")


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
    to_fit = allowed | frozenset[str]().union(*(s.needs() for s in subject.statistics))
    whole = subject.fit(made)
    expected = subject.outputs(made, made.tested, whole)
    try:
        bare = subject.fit(made, edit=lambda features: stripped(features, to_fit))
        with torch.no_grad():
            features = stripped(subject.features(made, made.tested), allowed)
            given = subject.output(features, bare)
    except Exception as error:
        raise AssertionError(
            f"{sorted(to_fit)} alone do not suffice: {type(error).__name__}: {error}; "
            "declare what it reads in needs(), and in that of its statistics"
        ) from error
    shared = given.keys() & expected.keys()
    if not shared:
        raise AssertionError(f"of features with {sorted(allowed)} alone it gives nothing")
    if where := apart({n: given[n] for n in shared}, {n: expected[n] for n in shared}):
        raise AssertionError(
            f"it gives something else of features with {sorted(allowed)} alone than of whole ones: "
            f"{where}; declare what it reads in needs(), and in that of its statistics"
        )
    labelled = subject.features(made, made.train)
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
    raise AssertionError(
        f"its AUROC on the toy problem is {area:.3f}, below {subject.floor}; {advice}"
    )


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
                    f"the score of {len(rows)} rows is {list(values.shape)}; give [N]"
                )
            if values.shape[:1] != (len(rows),):
                raise AssertionError(f"{name} of {len(rows)} rows is {list(values.shape)}")
            if values.dtype != torch.float64 and not name.startswith("layers."):
                raise AssertionError(
                    f"{name} is {values.dtype}; features come as float64 and stay so: cast what "
                    "they meet, as in state['x'].to(rows)"
                )
            if values.device != expected.device:
                raise AssertionError(
                    f"{name} is on {values.device}, the features on {expected.device}"
                )
        if where := unfinite(given):
            raise AssertionError(f"it gives numbers that are not finite: {where}")


def rows_apart(subject: Subject) -> None:
    """A row's output is its own: alone, in any batch, in any order."""
    made = subject.problem()
    learnt = subject.fit(made)
    rows = torch.cat([made.known[:8], made.unknown[:8]])
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
                f"a row gives something else {form} than among {len(rows)} others: {where}; look "
                "for softmax, mean, sort, cumsum or normalisation along dimension 0"
            )


def unchanged(subject: Subject) -> None:
    """Features, the model and what was learnt stay as they are."""
    made = subject.problem()
    (module,) = made.model.modules
    weights = copied(module)
    modes, hooks = [part.training for part in module.modules()], _hooks(module)
    fitting = subject.fitting(made)
    rows = subject.features(made, made.train)
    before, writes = copied(rows), written(rows)
    fitting.update(rows)
    learnt = fitting.finish(lambda held_out: iter([subject.features(made, made.train)]))[""]
    if where := changed(before, tensors(rows)) or changed(writes, written(rows)):
        raise AssertionError(f"fitting changes the features it is given, in place: {where}")
    asked = subject.features(made, made.tested)
    before, writes, state, wrote = copied(asked), written(asked), copied(learnt), written(learnt)
    with torch.no_grad():
        subject.output(asked, learnt)
    if where := changed(before, tensors(asked)) or changed(writes, written(asked)):
        raise AssertionError(
            f"it changes the features it is given, in place: {where}; work on a copy (no trailing "
            "underscore, no slice assignment)"
        )
    if where := changed(state, tensors(learnt)) or changed(wrote, written(learnt)):
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
    if hooks != _hooks(module):
        raise AssertionError("it leaves a hook on the model; take layers from the features")


def _hooks(module: torch.nn.Module) -> int:
    """How many hooks there are on a module and on those inside it."""
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
        for part in module.modules()
    )


def kept(subject: Subject) -> None:
    """Shaped features are of the same rows: labels, ids and logits are not lost."""
    assert isinstance(subject.part, Shaper)
    made = subject.problem()
    learnt = subject.fit(made)
    features = subject.features(made, made.train)
    with torch.no_grad():
        given = subject.part.apply(features, learnt.shapers[0])
    for name in ("labels", "ids"):
        if not torch.equal(getattr(features, name), _or_empty(getattr(given, name))):
            raise AssertionError(f"it loses or changes {name}{_WITH}")
    for name in ("embeddings", "logits"):
        if getattr(given, name) is None:
            raise AssertionError(f"it loses the {name}{_WITH}")
    if missing := sorted(features.layers.keys() - given.layers.keys()):
        raise AssertionError(f"it loses the layers {missing}{_WITH}")


def _or_empty(values: Tensor | None) -> Tensor:
    return torch.empty(0) if values is None else values


def pure(subject: Subject) -> None:
    """Chance comes from a seed in the fields alone, and nothing global is touched."""
    made = subject.problem()
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    with untouched_generators():
        first = subject.fit(made)
        expected = subject.outputs(made, made.tested, first)
    if before != (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()):
        raise AssertionError("it leaves torch's gradient mode, default type or threads changed")
    with other_seeds():
        learnt = subject.fit(made)
        given = subject.outputs(made, made.tested, learnt)
        again = subject.outputs(made, made.tested, learnt)
    if where := apart(tensors(learnt), tensors(first), SAME) or apart(given, expected, SAME):
        raise AssertionError(f"the same rows teach something else the second time: {where}")
    if where := apart(again, given, SAME):
        raise AssertionError(f"the same rows give something else when asked again: {where}")


def cuda(subject: Subject, device: str = "cuda") -> None:
    """On a GPU it learns and gives the same as on the CPU, and stays there."""
    here, there = subject.problem(), subject.problem().on(device)
    expected = subject.outputs(here, here.tested, subject.fit(here))
    learnt = subject.fit(there)
    features = subject.features(there, there.tested)
    with torch.no_grad():
        given = subject.output(features, learnt)
    if any(values.device != features.device for values in given.values()):
        raise AssertionError(f"features are on {features.device}, and what it gives is not")
    if where := apart(given, expected):
        raise AssertionError(f"it gives something else on {device} than on the CPU: {where}")
