"""Regularizers together: SURE whole against a bare loop, compositions, resuming, two processes."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, normalize
from torch.optim.swa_utils import update_bn
from training_runs import EPOCHS, STEPS, SURE, Points, config_of, weights

from oodcore import Regularizer
from oodcore.run_folder import RunFolder
from oodcore.testing.comparison import changed, tensors
from oodcore.testing.exercise import Exercise
from oodcore.training import train
from oodcore_plugins.center import Center
from oodcore_plugins.confidence_reweighting import ConfidenceReweighting
from oodcore_plugins.correctness_ranking import CorrectnessRanking
from oodcore_plugins.cosine_head import CosineHead
from oodcore_plugins.focal import Focal
from oodcore_plugins.label_smoothing import LabelSmoothing
from oodcore_plugins.logitnorm import LogitNorm
from oodcore_plugins.regmixup import Mixup, RegMixup
from oodcore_plugins.run_extractor import RunExtractor
from oodcore_plugins.sam import SAM
from oodcore_plugins.swa import SWA
from oodcore_plugins.t2fnorm import T2FNorm


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# SURE whole, computed by hand


class Notes(Regularizer):
    """Keeps the mixing of each step, which is drawn, for the loop that is written out."""

    kind = "zz_notes"

    def after(self, step, state):
        memo = step.loop._steps["regmixup"].memo
        MIXING.append((memo["share"], memo["order"]))


MIXING: list = []


def bare(exercise: Exercise, model: torch.nn.Module) -> torch.nn.Module:
    """What SURE is, as one loop: its steps, the average of its weights, the statistics of that."""
    head, plan = model.head, exercise.plan
    names = [name for name, _ in model.named_parameters() if name != "head.bias"]
    chosen = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.SGD(chosen, lr=0.05, momentum=0.9)
    counts, average = torch.zeros(plan.rows), [torch.zeros_like(part) for part in chosen]

    def logits_of(rows):
        hidden = []
        handle = head.register_forward_pre_hook(lambda part, args: hidden.append(args[0]))
        model(rows)
        handle.remove()
        return 8 * normalize(hidden[0]) @ normalize(head.weight).T

    def loss(rows, labels, ids, share, order, most):
        logits = logits_of(rows)
        confidence = logits.softmax(dim=1).amax(dim=1)
        least = counts.min()
        ranked = torch.zeros(())
        for i in range(len(rows)):
            j = (i + 1) % len(rows)
            right = [
                (counts[ids[n]] - least) / (most - least) if most > least else 0 for n in (i, j)
            ]
            if right[0] != right[1]:
                sign = 1 if right[0] > right[1] else -1
                gap = confidence[i] - confidence[j]
                ranked = ranked + (sign * (right[0] - right[1]) - sign * gap).clamp_min(0)
        mixed = logits_of(share * rows + (1 - share) * rows[order])
        both = share * cross_entropy(mixed, labels)
        both = both + (1 - share) * cross_entropy(mixed, labels[order])
        return cross_entropy(logits, labels) + 0.5 * both + 0.5 * ranked / len(rows), logits

    for step, (share, order) in enumerate(MIXING):
        epoch = step // plan.steps_per_epoch
        ids = exercise._numbers(step)
        done = step / plan.steps_per_epoch
        if done >= 1:
            towards = (1 - math.cos(math.pi * min(1, done - 1))) / 2
            optimizer.param_groups[0]["lr"] = towards * 0.02 + (1 - towards) * 0.05
        given = exercise.inputs[ids], exercise.labels[ids], ids, share, order, max(1, epoch)
        optimizer.zero_grad()
        total, logits = loss(*given)
        total.backward()
        buffers = [buffer.clone() for buffer in model.buffers()]
        kept = [part.detach().clone() for part in chosen]
        with torch.no_grad():
            length = torch.cat([part.grad.flatten() for part in chosen]).norm()
            for part in chosen:
                part += 0.05 * part.grad / length
        optimizer.zero_grad()
        loss(*given)[0].backward()
        with torch.no_grad():
            for part, value in zip(chosen, kept, strict=True):
                part.copy_(value)
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
        optimizer.step()
        counts[ids] += logits.argmax(dim=1) == exercise.labels[ids]
        if (step + 1) % plan.steps_per_epoch == 0 and epoch >= 1:
            for mean, part in zip(average, chosen, strict=True):
                mean += part.detach() / (plan.epochs - 1)
    with torch.no_grad():
        for mean, part in zip(average, chosen, strict=True):
            part.copy_(mean)
    update_bn([batch.inputs for batch in exercise._pass()], model)
    return model


def test_sure_is_what_a_bare_loop_computes():
    MIXING.clear()
    fresh = deepcopy(Exercise([]).run.model.network)
    exercise = Exercise([*SURE, Notes()]).advance()
    wanted = bare(exercise, fresh).state_dict()
    assert len(MIXING) == exercise.plan.steps
    assert exercise.engine.history[-1]["loss/correctness_ranking"] > 0
    given = exercise.run.model.network.state_dict()
    assert given.keys() - wanted.keys() == {"head.scale"}
    for name, value in given.items():
        if name != "head.scale":
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


# Runs


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    return train(config_of(*SURE), tmp_path_factory.mktemp("sure") / "run")


def test_sure_learns_and_leaves_one_network(sure):
    features = RunExtractor(path=sure).load()(Points().open().tensors[0])
    assert features.head.normalize_weight
    assert features.head.normalize_features
    assert features.head.scale == 8
    labels = Points().open().tensors[1]
    assert (features.predicted == labels).double().mean() > 0.7
    assert weights(sure)["network.body.1.num_batches_tracked"] == STEPS


POINTS = {
    "a step": (3, 1),
    "one before an epoch's last": (2 * STEPS - 1, 1),
    "an epoch's last": (2 * STEPS, 1),
    "one after an epoch's last": (2 * STEPS + 1, 1),
    "the end of an epoch, some steps back": (2 * STEPS + 3, None),
}


@pytest.mark.parametrize(("stop", "every"), POINTS.values(), ids=POINTS)
def test_sure_goes_on_from_any_step(tmp_path, sure, stop, every):
    config = config_of(*SURE, checkpoint_every=every)
    out = train(config, tmp_path / "run", stop_after=stop)
    train(config, out, resume=True)
    assert changed(weights(out), weights(sure)) is None
    assert (out / "metrics.csv").read_text() == (sure / "metrics.csv").read_text()


def test_all_that_is_remembered_goes_on_too(tmp_path):
    config, last = config_of(*SURE, checkpoint_every=1), EPOCHS * STEPS - 1
    whole = train(config, tmp_path / "whole", stop_after=last)
    parts = tmp_path / "parts"
    for stop in (2, STEPS, 2 * STEPS + 1, last):
        train(config, parts, resume=True, stop_after=stop)
    one, two = (tensors(RunFolder(folder).load_checkpoint()) for folder in (whole, parts))
    assert changed(one, two) is None
    kept = set(one)
    assert any(name.startswith("optimizer.state.") for name in kept)
    assert {"engine.states.correctness_ranking.count", "engine.states.swa.count"} < kept


def test_neither_the_order_of_the_list_nor_the_global_generators_matter(tmp_path, sure):
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    out = train(config_of(*reversed(SURE)), tmp_path / "run")
    assert changed(weights(out), weights(sure)) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("part", SURE, ids=lambda part: part.kind)
def test_a_part_of_weight_0_is_a_part_left_out(tmp_path, sure, part):
    off = type(part).model_validate({**part.dump(), "weight": 0})
    others = [other for other in SURE if other is not part]
    one = train(config_of(*others, epochs=2), tmp_path / "one")
    two = train(config_of(*others, off, epochs=2), tmp_path / "two")
    assert changed(weights(one), weights(two)) is None
    assert changed(weights(one), weights(sure)) is not None


CENTER = Center(weights=(0.01,), starts=(0,))
TOGETHER = {
    "center and sam": [CENTER, SAM(adaptive=True, rho=0.5)],
    "logitnorm and focal": [LogitNorm(temperature=0.5), Focal()],
    "mixup and regmixup": [Mixup(), RegMixup()],
    "label_smoothing and regmixup": [LabelSmoothing(), RegMixup(joint=True)],
    "t2fnorm with what reads its logits": [T2FNorm(), CorrectnessRanking(), Mixup(), SWA()],
    "the cosine network of DML+": [CosineHead(scale=40), Focal(detach_pt=True)],
    "the center network of DML+": [CosineHead(normalize="weight"), CENTER],
    "one of each": [
        *(CosineHead(learn_scale=True), LogitNorm(temperature=0.5), LabelSmoothing(), Mixup()),
        *(RegMixup(), CorrectnessRanking(), SAM(), SWA(), CENTER, ConfidenceReweighting()),
    ],
}


@pytest.mark.parametrize("parts", TOGETHER.values(), ids=TOGETHER)
def test_parts_go_together_and_go_on(tmp_path, parts):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    config = config_of(*parts, checkpoint_every=1)
    straight = train(config, tmp_path / "straight")
    out = train(config, tmp_path / "run", stop_after=STEPS + 2)
    train(config, out, resume=True)
    assert changed(weights(straight), weights(out)) is None
    features = RunExtractor(path=out).load()(Points().open().tensors[0])
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    alone = train(config_of(parts[0]), tmp_path / "alone")
    assert changed(weights(alone), weights(out)) is not None


REFUSED = {
    "two losses": (
        [Focal(), LabelSmoothing()],
        "focal and label_smoothing each replace the classification loss",
    ),
    "two heads": ([T2FNorm(), CosineHead()], "cosine_head and t2fnorm each replace the head"),
    "a head twice": ([CosineHead(), CosineHead(scale=16)], "cosine_head is there more than once"),
    "sam twice": ([SAM(), SAM(rho=0.1)], "sam is there more than once"),
}


@pytest.mark.parametrize(("parts", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_go_together_is_refused_with_the_configuration(parts, message):
    with pytest.raises(ValidationError, match=message):
        config_of(*parts)


SCRIPT = f"""
import sys
from pathlib import Path
import torch
from torch import distributed
from training_runs import SURE, config_of
from oodcore.training import train
from oodcore.run_folder import RunFolder
from oodcore_plugins.center import Center
from oodcore_plugins.confidence_reweighting import ConfidenceReweighting

torch.set_num_threads(1)
folder = Path(sys.argv[1])
config = config_of(*SURE, Center(weights=(0.01,), starts=(0,)), checkpoint_every=1, collapse=True)
train(config, folder / "whole")
train(config, folder / "resumed", stop_after={STEPS + 1})
train(config, folder / "resumed", resume=True)
start = {{"factory": "training_runs:net", "weights": str(folder / "whole")}}
train(config_of(*SURE, ConfidenceReweighting(), network=start), folder / "second")
train(config, folder / "kept", stop_after={2 * STEPS})
"""


def test_two_processes_train_together(tmp_path):
    pytest.importorskip("lightning", reason="training needs the extra 'train'")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(tmp_path / "script.py"), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert done.returncode == 0, done.stderr
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "resumed"))
    assert changed(whole, resumed) is None
    assert changed(whole, weights(tmp_path / "second")) is not None
    checkpoint = RunFolder(tmp_path / "kept").load_checkpoint()
    counts = checkpoint["engine"]["states"]["correctness_ranking"]["count"]
    rights = [row["accuracy"] * len(counts) for row in checkpoint["engine"]["history"]]
    assert int(counts.sum()) == round(sum(rights)), "the rows of both processes are counted"
