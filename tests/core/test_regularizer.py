"""Regularizer: the model that is trained, what is remembered, what a step and a run offer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from oodcore import Features, Head, Memory, Regularizer, Run, Step
from oodcore.component import faults
from oodcore.errors import OodcoreError
from oodcore.regularizer import TrainModel, held_statistics, place


class Cosine(nn.Module):
    """A head without a bias, of unit rows, that says so in its attribute ``head``."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width))

    @property
    def head(self) -> Head:
        return Head(self.weight, normalize_weight=True, normalize_features=True, scale=8.0)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.head(embeddings)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
        self.tail = nn.ModuleDict({"out": nn.Linear(5, 3)})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tail["out"](self.body(pixels))


class Plain(Regularizer):
    kind = "plain"


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run_of(model: TrainModel, **fields) -> Run:
    usual = {"classes": 3, "width": 5, "input_shape": (6,), "rows": 8, "epochs": 1}
    return Run(model=model, steps_per_epoch=1, seed=0, **{**usual, **fields})


def test_features_of_the_model_are_the_networks_and_carry_gradients():
    network = Nested()
    model = TrainModel(network, "tail.out")
    inputs = rows(4, 6)
    features = model(inputs)
    assert torch.equal(features.logits, network(inputs))
    assert torch.equal(features.embeddings, network.body(inputs))
    assert torch.equal(features.head(features.embeddings), features.logits)
    features.logits.sum().backward()
    assert network.body[0].weight.grad is not None
    assert not network.tail["out"]._forward_hooks


def test_the_head_is_replaced_in_its_place():
    network = Nested()
    model = TrainModel(network, "tail.out")
    assert model.head is network.tail["out"]
    model.head = Cosine(5, 3)
    assert network.tail["out"] is model.head
    assert "network.tail.out.weight" in model.state_dict()
    assert not any(name.startswith("head") for name in model.state_dict())
    features = model(rows(4, 6))
    assert features.logits.abs().max() <= 8.0 + 1e-5
    assert features.head.scale == 8.0


def test_a_network_that_is_its_own_head():
    model = TrainModel(nn.Linear(6, 3), "")
    inputs = rows(4, 6)
    assert torch.equal(model(inputs).embeddings, inputs)
    model.head = nn.Linear(6, 2)
    assert model(inputs).logits.shape == (4, 2)


def test_branches_see_the_embeddings_and_train_with_the_model():
    model = TrainModel(Nested(), "tail.out")
    model.branches["confidence"] = nn.Linear(5, 1)
    features = model(rows(4, 6))
    assert torch.equal(
        features.layers["confidence"], model.branches["confidence"](features.embeddings)
    )
    features.layers["confidence"].sum().backward()
    assert model.network.body[0].weight.grad is not None


def test_a_mapping_of_inputs_is_passed_by_name():
    inputs = rows(4, 6)
    model = TrainModel(Nested(), "tail.out")
    assert torch.equal(model({"pixels": inputs}).logits, model(inputs).logits)


@pytest.mark.parametrize("times", [0, 2])
def test_a_head_that_does_not_run_once_is_an_error(times):
    class Odd(Nested):
        def forward(self, pixels):
            logits = rows(len(pixels), 3)
            for _ in range(times):
                logits = self.tail["out"](self.body(pixels))
            return logits

    with pytest.raises(OodcoreError, match=f"'tail.out' ran {times} times"):
        TrainModel(Odd(), "tail.out")(rows(4, 6))


def test_memory_saves_its_optimizers():
    def memory() -> Memory:
        state = Memory()
        state.centers = nn.Parameter(torch.ones(3))
        state.own["centers"] = torch.optim.SGD(state.parameters(), lr=0.1, momentum=0.9)
        return state

    def move(state: Memory) -> None:
        state.own["centers"].zero_grad()
        (state.centers**2).sum().backward()
        state.own["centers"].step()

    one, two = memory(), memory()
    move(one)
    two.load_state_dict(one.state_dict())
    move(one)
    move(two)
    assert torch.equal(one.centers, two.centers)
    fresh = memory()
    with torch.no_grad():
        fresh.centers.copy_(two.centers)
    move(two)
    move(fresh)
    assert not torch.equal(two.centers, fresh.centers), "the momentum must matter for this test"


