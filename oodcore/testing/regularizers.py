"""The laws of regularizers: what they draw, remember and leave alone, and runs that are resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from oodcore.engine import prepare_model
from oodcore.errors import OodcoreError
from oodcore.features import required
from oodcore.regularizer import Regularizer, Run, Step, TrainModel
from oodcore.testing.check import Check, Law, checks_of, examine, instance
from oodcore.testing.comparison import changed, copied, other_seeds, tensors, untouched_generators
from oodcore.testing.description import configured, documented
from oodcore.testing.exercise import Classifier, Exercise, Plan


class Before(Regularizer):
    """``mean |h|^2``, and a number drawn in each step: company that acts before others."""

    kind = "a_testing_company"

    def build(self, run: Run) -> nn.Module:
        state = nn.Module()
        state.register_buffer("drawn", torch.zeros(run.epochs * run.steps_per_epoch))
        return state

    def before(self, step: Step, state: Any) -> None:
        state.drawn[step.index] = torch.rand((), generator=step.generator)

    def loss(self, step: Step, state: Any) -> Tensor:
        return 0.01 * required(step.features.embeddings, "embeddings").square().mean()


class Behind(Before):
    """``mean |h|^2``, and a number drawn in each step: company that acts after others."""

    kind = "zz_testing_company"


COMPANY = (Before(), Behind())


def off(part: Regularizer) -> None:
    """A weight of 0 leaves a run as it is without it, bit by bit."""
    try:
        silent = type(part).model_validate({**part.dump(), "weight": 0})
    except ValidationError as error:
        raise AssertionError(
            f"it cannot be switched off: weight 0 is refused ({error.errors()[0]['msg']})"
        ) from error
    plain = Exercise([]).advance().result()
    if where := changed(plain, Exercise([silent]).advance().result()):
        raise AssertionError(f"with a weight of 0 it still changes {where}")


def order(part: Regularizer) -> None:
    """The order of the list does not matter, and nobody else draws other numbers for its sake."""
    one, two = COMPANY
    first = Exercise([part, one, two]).advance().result()
    for others in ([two, one, part], [one, part, two]):
        if where := changed(first, Exercise(others).advance().result()):
            raise AssertionError(f"a run depends on the order of the list of regularizers: {where}")
    alone = Exercise(COMPANY).advance().result()
    for other in COMPANY:
        name = f"states.{other.kind}.drawn"
        if not torch.equal(alone[name], first[name]):
            raise AssertionError("in its presence others draw other numbers")


def repeatable(part: Regularizer) -> None:
    """``criterion`` and ``loss`` give the same again, and change nothing."""
    exercise, step, state = _begun(part)
    first = exercise.total().detach().clone()
    if not torch.equal(first, exercise.total().detach()):
        raise AssertionError(
            "a second pass over the same batch gives another total loss; draw from step.generator, "
            "which stands in the same place again, and remember in after"
        )
    before = _surroundings(exercise, step, state)
    criterion = partial(exercise.engine.criterion, step.features, step.labels)
    hooks: dict[str, Callable[[], Any]] = {"criterion": criterion}
    if part.weight_at(step.epoch):
        hooks["loss"] = partial(part.loss, step, state)
    for name, hook in hooks.items():
        _quietly(name, step, hook)
        if where := changed(before, _surroundings(exercise, step, state)):
            raise AssertionError(
                f"{name} changes {where}; remember in after, which runs once a step"
            )
        _no_gradients(name, exercise)


def terms(part: Regularizer) -> None:
    """``criterion`` gives a loss for each row, ``loss`` a scalar with a gradient or None."""
    exercise, step, state = _begun(part)
    exercise.total()
    labels = step.labels
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        rows = exercise.engine.criterion(step.features, labels)
        if rows.shape != labels.shape or not rows.is_floating_point():
            raise AssertionError(
                f"criterion gives {rows.dtype} {list(rows.shape)}; give [N], one a row"
            )
        if not bool(torch.isfinite(rows).all()):
            raise AssertionError("criterion gives numbers that are not finite")
        if not rows.requires_grad:
            raise AssertionError("criterion has no gradient; leave detach and no_grad out of it")
        term = part.loss(step, state) if part.weight_at(step.epoch) else None
    if term is None:
        return
    if not isinstance(term, Tensor) or term.ndim or not term.is_floating_point():
        raise AssertionError(
            f"loss is a scalar tensor of floating numbers or None, not {term!r:.80}"
        )
    if not bool(torch.isfinite(term)):
        raise AssertionError(f"loss is {float(term)}")
    if not term.requires_grad:
        raise AssertionError(
            "loss has no gradient, so it teaches nothing; leave detach and no_grad out of it, or "
            "give None in a step that has no term"
        )


def discreet(part: Regularizer) -> None:
    """``before`` and ``after`` touch their own state alone, and no global generator."""
    for steps in (0, Plan().steps_per_epoch + 1):
        exercise, step, state = _begun(part, steps)
        model, given = exercise.run.model, _given(step)
        weights = _parameters(model)
        rows = _quietly("before", step, partial(part.before, step, state))
        _no_gradients("before", exercise)
        if rows is not None and rows.shape[1:] != step.inputs.shape[1:]:
            raise AssertionError(
                f"before gives rows of shape {list(rows.shape[1:])}, and those of the batch are "
                f"{list(step.inputs.shape[1:])}: they cannot join the forward"
            )
        exercise.total()
        step.features = step.features.detach()
        step.extra = None if step.extra is None else step.extra.detach()
        _quietly("after", step, partial(part.after, step, state))
        if where := changed(given, _given(step)):
            raise AssertionError(f"it changes the batch, in place: {where}")
        if where := changed(weights, _parameters(model)):
            raise AssertionError(f"it changes the network's {where}; only finish may")
        modes = [module.training for module in Exercise([part]).run.model.modules()]
        if modes != [module.training for module in model.modules()]:
            raise AssertionError("it leaves the network in another mode (train or eval)")


def views(part: Regularizer) -> None:
    """``augment`` gives other views, as many and of the same shape, and touches nothing."""
    exercise, step, state = _begun(part, 0)
    step.inputs = exercise.inputs[: len(step.labels)].to(exercise.run.device, copy=True)
    touched = {"the network": exercise.run.model, "the state": state, "the batch": _given(step)}
    before = copied(touched)
    given = before["the batch.inputs"]
    found = [_quietly("augment", step, partial(part.augment, step.inputs, step)) for _ in range(2)]
    if where := changed(before, copied({**touched, "the batch": _given(step)})):
        raise AssertionError(f"augment changes {where}, in place; give other tensors")
    _no_gradients("augment", exercise)
    one, two = found
    if not isinstance(one, Tensor) or one.shape != given.shape or one.dtype != given.dtype:
        shown = f"{one.dtype} {list(one.shape)}" if isinstance(one, Tensor) else f"{one!r:.80}"
        raise AssertionError(
            f"augment gives {shown}, and the rows are {given.dtype} {list(given.shape)}; labels "
            "and ids are theirs, so give as many, of the same shape and type"
        )
    if not bool(torch.isfinite(one).all()):
        raise AssertionError("augment gives numbers that are not finite")
    if one.requires_grad:
        raise AssertionError(
            "augment gives rows with a graph, which would be gone in a second pass"
        )
    if not torch.equal(one, two):
        raise AssertionError(
            "augment gives other views when it is called again; draw from step.generator, which "
            "stands in the same place"
        )


def outliers(part: Regularizer) -> None:
    """``needs_outliers`` says whether it can do without; what it asks for, it uses."""
    if not part.needs_outliers:
        try:
            Exercise([part], Plan(outliers="none")).advance()
        except Exception as error:
            raise AssertionError(
                "a run without outliers fails, and only a regularizer that says "
                f"needs_outliers = True is kept from one: {type(error).__name__}: {error}"
            ) from error
        return
    usual = Exercise([part]).advance().result()
    if not changed(usual, Exercise([part], Plan(outliers="other")).advance().result()):
        raise AssertionError(
            "it says needs_outliers = True, and other outliers change nothing; return them from "
            "before to find them in step.extra, or leave needs_outliers away"
        )


def schedules(part: Regularizer) -> None:
    """``weight_at`` and ``wrap_schedule`` are pure functions to numbers of at least 0."""
    run = Exercise([part]).run
    rate = part.wrap_schedule(lambda epoch: 0.05, run)
    for epoch in range(run.epochs):
        weights = [part.weight_at(epoch) for _ in range(2)]
        rates = [rate(epoch + 0.5) for _ in range(2)]
        for name, values in (("weight_at", weights), ("wrap_schedule", rates)):
            if values[0] != values[1] or not (math.isfinite(values[0]) and values[0] >= 0):
                raise AssertionError(f"{name} of epoch {epoch} gives {values[0]}, then {values[1]}")


def chance(part: Regularizer) -> None:
    """The same run again, with the global generators elsewhere, ends with the same weights."""
    first = Exercise([part]).advance().result()
    with other_seeds():
        second = Exercise([part]).advance().result()
    if where := changed(first, second):
        raise AssertionError(
            f"the same run ends with other numbers in {where}; draw from step.generator alone, and "
            "keep what is remembered in the state that build returns"
        )


def resume(part: Regularizer) -> None:
    """A run that is stopped and resumed at any step ends as one that was not."""
    plan = Plan()
    ends = 2 * plan.steps_per_epoch
    points = (2, ends - 1, ends, ends + 1, plan.steps - 1)
    straight = Exercise([part])
    saved = {point: straight.advance(point).checkpoint() for point in points}
    expected = straight.advance().result()
    for point, checkpoint in saved.items():
        given = Exercise([part]).resume(checkpoint).advance().result()
        if where := changed(expected, given):
            raise AssertionError(
                f"resumed after step {point} it ends with other numbers in {where}: "
                "all that it remembers must be buffers, parameters and own optimizers of the "
                "state that build returns"
            )


def reloads(part: Regularizer) -> None:
    """The trained model is made again by ``prepare_model`` and its weights."""
    exercise = Exercise([part]).advance()
    trained = exercise.run.model.eval()
    with torch.random.fork_rng(devices=[]):
        fresh = TrainModel(Classifier(exercise.plan.classes), "head")
        again = Run(**{**vars(exercise.run), "model": fresh})
        prepare_model(again, [part])
    try:
        again.model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise AssertionError(
            f"prepare_model does not make the trained model again: {error}"
        ) from error
    with torch.no_grad():
        one, two = (model(exercise.inputs) for model in (trained, again.model.eval()))
    if where := changed(tensors(one), tensors(two)):
        raise AssertionError(f"the model that prepare_model makes again gives other {where}")


def few(part: Regularizer) -> None:
    """Two classes, two rows a step: finite, or an error on purpose."""
    try:
        result = Exercise([part], Plan(classes=2, rows=4, batch=2, epochs=2)).advance().result()
    except OodcoreError:
        return
    bad = [name for name, values in result.items() if not bool(torch.isfinite(values).all())]
    if any(name.startswith("model.") for name in bad):
        raise AssertionError(
            f"with two rows a step the run ends with numbers that are not finite: {bad}"
        )


def cuda(part: Regularizer) -> None:
    """A few steps on a GPU."""
    Exercise([part], Plan(device="cuda", epochs=1)).advance()


LAWS: dict[str, Law[Regularizer]] = {
    "documentation": documented,
    "configuration": configured,
    "weight 0": off,
    "order of the list": order,
    "repeated passes": repeatable,
    "terms": terms,
    "before and after": discreet,
    "views": views,
    "outliers": outliers,
    "schedules": schedules,
    "chance": chance,
    "resuming": resume,
    "reloading": reloads,
    "few rows": few,
}


def regularizer_checks(*components: Any) -> list[Check]:
    """The checks of regularizers, one by one, for ``pytest.mark.parametrize``.

    A regularizer that begins late, or needs long, is examined with fields that make it begin in the
    first of three epochs and take few steps.

    Args:
        components: instances, or classes without required fields.
    """
    laws = {**LAWS, "cuda": cuda} if torch.cuda.is_available() else LAWS
    found: list[Check] = []
    for component in components:
        part = instance(component, Regularizer)
        found += checks_of(part, part, laws)
    return found


def check_regularizer(regularizer: Any) -> None:
    """Examine a regularizer; arguments as in ``regularizer_checks``.

    Raises:
        AssertionError: lists every law that it breaks, and what to do.
    """
    examine(regularizer_checks(regularizer))


def _begun(part: Regularizer, steps: int | None = None) -> tuple[Exercise, Step, Any]:
    """A run whose next batch was begun, in its second epoch where ``steps`` does not say otherwise;
    the regularizer's step and state."""
    exercise = Exercise([part])
    exercise.advance(exercise.plan.steps_per_epoch + 1 if steps is None else steps)
    exercise.optimizer.zero_grad()
    exercise.begin()
    if part.kind not in exercise.engine.states:
        raise AssertionError("its weight is 0; examine it with a weight above 0")
    return exercise, exercise.engine._steps[part.kind], exercise.engine.states[part.kind]


def _quietly(name: str, step: Step, hook: Any) -> Any:
    """Call a hook as in a repeated pass; it may draw from the step's generator alone."""
    place, repeat = step.generator.get_state(), step.repeat
    try:
        step.repeat = 1
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), untouched_generators():
            return hook()
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}; here that is step.generator") from error
    finally:
        step.repeat = repeat
        step.generator.set_state(place)


def _surroundings(exercise: Exercise, step: Step, state: Any) -> dict[str, Tensor]:
    """All that criterion and loss may not change."""
    parts = {"the network": exercise.run.model, "the state": state, "the batch": _given(step)}
    return copied({**parts, "the features": step.features, "the extra rows": step.extra})


def _given(step: Step) -> dict[str, Tensor]:
    return copied(
        {
            "inputs": step.inputs,
            "labels": step.labels,
            "ids": step.ids,
            "outliers": step.outliers,
        }
    )


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return copied(dict(model.named_parameters()))


def _no_gradients(name: str, exercise: Exercise) -> None:
    if any(parameter.grad is not None for parameter in exercise.run.model.parameters()):
        raise AssertionError(
            f"{name} leaves gradients on the network; take torch.autograd.grad in place of backward"
        )
