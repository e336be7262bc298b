"""The training run: what is learnt, resuming, what changes nothing, and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch
from torch import nn
from toy_runs import (
    ALL,
    EPOCHS,
    STEPS,
    Broken,
    Clusters,
    Disturber,
    Mix,
    Replay,
    Rows,
    config_of,
    metrics,
    same,
    weights,
)

import oodcore
from oodcore import Regularizer, Source
from oodcore.batches import Batches
from oodcore.batches import Rows as BatchRows
from oodcore.errors import ConfigurationError, DataError, ExtraError
from oodcore.preprocess import Preprocess
from oodcore.regularizer import Diverged, place
from oodcore.run_folder import RunFolder
from oodcore.training import train

pytest.importorskip("lightning", reason="training needs the extra 'train'")


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One uninterrupted run with every hook in use, which the interrupted ones are compared to."""
    return train(
        config_of(*ALL, validation=Clusters(seed=1)), tmp_path_factory.mktemp("whole") / "run"
    )


# What is learnt


def test_a_run_learns_and_says_so(tmp_path):
    out = train(config_of(epochs=12, validation=Clusters(seed=1, rows=60)), tmp_path / "run")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "metrics.csv",
        "model.safetensors",
        "run.json",
    ]
    rows = metrics(out)
    assert [row["epoch"] for row in rows] == list(range(12))
    assert rows[-1]["loss/classification"] < 0.6 * rows[0]["loss/classification"]
    assert rows[-1]["validation/accuracy"] > 0.8
    assert rows[-1]["learning_rate"] < rows[0]["learning_rate"] == 0.05
    record = json.loads((out / "run.json").read_text())
    assert record["classes"] == 3
    assert record["rows"] == 42
    assert record["steps_per_epoch"] == STEPS
    assert record["metrics"] == rows[-1]


def test_plain_training_is_what_a_bare_loop_computes(tmp_path):
    fields = {
        "network": {"factory": "toy_runs:net", "arguments": {"dropout": 0.0}},
        "gradient_clip": 0.3,
        "seed": 3,
    }
    out = train(config_of(**fields), tmp_path / "run")
    model = config_of(**fields).network.build(place(3, "network"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    rows = BatchRows(Clusters().open(), "rows")
    batches = Batches(rows, None, batch_size=11, outlier_batch_size=1, seed=3)
    clipped = 0
    for step in range(EPOCHS * STEPS):
        inputs, labels, _, _ = batches[step]
        for group in optimizer.param_groups:
            group["lr"] = 0.025 * (1 + math.cos(math.pi * step / (EPOCHS * STEPS)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)) > 0.3
        optimizer.step()
    assert clipped > 3, "the gradient must be clipped for this test"
    trained = weights(out)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"network.{name}"], value, rtol=1e-4, atol=1e-6)


def test_the_same_configuration_gives_the_same_weights_and_another_seed_others(tmp_path):
    one = train(config_of(*ALL, epochs=1), tmp_path / "one")
    two = train(config_of(*ALL, epochs=1), tmp_path / "two")
    other = train(config_of(*ALL, epochs=1, seed=1), tmp_path / "other")
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


def test_every_term_is_logged_under_its_kind(whole):
    for row in metrics(whole):
        terms = {name for name in row if name.startswith("loss/")}
        assert terms == {f"loss/{k}" for k in ("classification", "total", *(p.kind for p in ALL))}
        assert row["everything/noise"] != 0
        total = row["loss/classification"] + row["loss/everything"] * (0.1 + 0.2 * row["epoch"])
        total += 0.5 * row["loss/mix"] + 0.1 * row["loss/replay"]
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)


def test_collapse_is_measured_after_every_epoch_and_changes_nothing(tmp_path, whole):
    config = config_of(*ALL, validation=Clusters(seed=1), collapse=True)
    out = train(config, tmp_path / "run")
    assert same(weights(out), weights(whole))
    rows = metrics(out)
    assert len(rows) == EPOCHS
    assert all(row["collapse/wfc"] > 0 and row["collapse/cfc"] > 0 for row in rows)
    assert json.loads((out / "run.json").read_text())["metrics"] == rows[-1]


def test_collapse_without_a_measure_leaves_an_empty_cell(tmp_path):
    config = config_of(network={"factory": "toy_runs:blind"}, collapse=True, outliers=None)
    out = train(config, tmp_path / "run")
    assert all("collapse/wfc" not in row for row in metrics(out))
    assert json.loads((out / "run.json").read_text())["metrics"]["epoch"] == EPOCHS - 1


def test_the_data_is_asked_for_each_row_once_an_epoch(tmp_path):
    opened = []

    class Counting(Clusters):
        kind = "counting"

        def open(self):
            opened.append(super().open())
            return opened[-1]

    train(config_of(train=Counting(), classes=3), tmp_path / "run")
    counts = torch.bincount(torch.tensor(opened[0].reads), minlength=42)
    counts[0] -= 1  # the row with which the head is found
    assert counts.tolist() == [EPOCHS] * 42


