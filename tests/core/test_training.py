"""The training run: what is learnt, resuming, what changes nothing, and what is refused."""

from __future__ import annotations

import csv
import json
import logging
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import oodcore
from oodcore import Memory, Regularizer, Source
from oodcore.errors import (
    ArtifactError,
    ConfigurationError,
    DataError,
    ExtraError,
)
from oodcore.preprocess import Preprocess
from oodcore.regularizer import Diverged
from oodcore.run_folder import RunFolder
from oodcore.training import TrainingConfig, train

pytest.importorskip("lightning", reason="training needs the extra 'train'")

STEPS = 4
EPOCHS = 3


class Rows(Dataset):
    def __init__(self, inputs, labels, ids=None):
        self.inputs, self.labels = inputs, labels
        self.ids = range(100, 100 + len(labels)) if ids is None else ids
        self.reads: list[int] = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        self.reads.append(row)
        return self.inputs[row], int(self.labels[row]), int(self.ids[row])


class Clusters(Source):
    """Points around one centre a class."""

    kind = "clusters_for_training"

    rows: int = 42
    classes: int = 3
    seed: int = 0
    first_label: int = 0

    def open(self):
        generator = torch.Generator().manual_seed(self.seed)
        labels = torch.arange(self.rows) % self.classes
        centers = 2 * torch.eye(self.classes, 6)
        inputs = centers[labels] + 0.7 * torch.randn(self.rows, 6, generator=generator)
        return Rows(inputs, labels + self.first_label)


