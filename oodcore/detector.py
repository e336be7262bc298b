"""Detector: composition of a model, shapers and a scorer; fit, calibrate, score, predict, save."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from oodcore.cache import Cache
from oodcore.component import Component
from oodcore.data import Adapt
from oodcore.decision import Array, Decision
from oodcore.errors import ConfigurationError, DataError, NotFittedError
from oodcore.extractor import Extractor, FeatureModel
from oodcore.features import Features
from oodcore.fitting import Fitting
from oodcore.passes import Classes, fit, partial_fit, place_of, score
from oodcore.plugins import registry
from oodcore.recipe import Learnt, Recipe
from oodcore.scorer import Scorer, Shaper, check_recipe

__all__ = ["Detector", "fit", "load"]

Self = TypeVar("Self", bound="Detector")


class Detector(Decision):
    """Finds inputs that a model should not be trusted on.

    Args:
        model: an ``nn.Module``, a ``FeatureModel``, an extractor (or its kind or mapping); left
            out, the detector works on ``Features`` and on arrays of embeddings.
        scorer: a scorer, its kind, or a mapping with a kind.
        shapers: what reshapes features before the scorer, in turn.
        device: ``auto`` (the model's own; for an extractor, a GPU where there is one), or a name.
        batch_size: rows at a time, where the data does not come in batches.
        num_workers: processes that read a data set.
        seed: of whatever is drawn (which tenth is held out, where that is needed).
        adapt: turns a batch of another form into a tensor, ``(x, y[, id])``, or a mapping with
            ``input``, ``label``, ``id``.
        cache: a folder (or a ``Cache``) that keeps what the model says of a batch, so that it is
            not asked twice; it is no part of what ``save`` writes. Left out, nothing is kept.

    Scores, p-values and predictions are NumPy arrays with one number a row, in the order of the
    data. A higher score is more in-distribution.

    Raises:
        ConfigurationError: components that are unknown, ill-formed or do not go together.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        scorer: Any,
        shapers: Sequence[Any] = (),
        device: str = "auto",
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        adapt: Adapt | None = None,
        cache: str | Path | Cache | None = None,
    ) -> None:
        if isinstance(shapers, str | Mapping | Component):
            raise ConfigurationError("shapers is a list: write shapers=[...]")
        numbers = {"batch_size": batch_size, "num_workers": num_workers, "seed": seed}
        batch_size, num_workers, seed = (_whole(name, given) for name, given in numbers.items())
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, not {batch_size}")
        if num_workers < 0:
            raise ConfigurationError(f"num_workers must be at least 0, not {num_workers}")
        self.recipe = Recipe(
            registry.build("scorer", scorer),  # type: ignore[arg-type]
            tuple(registry.build("shaper", shaper) for shaper in shapers),  # type: ignore[misc]
            seed,
        )
        check_recipe(self.recipe.scorer, self.recipe.shapers)
        _refuse_device(device)
        self.extractor, self._model = _modelled(model, device)
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.adapt = adapt
        self.cache = cache if cache is None or isinstance(cache, Cache) else Cache(cache)
        self.learnt: Learnt | None = None
        self.shape: Mapping[str, Any] = {}
        self.fitting: Fitting | None = None
        self.fingerprint: str | None = None
        self.name = "detector"

    @classmethod
    def from_config(cls, config: Any) -> Detector:
        """A detector from a YAML file (its path) or a mapping of the same form.

        Raises:
            ConfigurationError: names the file, the line and the field.
        """
        from oodcore.config import DetectorConfig, read, validate

        document = read(config) if isinstance(config, str | Path) else config
        checked = validate(DetectorConfig, document)
        return cls(
            checked.extractor,
            scorer=checked.scorer,
            shapers=checked.shapers,
            device=checked.device,
            batch_size=checked.batch_size,
            num_workers=checked.num_workers,
            seed=checked.seed,
            cache=checked.cache,
        )

    @property
    def scorer(self) -> Scorer:
        """The scorer."""
        return self.recipe.scorer

    @property
    def shapers(self) -> tuple[Shaper, ...]:
        """The shapers, in turn."""
        return self.recipe.shapers

    @property
    def model(self) -> FeatureModel | None:
        """The model, loaded on first use; None if the detector works on Features."""
        if self._model is None and self.extractor is not None:
            self._model = _placed(self.extractor.load(), self.device)
        return self._model

    def fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Detector:
        """Learn from in-distribution training data; returns the detector.

        Args:
            data: a loader, a Dataset, a Source, ``(inputs, labels)``, an array, or Features.
            held_out: in-distribution rows for parts that are measured on rows that nothing was
                fitted on; left out, a tenth of the data is set apart where such a part exists.
            classes: the number of classes (or the classes ``0..K-1``), where neither the model's
                logits nor whole arrays of labels tell.

        Raises:
            DataError: labels outside ``0..K-1``, numbers that are not finite, a missing field.
        """
        fit({self.name: self}, data, held_out, classes=classes)
        return self

    def partial_fit(self, data: Any, held_out: Any = None, *, classes: Classes = None) -> Detector:
        """Go on fitting with more rows: the result is that of all rows at once.

        The calibration is dropped. Arguments as in ``fit``; without logits, ``classes`` is required
        in the first call. A detector that learns in several stages keeps the features of its rows
        (memory-mapped past a limit) to be able to go on.

        Raises:
            NotFittedError: the detector was loaded without its store.
            DataError: as ``fit``; the detector stays as it was.
        """
        partial_fit({self.name: self}, data, held_out, classes=classes)
        return self

    def score(self, data: Any) -> Array:
        """The score of each row, ``[N]`` float64; higher is more in-distribution.

        Raises:
            NotFittedError: ``fit`` comes first.
            DataError: rows that are not of the kind that was fitted on, or not finite.
        """
        return score({self.name: self}, data)[self.name]

    def save(self, folder: str | Path, overwrite: bool = False, store: bool = False) -> Path:
        """Write the fitted detector to a folder: JSON, safetensors and hashes; no pickle.

        Args:
            folder: must not exist, unless ``overwrite``.
            overwrite: replace what is there, at once.
            store: keep the statistics too, so that ``partial_fit`` can go on after loading.

        Raises:
            NotFittedError: nothing to save yet.
            PluginError: a component that no installed plugin brings could not be loaded again.
            ArtifactError: the folder exists and is not to be, or cannot safely be, overwritten.
        """
        from oodcore.artifact import write_artifact
        from oodcore.packing import packed_detector

        packed = packed_detector(self, store=store)
        return write_artifact(Path(folder), "detector", packed, overwrite=overwrite)

    def ready(self) -> Learnt:
        """What was learnt.

        Raises:
            NotFittedError: nothing yet, and there is something to learn.
        """
        if self.learnt is None and self.recipe.fixed:
            self.learnt = Learnt({}, ({},) * len(self.shapers))
        if self.learnt is None:
            raise NotFittedError(
                f"this detector ('{self.scorer.kind}') learns from data: call fit first"
            )
        return self.learnt

    def going_on(self, classes: int | None, held_out: bool) -> Fitting:
        """A fitting of what was learnt so far, to go on with.

        Raises:
            NotFittedError: the detector was loaded without its store.
            ConfigurationError: it passes through the model again to learn.
            DataError: held-out rows now and not before, or before and not now.
        """
        if self.fitting is not None:
            fitting = self.fitting.only(self.name)
        elif self.learnt is None or self.recipe.fixed:
            fitting = Fitting({self.name: self.recipe}, classes, held_out)
        else:
            raise NotFittedError(
                "this detector was loaded without its store and cannot go on fitting: save it with "
                "store=True, or fit again"
            )
        if fitting.again():
            raise ConfigurationError(
                "partial_fit cannot go on with a detector that passes through the model again once "
                "some of it is fitted: such a detector is fitted in one call of fit"
            )
        if fitting.held_out != held_out and self.recipe.holds_out:
            raise DataError("give held_out= in every call of partial_fit, or in none")
        return fitting

    def take(self, learnt: Learnt, fitting: Fitting, name: str, fingerprint: str | None) -> None:
        """Take over what was learnt in a fitting, under the name it has there."""
        self.learnt, self.fitting, self.name = learnt, fitting, name
        self.shape, self.fingerprint = fitting.shape(), fingerprint
        self.calibration = self.false_alarm_rate = None

    def adopt(self, other: Detector) -> None:
        """Be what a copy of this detector has become."""
        self.__dict__.update(other.__dict__)

    def calibrate(self: Self, data: Any, false_alarm_rate: float = 0.05) -> Self:
        super().calibrate(data, false_alarm_rate)
        self.fingerprint = self.fingerprint or self.weights()
        return self

    def weights(self) -> str | None:
        """The fingerprint of the model as it is at this moment; None without a model."""
        return None if self.model is None else self.model.fingerprint()

    def reading(self, layers: Sequence[str]) -> Detector:
        """A detector to read data with: this one, its model capturing these layers too."""
        model = self.model
        reader = copy.copy(self)
        if model is not None and not set(layers) <= set(model.layers):
            reader._model = model.with_layers(layers)
        return reader

    def place(self, learnt: Learnt) -> str:
        """The same for detectors that see the same shaped features."""
        return place_of(self, learnt)

    def check_shape(self, features: Features) -> None:
        """Raise a DataError if these are not the kind of features that were fitted on."""
        for name, size, given in (
            ("embeddings", self.shape.get("D"), features.embeddings),
            ("logits", self.shape.get("K"), features.logits),
        ):
            if size is not None and given is not None and given.shape[1] != size:
                raise DataError(
                    f"{name} have {given.shape[1]} columns, and this detector was fitted on {size}"
                )


