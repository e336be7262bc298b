"""Lightning's loop around an Engine: devices, processes, gradients and their clipping."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from oodcore.engine import Engine

AfterStep = Callable[[bool], bool]
"""Called after each step with whether it ended an epoch; whether to go on."""


class _Stopped(Exception):
    """Leaves the loop between two steps, as a machine that goes away would."""


def drive(
    engine: Engine,
    batches: Iterable[Any],
    optimizer: Optimizer,
    *,
    folder: Path,
    gradient_clip: float | None,
    after_step: AfterStep,
) -> bool:
    """Train an engine from where it stands to the end of the run, and let it finish.

    To Lightning the rest of the run is one epoch, begun afresh: its own counters of epochs and
    batches come out wrong when a run that was resumed is resumed once more, and the engine knows
    where it stands.

    Args:
        engine: the engine; it and the optimizer are where the run is to go on.
        batches: of the steps that are left.
        optimizer: of its model's parameters.
        folder: where Lightning would put files, had it any.
        gradient_clip: the norm that the gradient is clipped to, or None.
        after_step: see ``AfterStep``.

    Returns:
        False if ``after_step`` ended the run before its end.

    Raises:
        KeyboardInterrupt: the user's; Lightning would leave the interpreter instead.
    """
    previous = signal.getsignal(signal.SIGINT)
    with _quiet():
        try:
            trainer = _trainer(engine, folder, gradient_clip, after_step)
            trainer.fit(_Module(engine, optimizer), train_dataloaders=batches)
        except _Stopped:
            return False
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, previous)
            raise KeyboardInterrupt from None
    return True


def _trainer(
    engine: Engine, folder: Path, gradient_clip: float | None, after_step: AfterStep
) -> Trainer:
    run = engine.run
    alone = run.world == 1
    environment: ClusterEnvironment = LightningEnvironment() if alone else TorchElasticEnvironment()
    strategy: Strategy = (
        SingleDeviceStrategy(device=run.device)
        if alone
        # A branch may be without a gradient in the epochs in which its weight is 0.
        else DDPStrategy(find_unused_parameters=len(run.model.branches) > 0)
    )
    return Trainer(
        accelerator="gpu" if run.device.type == "cuda" else "cpu",
        strategy=strategy,
        devices=1 if alone else int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=1 if alone else run.world // int(os.environ["LOCAL_WORLD_SIZE"]),
        plugins=[environment],
        max_epochs=1,
        gradient_clip_val=gradient_clip,
        callbacks=[_Follow(engine, after_step)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


class _Module(LightningModule):
    """The model, and the calls of the engine at the places that Lightning has for them.

    The states of the regularizers are no part of this module: Lightning would hand parameters of
    other optimizers to DDP, and DDP would overwrite the buffers of all processes but one.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer) -> None:
        super().__init__()
        self.model = engine.run.model
        self._engine, self._optimizer = engine, optimizer

    def configure_optimizers(self) -> Optimizer:
        return self._optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._engine.learning_rate
        self._engine.begin(*batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._engine.total()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        optimizer.step(closure=self._engine.closure(optimizer_closure, self._optimizer))

    def on_train_end(self) -> None:
        self._engine.finish()


class _Follow(Callback):
    """Ends each step."""

    def __init__(self, engine: Engine, after_step: AfterStep) -> None:
        self._engine, self._after_step = engine, after_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._after_step(self._engine.end()):
            raise _Stopped


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of itself; what anything else says still comes through."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