def test_preprocessing_reaches_the_network_and_the_folder(tmp_path):
    class Pictures(Source):
        kind = "pictures_for_training"

        def open(self):
            rows = Clusters(rows=12).open()
            return Rows(rows.inputs.reshape(12, 1, 2, 3).clamp(0, 1), rows.labels)

    arguments = {"factory": "toy_runs:flat"}
    config = config_of(
        train=Pictures(),
        network=arguments,
        preprocess={"mean": [0.5]},
        outliers=None,
        epochs=1,
    )
    out = train(config, tmp_path / "run")
    model, blueprint = RunFolder(out).load()
    assert blueprint.preprocess == Preprocess(mean=(0.5,))
    assert model.network[1].running_mean.mean() < 0, "the network must have seen the mean taken off"


def test_training_starts_from_the_weights_of_a_run_or_a_file(tmp_path):
    first = train(config_of(epochs=1), tmp_path / "first")
    still = {"optimizer": {"kind": "sgd", "lr": 1e-12}, "epochs": 1}
    model, _ = RunFolder(first).load()
    torch.save(model.network.state_dict(), tmp_path / "weights.pt")
    for number, start in enumerate((first, tmp_path / "weights.pt")):
        network = {"factory": "toy_runs:net", "weights": str(start)}
        out = train(config_of(network=network, seed=5, **still), tmp_path / f"tuned{number}")
        head = "network.head.weight"
        torch.testing.assert_close(weights(out)[head], weights(first)[head])


# Resuming

POINTS = {
    "a step": (3, 1),
    "one before an epoch's last": (2 * STEPS - 1, 1),
    "an epoch's last": (2 * STEPS, 1),
    "one after an epoch's last": (2 * STEPS + 1, 1),
    "the end of an epoch, some steps back": (2 * STEPS + 3, None),
    "before the first checkpoint": (2, None),
    "the last but one": (EPOCHS * STEPS - 1, 1),
}


