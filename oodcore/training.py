"""The training run: a network, its data and its regularizers, to a folder that can be loaded."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oodcore import __version__
from oodcore.batches import Batches, Rows
from oodcore.component import Component
from oodcore.config import validate
from oodcore.data import Batch, to_device
from oodcore.engine import Engine
from oodcore.errors import ConfigurationError, ExtraError
from oodcore.extractor import FeatureModel
from oodcore.factory import load_weights, settled
from oodcore.plugins import registry
from oodcore.regularizer import Run, TrainModel, place
from oodcore.run_folder import RunFolder
from oodcore.training_config import TrainingConfig

__all__ = ["TrainingConfig", "train"]

OnProgress = Callable[[int, int, Mapping[str, float]], None]
"""Called after every step with the steps done, their total, and the last epoch's numbers."""


def train(
    config: TrainingConfig | Mapping[str, Any],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    stop_after: int | None = None,
) -> Path:
    """Train a network, and leave a folder that the extractor ``run`` reads.

    The folder holds ``config.json``, ``metrics.csv`` (a row an epoch), ``model.safetensors`` and
    ``run.json``; and ``checkpoints/`` until the run is done. A run that was killed at any step and
    is called again with ``resume`` ends with the same weights: bit for bit on a CPU, and on a GPU
    as far as its kernels repeat themselves.

    The loop is Lightning's. Under ``torchrun`` the processes train together, each on its share of
    every batch. Global random generators are afterwards as they were.

    Args:
        config: the run, or a mapping that describes it.
        out: the folder.
        resume: go on with the run that the folder holds, from its newest checkpoint; the beginning
            if there is none. A finished run is left as it is.
        overwrite: replace the run that the folder holds, at once.
        on_progress: called after every step; what it raises interrupts the run.
        stop_after: leave, as if killed, after so many steps of the whole run.

    Returns:
        The folder.

    Raises:
        ConfigurationError: the configuration, or ``resume`` and ``overwrite`` together.
        ArtifactError: the folder holds something else, or another run.
        DataError: rows that cannot be trained on.
        Diverged: the loss or the weights are no longer usable numbers.
        ExtraError: Lightning is not installed.
    """
    if resume and overwrite:
        raise ConfigurationError("resume goes on with a run and overwrite replaces it; give one")
    if not isinstance(config, TrainingConfig):
        config = validate(TrainingConfig, config)
    drive = _lightning().drive
    folder = RunFolder(Path(out))
    device, rank, world = _place(config)
    _meet(device, world)
    with _own_torch(device):
        if rank == 0:
            folder.start(config, resume=resume, overwrite=overwrite)
        _barrier(world)
        if folder.finished:
            return folder.path
        engine, batches, validation = _assembled(config, device, rank, world)
        arguments = settled(config.network.factory, config.network.arguments)
        optimizer = config.optimizer.build(_trainable(engine.run.model))
        if (state := folder.load_checkpoint()) is not None:
            engine.run.model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            engine.load_state_dict(state["engine"])
        total = engine.run.epochs * engine.run.steps_per_epoch

        def after_step(ends_epoch: bool) -> bool:
            if ends_epoch:
                rows = engine.run.batches() if config.collapse else None
                engine.close(validation(), rows)
                if rank == 0:
                    folder.write_metrics(engine.history)
            every = config.checkpoint_every
            due = ends_epoch or (every is not None and engine.index % every == 0)
            if due and engine.index < total:
                state = {"engine": engine.state_dict()}
                if rank == 0:
                    state["model"] = engine.run.model.state_dict()
                    state["optimizer"] = optimizer.state_dict()
                    folder.save_checkpoint(engine.index, state)
            if on_progress is not None and rank == 0:
                on_progress(engine.index, total, engine.history[-1] if engine.history else {})
            return engine.index == total or stop_after is None or engine.index < stop_after

        done = drive(
            engine,
            batches.loader(engine.index, total, config.num_workers),
            optimizer,
            folder=folder.path,
            gradient_clip=config.gradient_clip,
            after_step=after_step,
        )
        if done and rank == 0:
            folder.finish(engine.run, _record(config, engine, arguments))
        _barrier(world)
    return folder.path


def _lightning() -> Any:
    try:
        from oodcore import lightning_run
    except ImportError as error:
        raise ExtraError(
            f"training needs lightning, which cannot be imported ({error}); "
            "pip install 'oodcore[train]'"
        ) from error
    return lightning_run


