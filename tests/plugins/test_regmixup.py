"""regmixup and mixup: the draw, the mixing, the two losses, and what the network sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_runs import config_of, drawn, plain, step_of

from oodcore import Features, Regularizer, registry
from oodcore.errors import DataError
from oodcore.testing import regularizer_checks
from oodcore.testing.exercise import Exercise
from oodcore_plugins.confidence_reweighting import ConfidenceReweighting
from oodcore_plugins.regmixup import Mixup, RegMixup, draw, mixed
from oodcore_plugins.sam import SAM

LABELS = torch.tensor([0, 1, 2, 0, 1])


def linear(rows) -> Features:
    return Features(embeddings=rows, logits=rows @ drawn(4, 3, seed=9))


def cross_entropy(logits, label: int) -> float:
    top = float(max(logits))
    lse = top + math.log(sum(math.exp(float(z) - top) for z in logits))
    return lse - float(logits[label])


# The draw


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_shares_are_drawn_from_the_beta_distribution(alpha):
    step = step_of(labels=LABELS)
    shares = np.array([draw(alpha, step)[0] for _ in range(4000)])
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)
    if alpha == 1:  # uniform
        sizes = np.histogram(shares, bins=10, range=(0, 1))[0]
        assert abs(sizes - 400).max() < 100


def test_a_tiny_alpha_takes_one_of_the_two_rows():
    step = step_of(labels=LABELS)
    shares = np.array([draw(1e-4, step)[0] for _ in range(300)])
    assert (np.minimum(shares, 1 - shares) < 1e-6).mean() > 0.98
    assert 0.4 < shares.mean() < 0.6


def test_a_large_alpha_takes_halves():
    shares = [draw(1e12, step_of(labels=LABELS, seed=seed))[0] for seed in range(5)]
    assert shares == pytest.approx([0.5] * 5, abs=1e-5)


def test_orders_are_drawn_evenly_and_from_the_steps_generator_alone():
    state = torch.get_rng_state()
    counts = torch.zeros(5, 5)
    step = step_of(labels=LABELS)
    for _ in range(1000):
        counts[torch.arange(5), draw(1.0, step)[1]] += 1
    assert (counts - 200).abs().max() < 60
    assert torch.equal(torch.get_rng_state(), state)
    one, two, other = (draw(1.0, step_of(labels=LABELS, seed=seed)) for seed in (1, 1, 2))
    assert one[0] == two[0] != other[0]
    assert torch.equal(one[1], two[1])


def test_rows_are_mixed_in_pairs():
    rows, order = drawn(3, 2), torch.tensor([2, 0, 1])
    wanted = [[0.3 * rows[i, j] + 0.7 * rows[order[i], j] for j in range(2)] for i in range(3)]
    given = mixed(rows, 0.3, order)
    torch.testing.assert_close(given, torch.tensor(wanted, dtype=torch.float64))
    assert mixed(rows.float(), 0.3, order).dtype == torch.float32


@pytest.mark.parametrize(
    ("inputs", "given"), [(torch.ones(2, 3).long(), "torch.int64"), ({"pixels": 1}, "dict")]
)
def test_what_cannot_be_mixed_is_refused(inputs, given):
    with pytest.raises(DataError, match=f"one tensor of floating numbers, not {given}"):
        mixed(inputs, 0.5, torch.tensor([1, 0]))


# regmixup


def term(part: RegMixup, step) -> torch.Tensor:
    rows = part.before(step, None)
    assert (rows is not None) == part.joint
    if part.joint:
        step.extra = linear(rows)
    else:
        step.forward = lambda rows, stats: linear(rows)
    return part.loss(step, None)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_term(joint, seed):
    rows = drawn(5, 4)
    step = step_of(labels=LABELS, seed=seed, inputs=rows.clone())
    given = term(RegMixup(joint=joint), step)
    share, order = step.memo["share"], step.memo["order"].tolist()
    wanted = 0.0
    for i in range(5):
        logits = (share * rows[i] + (1 - share) * rows[order[i]]) @ drawn(4, 3, seed=9)
        own, other = (cross_entropy(logits, int(LABELS[k])) for k in (i, order[i]))
        wanted += (share * own + (1 - share) * other) / 5
    assert float(given) == pytest.approx(wanted, rel=1e-10)
    assert torch.equal(step.inputs, rows)


def test_one_row_is_mixed_with_itself():
    step = step_of(labels=LABELS[:1], inputs=drawn(1, 4))
    given = term(RegMixup(), step)
    torch.testing.assert_close(given, plain(linear(drawn(1, 4)), LABELS[:1]).mean())


@pytest.mark.parametrize(("joint", "batches"), [(True, 1), (False, 2)])
def test_mixed_rows_pass_with_the_clean_ones_or_after_them(joint, batches):
    exercise = Exercise([RegMixup(joint=joint)])
    exercise.begin()
    exercise.total()
    assert int(exercise.run.model.network.norm.num_batches_tracked) == batches


@pytest.mark.parametrize("joint", [True, False])
def test_both_passes_of_a_step_see_the_same_mixing(joint):
    exercise = Exercise([RegMixup(joint=joint), SAM(rho=0.05)])
    seen: list[torch.Tensor] = []
    exercise.run.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    exercise.advance(1)
    assert len(seen) == (2 if joint else 4)
    for first, second in zip(seen, seen[len(seen) // 2 :], strict=False):
        assert torch.equal(first, second)


# mixup


def test_mixed_rows_come_in_place_of_the_clean_ones():
    class Beside(Regularizer):
        kind = "beside"

        def before(self, step, state):
            BESIDE.append(step.inputs.clone())

    BESIDE: list[torch.Tensor] = []
    exercise = Exercise([Mixup(), Beside()])
    seen: list[torch.Tensor] = []
    exercise.run.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    exercise.begin()
    total = exercise.total()
    memo = exercise.engine._steps["mixup"].memo
    rows = exercise._numbers(0)
    clean, labels = exercise.inputs[rows], exercise.labels[rows]
    assert torch.equal(BESIDE[0], clean)
    (given,) = seen
    torch.testing.assert_close(given, mixed(clean, memo["share"], memo["order"]))
    logits = exercise.engine._steps["mixup"].features.logits.detach()
    wanted = 0.0
    for i, j in enumerate(memo["order"].tolist()):
        own, other = (cross_entropy(logits[i], int(labels[k])) for k in (i, j))
        wanted += (memo["share"] * own + (1 - memo["share"]) * other) / len(rows)
    assert float(total.detach()) == pytest.approx(wanted, rel=1e-5)


def test_rows_of_others_are_not_mixed_again():
    step = step_of(labels=LABELS, inputs=drawn(5, 4))
    part = Mixup()
    part.before(step, None)
    rows = linear(drawn(5, 4, seed=3))
    given = part.criterion(rows, LABELS, plain, step, None)
    torch.testing.assert_close(given, plain(rows, LABELS))


def test_mixup_with_regmixup_mixes_clean_rows_once_each():
    exercise = Exercise([Mixup(alpha=1), RegMixup(weight=0.5)])
    seen: list[torch.Tensor] = []
    exercise.run.model.register_forward_pre_hook(lambda model, args: seen.append(args[0].clone()))
    exercise.begin()
    total = float(exercise.total().detach())
    clean = exercise.inputs[exercise._numbers(0)]
    steps = exercise.engine._steps
    for kind, rows in zip(("mixup", "regmixup"), seen, strict=True):
        memo = steps[kind].memo
        torch.testing.assert_close(rows, mixed(clean, memo["share"], memo["order"]))
    assert steps["mixup"].memo["share"] != steps["regmixup"].memo["share"]
    features, labels = steps["mixup"].features, steps["mixup"].labels
    memo = steps["mixup"].memo
    own = plain(features, labels).mean(), plain(features, labels[memo["order"]]).mean()
    wanted = memo["share"] * own[0] + (1 - memo["share"]) * own[1]
    exercise.engine._steps["regmixup"].repeat = 1
    wanted = wanted + 0.5 * RegMixup().loss(steps["regmixup"], None)
    assert total == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_two_that_replace_the_rows_are_refused():
    class Replaced(Mixup):
        kind = "cutting"

    with pytest.raises(ValidationError, match="cutting and mixup each replace the rows of"):
        config_of(Mixup(), Replaced())
    config_of(Mixup(), Replaced(weight=0), RegMixup(), ConfidenceReweighting())


@pytest.mark.parametrize("cls", [RegMixup, Mixup])
@pytest.mark.parametrize("alpha", [0, -1, math.inf])
def test_an_alpha_is_above_0(cls, alpha):
    with pytest.raises(ValidationError):
        cls(alpha=alpha)


def test_they_are_found_by_their_kinds():
    assert registry.build("regularizer", "regmixup") == RegMixup(alpha=10, weight=0.5, joint=False)
    assert registry.build("regularizer", "mixup") == Mixup(alpha=1)
    assert Mixup.replaces_batch
    assert not RegMixup.replaces_batch


PARTS = RegMixup(alpha=20, weight=1, joint=True), Mixup(alpha=0.2)


@pytest.mark.parametrize("check", regularizer_checks(*PARTS), ids=str)
def test_the_laws_of_regularizers(check):
    check()
