"""cider: the term and the prototypes against their formulas, the head, and the laws."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from oodcore import Features, registry
from oodcore.features import unit
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise, Plan
from oodcore_plugins.cider import Cider, Probe, dispersion, moved

SMALL = Cider(width=5)


def numbers(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).double() for shape in shapes)


def naive_moved(prototypes, points, labels, momentum) -> np.ndarray:
    found = prototypes.numpy().copy()
    for point, label in zip(points.numpy(), labels.tolist(), strict=True):
        mean = momentum * found[label] + (1 - momentum) * point
        found[label] = mean / np.linalg.norm(mean)
    return found


def naive_term(prototypes, points, labels, part: Cider) -> float:
    p = naive_moved(prototypes, points, labels, part.momentum)
    t, classes = part.temperature, len(p)
    apart = [
        math.log(sum(math.exp(p[k] @ p[j] / t) for j in range(classes) if j != k) / (classes - 1))
        for k in range(classes)
    ]
    near = []
    for point, label in zip(points.numpy(), labels.tolist(), strict=True):
        shares = [math.exp(point @ p[k] / t) for k in range(classes)]
        near.append(-math.log(shares[label] / sum(shares)))
    return float(np.mean(apart) + part.compactness * np.mean(near))


def term(part: Cider, prototypes, layer, labels) -> torch.Tensor:
    features = Features(embeddings=torch.zeros(len(labels), 2), layers={"cider": layer})
    step = SimpleNamespace(features=features, labels=labels)
    return part.loss(step, SimpleNamespace(prototypes=prototypes))


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_prototypes_follow_the_rows_one_after_another(seed, labels, momentum):
    prototypes, points = numbers((4, 3), (len(labels), 3), seed=seed)
    prototypes, points, labels = unit(prototypes), unit(points), torch.tensor(labels)
    given = moved(prototypes, points, labels, momentum)
    np.testing.assert_allclose(given, naive_moved(prototypes, points, labels, momentum), rtol=1e-9)


def test_prototypes_of_other_classes_stay_and_nothing_is_changed_in_place():
    prototypes, points = numbers((3, 2), (2, 2))
    prototypes = unit(prototypes)
    before = prototypes.clone()
    given = moved(prototypes, unit(points), torch.tensor([1, 1]), 0.9)
    assert torch.equal(prototypes, before)
    assert torch.equal(given[[0, 2]], prototypes[[0, 2]])
    assert not torch.equal(given[1], prototypes[1])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 4),
    part=st.sampled_from([SMALL, Cider(temperature=0.5, compactness=0.3, momentum=0.2)]),
)
def test_the_term(seed, classes, part):
    prototypes, layer = numbers((classes, 3), (6, 3), seed=seed)
    labels = torch.arange(6) % classes
    given = term(part, unit(prototypes), layer, labels)
    wanted = naive_term(unit(prototypes), unit(layer), labels, part)
    assert float(given) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_a_dispersion_worked_out_by_hand():
    # Opposite points of two classes: log exp(-1 / 0.1).
    prototypes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert float(dispersion(prototypes, 0.1)) == pytest.approx(-10)
    corners = torch.eye(4, dtype=torch.float64)
    assert float(dispersion(corners, 0.1)) == pytest.approx(0)


def test_the_gradient_is_that_of_the_formula_with_fixed_prototypes_in_compactness():
    """By finite differences: dispersion moves with the points, compactness's prototypes do not."""
    prototypes, layer = numbers((3, 4), (5, 4), seed=3)
    prototypes, labels = unit(prototypes), torch.tensor([0, 1, 2, 2, 2])
    part = Cider(temperature=0.5, momentum=0.6, compactness=0.7)
    layer.requires_grad_()
    [given] = torch.autograd.grad(term(part, prototypes, layer, labels), [layer])
    fixed = moved(prototypes, unit(layer.detach()), labels, part.momentum)

    def value(rows: torch.Tensor) -> float:
        points = unit(rows)
        apart = dispersion(moved(prototypes, points, labels, part.momentum), part.temperature)
        alike = points @ fixed.T / part.temperature
        near = torch.nn.functional.cross_entropy(alike, labels)
        return float(apart + part.compactness * near)

    for i in range(5):
        for j in range(4):
            shift = torch.zeros_like(given)
            shift[i, j] = 1e-6
            slope = (value(layer.detach() + shift) - value(layer.detach() - shift)) / 2e-6
            assert float(given[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_the_gradient_of_dispersion_reaches_the_points():
    prototypes, layer = numbers((3, 4), (5, 4))
    part = Cider(compactness=0)
    loss = term(part, unit(prototypes), layer.requires_grad_(), torch.tensor([0, 1, 2, 2, 2]))
    loss.backward()
    assert layer.grad.abs().sum() > 0


def test_points_and_prototypes_at_the_origin_have_a_gradient():
    layer = torch.zeros(4, 3, requires_grad=True)
    loss = term(SMALL, torch.zeros(3, 3), layer, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert torch.isfinite(layer.grad).all()


def test_prototypes_begin_as_the_mean_points_of_the_classes():
    exercise = Exercise([SMALL])
    model = exercise.run.model.eval()
    with torch.no_grad():
        points = unit(model(exercise.inputs).layers["cider"]).double()
    wanted = torch.stack([points[exercise.labels == k].mean(dim=0) for k in range(3)])
    given = exercise.engine.states["cider"].prototypes.double()
    torch.testing.assert_close(given, unit(wanted), atol=1e-6, rtol=1e-5)


def test_building_leaves_the_network_as_it_was():
    plain, exercise = Exercise([]), Exercise([SMALL])
    assert all(module.training for module in exercise.run.model.modules())
    norm = exercise.run.model.network.norm
    assert torch.equal(norm.running_mean, plain.run.model.network.norm.running_mean)
    assert norm.num_batches_tracked == 0


def test_after_a_step_the_prototypes_have_followed_its_rows():
    exercise = Exercise([SMALL])
    before = exercise.engine.states["cider"].prototypes.clone()
    exercise.begin()
    exercise.total()
    step = exercise.engine._steps["cider"]
    points = unit(step.features.layers["cider"]).detach()
    exercise.engine.end()
    wanted = moved(before, points, step.labels, 0.95)
    assert torch.equal(exercise.engine.states["cider"].prototypes, wanted)


def gradients(part: Cider) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the classification loss alone, in the first layer and in the head."""
    exercise = Exercise([part])
    exercise.begin()
    exercise.total()
    step = exercise.engine._steps["cider"]
    loss = exercise.engine.criterion(step.features, step.labels).mean()
    network = exercise.run.model.network
    head = network.head.inner if isinstance(network.head, Probe) else network.head
    targets = [network.maps.weight, head.weight]
    first, last = torch.autograd.grad(loss, targets, allow_unused=True)
    return torch.zeros(1) if first is None else first, last


def test_the_classification_loss_trains_the_head_and_nothing_else():
    first, head = gradients(SMALL)
    assert first.abs().sum() == 0
    assert head.abs().sum() > 0


def test_jointly_it_trains_the_network():
    first, head = gradients(Cider(width=5, joint=True))
    assert first.abs().sum() > 0
    assert head.abs().sum() > 0


def test_at_test_time_the_head_passes_a_gradient_to_the_input():
    """Scorers that move the input need it."""
    exercise = Exercise([SMALL]).advance()
    inputs = exercise.inputs.clone().requires_grad_()
    features = exercise.run.model.eval()(inputs)
    features.logits.sum().backward()
    assert inputs.grad.abs().sum() > 0
    torch.testing.assert_close(features.head(features.embeddings), features.logits)


def test_a_run_that_starts_from_one_keeps_its_head():
    run = Exercise([SMALL]).run
    head = run.model.head
    assert isinstance(head, Probe)
    assert SMALL.prepare_model(run.model, run).head is head


def test_a_run_makes_classes_compact_and_disperses_them():
    def measured(*parts) -> tuple[float, float]:
        exercise = Exercise(parts, Plan(epochs=25)).advance()
        with torch.no_grad():
            rows = unit(exercise.run.model.eval()(exercise.inputs).embeddings)
        means = torch.stack([rows[exercise.labels == k].mean(dim=0) for k in range(3)])
        within = float((rows * unit(means)[exercise.labels]).sum(dim=1).mean())
        between = unit(means) @ unit(means).T
        return within, float(between[~torch.eye(3, dtype=torch.bool)].mean())

    within, between = measured(SMALL)
    plain_within, plain_between = measured()
    assert within > plain_within
    assert between < plain_between - 0.1


@pytest.mark.parametrize(
    "fields", [{"momentum": 1}, {"momentum": -0.1}, {"temperature": 0}, {"width": 0}]
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        Cider(**fields)


@pytest.mark.parametrize("check", regularizer_checks(SMALL, Cider(joint=True, width=4)), ids=str)
def test_the_laws_of_regularizers(check):
    check()


def test_it_is_found_by_its_kind():
    built = registry.build("regularizer", "cider")
    assert built == Cider(width=128, temperature=0.1, compactness=2, momentum=0.95, joint=False)
