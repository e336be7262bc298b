"""swa: the average, the learning rate on the way, and the statistics of the averaged network."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.swa_utils import SWALR, update_bn
from training_runs import drawn

from oodcore import registry
from oodcore.data import Batch
from oodcore.errors import ConfigurationError
from oodcore.testing import regularizer_checks
from oodcore.testing.comparison import changed
from oodcore.testing.exercise import Exercise, Plan
from oodcore_plugins.swa import SWA, Average, renew_statistics


def run_of(epochs: int, **fields) -> SimpleNamespace:
    return SimpleNamespace(epochs=epochs, **fields)


class Epochs(SWA):
    """Keeps the weights of each epoch's end beside the average."""

    kind = "epochs"

    def after(self, step, state):
        super().after(step, state)
        if step.ends_epoch:
            KEPT.append([value.detach().clone() for value in step.run.model.parameters()])


KEPT: list[list[torch.Tensor]] = []


@pytest.mark.parametrize(("start", "epochs"), [(0, 4), (1, 4), (3, 4), (None, 5), (None, 1)])
def test_the_run_ends_with_the_mean_of_the_weights_at_the_ends_of_epochs(start, epochs):
    KEPT.clear()
    exercise = Exercise([Epochs(start=start)], Plan(epochs=epochs)).advance()
    first = {5: 3, 1: 0}[epochs] if start is None else start
    assert len(KEPT) == epochs
    assert int(exercise.engine.states["epochs"].count) == epochs - first
    for number, value in enumerate(exercise.run.model.parameters()):
        wanted = torch.stack([weights[number].double() for weights in KEPT[first:]]).mean(dim=0)
        torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_average_of_one_is_that_one_bit_by_bit():
    KEPT.clear()
    exercise = Exercise([Epochs(start=2)]).advance()
    for value, kept in zip(exercise.run.model.parameters(), KEPT[-1], strict=True):
        assert torch.equal(value, kept)


def test_an_average_of_many_is_exact():
    model = nn.Linear(3, 2).double()
    average, snapshots = Average(model), []
    for seed in range(200):
        with torch.no_grad():
            model.weight.copy_(1e3 + drawn(2, 3, seed=seed))
        average.add(model)
        snapshots.append(model.weight.detach().clone())
    average.copy_to(model)
    wanted = torch.stack(snapshots).mean(dim=0)
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize("anneal", [0, 1, 4])
def test_the_learning_rate_is_that_of_torch(shape, anneal):
    def usual(epoch: float) -> float:
        return 0.1 * 0.9**epoch

    rate = SWA(start=3, lr=0.05, anneal=anneal, shape=shape).wrap_schedule(usual, run_of(12))
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=usual(3))
    strategy = "cos" if shape == "cosine" else "linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no step of the optimizer before the first
        scheduler = SWALR(optimizer, 0.05, anneal_epochs=anneal, anneal_strategy=strategy)
        for epoch in range(3, 12):
            if epoch > 3 or anneal == 0:
                scheduler.step()
            assert rate(epoch) == pytest.approx(optimizer.param_groups[0]["lr"]), epoch
    assert [rate(epoch) for epoch in (0, 1.5, 2.99)] == [usual(e) for e in (0, 1.5, 2.99)]
    assert rate(3.5) == pytest.approx(
        {0: 0.05, 1: (usual(3) + 0.05) / 2}.get(anneal, rate(3.5)), rel=1e-12
    )


class Normed(nn.Module):
    """Two batch normalisations with a dropout between, which may be left out."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 3),
            nn.BatchNorm1d(3, momentum=0.3),
            nn.Dropout(dropout),
            nn.Linear(3, 3),
            nn.BatchNorm1d(3),
        )

    def forward(self, rows):
        return self.body(rows)


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


BATCHES = [drawn(rows, 4, seed=seed).float() for seed, rows in enumerate((5, 5, 4))]


def renewed(model: nn.Module) -> dict[str, torch.Tensor]:
    renew_statistics(
        SimpleNamespace(model=model, batches=lambda: (Batch(rows, None, None) for rows in BATCHES))
    )
    return statistics(model)


def test_statistics_are_those_of_torchs_update():
    model, other = Normed(0.0), Normed(0.0)
    other.load_state_dict(model.state_dict())
    model(10 + drawn(7, 4).float())  # something to forget
    update_bn(BATCHES, other)
    wanted = statistics(other)
    given = renewed(model)
    assert given.keys() == wanted.keys()
    for name, value in given.items():
        torch.testing.assert_close(value, wanted[name])
    assert int(given["body.1.num_batches_tracked"]) == 3


def test_statistics_are_measured_as_the_network_will_be_used():
    model = Normed(0.9)
    again = renewed(model)
    calm = Normed(0.0)
    calm.load_state_dict(model.state_dict())
    for name, value in renewed(calm).items():
        torch.testing.assert_close(again[name], value)


def test_modes_and_momenta_are_left_as_they_were():
    model = Normed(0.5)
    model.body[2].eval()
    renewed(model)
    assert [part.training for part in model.body] == [True, True, False, True, True]
    assert (model.body[1].momentum, model.body[4].momentum) == (0.3, 0.1)


def test_networks_without_statistics_need_no_pass():
    class Run:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))

        def batches(self):
            raise AssertionError("no pass is needed")

    renew_statistics(Run())


def test_the_run_ends_with_statistics_of_the_averaged_weights():
    exercise = Exercise([SWA(start=1)]).advance()
    norm = exercise.run.model.network.norm
    assert int(norm.num_batches_tracked) == exercise.plan.steps_per_epoch
    maps = exercise.run.model.network.maps(exercise.inputs).detach()
    torch.testing.assert_close(norm.running_mean, maps.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert exercise.run.model.training


def test_a_weight_of_0_leaves_the_learning_rate():
    plain = Exercise([]).advance().result()
    assert changed(plain, Exercise([SWA(weight=0)]).advance().result()) is None


def test_a_start_behind_the_last_epoch_is_refused():
    with pytest.raises(ConfigurationError, match=r"starts at epoch 3, and the run has 3"):
        Exercise([SWA(start=3)])
    Exercise([SWA(start=2)])


@pytest.mark.parametrize("fields", [{"lr": 0}, {"start": -1}, {"anneal": -1}, {"shape": "step"}])
def test_fields_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        SWA(**fields)


def test_it_is_found_by_its_kind():
    assert registry.build("regularizer", "swa") == SWA(start=None, lr=0.05, anneal=10)


@pytest.mark.parametrize("check", regularizer_checks(SWA(start=0, anneal=1)), ids=str)
def test_the_laws_of_regularizers(check):
    check()