def _place(config: TrainingConfig) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes, the latter as torchrun says in the environment."""
    world = int(os.environ.get("WORLD_SIZE", 1)) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    rank, local = (int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])) if world > 1 else (0, 0)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device: cuda is asked for, and there is no GPU; take 'auto'")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", local) if on_gpu else torch.device("cpu"), rank, world


def _meet(device: torch.device, world: int) -> None:
    """Have the processes able to talk, from here until the interpreter ends.

    A group that is taken down and begun again hangs at times, on what the first left in the store
    of torchrun; so it is begun once, and before Lightning would.
    """
    from torch import distributed

    if world == 1 or distributed.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_part)


def _part() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def _barrier(world: int) -> None:
    if world > 1:
        from torch import distributed

        distributed.barrier()


@contextmanager
def _own_torch(device: torch.device) -> Iterator[None]:
    """Gradients, generators and kernels as a run wants them; afterwards as they were."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _assembled(
    config: TrainingConfig, device: torch.device, rank: int, world: int
) -> tuple[Engine, Batches, Callable[[], Iterator[Batch] | None]]:
    """Engine, batches, and a way to a pass over this process's share of the validation rows."""
    rows = Rows(config.train.open(), "the training data", config.preprocess)
    classes = config.classes or (rows.count_classes() if len(rows) else 2)
    rows = Rows(rows.data, rows.name, rows.prepare, classes)
    outliers = None
    if config.outliers is not None:
        outliers = Rows(config.outliers.open(), "the outliers", config.preprocess)
    batches = Batches(
        rows,
        outliers,
        batch_size=config.batch_size,
        outlier_batch_size=config.outlier_batch_size or config.batch_size,
        seed=config.seed,
        rank=rank,
        world=world,
    )
    model, width, shape = _model(config, rows, classes)
    run = Run(
        model=model,
        classes=classes,
        width=width,
        input_shape=shape,
        rows=len(rows),
        epochs=config.epochs,
        steps_per_epoch=batches.steps_per_epoch,
        seed=config.seed,
        rank=rank,
        world=world,
        device=device,
        preprocess=config.preprocess,
        passes=lambda: _on(device, batches.epoch(config.epochs)),
    )
    rate = config.schedule.rate(config.optimizer.lr, config.epochs)
    engine = Engine(run, config.regularizers, rate)
    known = None
    if config.validation is not None:
        known = Rows(config.validation.open(), "the validation data", config.preprocess, classes)

    def validation() -> Iterator[Batch] | None:
        if known is None:
            return None
        return _on(device, known.parts(config.batch_size, rank, world))

    return engine, batches, validation


def _model(
    config: TrainingConfig, rows: Rows, classes: int
) -> tuple[TrainModel, int, tuple[int, ...]]:
    """The network with its head found, the size of its embeddings, and the shape of an input."""
    network = config.network.build(place(config.seed, "network"))
    if config.network.weights is not None:
        network = _started(network, config)
    example = rows.read([0]).inputs
    wrapped = FeatureModel.wrap(network)
    name = wrapped.head_name(example)
    with torch.no_grad():
        features = wrapped.forward(example)
    assert features.embeddings is not None
    assert features.logits is not None
    if features.logits.shape[1] != classes:
        raise ConfigurationError(
            f"the network has {features.logits.shape[1]} logits and the data {classes} classes; "
            "set 'classes', or give the factory the number as an argument"
        )
    shape = tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else ()
    return TrainModel(network, name), features.embeddings.shape[1], shape


def _started(network: nn.Module, config: TrainingConfig) -> nn.Module:
    """The network with the weights in a file, or with those that a run left in its folder.

    The head that a regularizer of that run put in place comes with them.
    """
    weights = config.network.weights
    assert weights is not None
    if not weights.is_dir():
        load_weights(network, weights)
        return network
    trained, blueprint = RunFolder(weights).load(network)
    heads = [part for part in blueprint.regularizers if part.weight and part.replaces_head]
    if strange := [part.kind for part in heads if part not in config.regularizers]:
        raise ConfigurationError(
            f"the run in {weights} was trained with the head of '{strange[0]}'; a run that starts "
            "from it needs the same regularizer, with the same fields"
        )
    return trained.network


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigurationError("the network has no parameter that requires a gradient")
    return parameters


def _on(device: torch.device, batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        yield Batch(*(to_device(part, device) for part in (batch.inputs, batch.labels, batch.ids)))


def _record(
    config: TrainingConfig, engine: Engine, arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a finished run says of how it came about."""
    import lightning

    parts: list[Component] = [config.train, *config.regularizers]
    parts += [part for part in (config.validation, config.outliers) if part is not None]
    owners = (registry.owner(inner) for part in parts for inner in part.walk())
    return {
        "oodcore": __version__,
        "plugins": {owner.distribution: owner.version for owner in owners if owner is not None},
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "device": engine.run.device.type,
        "processes": engine.run.world,
        "arguments": arguments,
        "metrics": engine.history[-1],
    }
