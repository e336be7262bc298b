"""Files that a user writes: configurations, their schema, plugins of his own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from oodcore.candidates import Part
from oodcore.cli import streams
from oodcore.config import (
    BenchmarkConfig,
    Candidate,
    Configuration,
    DetectorConfig,
    EnsembleConfig,
    Joint,
    candidates,
    read,
    validate,
)
from oodcore.data import Batch, Stream
from oodcore.document import Document
from oodcore.errors import ConfigurationError
from oodcore.extractor import Extractor
from oodcore.features import Features
from oodcore.schema import schema
from oodcore.training_config import TrainingConfig

SETS = ("train", "held_out", "validation", "calibrate", "outliers", "id_test")


def check(path: Path, *, load: bool) -> None:
    """Print what a configuration is for.

    Args:
        path: the file.
        load: load its model and open its data as well, which runs the code that they name.

    Raises:
        ConfigurationError: with all that is wrong, one line each.
    """
    document = read(path)
    for model in _meant(document):
        config = validate(model, document)
        streams.write(f"{path} is {_told(config)}")
    if load:
        for line in _loaded(config):
            streams.write(f"  {line}")


def schema_of(target: str) -> None:
    """Print the JSON Schema of a configuration."""
    streams.write_json(schema(target))


def start_plugin(name: str, folder: Path | None) -> None:
    """Make the files of a plugin, and say what comes next."""
    from oodcore.new_plugin import new_plugin

    made = new_plugin(name, folder)
    streams.write(f"made {made}; next: pip install --editable {made}")


def _meant(document: Document) -> list[type[Configuration] | type[TrainingConfig]]:
    """What a document is meant for, by the fields that only one kind of configuration has."""
    names = set(document.data)
    if "network" in names:
        return [TrainingConfig]
    if names & {"scorers", "models", "trainings"}:
        return [BenchmarkConfig]
    if "members" in names:
        return [EnsembleConfig]
    if "scorer" not in names:
        raise ConfigurationError(
            f"{document.file}: a detector has a 'scorer', an ensemble 'members', a benchmark "
            f"'scorers' and a training run a 'network'; this has {', '.join(names) or 'nothing'}"
        )
    return [DetectorConfig, *([BenchmarkConfig] if names >= {"id_test", "ood"} else [])]


def _told(config: Configuration | TrainingConfig) -> str:
    if isinstance(config, TrainingConfig):
        acting = ", ".join(part.kind for part in config.regularizers)
        return (
            f"a training run: {config.network.factory} on {config.train.kind}, "
            f"{_several(config.epochs, 'epoch')}, {acting or 'no regularizer'}"
        )
    if isinstance(config, BenchmarkConfig):
        detectors = [str(candidate.name) for candidate in config.candidates()]
        number = len(config.models or ()) + len(config.trainings or ())
        models = f" on {_several(number, 'model')}" if number else ""
        trained = len(config.trainings or ())
        models += f", {trained} to be trained" if trained else ""
        plain = config.protocol.kind == "separation"
        protocol = "" if plain else f", protocol {config.protocol.kind}"
        sets = f", {_several(len(config.ood), 'OOD set')}" if config.ood else ""
        return (
            f"a benchmark: {_several(len(detectors), 'detector')}{models}"
            f"{sets}{protocol}: {', '.join(detectors)}"
        )
    given = [name for name in ("train", "held_out", "calibrate") if getattr(config, name)]
    if isinstance(config, EnsembleConfig):
        joint = Joint(
            members={
                name: Part(scorer=one.scorer, shapers=one.shapers)
                for name, one in config.members.items()
            },
            combine=config.combine,
        )
        (candidate,) = candidates([joint], config.shapers)
        return f"an ensemble: {candidate.name}, with {', '.join(given) or 'no data'}"
    assert isinstance(config, DetectorConfig)
    item = Candidate(shapers=config.shapers, scorer=config.scorer)
    (candidate,) = candidates([item])
    model = f" on {config.extractor.kind}" if config.extractor else ""
    return f"a detector: {candidate.name}{model}, with {', '.join(given) or 'no data'}"


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _loaded(config: Configuration | TrainingConfig) -> Iterator[str]:
    """What its data and models turn out to be, a line each."""
    sources = {name: getattr(config, name, None) for name in SETS}
    if isinstance(config, Configuration):
        sources |= {f"ood.{name}": source for name, source in (config.ood or {}).items()}
    first = None
    for name, source in sources.items():
        if source is not None:
            stream = Stream(source, batch_size=2)
            batch = next(iter(stream))
            first = batch if first is None else first
            yield f"{name}: {stream.rows} rows of {_form(batch)}"
    if isinstance(config, TrainingConfig):
        network = config.network.build(config.seed)
        size = sum(parameter.numel() for parameter in network.parameters())
        yield f"network: {type(network).__name__}, {size} parameters"
        return
    models: dict[str, Extractor | None] = {"extractor": config.extractor}
    if isinstance(config, BenchmarkConfig):
        models |= {f"models.{name}": model for name, model in (config.models or {}).items()}
        for name, training in (config.trainings or {}).items():
            yield from (f"trainings.{name}.{line}" for line in _loaded(training))
    if isinstance(config, EnsembleConfig):
        models |= {f"members.{name}": one.extractor for name, one in config.members.items()}
    for name, extractor in models.items():
        if extractor is not None:
            yield f"{name}: {_seen(extractor, first)}"


def _form(batch: Batch | Features) -> str:
    """The size of one input."""
    given: Any = batch.embeddings if isinstance(batch, Features) else batch.inputs
    if isinstance(given, torch.Tensor):
        return str(list(given.shape[1:]))
    return f"{', '.join(given)}" if isinstance(given, Mapping) else "text"


def _seen(extractor: Extractor, batch: Batch | Features | None) -> str:
    """What a model makes of an input."""
    model = extractor.load()
    name = model.title
    if not isinstance(batch, Batch):
        return name
    with torch.no_grad():
        features = model.forward(batch.inputs)
    sizes = {"embeddings": features.embeddings, "logits": features.logits}
    told = [f"{rows.shape[1]} {title}" for title, rows in sizes.items() if rows is not None]
    return f"{name}, {' and '.join(told)}"
