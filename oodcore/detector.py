"""Detector: composition of a model, shapers and a scorer; fit, calibrate, score, predict, save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from oodcore.calibration import Calibration
from oodcore.component import Component
from oodcore.data import Adapt, Batch, Stream
from oodcore.errors import ConfigurationError, DataError, NotFittedError
from oodcore.extractor import Extractor, FeatureModel
from oodcore.features import Features
from oodcore.fitting import Fitting, Learnt, Recipe, scored, shaped
from oodcore.plugins import registry
from oodcore.progress import track
from oodcore.scorer import Scorer, Shaper, check_recipe

Array = np.ndarray[Any, Any]


class Detector:
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
    ) -> None:
        if isinstance(shapers, str | Mapping | Component):
            raise ConfigurationError("shapers is a list: write shapers=[...]")
        self.recipe = Recipe(
            registry.build("scorer", scorer),  # type: ignore[arg-type]
            tuple(registry.build("shaper", shaper) for shaper in shapers),  # type: ignore[misc]
            seed,
        )
        check_recipe(self.recipe.scorer, self.recipe.shapers)
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, not {batch_size}")
        self.extractor, self._model = _modelled(model, device)
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.adapt = adapt
        self.learnt: Learnt | None = None
        self.calibration: Calibration | None = None
        self.false_alarm_rate: float | None = None
        self.shape: dict[str, Any] = {}
        self._fitting: Fitting | None = None
        self._name = "detector"

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
        """The model, loaded on first use and with the layers that the components need."""
        if self._model is None and self.extractor is not None:
            self._model = _placed(self.extractor.load(), self.device)
        if self._model is not None:
            layers = [
                need.partition(".")[2]
                for need in sorted(self.recipe.needs(fitting=True))
                if need.startswith("layers.")
            ]
            if not set(layers) <= set(self._model.layers):
                self._model = self._model.with_layers(layers)
        return self._model

    def fit(
        self, data: Any, held_out: Any = None, *, classes: int | Sequence[int] | None = None
    ) -> Detector:
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
        fit({"detector": self}, data, held_out, classes=classes)
        return self

    def partial_fit(
        self, data: Any, held_out: Any = None, *, classes: int | Sequence[int] | None = None
    ) -> Detector:
        """Go on fitting with more rows: the result is that of all rows at once.

        The calibration is dropped. Arguments as in ``fit``; without logits, ``classes`` is required
        in the first call. A detector that learns in several stages keeps the features of its rows
        (memory-mapped past a limit) to be able to go on.
        """
        if self._fitting is not None:
            fitting = self._fitting.only(self._name)
        elif self.learnt is None or self.recipe.fixed:
            fitting = Fitting({self._name: self.recipe}, class_number(classes), held_out is not None)
        else:
            raise NotFittedError(
                "this detector was loaded without its store and cannot go on fitting: save it with "
                "store=True, or fit again"
            )
        if fitting.again():
            raise ConfigurationError(
                "partial_fit cannot go on with a scorer whose parts are measured through the model: "
                "such a detector is fitted in one call of fit"
            )
        if fitting.held_out != (held_out is not None) and self.recipe.holds_out:
            raise DataError("give held_out= in every call of partial_fit, or in none")
        _fold(fitting, self, data, held_out)
        self._take(fitting.finish()[self._name], fitting, self._name)
        return self

    def calibrate(self, data: Any, false_alarm_rate: float = 0.05) -> Detector:
        """Learn the scores of in-distribution data, and so the threshold; returns the detector.

        Args:
            data: in-distribution rows that were neither fitted on nor held out.
            false_alarm_rate: the share of in-distribution inputs that may be flagged.

        Raises:
            ConfigurationError: too few rows for the rate; the message says how many are needed.
        """
        calibration = Calibration(self.score(data))
        calibration.threshold(false_alarm_rate)
        self.calibration, self.false_alarm_rate = calibration, false_alarm_rate
        return self

    def score(self, data: Any) -> Array:
        """The score of each row, ``[N]`` float64; higher is more in-distribution."""
        learnt = self._ready()
        with torch.no_grad():
            scores = [
                scored(rows, self.recipe, learnt).detach().cpu()
                for rows in self.shaped_features(data, learnt)
            ]
        return np.asarray(torch.cat(scores).numpy()) if scores else np.zeros(0)

    def p_value(self, data: Any) -> Array:
        """The conformal p-value of each row, ``(1 + #{calibration <= s}) / (n + 1)``, in (0, 1]."""
        calibration = self._calibrated()
        return calibration.p_values(self.score(data))

    def predict(
        self, data: Any, false_alarm_rate: float | None = None, *, fdr: float | None = None
    ) -> Array:
        """1 for in-distribution, -1 for out, ``[N]`` int64.

        Args:
            data: rows to judge.
            false_alarm_rate: flag at most this share of in-distribution inputs; that of
                ``calibrate`` if not given.
            fdr: instead, flag so that at most this share of the flagged rows are in-distribution
                (Benjamini and Hochberg, over all rows of ``data``).

        Raises:
            ConfigurationError: both rates, or too few calibration rows for the rate.
        """
        if fdr is not None and false_alarm_rate is not None:
            raise ConfigurationError("give either a false_alarm_rate or an fdr")
        calibration = self._calibrated()
        scores = self.score(data)
        if fdr is not None:
            flagged = calibration.discoveries(scores, fdr)
        else:
            rate = self.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
            assert rate is not None
            flagged = calibration.flagged(scores, rate)
        return np.where(flagged, -1, 1).astype(np.int64)

    def save(self, folder: str | Path, overwrite: bool = False, store: bool = False) -> Path:
        """Write the fitted detector to a folder: JSON, safetensors and hashes; no pickle.

        Args:
            folder: must not exist, unless ``overwrite``.
            overwrite: replace what is there, at once.
            store: keep the statistics too, so that ``partial_fit`` can go on after loading.

        Raises:
            NotFittedError: nothing to save yet.
            PluginError: a component that no installed plugin brings could not be loaded again.
        """
        from oodcore.artifact import write_artifact
        from oodcore.packing import packed_detector

        self._ready()
        packed = packed_detector(self, store=store)
        return write_artifact(Path(folder), "detector", packed, overwrite=overwrite)

    def shaped_features(self, data: Any, learnt: Learnt) -> Iterator[Features]:
        """The features of data as the scorer sees them, batch by batch."""
        for features in features_of(self, data, self.recipe.needs(), "scoring"):
            self._check_shape(features)
            with torch.no_grad():
                rows = shaped(features, self.recipe.shapers, learnt.shapers)
            yield rows

    def _check_shape(self, features: Features) -> None:
        """Raise a DataError if these are not the kind of features that were fitted on."""
        for name, size, given in (
            ("embeddings", self.shape.get("D"), features.embeddings),
            ("logits", self.shape.get("K"), features.logits),
        ):
            if size is not None and given is not None and given.shape[1] != size:
                raise DataError(
                    f"{name} have {given.shape[1]} columns, and this detector was fitted on {size}"
                )

    def _ready(self) -> Learnt:
        if self.learnt is None and self.recipe.fixed:
            self.learnt = Learnt({}, ({},) * len(self.recipe.shapers))
        if self.learnt is None:
            raise NotFittedError(
                f"this detector ('{self.scorer.kind}') learns from data: call fit first"
            )
        return self.learnt

    def _calibrated(self) -> Calibration:
        if self.calibration is None:
            raise NotFittedError("this detector has no threshold yet: call calibrate first")
        return self.calibration

    def _take(self, learnt: Learnt, fitting: Fitting, name: str) -> None:
        self.learnt, self._fitting, self._name = learnt, fitting, name
        self.shape = fitting.shape()
        self.calibration = self.false_alarm_rate = None


def fit(
    detectors: Mapping[str, Detector],
    data: Any,
    held_out: Any = None,
    *,
    classes: int | Sequence[int] | None = None,
) -> None:
    """Fit many detectors in the same passes: a model sees each row once, however many use it.

    Args:
        detectors: by name; those that share a model share its passes.
        data: as in ``Detector.fit``.
        held_out: as in ``Detector.fit``.
        classes: as in ``Detector.fit``.
    """
    groups = by_model(detectors)
    if len(groups) > 1 and not Stream(data).repeatable:
        raise DataError(
            f"{len(groups)} models read this data, and it can be read only once; give a Dataset"
        )
    for group in groups:
        first = next(iter(group.values()))
        count = class_number(classes)
        if count is None:
            count = _largest_label(data, first)
        recipes = {name: detector.recipe for name, detector in group.items()}
        fitting = Fitting(recipes, count, held_out is not None)
        layered = _with_layers(first, group.values())
        _fold(fitting, layered, data, held_out)
        for name, learnt in fitting.finish(_reread(layered, fitting, data, held_out)).items():
            group[name]._take(learnt, fitting, name)


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
            refused (by the fingerprint of its weights). Left out, such a detector works on Features.
        allow: importable names ("package.module:function") that the artifact may run.
        sha256: of the manifest: the only defence against whoever wrote the artifact.

    Raises:
        ArtifactError: a folder that is damaged, hostile, newer than this version, or needs a name
            that is not allowed or a plugin that is not installed.
    """
    from oodcore.artifact import read_artifact
    from oodcore.packing import unpacked_detector

    packed = read_artifact(Path(folder), ("detector", "ensemble"), sha256=sha256)
    return unpacked_detector(packed, model, frozenset(allow))


def features_of(
    detector: Detector, data: Any, needs: frozenset[str], title: str, start: int = 0
) -> Iterator[Features]:
    """The features of data, float64 and finite, with labels and ids; inputs only where needed."""
    stream = Stream(
        data,
        batch_size=detector.batch_size,
        num_workers=detector.num_workers,
        adapt=detector.adapt,
        start=start,
    )
    model = detector.model
    for batch in track(stream, title, stream.rows):
        with torch.no_grad():
            features = _features(model, batch)
            if "inputs" not in needs:
                features = replace(features, inputs=None, rerun=None)
            elif features.rerun is not None:
                features = replace(features, rerun=_wide(features.rerun))
            features = features.double()
            features.check_finite("features")
        yield features


def _wide(road: Any) -> Any:
    return lambda inputs, edit=None: road(inputs, edit=edit).double()


def _features(model: FeatureModel | None, batch: Batch | Features) -> Features:
    if isinstance(batch, Features):
        return batch
    if model is not None:
        features = model.forward(batch.inputs)
        device = features.device
        return replace(
            features,
            labels=None if batch.labels is None else batch.labels.to(device),
            ids=None if batch.ids is None else batch.ids.to(device),
        )
    if not isinstance(batch.inputs, Tensor) or batch.inputs.ndim != 2:
        shape = list(batch.inputs.shape) if isinstance(batch.inputs, Tensor) else "no tensor"
        raise DataError(
            f"a detector without a model takes embeddings [N, D] or Features, not {shape}; "
            "give a model to score anything else"
        )
    return Features(embeddings=batch.inputs.double(), labels=batch.labels, ids=batch.ids)


def by_model(detectors: Mapping[str, Detector]) -> list[dict[str, Detector]]:
    """Detectors in groups that can share the passes of one model."""
    groups: list[dict[str, Detector]] = []
    for name, detector in detectors.items():
        for group in groups:
            other = next(iter(group.values()))
            if _same_model(detector, other):
                group[name] = detector
                break
        else:
            groups.append({name: detector})
    return groups


def _same_model(a: Detector, b: Detector) -> bool:
    if a.adapt is not b.adapt:
        return False
    if a.extractor is not None or b.extractor is not None:
        return a.extractor == b.extractor and a.device == b.device
    if a._model is None or b._model is None:
        return a._model is b._model
    one, two = a._model, b._model
    heads = one.head is two.head or (isinstance(one.head, str) and one.head == two.head)
    return one.module is two.module and heads and one.preprocess == two.preprocess


def _with_layers(first: Detector, group: Iterable[Detector]) -> Detector:
    """The first detector's model, with the layers that any of the group needs."""
    layers = sorted({name for other in group for name in (other.model.layers if other.model else ())})
    model = first.model
    if model is not None and set(layers) > set(model.layers):
        first._model = model.with_layers(layers)
    return first


def _fold(fitting: Fitting, detector: Detector, data: Any, held_out: Any) -> None:
    needs = fitting.needs() if not fitting.again() else fitting.needs() | {"inputs"}
    if all(recipe.fixed for recipe in fitting.recipes.values()):
        needs = frozenset[str]()
    for features in features_of(detector, data, needs, "fitting", start=fitting.rows):
        fitting.update(features)
    if held_out is not None:
        for features in features_of(detector, held_out, needs, "measuring", fitting.held_rows):
            fitting.update_held_out(features)


def _reread(detector: Detector, fitting: Fitting, data: Any, held_out: Any) -> Any:
    def reread(apart: bool) -> Iterator[Features]:
        rows = held_out if apart else data
        if not Stream(rows).repeatable:
            raise DataError(
                "a part of this scorer is measured through the model, so the data is read again: "
                "give data that comes in the same order twice (a Dataset, arrays)"
            )
        return features_of(detector, rows, fitting.needs(), "measuring")

    return reread


def class_number(classes: int | Sequence[int] | None) -> int | None:
    """K, from K itself or from the classes ``0..K-1``."""
    if classes is None or isinstance(classes, int):
        return classes
    numbers = sorted(int(label) for label in classes)
    if numbers != list(range(len(numbers))):
        raise ConfigurationError(f"classes must be 0..K-1, not {numbers[:10]}")
    return len(numbers)


def _largest_label(data: Any, detector: Detector) -> int | None:
    """K from the labels of all rows, where there is no model to tell it."""
    stream = Stream(data, adapt=detector.adapt)
    if detector.model is not None or not stream.repeatable:
        return None
    labels = [batch.labels for batch in stream]
    return 1 + max((int(y.max()) for y in labels if y is not None), default=0)


def _modelled(model: Any, device: str) -> tuple[Extractor | None, FeatureModel | None]:
    if model is None:
        return None, None
    if isinstance(model, FeatureModel):
        return None, _same_device(model, device)
    if isinstance(model, nn.Module):
        return None, _same_device(FeatureModel.wrap(model), device)
    return registry.build("extractor", model), None  # type: ignore[return-value]


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
    return model.to(device)