class Net(nn.Module):
    """Batch normalisation and dropout, so that running statistics and random draws count."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 5)
        )
        self.head = nn.Linear(5, classes)

    def forward(self, inputs):
        return self.head(self.body(inputs))


def net(classes: int = 3, dropout: float = 0.3) -> nn.Module:
    return Net(classes, dropout)


def tied(classes: int = 3) -> nn.Module:
    network = Net(classes, 0.0)
    network.again = network.body[0]
    return network


class Everything(Regularizer):
    """Uses every hook: a branch, state with an optimizer of its own, SAM, averaged weights."""

    kind = "everything"
    needs_outliers = True

    def prepare_model(self, model, run):
        model.branches["beside"] = nn.Linear(run.width, 1)
        return model

    def build(self, run):
        state = Memory()
        state.critic = nn.Linear(run.input_shape[0], 1)
        state.own["critic"] = torch.optim.Adam(state.critic.parameters(), lr=0.01)
        state.register_buffer("history", torch.zeros(run.rows))
        state.register_buffer("epochs", torch.zeros(()))
        for name, value in run.model.named_parameters():
            state.register_buffer("mean_" + name.replace(".", "_"), torch.zeros_like(value))
        return state

    def weight_at(self, epoch):
        return self.weight * (0.1 + 0.2 * epoch)

    def wrap_schedule(self, schedule, run):
        return lambda epoch: schedule(epoch) * (0.5 if epoch > run.epochs - 1 else 1.0)

    def before(self, step, state):
        noise = torch.randn(step.inputs.shape, generator=step.generator)
        state.own["critic"].zero_grad()
        loss = state.critic(step.inputs).mean() - state.critic(noise).square().mean()
        loss.backward()
        step.run.average_gradients(state.critic)
        state.own["critic"].step()
        seen = step.forward(noise).logits.logsumexp(dim=1).mean()
        step.memo["weights"] = torch.rand(len(step.labels), generator=step.generator)
        step.log("noise", seen)
        return torch.cat([step.outliers, step.inputs[:2] + 0.1 * noise[:2]])

    def criterion(self, rows, labels, inner, step, state):
        return (1 + 0.1 * state.history.mean()) * inner(rows, labels)

    def loss(self, step, state):
        uniform = step.extra.logits.logsumexp(dim=1) - step.extra.logits.mean(dim=1)
        mixed = step.forward(step.inputs.flip(0), stats=True)
        draw = torch.rand((), generator=step.generator)
        beside = step.features.layers["beside"][:, 0] * step.memo["weights"]
        own = step.criterion(mixed, step.labels.flip(0)).mean()
        return uniform.mean() + draw * own + beside.square().mean()

    def wrap_closure(self, closure, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def sharp():
            loss = closure()
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
                for p in parameters:
                    if p.grad is not None:
                        p += 0.05 * p.grad / (norm + 1e-12)
            closure()
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)
            return loss

        return sharp

    def after(self, step, state):
        assert step.repeat == 0
        assert not step.features.logits.requires_grad
        assert not step.extra.logits.requires_grad
        right = (step.features.predicted == step.labels).float()
        state.history.index_add_(0, step.run.gather(step.ids), step.run.gather(right))
        if step.ends_epoch:
            state.epochs += 1
            for name, value in step.run.model.named_parameters():
                mean = getattr(state, "mean_" + name.replace(".", "_"))
                mean += (value.detach() - mean) / state.epochs

    def finish(self, run, state):
        with torch.no_grad():
            for name, value in run.model.named_parameters():
                value.copy_(getattr(state, "mean_" + name.replace(".", "_")))
            norm = run.model.network.body[1]
            norm.reset_running_stats()
            norm.momentum = None
            for batch in run.batches():
                run.model(batch.inputs)


class Mix(Regularizer):
    """A term of its own forward and draws, and a criterion that smooths."""

    kind = "mix"

    def criterion(self, rows, labels, inner, step, state):
        return 0.9 * inner(rows, labels) + 0.1 * rows.logits.square().mean(dim=1)

    def loss(self, step, state):
        share = torch.rand((), generator=step.generator)
        order = torch.randperm(len(step.labels), generator=step.generator)
        mixed = step.forward(share * step.inputs + (1 - share) * step.inputs[order])
        losses = share * step.criterion(mixed, step.labels)
        return (losses + (1 - share) * step.criterion(mixed, step.labels[order])).mean()


class Replay(Regularizer):
    """Remembers inputs, differently in every process."""

    kind = "replay"
    per_rank = True

    def build(self, run):
        state = nn.Module()
        state.register_buffer("kept", torch.randn(16, *run.input_shape))
        return state

    def before(self, step, state):
        where = torch.randperm(16, generator=step.generator)[:4]
        step.memo["rows"] = state.kept[where].clone()
        state.kept[where] = step.inputs[:4]

    def loss(self, step, state):
        return step.forward(step.memo["rows"]).logits.logsumexp(dim=1).mean()


class Disturber(Regularizer):
    """Draws from every generator it can reach, and works in every hook that must not matter."""

    kind = "disturber"

    def build(self, run):
        state = Memory()
        state.net = nn.Linear(6, 6)
        state.own["net"] = torch.optim.SGD(state.net.parameters(), lr=0.1)
        return state

    def weight_at(self, epoch):
        return 0.0

    def before(self, step, state):
        torch.rand(7)
        torch.rand(3, generator=step.generator)
        step.forward(state.net(step.inputs), stats=False)
        return torch.rand_like(step.inputs)

    def loss(self, step, state):
        raise AssertionError("a term of weight 0 is not asked for")

    def after(self, step, state):
        torch.rand(5)
        state.own["net"].zero_grad()
        state.net(step.inputs).square().sum().backward()
        state.own["net"].step()


class Broken(Regularizer):
    """Does as it is told by a field."""

    kind = "broken"

    how: str

    def criterion(self, rows, labels, inner, step, state):
        return inner(rows, labels).mean() if self.how == "criterion" else inner(rows, labels)

    def loss(self, step, state):
        if self.how == "nan" and step.index == 5:
            return step.features.logits.sum() * torch.nan
        if self.how == "huge":
            return step.features.logits.sum() * 0 + 2e8
        return step.features.logits.sum(dim=1) if self.how == "loss" else None

    def wrap_closure(self, closure, optimizer):
        return (lambda: torch.zeros(())) if self.how == "closure" else closure

    def finish(self, run, state):
        if self.how == "finish":
            with torch.no_grad():
                next(run.model.parameters()).fill_(torch.inf)


class Replacing(Regularizer):
    kind = "replacing"
    replaces_loss = True

    def criterion(self, rows, labels, inner, step, state):
        return 2 * rows.logits.square().mean(dim=1)


class ReplacingToo(Replacing):
    kind = "also_replacing"


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plugin():
    def register_regularizers(register):
        for cls in (Everything, Mix, Replay, Broken):
            register(cls)

    def register_sources(register):
        register(Clusters)

    hooks = SimpleNamespace(
        register_regularizers=oodcore.hookimpl(register_regularizers),
        register_sources=oodcore.hookimpl(register_sources),
    )
    with oodcore.registry.using(hooks) as record:
        yield record


def config_of(*regularizers: Regularizer, **fields) -> TrainingConfig:
    usual = {
        "network": {"factory": f"{__name__}:net"},
        "train": Clusters(),
        "outliers": Clusters(rows=7, seed=9),
        "outlier_batch_size": 3,
        "epochs": EPOCHS,
        "batch_size": 11,
        "optimizer": {"kind": "sgd", "lr": 0.05, "weight_decay": 1e-3},
        "gradient_clip": 5.0,
        "device": "cpu",
    }
    return TrainingConfig(**{**usual, "regularizers": regularizers, **fields})


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def metrics(folder) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


ALL = (Everything(), Mix(weight=0.5), Replay(weight=0.1))


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
    from oodcore.batches import Batches
    from oodcore.batches import Rows as Read
    from oodcore.regularizer import place

    fields = {"network": {"factory": f"{__name__}:net", "arguments": {"dropout": 0.0}}}
    out = train(config_of(seed=3, schedule="constant", **fields), tmp_path / "run")
    model = config_of(**fields).network.build(place(3, "network"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    batches = Batches(
        Read(Clusters().open(), "rows"), None, batch_size=11, outlier_batch_size=1, seed=3
    )
    for step in range(EPOCHS * STEPS):
        inputs, labels, _, _ = batches[step]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
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

    arguments = {"factory": f"{__name__}:flat"}
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


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3))


def test_training_starts_from_the_weights_of_a_run_or_a_file(tmp_path):
    first = train(config_of(epochs=1), tmp_path / "first")
    still = {"optimizer": {"kind": "sgd", "lr": 1e-12}, "epochs": 1}
    model, _ = RunFolder(first).load()
    torch.save(model.network.state_dict(), tmp_path / "weights.pt")
    for number, start in enumerate((first, tmp_path / "weights.pt")):
        network = {"factory": f"{__name__}:net", "weights": str(start)}
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


def test_an_error_in_a_step_leaves_a_run_that_can_go_on(tmp_path, whole):
    config = config_of(*ALL, validation=Clusters(seed=1))

    def fail(done, total, numbers):
        assert total == EPOCHS * STEPS
        if done == STEPS + 2:
            raise KeyError("on the way")

    with pytest.raises(KeyError, match="on the way"):
        train(config, tmp_path / "run", on_progress=fail)
    out = train(config, tmp_path / "run", resume=True)
    assert same(weights(out), weights(whole))


def test_an_interrupt_is_the_callers_to_handle(tmp_path):
    import signal

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


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path):
    out = train(config_of(), tmp_path / "run", stop_after=STEPS)
    (checkpoint,) = (out / "checkpoints").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"step-000000000004.*overwrite=True"):
        train(config_of(), out, resume=True)


def test_where_and_how_may_change_but_not_what(tmp_path):
    config = config_of(*ALL)
    out = train(config, tmp_path / "run", stop_after=5)
    with pytest.raises(ArtifactError, match=r"seed was 0 and is 1"):
        train(config_of(*ALL, seed=1), out, resume=True)
    with pytest.raises(ArtifactError, match=r"another configuration: regularizers was"):
        train(config_of(*ALL[:2]), out, resume=True)
    train(config_of(*ALL, checkpoint_every=2), out, resume=True)


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


def test_nothing_of_the_caller_is_changed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(7)
    generator = torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning")}
    filters = list(warnings.filters)
    environment = dict(os.environ)
    with torch.no_grad():
        train(config_of(*ALL), tmp_path / "run")
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert warnings.filters == filters
    assert dict(os.environ) == environment
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert capfd.readouterr() == ("", "")


def test_progress_is_told_step_by_step(tmp_path):
    told = []
    train(config_of(epochs=2), tmp_path / "run", on_progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == list(range(1, 2 * STEPS + 1))
    assert {total for _, total, _ in told} == {2 * STEPS}
    assert told[0][2] == {}
    assert told[STEPS - 1][2]["epoch"] == 0


# The folder


def test_a_run_is_not_replaced_unasked(tmp_path):
    config = config_of(epochs=1)
    out = train(config, tmp_path / "run")
    before = weights(out)
    with pytest.raises(ArtifactError, match="a finished run; give overwrite=True"):
        train(config, out)
    train(config_of(epochs=1, seed=1), out, overwrite=True)
    assert not same(weights(out), before)
    unfinished = train(config, tmp_path / "other", stop_after=1)
    with pytest.raises(ArtifactError, match="can go on with resume=True"):
        train(config, unfinished)
    with pytest.raises(ConfigurationError, match="give one"):
        train(config, out, resume=True, overwrite=True)


@pytest.mark.parametrize("way", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_folder_of_something_else_is_left_alone(tmp_path, way):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match=r"no training run, and holds thesis\.tex"):
        train(config_of(), tmp_path, **way)
    with pytest.raises(ArtifactError, match="holds a file"):
        train(config_of(), tmp_path / "thesis.tex", **way)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_model_is_made_again_without_its_data(tmp_path, whole, plugin):
    model, _ = RunFolder(whole).load()
    assert same(model.state_dict(), weights(whole))
    assert not model.training
    assert "beside" in model.branches
    document = json.loads((whole / "config.json").read_text())
    document["train"] = {"kind": "gone"}
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("run.json", "model.safetensors"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(document))
    again, _ = RunFolder(folder).load()
    inputs = torch.randn(4, 6)
    assert torch.equal(again(inputs).logits, model(inputs).logits)


def test_a_missing_plugin_is_named(whole):
    with pytest.raises(ArtifactError, match="unknown regularizer 'everything'"):
        RunFolder(whole).load()


def test_weights_that_two_names_share_are_saved(tmp_path):
    out = train(config_of(network={"factory": f"{__name__}:tied"}, epochs=1), tmp_path / "run")
    model, _ = RunFolder(out).load()
    assert model.network.again is model.network.body[0]
    assert same(model.state_dict(), weights(out))


def damaged_json(folder, name, **changes):
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**document, **changes}))


DAMAGE = {
    "no run.json": (lambda folder: (folder / "run.json").unlink(), "did not finish"),
    "nothing at all": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "no training run",
    ),
    "a flipped bit": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "it is damaged",
    ),
    "no JSON": (lambda folder: (folder / "run.json").write_text("{"), "cannot be read"),
    "no object": (lambda folder: (folder / "run.json").write_text("[]"), "no JSON object"),
    "another schema": (lambda folder: damaged_json(folder, "run.json", schema=2), "has schema 2"),
    "another network": (
        lambda folder: damaged_json(
            folder, "config.json", network={"factory": f"{__name__}:flat", "arguments": {}}
        ),
        "does not fit the network",
    ),
    "a field that nobody knows": (
        lambda folder: damaged_json(folder, "config.json", network={"factory": "a:b", "fctry": 1}),
        "fctry",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    out = train(config_of(epochs=1), tmp_path / "run")
    damage(out)
    with pytest.raises(ArtifactError, match=message):
        RunFolder(out).load()


# What is refused


REFUSED = {
    "same kind": ({"regularizers": [Mix(), Mix(weight=2)]}, "mix is there more than once"),
    "two losses": (
        {"regularizers": [Replacing(), ReplacingToo()]},
        "also_replacing and replacing each replace the classification loss",
    ),
    "no outliers": (
        {"regularizers": [Everything()], "outliers": None},
        "everything needs outliers",
    ),
    "warm-up": ({"schedule": {"warmup": 3}}, "leaves nothing of 3 epochs"),
    "milestones": ({"schedule": {"kind": "step"}}, "which needs them"),
    "no step": ({"schedule": {"milestones": [1]}}, "belong to the schedule 'step'"),
    "final": ({"schedule": {"kind": "constant", "final": 0.1}}, "belongs to the schedule 'cosine'"),
    "momentum": ({"optimizer": {"kind": "adam", "lr": 0.1, "momentum": 0.9}}, "are SGD's"),
    "nesterov": (
        {"optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0, "nesterov": True}},
        "above 0",
    ),
    "factory": ({"network": {"factory": "os.system"}}, "package.module:name"),
    "no epochs": ({"epochs": 0}, "epochs"),
    "a typo": ({"epoch": 3}, "epoch"),
    "a source": ({"regularizers": [Clusters()]}, "a regularizer is needed"),
    "text": ({"epochs": "3"}, "epochs"),
}


@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_cannot_work_is_refused(tmp_path, fields, message):
    usual = {name: getattr(config_of(), name) for name in TrainingConfig.model_fields}
    with pytest.raises(ConfigurationError, match=message):
        train({**usual, **fields}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_configuration_is_plain_text_and_back(plugin):
    config = config_of(*ALL, schedule={"kind": "cosine", "warmup": 0.5}, preprocess={"size": 4})
    assert TrainingConfig.model_validate(json.loads(json.dumps(config.dump()))) == config


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
    network = {"factory": f"{__name__}:net", "arguments": {"classes": 5}}
    with pytest.raises(ConfigurationError, match="5 logits and the data 3 classes"):
        train(config_of(network=network), tmp_path / "run")
    train(config_of(network=network, classes=5, epochs=1), tmp_path / "other")


def test_a_missing_lightning_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "oodcore.lightning_run", None)
    monkeypatch.delattr(oodcore, "lightning_run", raising=False)
    with pytest.raises(ExtraError, match=r"pip install 'oodcore\[train\]'"):
        train(config_of(), tmp_path / "run")


def test_the_contract_needs_no_lightning():
    import subprocess
    import sys

    code = "import oodcore.training, oodcore.regularizer, sys; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The learning rate


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.1, 5: 0.1, 10: 0.1}),
        ("cosine", {0: 0.1, 5: 0.05, 10: 0.0}),
        ({"kind": "cosine", "final": 0.02, "warmup": 2}, {0: 0.001, 1: 0.0505, 6: 0.06, 10: 0.02}),
        ({"kind": "step", "milestones": [3, 6]}, {2.9: 0.1, 3: 0.01, 5.9: 0.01, 6: 0.001}),
    ],
)
def test_the_learning_rate_is_a_function_of_the_epoch(schedule, expected):
    rate = config_of(schedule=schedule, epochs=10).schedule.rate(0.1, 10)
    for epoch, value in expected.items():
        assert rate(epoch) == pytest.approx(value, abs=1e-12)


# The order of the rows


@pytest.mark.parametrize(("rows", "batch"), [(42, 11), (7, 7), (10, 3), (5, 100), (3, 1)])
def test_an_epoch_has_each_row_once_in_batches_of_one_size(rows, batch):
    from oodcore.batches import Batches
    from oodcore.batches import Rows as Read

    batches = Batches(
        Read(Clusters(rows=rows).open(), "rows"),
        None,
        batch_size=batch,
        outlier_batch_size=1,
        seed=0,
    )
    orders = []
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        parts = [batches.numbers(first + step) for step in range(batches.steps_per_epoch)]
        assert max(map(len, parts)) <= batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        orders.append([row for part in parts for row in part])
        assert sorted(orders[-1]) == list(range(rows))
    assert rows < 6 or orders[0] != orders[1]


def test_processes_share_each_batch_and_its_outliers():
    from oodcore.batches import Batches
    from oodcore.batches import Rows as Read

    def batches(rank, world):
        return Batches(
            Read(Clusters().open(), "rows"),
            Read(Clusters(rows=7, seed=9).open(), "outliers"),
            batch_size=11,
            outlier_batch_size=5,
            seed=0,
            rank=rank,
            world=world,
        )

    for step in range(2 * STEPS):
        _, labels, ids, outliers = batches(0, 1)[step]
        parts = [batches(rank, 2)[step] for rank in range(2)]
        joined = torch.cat([part[2] for part in parts])
        order = torch.argsort(joined)
        assert torch.equal(joined[order], ids.sort().values)
        assert torch.equal(torch.cat([part[1] for part in parts])[order], labels[ids.argsort()])
        shared = torch.cat([part[3] for part in parts])
        assert torch.equal(shared.sort(0).values, outliers.sort(0).values)


def test_outliers_are_read_through_again_and_again():
    from oodcore.batches import Batches
    from oodcore.batches import Rows as Read

    batches = Batches(
        Read(Clusters().open(), "rows"),
        Read(Clusters(rows=7, seed=9).open(), "outliers"),
        batch_size=11,
        outlier_batch_size=3,
        seed=0,
    )
    seen = torch.cat([batches[step][3] for step in range(7)])
    every = Clusters(rows=7, seed=9).open().inputs
    for turn in range(3):
        part = seen[7 * turn : 7 * turn + 7]
        assert torch.equal(part.sort(0).values, every.sort(0).values)
