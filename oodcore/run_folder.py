"""RunFolder: what a training run leaves, and how its model is made of it again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from oodcore.component import Settings
from oodcore.engine import prepare_model, taking_part
from oodcore.errors import ArtifactError
from oodcore.factory import Arguments
from oodcore.messages import explain
from oodcore.regularizer import Run, TrainModel
from oodcore.training_config import Blueprint, TrainingConfig

SCHEMA = 1
CONFIG, RECORD, METRICS = "config.json", "run.json", "metrics.csv"
WEIGHTS, CHECKPOINTS = "model.safetensors", "checkpoints"


class _Seal(Settings):
    """What a finished run's record must say for its model to be made again."""

    model_config = ConfigDict(extra="ignore")

    classes: PositiveInt
    width: PositiveInt
    input_shape: tuple[PositiveInt, ...]
    rows: PositiveInt
    epochs: PositiveInt
    steps_per_epoch: PositiveInt
    seed: NonNegativeInt
    head: str
    fingerprint: str
    arguments: Arguments | None = None


SHAPE = tuple(
    name for name in _Seal.model_fields if name not in ("head", "fingerprint", "arguments")
)
"""The fields of a Run that a finished run records."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one training run.

    ``config.json`` (as validated) and ``metrics.csv`` (a row an epoch) are there from the start,
    ``checkpoints/`` while it runs; ``model.safetensors`` and at last ``run.json`` when it is done.
    """

    path: Path

    @property
    def started(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / CONFIG).is_file()

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / RECORD).is_file()

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = sorted((self.path / CHECKPOINTS).glob("step-*.ckpt"))
        return found[-1] if found else None

    def start(self, config: TrainingConfig, *, resume: bool, overwrite: bool) -> None:
        """Make the folder ready for a run, or for the rest of one.

        Raises:
            ArtifactError: there is a run and neither ``resume`` nor ``overwrite``, the run that is
                to be resumed has another configuration, or there is something that is no run.
        """
        if strange := self._strange():
            raise ArtifactError(
                f"{self.path} is no training run, and holds {', '.join(strange[:5])}; choose "
                "another folder"
            )
        if self.started and not resume and not overwrite:
            state = "a finished run" if self.finished else "a run that can go on with resume=True"
            raise ArtifactError(
                f"{self.path} holds {state}; give overwrite=True to replace it, or another folder"
            )
        if self.started and resume:
            self.refuse_another(config)
            return
        for name in (RECORD, WEIGHTS, METRICS, CONFIG):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        (self.path / CHECKPOINTS).mkdir(parents=True)
        self._write(CONFIG, _json(config.dump()))

    def save_checkpoint(self, step: int, state: Mapping[str, Any]) -> None:
        """A checkpoint after so many steps, in place of the one before."""
        content = io.BytesIO()
        torch.save(state, content)
        before = self.checkpoint
        self._write(f"{CHECKPOINTS}/step-{step:012d}.ckpt", content.getbuffer())
        if before is not None:
            before.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """What the newest checkpoint holds, on the CPU, or None.

        Raises:
            ArtifactError: it cannot be read.
        """
        path = self.checkpoint
        if path is None:
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ArtifactError(
                f"{path} cannot be read: {error}; start the run again with overwrite=True"
            ) from error
        return state

    def write_metrics(self, history: Sequence[Mapping[str, float]]) -> None:
        """One row an epoch; a number that an epoch does not have is an empty cell."""
        names = list(dict.fromkeys(name for row in history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        self._write(METRICS, text.getvalue().encode())

    def finish(self, run: Run, record: Mapping[str, Any]) -> None:
        """The weights, then the record that says that the run is done; the checkpoints go."""
        state = run.model.state_dict()
        # Copies, for the format refuses two names of one tensor, as tied weights are.
        weights = save({name: value.cpu().clone().contiguous() for name, value in state.items()})
        self._write(WEIGHTS, weights)
        shape = {name: getattr(run, name) for name in SHAPE}
        document = {
            "schema": SCHEMA,
            **shape,
            "head": run.model.head_name,
            "fingerprint": hashlib.sha256(weights).hexdigest(),
            **record,
        }
        self._write(RECORD, _json(document))
        shutil.rmtree(self.path / CHECKPOINTS)

    def load(self, network: nn.Module | None = None) -> tuple[TrainModel, Blueprint]:
        """The model that the run left, on the CPU in evaluation mode, and what it was made by.

        Neither the training data nor its source is needed.

        Args:
            network: to put the weights into, once the run's regularizers have prepared it; one that
                the run's factory makes where it is left out.

        Raises:
            ArtifactError: no finished run, a file that is damaged or of another schema, or weights
                that do not fit the network.
            ConfigurationError: the factory cannot be imported or called, or its network has lost
                the head.
        """
        if not self.finished:
            what = "a run that did not finish" if self.started else "no training run"
            raise ArtifactError(f"{self.path} holds {what}; run.json is missing")
        seal, blueprint = self._seal(), self.blueprint()
        weights = self.path / WEIGHTS
        if hashlib.sha256(weights.read_bytes()).hexdigest() != seal.fingerprint:
            raise ArtifactError(f"{weights} is not the file that the run wrote; it is damaged")
        target = "the network that starts from it"
        if network is None:
            target = f"the network of {self.path / CONFIG}"
            origin = blueprint.network
            if seal.arguments is not None:
                origin = origin.model_copy(update={"arguments": seal.arguments})
            network = origin.build(seal.seed)
        model = TrainModel(network, seal.head)
        run = Run(model=model, **{name: getattr(seal, name) for name in SHAPE})
        with torch.random.fork_rng(devices=[]):
            prepare_model(run, taking_part(blueprint.regularizers))
        try:
            run.model.load_state_dict(load_file(weights))
        except (RuntimeError, SafetensorError) as error:
            raise ArtifactError(f"{weights} does not fit {target}: {error}") from None
        return run.model.eval(), blueprint

    def blueprint(self) -> Blueprint:
        """Network, preprocessing and regularizers of the run, as configured.

        Raises:
            ArtifactError: there is no run, or its configuration cannot be read.
        """
        document = self._read(CONFIG)
        parts = {name: document[name] for name in Blueprint.model_fields if name in document}
        try:
            return Blueprint.model_validate(parts)
        except ValidationError as error:
            raise ArtifactError(explain(error, at=str(self.path / CONFIG))) from None

    def _strange(self) -> list[str]:
        """What keeps a folder from being begun: the files in it, if it is none of ours."""
        if self.started or not os.path.lexists(self.path):
            return []
        if not self.path.is_dir():
            return ["a file"]
        ours = {CONFIG, RECORD, METRICS, WEIGHTS}
        ours |= {_part(name) for name in ours} | {CHECKPOINTS}
        return sorted({entry.name for entry in self.path.iterdir()} - ours)

    def refuse_another(self, config: TrainingConfig) -> None:
        """Raise an ArtifactError if the run that was begun here learns something else."""
        before, given = self._read(CONFIG), config.learning()
        changed = [name for name, value in given.items() if before.get(name) != value]
        if changed:
            shown = ", ".join(
                f"{name} was {json.dumps(before.get(name))} and is {json.dumps(given[name])}"
                for name in changed
            )
            raise ArtifactError(
                f"{self.path} cannot be resumed with another configuration: {shown}"
            )

    def _seal(self) -> _Seal:
        record = self._read(RECORD)
        if record.get("schema") != SCHEMA:
            raise ArtifactError(
                f"{self.path / RECORD} has schema {record.get('schema')}, and this oodcore reads "
                f"{SCHEMA}; update oodcore"
            )
        try:
            return _Seal.model_validate(record)
        except ValidationError as error:
            raise ArtifactError(explain(error, at=str(self.path / RECORD))) from None

    def _read(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.path / name} cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise ArtifactError(f"{self.path / name} is no JSON object")
        return document

    def _write(self, name: str, content: bytes | memoryview) -> None:
        part = self.path / _part(name)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / name)


def _part(name: str) -> str:
    folder, slash, name = name.rpartition("/")
    return f"{folder}{slash}.{name}.part"


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()
