"""The training exercise: a run small enough to be repeated, stopped and resumed many times."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oodcore.data import Batch
from oodcore.engine import Engine
from oodcore.regularizer import Regularizer, Run, TrainModel, place
from oodcore.testing.comparison import tensors

SIDE, CHANNELS, WIDTH = 8, 3, 12


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: K, training rows, rows of a step, passes over the rows; and its outliers, the
    usual ones, others, or none."""

    classes: int = 3
    rows: int = 32
    batch: int = 8
    epochs: int = 3
    device: str = "cpu"
    outliers: Literal["usual", "other", "none"] = "usual"

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the rows."""
        return self.rows // self.batch

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class Classifier(nn.Module):
    """A convolution with batch normalisation and a hidden layer, on inputs ``[N, 3, 8, 8]``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * SIDE * SIDE // 4, WIDTH)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, K]``."""
        maps = torch.nn.functional.avg_pool2d(self.norm(self.maps(inputs)).relu(), 2)
        logits: Tensor = self.head(self.hidden(maps.flatten(1)).relu())
        return logits


class Exercise:
    """A run of the exercise, step by step, with a driver of its own in place of Lightning's loop.

    Args:
        regularizers: that take part.
        plan: sizes; the usual ones where left out.
    """

    def __init__(self, regularizers: Iterable[Regularizer], plan: Plan | None = None) -> None:
        self.plan = plan or Plan()
        generator = torch.Generator().manual_seed(7)
        classes = torch.arange(self.plan.rows) % self.plan.classes
        patterns = torch.rand(self.plan.classes, CHANNELS, SIDE, SIDE, generator=generator)
        noise = torch.rand(self.plan.rows, CHANNELS, SIDE, SIDE, generator=generator)
        self.inputs = 0.6 * patterns[classes] + 0.4 * noise
        self.labels = classes
        outliers = torch.rand(self.plan.batch, CHANNELS, SIDE, SIDE, generator=generator)
        other = 1 - outliers if self.plan.outliers == "other" else outliers
        self.outliers = None if self.plan.outliers == "none" else other
        with _seeded("network"):
            model = TrainModel(Classifier(self.plan.classes), "head")
        self.run = Run(
            model=model,
            classes=self.plan.classes,
            width=WIDTH,
            input_shape=(CHANNELS, SIDE, SIDE),
            rows=self.plan.rows,
            epochs=self.plan.epochs,
            steps_per_epoch=self.plan.steps_per_epoch,
            seed=0,
            device=torch.device(self.plan.device),
            passes=self._pass,
        )
        with torch.random.fork_rng(devices=[]):
            self.engine = Engine(self.run, regularizers, lambda epoch: 0.05)
        self.optimizer = torch.optim.SGD(self.run.model.parameters(), lr=0.05, momentum=0.9)

    def begin(self) -> None:
        """Take the batch of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.engine.learning_rate
        rows = self._numbers(self.engine.index)
        batch = (self.inputs[rows], self.labels[rows], rows, self.outliers)
        with torch.random.fork_rng(devices=[]):
            self.engine.begin(*(self._given(part) for part in batch))

    def advance(self, until: int | None = None) -> Exercise:
        """Train up to a number of steps, or to the end and its ``finish``.

        Raises:
            AssertionError: a gradient that is not finite.
        """
        last = self.plan.steps if until is None else until
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            while self.engine.index < last:
                self.begin()
                self.optimizer.step(self.engine.closure(self._pass_back, self.optimizer))
                self._check_gradients()
                if self.engine.end():
                    self.engine.close(None)
            if until is None:
                self.engine.finish()
        return self

    def total(self) -> Tensor:
        """One pass over the batch that was begun."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return self.engine.total()

    def checkpoint(self) -> bytes:
        """Everything that a run is, as a file."""
        file = io.BytesIO()
        torch.save(
            {
                "model": self.run.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "engine": self.engine.state_dict(),
            },
            file,
        )
        return file.getvalue()

    def resume(self, checkpoint: bytes) -> Exercise:
        """Go on where another run stood; nothing but tensors and plain values is read."""
        saved = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.run.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.engine.load_state_dict(saved["engine"])
        return self

    def result(self) -> dict[str, Tensor]:
        """Weights, what the optimizer and the regularizers remember, and the metrics."""
        parts: dict[str, Any] = {
            "model": self.run.model,
            "optimizer": self.optimizer.state_dict()["state"],
            "states": self.engine.states,
            "history": self.engine.history,
        }
        return {name: value.clone() for name, value in tensors(parts).items()}

    def _pass_back(self) -> Tensor:
        self.optimizer.zero_grad()
        total = self.engine.total()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    def _check_gradients(self) -> None:
        for name, parameter in self.run.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                raise AssertionError(
                    f"after step {self.engine.index} the gradient of {name} is not finite"
                )

    def _given(self, part: Any) -> Any:
        return None if part is None else part.clone().to(self.run.device)

    def _numbers(self, step: int) -> Tensor:
        """The rows of a step, a pure function of it."""
        epoch, number = divmod(step, self.plan.steps_per_epoch)
        generator = torch.Generator().manual_seed(place(0, "rows", epoch))
        order = torch.randperm(self.plan.rows, generator=generator)
        return order[number * self.plan.batch : (number + 1) * self.plan.batch]

    def _pass(self) -> Iterator[Batch]:
        for step in range(self.plan.steps_per_epoch):
            rows = self._numbers(step)
            parts = (self.inputs[rows], self.labels[rows], rows)
            yield Batch(*(part.to(self.run.device) for part in parts))


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(place(0, name))
        yield
