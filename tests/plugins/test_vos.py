"""vos: queues, draws, the term and the score against their formulas, and the laws of both."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from scipy.stats import ks_2samp
from weighted_network import WeightedNetwork

import oodcore
from oodcore import Features, registry
from oodcore.errors import ConfigurationError, DataError
from oodcore.testing import regularizer_checks, scorer_checks
from oodcore.testing.exercise import Exercise, Plan
from oodcore.training import train
from oodcore_plugins.vos import VOS, Queues, Uncertainty, WeightedEnergy, energy

EARLY = VOS(start=0, queue=4, samples=50)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_energy(logits, weights) -> float:
    return math.log(sum(max(1e-12, w) * math.exp(z) for z, w in zip(logits, weights, strict=True)))


@given(
    logits=arrays(np.float64, (4, 3), elements=st.floats(-30, 30)),
    weights=arrays(np.float64, 3, elements=st.floats(0, 3)),
)
def test_the_energy(logits, weights):
    given = energy(torch.from_numpy(logits), torch.from_numpy(weights))
    wanted = [naive_energy(row, weights) for row in logits]
    np.testing.assert_allclose(given.numpy(), wanted, rtol=1e-9, atol=1e-9)


def test_the_energy_of_huge_logits_and_of_no_weight_is_finite():
    given = energy(torch.tensor([[1e4, -1e4], [-1e4, -1e4]]), torch.zeros(2))
    assert torch.isfinite(given).all()


def pushed(batches, size: int, classes: int = 3) -> tuple[Queues, list[list[float]]]:
    """Queues of one number a row, and the same as lists."""
    queues, lists = Queues(classes, size, 1), [[] for _ in range(classes)]
    number = 0.0
    for labels in batches:
        rows = torch.arange(len(labels))[:, None] + number
        queues.push(rows, torch.tensor(labels, dtype=torch.int64))
        for label in labels:
            lists[label].append(number)
            number += 1
    return queues, lists


@given(
    batches=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=6),
    size=st.integers(2, 5),
)
def test_queues_hold_the_newest_rows_of_each_class(batches, size):
    queues, lists = pushed(batches, size)
    assert queues.seen.tolist() == [len(rows) for rows in lists]
    assert queues.full == all(len(rows) >= size for rows in lists)
    for kept, rows in zip(queues.rows[:, :, 0].tolist(), lists, strict=True):
        newest = rows[-size:]
        assert sorted(kept) == sorted(newest + [0.0] * (size - len(newest)))


def filled(seed: int, classes: int = 2, size: int = 60, width: int = 3) -> Queues:
    queues = Queues(classes, size, width)
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.3, 1.0]])[:width, :width]
    rows = torch.randn(classes * size, width, generator=generator(seed)) @ mixing.T
    labels = torch.arange(classes).repeat_interleave(size)
    queues.push(rows + 5 * labels[:, None], labels)
    return queues


def gaussian(queues: Queues) -> tuple[np.ndarray, np.ndarray]:
    """The class means and the covariance, written out."""
    rows = queues.rows.double().numpy()
    means = rows.mean(axis=1)
    total = sum(np.outer(x - m, x - m) for own, m in zip(rows, means, strict=True) for x in own)
    return means, total / (rows.shape[0] * rows.shape[1]) + 1e-4 * np.eye(rows.shape[2])


def distances(drawn: torch.Tensor, queues: Queues) -> np.ndarray:
    """Squared Mahalanobis distances of draws to the mean of their class."""
    means, covariance = gaussian(queues)
    apart = drawn.numpy() - np.repeat(means, len(drawn) // len(means), axis=0)
    return np.einsum("nd,de,ne->n", apart, np.linalg.inv(covariance), apart)


def test_all_draws_together_have_the_distribution_of_the_classes():
    queues = filled(1)
    drawn = queues.draw(40_000, 40_000, generator())
    means, covariance = gaussian(queues)
    for own, mean in zip(drawn.chunk(2), means, strict=True):
        np.testing.assert_allclose(own.mean(dim=0), mean, atol=0.05)
        np.testing.assert_allclose(np.cov(own.numpy().T), covariance, atol=0.1)


def test_the_selected_are_as_unlikely_as_the_least_likely_of_as_many_gaussian_draws():
    queues = filled(2)
    rng, given, wanted = np.random.default_rng(0), [], []
    for seed in range(300):
        given += distances(queues.draw(100, 2, generator(seed)), queues).tolist()
        squares = np.square(rng.standard_normal((2, 100, 3))).sum(axis=2)
        wanted += np.sort(squares, axis=1)[:, -2:].flatten().tolist()
    assert ks_2samp(given, wanted).pvalue > 0.01
    assert np.mean(given) == pytest.approx(np.mean(wanted), rel=0.03)


def test_draws_come_from_the_generator_alone():
    queues = filled(3)
    one, two, other = (queues.draw(50, 3, generator(seed)) for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (6, 3)


def test_rows_that_do_not_differ_still_have_a_distribution():
    queues = Queues(2, 5, 4)
    queues.push(torch.full((10, 4), 1e3), torch.arange(2).repeat(5))
    drawn = queues.draw(20, 1, generator())
    assert torch.isfinite(drawn).all()
    assert (drawn - 1e3).abs().max() < 1


def term(
    logits: torch.Tensor, outliers: torch.Tensor, branch: Uncertainty, head: torch.Tensor
) -> torch.Tensor:
    model = SimpleNamespace(branches={"vos": branch}, head=lambda rows: rows @ head.T)
    step = SimpleNamespace(
        memo={"outliers": outliers},
        run=SimpleNamespace(model=model),
        features=Features(logits=logits),
    )
    return VOS().loss(step, None)


def numbers(seed: int) -> tuple[torch.Tensor, ...]:
    shapes = ((5, 3), (4, 2), (3, 2))
    draw = generator(seed)
    return tuple(torch.randn(shape, generator=draw).double() for shape in shapes)


def uncertainty(weights: list[float], slopes: list[float], biases: list[float]) -> Uncertainty:
    branch = Uncertainty(len(weights), True).double()
    with torch.no_grad():
        branch.weight.copy_(torch.tensor(weights))
        branch.logistic.weight.copy_(torch.tensor(slopes)[:, None])
        branch.logistic.bias.copy_(torch.tensor(biases))
    return branch


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_the_term(seed):
    logits, outliers, head = numbers(seed)
    weights = [0.5, -0.3, 1.5]
    given = term(logits, outliers, uncertainty(weights, [0.4, -0.7], [0.1, 0.2]), head)
    wanted = []
    given = given.detach()
    for known, rows in ((1, logits), (0, outliers @ head.T)):
        for row in rows.tolist():
            e = naive_energy(row, weights)
            classes = [0.4 * e + 0.1, -0.7 * e + 0.2]
            wanted.append(math.log(sum(map(math.exp, classes))) - classes[known])
    # Class 1 is that of the rows.
    assert float(given) == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)


def test_the_gradient_is_that_of_the_formula_and_reaches_the_network():
    logits, outliers, head = numbers(7)
    branch = uncertainty([0.5, 0.3, 1.5], [0.4, -0.7], [0.1, 0.2])
    assert torch.autograd.gradcheck(
        lambda z, w: term(z, outliers, branch, w),
        [logits.requires_grad_(), head.requires_grad_()],
    )
    term(logits, outliers, branch, head).backward()
    for value in (logits, head, branch.weight, branch.logistic.weight):
        assert value.grad.abs().sum() > 0


def test_without_outliers_there_is_no_term():
    step = SimpleNamespace(memo={})
    assert VOS().loss(step, None) is None


@pytest.mark.parametrize(("part", "first"), [(EARLY, 2), (VOS(start=2, queue=4, samples=20), 8)])
def test_the_term_begins_in_its_epoch_when_all_queues_are_full(part, first):
    exercise, begun = Exercise([part]), []
    for index in range(exercise.plan.steps):
        exercise.advance(index)
        exercise.begin()
        if "outliers" in exercise.engine._steps["vos"].memo:
            assert exercise.engine.states["vos"].full
            begun.append(index)
    assert begun == list(range(max(first, begun[0]), exercise.plan.steps))


def test_the_whole_network_learns_from_the_term():
    """What another library lacks: there the energies come back without a gradient."""
    plain = Exercise([]).advance().result()
    with_it = Exercise([EARLY]).advance().result()
    name = next(name for name in plain if name.endswith("maps.weight"))
    assert not torch.equal(plain[name], with_it[name])


def test_unweighted_it_keeps_every_weight_at_1():
    part = VOS(start=0, queue=4, samples=20, weighted=False)
    exercise = Exercise([part]).advance()
    branch = exercise.run.model.branches["vos"]
    assert branch.weight.eq(1).all()
    z = torch.randn(3, 3, generator=generator())
    torch.testing.assert_close(branch.energies(z), z.logsumexp(dim=1))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (VOS(), "starts at epoch 40, and the run has 3"),
        (VOS(start=1), "3 epochs of 32 rows never fill queues of 1000 rows for each of 3 classes"),
    ],
)
def test_a_term_that_would_never_begin_is_refused(part, message):
    with pytest.raises(ConfigurationError, match=message):
        Exercise([part])


def test_queues_that_were_never_full_are_told_of(caplog):
    part = VOS(start=0, queue=31, samples=20)
    with caplog.at_level(logging.WARNING, logger="oodcore"):
        Exercise([part], Plan(epochs=3)).advance()
    assert "ended before all queues were full" in caplog.text
    assert "gave 30 embeddings of 31" in caplog.text


@pytest.mark.parametrize("fields", [{"select": 11, "samples": 10}, {"queue": 1}, {"start": -1}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        VOS(**fields)


def test_the_score_is_the_energy_with_the_weights_of_the_layer():
    logits = torch.randn(4, 3, generator=generator()).double()
    weights = [0.2, 0.0, 1.4]
    features = Features(logits=logits, layers={"vos": torch.tensor(weights).expand(4, 3)})
    given = WeightedEnergy().score(features, {})
    np.testing.assert_allclose(
        given, [naive_energy(row, weights) for row in logits.tolist()], rtol=1e-6
    )


def test_without_weights_of_the_right_shape_there_is_no_score():
    logits = torch.zeros(2, 3)
    with pytest.raises(DataError, match="no such layer"):
        WeightedEnergy().score(Features(logits=logits), {})
    with pytest.raises(DataError, match=r"shape \[2, 4\]"):
        WeightedEnergy().score(Features(logits=logits, layers={"vos": torch.ones(2, 4)}), {})


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_leaves_the_weights_and_a_detector_finds_them(tmp_path, one_thread):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    config = {
        "network": {
            "factory": "oodcore_plugins.networks:mlp",
            "arguments": {"inputs": 64, "classes": 3},
        },
        "train": {"kind": "digits", "split": "train", "classes": [0, 1, 2]},
        "regularizers": [{"kind": "vos", "start": 1, "queue": 20, "samples": 100}],
        "epochs": 2,
        "optimizer": {"kind": "adam", "lr": 0.003},
        "device": "cpu",
    }
    train(config, tmp_path / "run")
    model = {"kind": "run", "path": str(tmp_path / "run"), "layers": ["vos"]}
    detector = oodcore.Detector(model, scorer="weighted_energy", device="cpu")
    detector.fit({"kind": "digits", "split": "train", "classes": [0, 1, 2]})
    given = detector.score({"kind": "digits", "split": "test", "classes": [0, 1, 2]})
    plain = oodcore.Detector(model, scorer="energy", device="cpu")
    plain.fit({"kind": "digits", "split": "train", "classes": [0, 1, 2]})
    other = plain.score({"kind": "digits", "split": "test", "classes": [0, 1, 2]})
    assert np.isfinite(given).all()
    assert not np.allclose(given, other)


@pytest.mark.parametrize("check", regularizer_checks(EARLY), ids=str)
def test_the_laws_of_regularizers(check):
    check()


@pytest.mark.parametrize("check", scorer_checks(WeightedEnergy(), network=WeightedNetwork), ids=str)
def test_the_laws_of_scorers(check):
    check()


def test_both_are_found_by_their_kinds():
    assert registry.build("regularizer", "vos") == VOS(weight=0.1, start=40, queue=1000)
    assert registry.build("scorer", "weighted_energy") == WeightedEnergy(layer="vos")