def test_memory_survives_a_checkpoint_that_runs_no_code(tmp_path):
    state = Memory()
    state.net = nn.Linear(2, 2)
    state.own["net"] = torch.optim.Adam(state.net.parameters())
    state.net(torch.ones(1, 2)).sum().backward()
    state.own["net"].step()
    torch.save(state.state_dict(), tmp_path / "state.ckpt")
    state.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
    ],
    ids=["batch_norm", "instance_norm", "spectral_norm"],
)
def test_held_statistics_hold_and_backward_still_works(layer):
    model = nn.Sequential(layer).train()
    inputs = rows(8, 4)[..., None] if isinstance(layer, nn.InstanceNorm1d) else rows(8, 4)
    inputs = inputs.expand(8, 4, 3) if inputs.ndim == 3 else inputs
    before = {name: value.clone() for name, value in model.named_buffers()}
    originals = dict(model.named_buffers())
    first = model(inputs)
    moved = {name: value.clone() for name, value in model.named_buffers()}
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    with held_statistics(model):
        second = model(inputs + 1)
    assert all(torch.equal(moved[name], value) for name, value in model.named_buffers())
    assert all(originals[name] is value for name, value in model.named_buffers())
    (first.square().sum() + second.square().sum()).backward()


def test_held_statistics_come_back_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(4)).train()
    originals = dict(model.named_buffers())

    def fail():
        with held_statistics(model):
            model(rows(8, 4))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(originals[name] is value for name, value in model.named_buffers())


@given(
    seed=st.integers(0, 2**32),
    one=st.tuples(st.text(max_size=5), st.integers(0, 9)),
    two=st.tuples(st.text(max_size=5), st.integers(0, 9)),
)
def test_places_are_a_pure_function_and_differ(seed, one, two):
    assert 0 <= place(seed, *one) < 2**63
    assert place(seed, *one) == place(seed, *one)
    assert (place(seed, *one) == place(seed, *two)) == (one == two)
    assert place(seed, *one) != place(seed + 1, *one)


def test_a_bare_regularizer_does_nothing():
    part = Plain()
    model = TrainModel(Nested(), "tail.out")
    run = run_of(model)
    assert part.prepare_model(model, run) is model
    assert part.build(run) is None
    assert part.weight_at(3) == 1.0
    assert part.before(None, None) is None
    assert part.loss(None, None) is None
    marker = object()
    assert part.wrap_schedule(marker, run) is marker
    assert part.wrap_closure(marker, None) is marker
    features = model(rows(2, 6))
    losses = part.criterion(features, "labels", lambda given, labels: (given, labels), None, None)
    assert losses == (features, "labels")


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf, "1", True])
def test_a_weight_is_a_number_of_at_least_0(weight):
    with pytest.raises(ValidationError):
        Plain(weight=weight)


def test_it_is_a_component():
    assert Plain(weight=2).dump() == {"kind": "plain", "weight": 2.0}
    assert Plain.model_validate(Plain(weight=0.5).dump()) == Plain(weight=0.5)
    assert faults(Plain, Regularizer) is None


@pytest.mark.parametrize("name", ["loss", "before", "replaces_loss"])
def test_a_field_cannot_hide_a_hook(name):
    with pytest.warns(UserWarning, match=f'Field name "{name}"'):
        cls = type("Hides", (Regularizer,), {"kind": "hides", "__annotations__": {name: int}})
    assert "cannot be named like an attribute" in str(faults(cls, Regularizer))


def test_one_process_gathers_and_averages_nothing():
    model = TrainModel(Nested(), "tail.out")
    run = run_of(model)
    history = rows(4, 2)
    assert run.gather(history) is history
    model(rows(4, 6)).logits.sum().backward()
    before = model.head.weight.grad.clone()
    run.average_gradients(model)
    assert torch.equal(model.head.weight.grad, before)
    assert list(run.batches()) == []


class Told:
    """Stands in for the run's loop, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def forward(self, inputs, *, stats):
        self.asked.append(("forward", stats))
        return Features(embeddings=inputs)

    def criterion(self, rows, labels):
        return torch.zeros(len(labels))

    def log(self, name, value):
        self.asked.append((name, value))


def step_of(loop: Told, **fields) -> Step:
    usual = {"epoch": 0, "index": 0, "ends_epoch": False, "outliers": None, "kind": "plain"}
    return Step(
        run=None,
        inputs=rows(2, 6),
        labels=torch.tensor([0, 1]),
        ids=torch.tensor([0, 1]),
        generator=torch.Generator(),
        loop=loop,
        **{**usual, **fields},
    )


def test_a_repeated_pass_neither_logs_nor_moves_statistics():
    loop = Told()
    first, again = step_of(loop), step_of(loop, repeat=1)
    for step in (first, again):
        step.forward(step.inputs)
        step.forward(step.inputs, stats=True)
        step.log("gap", 0.5)
    assert loop.asked == [
        ("forward", False),
        ("forward", True),
        ("plain/gap", 0.5),
        ("forward", False),
        ("forward", False),
    ]


def test_there_are_no_features_before_the_forward():
    with pytest.raises(AttributeError, match="features"):
        _ = step_of(Told()).features