@pytest.mark.parametrize(("stop", "every"), POINTS.values(), ids=POINTS)
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, whole, stop, every):
    config = config_of(*ALL, validation=Clusters(seed=1), checkpoint_every=every)
    out = train(config, tmp_path / "run", stop_after=stop)
    assert not (out / "run.json").exists()
    assert not (out / "model.safetensors").exists()
    train(config, out, resume=True)
    assert same(weights(out), weights(whole))
    assert (out / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert not (out / "checkpoints").exists()


def test_a_run_that_is_killed_at_every_step_ends_with_the_same_weights(tmp_path, whole):
    config = config_of(*ALL, validation=Clusters(seed=1), checkpoint_every=1)
    for stop in range(1, EPOCHS * STEPS + 1):
        out = train(config, tmp_path / "run", resume=True, stop_after=stop)
        found = list((out / "checkpoints").glob("*"))
        assert len(found) == (stop < EPOCHS * STEPS), found
    assert same(weights(out), weights(whole))
    assert (out / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "optimizer",
    [{"kind": "adamw", "lr": 0.01}, {"kind": "sgd", "lr": 0.05, "nesterov": True}],
    ids=["adamw", "nesterov"],
)
def test_the_optimizer_remembers(tmp_path, optimizer):
    schedule = {"kind": "step", "milestones": [2], "warmup": 1}
    config = config_of(optimizer=optimizer, schedule=schedule, checkpoint_every=1, num_workers=1)
    straight = train(config, tmp_path / "straight")
    out = train(config, tmp_path / "run", stop_after=5)
    assert same(weights(train(config, out, resume=True)), weights(straight))


@pytest.mark.parametrize("step", [STEPS + 2, EPOCHS * STEPS], ids=["midway", "the last"])
def test_an_error_after_a_step_leaves_a_run_that_can_go_on(tmp_path, whole, step):
    config = config_of(*ALL, validation=Clusters(seed=1))

    def fail(done, total, numbers):
        assert total == EPOCHS * STEPS
        if done == step:
            raise KeyError("on the way")

    with pytest.raises(KeyError, match="on the way"):
        train(config, tmp_path / "run", on_progress=fail)
    out = train(config, tmp_path / "run", resume=True)
    assert same(weights(out), weights(whole))


def test_an_interrupt_is_the_callers_to_handle(tmp_path):
    def interrupt(done, total, numbers):
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(), tmp_path / "run", on_progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = config_of(epochs=1)
    out = train(config, tmp_path / "run")
    stamp = (out / "run.json").stat().st_mtime_ns
    assert train(config, out, resume=True) == out
    assert (out / "run.json").stat().st_mtime_ns == stamp


def test_a_run_killed_while_it_was_written_down_goes_on(tmp_path):
    config = config_of(epochs=2)
    straight = train(config, tmp_path / "straight")
    out = train(config, tmp_path / "run", stop_after=STEPS + 1)
    (out / "model.safetensors").write_bytes(b"half")
    (out / ".run.json.part").write_bytes(b"{")
    (out / "checkpoints" / ".step-000000000007.ckpt.part").write_bytes(b"half")
    assert same(weights(train(config, out, resume=True)), weights(straight))
    assert not (out / ".run.json.part").exists()


# What changes nothing


def test_a_regularizer_of_weight_0_changes_nothing(tmp_path):
    off = [type(part)(weight=0) for part in ALL]
    plain = train(config_of(), tmp_path / "plain")
    out = train(config_of(*off), tmp_path / "off")
    assert same(weights(out), weights(plain))
    with_mix = train(config_of(Mix()), tmp_path / "mix")
    assert not same(weights(with_mix), weights(plain))
    assert same(weights(train(config_of(off[0], Mix()), tmp_path / "two")), weights(with_mix))


def test_a_term_of_weight_0_in_an_epoch_disturbs_nobody(tmp_path):
    alone = train(config_of(Mix(), Replay()), tmp_path / "alone")
    out = train(config_of(Mix(), Disturber(), Replay()), tmp_path / "disturbed")
    assert same(weights(out), weights(alone))


def test_the_order_of_the_list_does_not_matter(tmp_path, whole):
    config = config_of(*reversed(ALL), validation=Clusters(seed=1))
    assert same(weights(train(config, tmp_path / "run")), weights(whole))


def test_sharpness_of_radius_0_is_plain_training(tmp_path):
    class Twice(Regularizer):
        kind = "twice"

        def wrap_closure(self, closure, optimizer):
            def again():
                loss = closure()
                assert torch.equal(closure(), loss), "the second pass must draw the same"
                return loss

            return again

    plain = train(config_of(Mix()), tmp_path / "plain")
    assert same(weights(train(config_of(Mix(), Twice()), tmp_path / "twice")), weights(plain))


def test_finish_had_its_pass_over_the_rows(whole):
    assert weights(whole)["network.body.1.num_batches_tracked"] == STEPS
    assert weights(whole)["network.body.1.running_mean"].abs().max() > 0


def test_nothing_of_the_caller_is_changed(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    caplog.set_level(logging.INFO)
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    kernels = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning")}
    filters = list(warnings.filters)
    import_module("sklearn")  # sets two variables of OpenMP when it is imported
    environment = dict(os.environ)
    with torch.no_grad():
        train(config_of(*ALL), tmp_path / "run")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == kernels
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert warnings.filters == filters
    assert dict(os.environ) == environment
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("lightning")]


def test_progress_is_told_step_by_step(tmp_path):
    told = []
    train(config_of(epochs=2), tmp_path / "run", on_progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == list(range(1, 2 * STEPS + 1))
    assert {total for _, total, _ in told} == {2 * STEPS}
    assert told[0][2] == {}
    assert told[STEPS - 1][2]["epoch"] == 0


# What is refused


BROKEN = {
    "criterion": (ConfigurationError, r"one loss a row, \[14\], not \[\]; .*: broken"),
    "loss": (ConfigurationError, r"broken: loss must be a scalar tensor or None, not \[14\]"),
    "closure": (ConfigurationError, "never calls its closure"),
    "nan": (Diverged, r"step 5 \(epoch 1\) is not finite.*classification .*broken nan"),
    "huge": (Diverged, "beyond 1e"),
    "finish": (Diverged, "ended with numbers in network"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_regularizer_that_errs_is_told(tmp_path, how):
    error, message = BROKEN[how]
    with pytest.raises(error, match=message):
        train(config_of(Broken(how=how), batch_size=14), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_learning_rate_that_is_too_high_is_told(tmp_path):
    with pytest.raises(Diverged, match="lower the learning rate"):
        train(
            config_of(optimizer={"kind": "sgd", "lr": 1e12}, gradient_clip=None), tmp_path / "run"
        )


DATA = {
    "a label below 0": ({"train": Clusters(first_label=-1)}, "row 0 .* label -1"),
    "a label below 0, the classes being known": (
        {"train": Clusters(first_label=-1), "classes": 3},
        "label -1, and there are 3 classes",
    ),
    "an unknown label": (
        {"train": Clusters(first_label=1), "classes": 3},
        r"label 3, and there are 3 classes.*select",
    ),
    "one class": ({"train": Clusters(classes=1)}, "one class alone"),
    "no rows": ({"train": Clusters(rows=0)}, "the training data has 0 rows"),
    "no outliers": ({"outliers": Clusters(rows=0)}, "the outliers has 0 rows"),
}


@pytest.mark.parametrize(("fields", "message"), DATA.values(), ids=DATA)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        train(config_of(**fields), tmp_path / "run")


def test_a_network_of_other_classes_is_refused(tmp_path):
    network = {"factory": "toy_runs:net", "arguments": {"classes": 5}}
    with pytest.raises(ConfigurationError, match="5 logits and the data 3 classes"):
        train(config_of(network=network), tmp_path / "run")
    train(config_of(network=network, classes=5, epochs=1), tmp_path / "other")


def test_a_missing_lightning_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "oodcore.lightning_run", None)
    monkeypatch.delattr(oodcore, "lightning_run", raising=False)
    with pytest.raises(ExtraError, match=r"pip install 'oodcore\[train\]'"):
        train(config_of(), tmp_path / "run")


def test_the_contract_needs_no_lightning():
    code = "import oodcore.training, oodcore.regularizer, sys; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
