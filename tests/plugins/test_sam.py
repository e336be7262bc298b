"""sam: where the gradient is taken, what comes back bit by bit, and what moves once."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from training_runs import drawn

from oodcore import registry
from oodcore.testing import regularizer_checks
from oodcore.testing.comparison import changed
from oodcore.testing.exercise import Exercise
from oodcore_plugins.center import Center
from oodcore_plugins.regmixup import RegMixup
from oodcore_plugins.sam import SAM


def parameters(*shapes, seed=0) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(*shape, seed=seed + n)) for n, shape in enumerate(shapes)]


def optimizer_of(given) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": given[:1]}, {"params": given[1:]}], lr=0.1)


def fourth_powers(given, seen=None):
    """A loss ``sum w^4 / 4``, whose gradient is w^3."""

    def closure():
        for parameter in given:
            parameter.grad = None
        loss = sum(parameter.pow(4).sum() for parameter in given) / 4
        loss.backward()
        if seen is not None:
            seen.append([parameter.detach().clone() for parameter in given])
        return loss

    return closure


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_gradient_is_that_of_the_weights_nearby(adaptive):
    given = parameters((3, 2), (4,), (1,))
    before = [parameter.detach().clone() for parameter in given]
    seen: list = []
    closure = fourth_powers(given, seen)
    part = SAM(rho=0.3, adaptive=adaptive)
    loss = part.wrap_closure(closure, optimizer_of(given))()
    flat = torch.cat([weight.flatten() for weight in before])
    gradient = flat**3
    if adaptive:
        shift = 0.3 * flat**2 * gradient / ((flat.abs() * gradient).square().sum().sqrt())
    else:
        shift = 0.3 * gradient / gradient.square().sum().sqrt()
        assert float(shift.norm()) == pytest.approx(0.3)
    assert float(loss.detach()) == pytest.approx(float(flat.pow(4).sum() / 4))
    assert len(seen) == 2
    torch.testing.assert_close(torch.cat([w.flatten() for w in seen[1]]), flat + shift)
    found = torch.cat([parameter.grad.flatten() for parameter in given])
    torch.testing.assert_close(found, (flat + shift) ** 3)
    for parameter, weight in zip(given, before, strict=True):
        assert torch.equal(parameter, weight)


def test_the_shift_raises_the_loss_as_much_as_any_of_its_length():
    given = parameters((5,))
    seen: list = []
    SAM(rho=1e-4).wrap_closure(fourth_powers(given, seen), optimizer_of(given))()
    worst = seen[1][0].pow(4).sum()
    for seed in range(50):
        aside = drawn(5, seed=100 + seed)
        assert (given[0].detach() + 1e-4 * aside / aside.norm()).pow(4).sum() <= worst


def test_parameters_without_a_gradient_stay():
    given = [
        *parameters((3,)),
        nn.Parameter(torch.ones(2), requires_grad=False),
        nn.Parameter(torch.ones(1)),
    ]
    seen: list = []
    used = given[:1]

    def closure():
        used[0].grad = None
        loss = used[0].square().sum()
        loss.backward()
        seen.append([parameter.detach().clone() for parameter in given])
        return loss

    SAM().wrap_closure(closure, optimizer_of(given))()
    assert not torch.equal(seen[0][0], seen[1][0])
    assert given[1].grad is None
    assert given[2].grad is None
    for number in (1, 2):
        assert torch.equal(seen[0][number], seen[1][number])


def test_no_gradient_at_all_moves_nothing():
    given = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    seen: list = []
    SAM().wrap_closure(fourth_powers(given, seen), optimizer_of(given))()
    assert torch.equal(seen[1][0], seen[0][0])
    assert torch.isfinite(given[0].grad).all()
    frozen = [nn.Parameter(torch.ones(1), requires_grad=False)]
    assert SAM().wrap_closure(lambda: torch.ones(()), optimizer_of(frozen))() == 1


def test_an_error_in_the_second_pass_leaves_the_weights():
    given = parameters((3, 2))
    before = given[0].detach().clone()
    closure, calls = fourth_powers(given), []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("second")
        return closure()

    with pytest.raises(KeyError, match="second"):
        SAM().wrap_closure(failing, optimizer_of(given))()
    assert torch.equal(given[0], before)


@pytest.mark.parametrize("beside", [[], [RegMixup()]], ids=["alone", "regmixup"])
def test_a_radius_of_0_is_the_plain_step_bit_by_bit(beside):
    plain = Exercise(beside).advance().result()
    assert changed(plain, Exercise([*beside, SAM(rho=0)]).advance().result()) is None
    assert changed(plain, Exercise([*beside, SAM()]).advance().result()) is not None


def test_running_statistics_move_in_the_first_pass_alone():
    plain, sharp = (Exercise(parts).advance(1) for parts in ([], [SAM(rho=0.5)]))
    for name, buffer in plain.run.model.named_buffers():
        assert torch.equal(buffer, dict(sharp.run.model.named_buffers())[name]), name
    weight = plain.run.model.network.maps.weight
    assert not torch.equal(weight, sharp.run.model.network.maps.weight)
    sharp.advance()
    assert int(sharp.run.model.network.norm.num_batches_tracked) == sharp.plan.steps


def test_centres_and_histories_step_once():
    part = Center(weights=(0.1,), starts=(0,))
    exercise = Exercise([part, SAM()])
    start = exercise.engine.states["center"].centers.detach().clone()
    exercise.begin()
    step = exercise.engine._steps["center"]
    exercise.optimizer.step(exercise.engine.closure(exercise._pass_back, exercise.optimizer))
    exercise.engine.end()
    rows, labels = step.features.embeddings, step.labels
    wanted = start.clone()
    for row, label in zip(rows, labels.tolist(), strict=True):
        wanted[label] -= 0.5 * 2 * (start[label] - row) / len(rows)
    torch.testing.assert_close(exercise.engine.states["center"].centers.detach(), wanted)


def test_the_numbers_of_an_epoch_are_those_of_first_passes():
    exercise = Exercise([SAM(rho=0.5)])
    exercise.begin()
    first = float(exercise.total().detach())
    exercise.optimizer.step(exercise.engine.closure(exercise._pass_back, exercise.optimizer))
    logged = exercise.engine._sums["loss/total"]
    assert logged.tolist() == [pytest.approx(first), 1]


def test_a_radius_is_at_least_0():
    with pytest.raises(ValidationError):
        SAM(rho=-0.1)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "sam") == SAM(rho=0.05, adaptive=False)


@pytest.mark.parametrize("check", regularizer_checks(SAM(rho=0.5, adaptive=True)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
