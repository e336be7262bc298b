"""entropic_open_set and objectosphere: formulas, corners, and the laws of regularizers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from oodcore import Features, registry
from oodcore.config import validate
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise, Plan
from oodcore.training_config import TrainingConfig
from oodcore_plugins.objectosphere import EntropicOpenSet, Objectosphere


def step(known: Features, unknown: Features | None) -> SimpleNamespace:
    return SimpleNamespace(kind="entropic_open_set", features=known, extra=unknown)


def rows(embeddings: np.ndarray, logits: np.ndarray) -> Features:
    return Features(embeddings=torch.from_numpy(embeddings), logits=torch.from_numpy(logits))


def naive_uniform(logits: np.ndarray) -> float:
    losses = []
    for row in logits:
        total = max(row) + math.log(sum(math.exp(z - max(row)) for z in row))
        losses.append(sum(total - z for z in row) / len(row))
    return sum(losses) / len(losses)


LOGITS = arrays(np.float64, (5, 4), elements=st.floats(-30, 30))


@given(logits=LOGITS)
def test_the_entropic_term_is_the_cross_entropy_to_uniform(logits):
    unknown = Features(logits=torch.from_numpy(logits))
    given = EntropicOpenSet().loss(step(Features(logits=torch.zeros(2, 4)), unknown), None)
    assert float(given) == pytest.approx(naive_uniform(logits), rel=1e-9)
    assert float(given) >= math.log(4) - 1e-9


def test_it_is_least_where_all_classes_are_alike():
    unknown = Features(logits=torch.full((3, 7), 2.5, dtype=torch.float64))
    given = EntropicOpenSet().loss(step(unknown, unknown), None)
    assert float(given) == pytest.approx(math.log(7))


@given(
    logits=LOGITS,
    known=arrays(np.float64, (3, 2), elements=st.floats(-9, 9)),
    unknown=arrays(np.float64, (5, 2), elements=st.floats(-9, 9)),
    radius=st.sampled_from([0.0, 3.0, 50.0]),
)
def test_the_formula_of_the_objectosphere(logits, known, unknown, radius):
    part = Objectosphere(radius=radius, magnitude_weight=0.25)
    given = part.loss(step(rows(known, logits[:3]), rows(unknown, logits)), None)
    short = [max(0.0, radius - math.hypot(*row)) ** 2 for row in known]
    long = [row[0] ** 2 + row[1] ** 2 for row in unknown]
    wanted = naive_uniform(logits) + 0.25 * (sum(short) / 3 + sum(long) / 5)
    assert float(given) == pytest.approx(wanted, rel=1e-9)


def test_a_value_worked_out_by_hand():
    # A known row of norm 5 is 1 short of 6, an unknown one of norm 2 is 2 too long.
    known, unknown = rows(np.array([[3.0, 4.0]]), np.zeros((1, 2))), None
    unknown = rows(np.array([[0.0, 2.0]]), np.zeros((1, 2)))
    given = Objectosphere(radius=6, magnitude_weight=0.1).loss(step(known, unknown), None)
    assert float(given) == pytest.approx(math.log(2) + 0.1 * (1 + 4))


def test_the_gradient_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(s, generator=generator).double() for s in ((3, 2), (4, 2), (4, 3))]

    def loss(known, unknown, logits):
        outliers = Features(embeddings=unknown, logits=logits)
        part = Objectosphere(radius=1.5, magnitude_weight=0.3)
        return part.loss(step(Features(embeddings=known, logits=logits[:3]), outliers), None)

    assert torch.autograd.gradcheck(loss, [n.requires_grad_() for n in numbers])


def test_embeddings_at_the_origin_have_a_gradient():
    known = torch.zeros(2, 3, requires_grad=True)
    features = Features(embeddings=known, logits=torch.zeros(2, 3))
    Objectosphere().loss(step(features, features), None).backward()
    assert torch.isfinite(known.grad).all()


def test_rows_beyond_the_radius_are_left_alone():
    known = torch.tensor([[30.0, 40.1]], requires_grad=True)
    unknown = Features(embeddings=torch.zeros(1, 2), logits=torch.zeros(1, 2))
    part = Objectosphere(radius=50, magnitude_weight=1)
    part.loss(step(Features(embeddings=known, logits=torch.zeros(1, 2)), unknown), None).backward()
    assert known.grad.eq(0).all()


@pytest.mark.parametrize("part", [EntropicOpenSet(), Objectosphere()])
def test_a_step_without_outliers_is_refused(part):
    with pytest.raises(DataError, match="needs outliers"):
        part.loss(step(Features(logits=torch.zeros(1, 2)), None), None)


@pytest.mark.parametrize("kind", ["entropic_open_set", "objectosphere"])
def test_a_run_without_outliers_is_refused(kind):
    config = {
        "network": {"factory": "oodcore_plugins.networks:mlp"},
        "train": "digits",
        "epochs": 1,
        "regularizers": [kind],
    }
    with pytest.raises(ConfigurationError, match=f"{kind} needs outliers"):
        validate(TrainingConfig, config)
    assert validate(TrainingConfig, {**config, "outliers": "digits"}).outliers is not None


@pytest.mark.parametrize("fields", [{"radius": -1}, {"magnitude_weight": -1}, {"radius": "50"}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        Objectosphere(**fields)


@pytest.mark.parametrize("part", [EntropicOpenSet(), Objectosphere(radius=5, magnitude_weight=0.1)])
def test_a_run_makes_outliers_less_certain_than_one_without(part):
    def confidence(*parts) -> torch.Tensor:
        exercise = Exercise(parts, Plan(epochs=30)).advance()
        with torch.no_grad():
            logits = exercise.run.model.eval()(exercise.outliers).logits
        return logits.softmax(dim=1).amax(dim=1).mean()

    assert confidence(part) < confidence() - 0.05


def test_the_objectosphere_parts_known_from_unknown_by_their_norm():
    def norms(*parts) -> tuple[float, float]:
        exercise = Exercise(parts, Plan(epochs=30)).advance()
        with torch.no_grad():
            known, unknown = (
                float(exercise.run.model.eval()(x).embeddings.norm(dim=1).mean())
                for x in (exercise.inputs, exercise.outliers)
            )
        return known, unknown

    known, unknown = norms(Objectosphere(radius=5, magnitude_weight=0.3))
    plain_known, plain_unknown = norms()
    assert known > 1
    assert known * plain_unknown > 1.2 * plain_known * unknown


@pytest.mark.parametrize("check", regularizer_checks(EntropicOpenSet(), Objectosphere()), ids=str)
def test_the_laws_of_regularizers(check):
    check()


def test_they_are_found_by_their_kinds():
    assert registry.build("regularizer", "entropic_open_set") == EntropicOpenSet(weight=1)
    built = registry.build("regularizer", "objectosphere")
    assert built == Objectosphere(radius=50, magnitude_weight=1e-4)
    assert built.needs_outliers
