"""confidence_reweighting: the weights, where they come from, and a run from another's folder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError
from torch import nn
from training_runs import STEPS, Points, config_of, drawn, plain, weights

from oodcore import Features, registry
from oodcore.run_folder import RunFolder
from oodcore.testing import regularizer_checks
from oodcore.testing.comparison import changed, copied
from oodcore.testing.exercise import Exercise
from oodcore.training import train
from oodcore_plugins.confidence_reweighting import ConfidenceReweighting
from oodcore_plugins.cosine_head import CosineHead
from oodcore_plugins.regmixup import RegMixup
from oodcore_plugins.sam import SAM

LABELS = torch.tensor([0, 1, 2, 0])


def state_of(confidence) -> nn.Module:
    state = nn.Module()
    state.register_buffer("confidence", torch.as_tensor(confidence, dtype=torch.float64))
    return state


def losses(confidence, ids=(0, 1, 2, 3), **fields) -> torch.Tensor:
    rows = Features(logits=drawn(4, 3), ids=None if ids is None else torch.tensor(ids))
    part = ConfidenceReweighting(**fields)
    return part.criterion(rows, LABELS, plain, None, state_of(confidence))


@given(
    confidence=arrays(np.float64, 6, elements=st.floats(0.1, 1)),
    t=st.sampled_from([0, 0.5, 1, 5]),
    clamp=st.booleans(),
    ids=st.permutations(range(6)),
)
def test_the_formula(confidence, t, clamp, ids):
    ids = ids[:4]
    shares = [math.exp(-t * confidence[i]) for i in ids]
    factors = [share / (sum(shares) / 4) for share in shares]
    factors = [min(max(factor, 1e-4), 1) for factor in factors] if clamp else factors
    wanted = plain(Features(logits=drawn(4, 3)), LABELS) * torch.tensor(factors).double()
    given = losses(confidence, tuple(ids), t=t, clamp=clamp)
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-9)


def test_a_t_of_0_weighs_all_alike():
    wanted = plain(Features(logits=drawn(4, 3)), LABELS)
    torch.testing.assert_close(losses([0.2, 0.9, 1, 0.4], t=0), wanted)


def test_rows_of_others_keep_their_loss():
    wanted = plain(Features(logits=drawn(4, 3)), LABELS)
    assert torch.equal(losses([0.2, 0.9, 1, 0.4], ids=None, t=5), wanted)


def test_one_row_counts_1():
    part = ConfidenceReweighting(t=3)
    rows = Features(logits=drawn(1, 3), ids=torch.tensor([2]))
    given = part.criterion(rows, LABELS[:1], plain, None, state_of([0.1, 0.2, 0.9]))
    torch.testing.assert_close(given, plain(rows, LABELS[:1]))


def test_the_gradient_goes_through_the_loss_alone():
    part, state = ConfidenceReweighting(t=2), state_of([0.2, 0.9, 1, 0.4])

    def loss(logits):
        rows = Features(logits=logits, ids=torch.arange(4))
        return part.criterion(rows, LABELS, plain, None, state)

    assert torch.autograd.gradcheck(loss, [drawn(4, 3).requires_grad_()])


def test_what_further_in_gives_is_weighed():
    def further(rows, labels):
        return torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)

    rows = Features(logits=drawn(4, 3), ids=torch.arange(4))
    state = state_of([0, 0, 1, 1])
    given = ConfidenceReweighting(t=1).criterion(rows, LABELS, further, None, state)
    mean = (1 + math.exp(-1)) / 2
    wanted = torch.tensor([1.0, 2, 3 * math.exp(-1), 4 * math.exp(-1)], dtype=torch.float64) / mean
    torch.testing.assert_close(given, wanted)


def test_confidence_is_measured_once_on_the_network_as_it_is_used():
    plain_run = Exercise([])
    part = ConfidenceReweighting()
    run = plain_run.run
    run.model.network.norm.train()
    run.model.network.head.eval()
    before = copied(run.model)
    modes = [module.training for module in run.model.modules()]
    state = part.build(run)
    assert changed(before, copied(run.model)) is None
    assert [module.training for module in run.model.modules()] == modes
    logits = run.model.eval()(plain_run.inputs).logits
    torch.testing.assert_close(state.confidence, logits.softmax(dim=1).amax(dim=1).detach())
    exercise = Exercise([part])
    kept = exercise.engine.states[part.kind].confidence.clone()
    exercise.advance()
    assert torch.equal(exercise.engine.states[part.kind].confidence, kept)


def second(first, *parts, **fields):
    start = {"factory": "training_runs:net", "weights": str(first)}
    usual = {"network": start, "optimizer": {"kind": "sgd", "lr": 0.005}, "seed": 1}
    return config_of(ConfidenceReweighting(), *parts, **{**usual, **fields})


@pytest.mark.parametrize("parts", [(), (CosineHead(), SAM(), RegMixup())], ids=["plain", "sure"])
def test_a_second_stage_starts_from_the_first(tmp_path, parts):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    first = train(config_of(*parts), tmp_path / "first")
    config = second(first, *parts, checkpoint_every=1)
    out = train(config, tmp_path / "second", stop_after=STEPS + 1)
    checkpoint = RunFolder(out).load_checkpoint()
    confidence = checkpoint["engine"]["states"]["confidence_reweighting"]["confidence"]
    model, _ = RunFolder(first).load()
    with torch.no_grad():
        wanted = model(Points().open().tensors[0]).logits.softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(confidence, wanted)
    train(config, out, resume=True)
    straight = train(config, tmp_path / "straight")
    assert changed(weights(straight), weights(out)) is None
    assert changed(weights(first), weights(out)) is not None
    other, _ = RunFolder(out).load()
    assert type(other.head) is type(model.head)


def test_without_a_history_of_its_own_all_rows_of_a_fresh_network_count_about_alike():
    exercise = Exercise([ConfidenceReweighting()])
    exercise.begin()
    weighed, even = float(exercise.total().detach()), Exercise([])
    even.begin()
    assert weighed == pytest.approx(float(even.total().detach()), rel=0.05)


@pytest.mark.parametrize("fields", [{"t": -1}, {"t": math.inf}, {"clamp": 1}])
def test_fields_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValidationError):
        ConfidenceReweighting(**fields)


def test_it_is_found_by_its_kind():
    found = registry.build("regularizer", "confidence_reweighting")
    assert found == ConfidenceReweighting(t=1, clamp=False)


PART = ConfidenceReweighting(t=5, clamp=True)


@pytest.mark.parametrize("check", regularizer_checks(PART), ids=str)
def test_the_laws_of_regularizers(check):
    check()
