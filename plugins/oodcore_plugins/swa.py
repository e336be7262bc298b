"""swa: the average of the weights that a run passes through."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import oodcore
from oodcore.errors import ConfigurationError
from oodcore.regularizer import Schedule

SHARE = 0.6
"""SURE averages from epoch 120 of 200 on."""


class SWA(oodcore.Regularizer):
    """Stochastic weight averaging: the run ends with the mean of its weights at the end of each
    epoch from ``start`` on.

    From then on the learning rate goes from what it was to ``lr``, within ``anneal`` epochs, and
    stays. After the last epoch the statistics of batch normalisation are computed anew, from one
    pass over the training rows with everything else as it is at test time.

    There is no term, so a ``weight`` above 0 means nothing more than that it takes part.

    Args:
        start: the first epoch whose weights count, from 0; left out, three fifths of the run.
        lr: the learning rate of the averaged epochs; SURE takes 0.05 with SGD on CIFAR.
        anneal: epochs in which the rate gets there; 0 is at once.
        shape: of the way there, "cosine" or "linear".
        weight: 0 switches it off.

    Raises a ConfigurationError where ``start`` lies behind the last epoch.
    """

    kind = "swa"
    paper = oodcore.Paper(
        title="Averaging Weights Leads to Wider Optima and Better Generalization",
        authors="Pavel Izmailov, Dmitrii Podoprikhin, Timur Garipov, Dmitry Vetrov, "
        "Andrew Gordon Wilson",
        venue="UAI",
        year=2018,
        url="https://arxiv.org/abs/1803.05407",
    )

    start: NonNegativeInt | None = None
    lr: PositiveFloat = 0.05
    anneal: NonNegativeInt = 10
    shape: Literal["cosine", "linear"] = "cosine"

    def build(self, run: oodcore.Run) -> nn.Module:
        self._first(run)
        return Average(run.model)

    def wrap_schedule(self, schedule: Schedule, run: oodcore.Run) -> Schedule:
        start = self._first(run)

        def rate(epoch: float) -> float:
            if epoch < start:
                return schedule(epoch)
            done = 1.0 if self.anneal == 0 else min(1.0, (epoch - start) / self.anneal)
            done = (1 - math.cos(math.pi * done)) / 2 if self.shape == "cosine" else done
            return self.lr + (1 - done) * (schedule(start) - self.lr)

        return rate

    def after(self, step: oodcore.Step, state: Any) -> None:
        if step.ends_epoch and step.epoch >= self._first(step.run):
            state.add(step.run.model)

    def finish(self, run: oodcore.Run, state: Any) -> None:
        state.copy_to(run.model)
        renew_statistics(run)

    def _first(self, run: oodcore.Run) -> int:
        start = int(SHARE * run.epochs) if self.start is None else self.start
        if start >= run.epochs:
            raise ConfigurationError(
                f"swa: averaging starts at epoch {start}, and the run has {run.epochs}, counted "
                "from 0"
            )
        return start


class Average(nn.Module):
    """The running mean of a model's parameters.

    Args:
        model: whose parameters, by their shapes; nothing is counted yet.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.count: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for number, parameter in enumerate(model.parameters()):
            self.register_buffer(f"mean{number}", torch.zeros_like(parameter))

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        self.count += 1
        for number, parameter in enumerate(model.parameters()):
            mean = getattr(self, f"mean{number}")
            mean += (parameter - mean) / self.count

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(getattr(self, f"mean{number}"))


def renew_statistics(run: oodcore.Run) -> None:
    """Compute the statistics of batch normalisation anew, from all training rows once."""
    layers = [
        part
        for part in run.model.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
    if not layers:
        return
    modes = [(part, part.training) for part in run.model.modules()]
    momenta = [layer.momentum for layer in layers]
    run.model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        layer.momentum = None  # the mean over all batches
    try:
        with torch.no_grad():
            for batch in run.batches():
                run.model(batch.inputs)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for part, training in modes:
            part.training = training


@oodcore.hookimpl
def register_regularizers(register: Any) -> None:
    register(SWA)
