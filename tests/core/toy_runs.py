"""Training runs of a few steps: data, networks, and regularizers, some of which err."""

from __future__ import annotations

import csv
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import oodcore
from oodcore import Memory, Regularizer, Source
from oodcore.training_config import TrainingConfig

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


def config_of(*regularizers: Regularizer, **fields) -> TrainingConfig:
    usual = {
        "network": {"factory": "toy_runs:net"},
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


def wrapped(classes: int = 3) -> nn.Module:
    return nn.DataParallel(Net(classes, 0.0))


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3))


class Zeros(nn.Module):
    def forward(self, rows):
        return 0 * rows


def blind() -> nn.Module:
    return nn.Sequential(Zeros(), nn.Linear(6, 3))


@contextmanager
def registered():
    """The regularizers and the source here as a plugin."""

    def register_regularizers(register):
        for cls in (Everything, Mix, Replay, Broken):
            register(cls)

    def register_sources(register):
        register(Clusters)

    hooks = SimpleNamespace(
        register_regularizers=oodcore.hookimpl(register_regularizers),
        register_sources=oodcore.hookimpl(register_sources),
    )
    with oodcore.registry.using(hooks):
        yield