def load(
    folder: str | Path,
    model: Any = None,
    allow: Iterable[str] = (),
    sha256: str | None = None,
) -> Any:
    """Read what ``save`` wrote, a detector or an ensemble. Nothing is unpickled, no data is needed.

    Args:
        folder: the artifact.
        model: the model, if the detector was made with one from memory; another than that is
            refused (by the fingerprint of its weights). Left out, such a detector works on
            Features. For an ensemble, a mapping from member to model.
        allow: importable names ("package.module:function") that the artifact may run.
        sha256: of the manifest: the only defence against whoever wrote the artifact.

    Raises:
        ArtifactError: a folder that is damaged, hostile, newer than this version, or needs a name
            that is not allowed or a plugin that is not installed.
    """
    from oodcore.artifact import read_artifact
    from oodcore.unpacking import unpacked

    if isinstance(allow, str):
        raise ConfigurationError("allow is a list of names: write allow=[...]")
    packed = read_artifact(Path(folder), ("detector", "ensemble"), sha256=sha256)
    return unpacked(packed, model, frozenset(allow))


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigurationError(f"{name} must be a whole number, not {value!r}") from None


def _modelled(model: Any, device: str) -> tuple[Extractor | None, FeatureModel | None]:
    if model is None:
        return None, None
    if isinstance(model, FeatureModel):
        return None, _same_device(model, device)
    if isinstance(model, nn.Module):
        return None, _same_device(FeatureModel.wrap(model), device)
    return registry.build("extractor", model), None  # type: ignore[return-value]


def _refuse_device(device: str) -> None:
    """Raise a ConfigurationError for a device that torch does not know."""
    try:
        torch.device("cpu" if device == "auto" else device)
    except (RuntimeError, TypeError) as error:
        told = str(error).splitlines()[0][:200]
        raise ConfigurationError(
            f"device is 'auto' or as torch names it, not {device!r}: {told}"
        ) from None


def _same_device(model: FeatureModel, device: str) -> FeatureModel:
    if device != "auto" and torch.device(device).type != model.device.type:
        raise ConfigurationError(
            f"the model is on {model.device}, not on {device}: move it there yourself, for a "
            "detector changes nothing of a model that it is given"
        )
    return model


def _placed(model: FeatureModel, device: str) -> FeatureModel:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).splitlines()[0]
        raise ConfigurationError(f"the model cannot be put on '{device}': {told}") from None
