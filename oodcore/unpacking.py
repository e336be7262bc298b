"""How a detector or an ensemble is made again of what an artifact says, after every check."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch import Tensor

from oodcore.calibration import Calibration
from oodcore.component import Component
from oodcore.decision import Decision
from oodcore.errors import ArtifactError, DataError, OodcoreError
from oodcore.extractor import Extractor
from oodcore.features import Features, Head
from oodcore.fitting import Fitting
from oodcore.plugins import UNNAMED, registry
from oodcore.recipe import Learnt, Recipe, scored, shaped
from oodcore.rows import Rows
from oodcore.scorer import needed, needed_to_fit, state_at, tree
from oodcore.spool import dtype_of

if TYPE_CHECKING:
    from oodcore.detector import Detector
    from oodcore.ensemble import Ensemble

log = logging.getLogger("oodcore")

SIZE_LIMIT = 2**26
"""Numbers in a row of features: more is no honest artifact."""

Size = Annotated[int, Field(ge=0, le=2**40)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)


class _Shape(_Strict):
    K: Size | None = None
    D: Size | None = None
    layers: dict[str, list[Size]] = Field(default_factory=dict)
    types: dict[str, str] = Field(default_factory=dict)
    head: bool = False


class _Configuration(_Strict):
    extractor: dict[str, Any] | None
    shapers: list[dict[str, Any]]
    scorer: dict[str, Any]
    device: str
    batch_size: Size
    num_workers: Annotated[int, Field(ge=0, le=256)]
    seed: int


class _Learnt(_Strict):
    scorer: dict[str, Any]
    shapers: list[dict[str, Any]]
    record: dict[str, Any]


class _Calibration(_Strict):
    scores: Tensor
    false_alarm_rate: float


class _Head(_Strict):
    normalize_weight: bool
    normalize_features: bool
    scale: float
    tensors: dict[str, Tensor]


class _Spool(_Strict):
    columns: dict[str, Rows]
    types: dict[str, str]
    head: _Head | None


class _Statistics(_Strict):
    rows: NonNegativeInt
    classes: NonNegativeInt | None
    labelling: str | None
    statistics: list[dict[str, Any]]
    states: dict[str, dict[str, Any]]
    head: _Head | None


class _Store(_Strict):
    rows: NonNegativeInt
    classes: Annotated[int, Field(ge=1, le=2**40)] | None
    held_out: bool
    stores: dict[str, _Statistics]
    places: list[str]
    spool: _Spool | None
    held_spool: _Spool | None
    example: _Spool


class _Detector(_Strict):
    """The form of a detector's document."""

    configuration: _Configuration
    components: list[list[str]]
    fingerprint: str | None
    shape: _Shape
    learnt: _Learnt
    calibration: _Calibration | None
    store: _Store | None


class _Member(_Strict):
    name: str
    detector: _Detector


class _Ensemble(_Strict):
    """The form of an ensemble's document."""

    members: list[_Member]
    combine: dict[str, Any]
    components: list[list[str]]
    seed: int
    state: dict[str, Any]
    calibration: _Calibration | None


Form = TypeVar("Form", bound=_Strict)


def unpacked(packed: Mapping[str, Any], model: Any, allow: frozenset[str]) -> Decision:
    """The detector or ensemble that an artifact describes.

    Raises:
        ArtifactError: a document, a component or a state that is not as it should be.
    """
    fields = {k: v for k, v in packed.items() if k not in ("schema", "type", "made_with")}
    try:
        if packed["type"] == "ensemble":
            return _rebuilt_ensemble(_form(_Ensemble, fields), model, allow)
        return _rebuilt(_form(_Detector, fields), model, allow)
    except ArtifactError:
        raise
    except OodcoreError as error:
        raise ArtifactError(f"this artifact cannot be used: {error}") from error


def _form(form: type[Form], fields: Mapping[str, Any]) -> Form:
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        from oodcore.config import explain

        raise ArtifactError(f"detector.json: {explain(error)}") from None


def _rebuilt_ensemble(saved: _Ensemble, model: Any, allow: frozenset[str]) -> Ensemble:
    from oodcore.ensemble import Ensemble

    _refuse_missing(saved.components)
    models = {} if model is None else model
    names = [member.name for member in saved.members]
    if not isinstance(models, Mapping) or not set(models) <= set(names):
        raise ArtifactError(f"this is an ensemble: give model= as a mapping from {names} to models")
    if len(set(names)) != len(names):
        raise ArtifactError(f"detector.json: two members have one name: {names}")
    members = {
        member.name: _rebuilt(member.detector, models.get(member.name), allow)
        for member in saved.members
    }
    ensemble = Ensemble(members, saved.combine, seed=saved.seed)
    ensemble.state = saved.state
    scores = torch.rand(2, len(members), dtype=torch.float64, generator=_generator())
    combination = ensemble.combination
    _attempt(lambda: combination.combine(combination.normalized(scores, saved.state)), "state")
    _calibrate(ensemble, saved.calibration)
    return ensemble


def _refuse_missing(components: list[list[str]]) -> None:
    for origin in components:
        if len(origin) != 4 or origin[0] not in ("extractor", "statistic", "scorer", "shaper"):
            raise ArtifactError(f"detector.json names a component that cannot be: {origin}")
        slot, kind, distribution, release = origin
        if registry.find(slot, kind) is not None:
            continue
        if distribution == UNNAMED:
            raise ArtifactError(
                f"the {slot} '{kind}' was registered by hand where this was saved: register it "
                "again (registry.using, registry.register) before loading"
            )
        if not _NAME.fullmatch(distribution) or not _RELEASE.fullmatch(release):
            raise ArtifactError(
                f"the {slot} {kind!r} is not installed, and it comes from what is no distribution"
            )
        raise ArtifactError(
            f"the {slot} '{kind}' comes from {distribution} {release}, which is not installed: "
            f"pip install '{distribution}=={release}'"
        )


# What is told to be pasted into a shell is no more than a name and a version.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_RELEASE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,99}")


def _rebuilt(saved: _Detector, model: Any, allow: frozenset[str]) -> Detector:
    from oodcore.detector import Detector

    _refuse_missing(saved.components)
    configuration = saved.configuration
    extractor = configuration.extractor
    if extractor is not None and model is None:
        model = registry.build("extractor", extractor)
        if refused := sorted(_code(model) - allow):
            options = " ".join(f"--allow {name}" for name in refused)
            raise ArtifactError(
                f"this artifact runs {', '.join(refused)}: allow it by name if you trust it "
                f"(allow={refused!r}, or {options}), or give model="
            )
    detector = Detector(
        model,
        scorer=configuration.scorer,
        shapers=configuration.shapers,
        device=_here(configuration.device) if extractor is not None else "auto",
        batch_size=configuration.batch_size,
        num_workers=configuration.num_workers,
        seed=configuration.seed,
    )
    loaded = detector.model
    if loaded is not None and saved.fingerprint and loaded.fingerprint() != saved.fingerprint:
        raise ArtifactError(
            "this detector was fitted on a model with other weights or preprocessing "
            f"(fingerprint {saved.fingerprint[:12]}, not {loaded.fingerprint()[:12]})"
        )
    if len(saved.learnt.shapers) != len(detector.shapers):
        raise ArtifactError("detector.json: the shapers and their states do not match")
    device = loaded.device if loaded is not None else torch.device("cpu")
    with _blamed("state"):
        detector.learnt = _on_device(saved.learnt, device)
    detector.shape = saved.shape.model_dump()
    detector.fingerprint = saved.fingerprint
    _try(detector.recipe, detector.learnt, saved.shape, device)
    _calibrate(detector, saved.calibration)
    if saved.store is not None:
        detector.fitting = _resumed(saved.store, detector)
    return detector


def _code(extractor: Component) -> set[str]:
    """The importable names that an extractor, and any inside it, would run."""
    parts = [part for part in extractor.walk() if isinstance(part, Extractor)]
    return {name for part in parts for name in part.code()}


def _here(device: str) -> str:
    """The device that was asked for where the artifact was made, if this machine has it."""
    try:
        torch.empty(1, device="cpu" if device == "auto" else device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        log.warning("this machine has no device '%s', which the artifact asks for", device)
        return "auto"
    return device


def _resumed(saved: _Store, detector: Detector) -> Fitting:
    """The fitting that was saved, if it can go on: it takes in one row more, as a trial."""
    with _blamed("store"):
        fitting = Fitting.unpacked(saved.model_dump(), {detector.name: detector.recipe})
    # What passes through the model again cannot be tried on a row without its inputs.
    shaping = frozenset[str]().union(*(shaper.needs() for shaper in detector.shapers))
    if "inputs" not in shaping | needed_to_fit(detector.scorer, detector.shapers):
        _attempt(lambda: fitting.only(detector.name).rehearse(), "store")
    return fitting


def _on_device(learnt: _Learnt, device: torch.device) -> Learnt:
    from oodcore.statistics import map_state

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return Learnt(
        map_state(learnt.scorer, move),
        tuple(map_state(state, move) for state in learnt.shapers),
        learnt.record,
    )


def _try(recipe: Recipe, learnt: Learnt, shape: _Shape, device: torch.device) -> None:
    """Score two made-up rows, so that a state of wrong names, types or shapes is refused.

    Where the scorer passes through the model again, the scorers inside it that do not are tried.
    """
    numbers = (shape.K or 0) + (shape.D or 0) + (shape.K or 0) * (shape.D or 0)
    numbers += sum(torch.Size(layer).numel() for layer in shape.layers.values())
    if numbers > SIZE_LIMIT:
        raise ArtifactError(f"detector.json: features of {numbers} numbers a row cannot be")
    if not numbers or any("inputs" in shaper.needs() for shaper in recipe.shapers):
        return

    def trial() -> None:
        features = shaped(_made_up(shape, device), recipe.shapers, learnt.shapers)
        for path, part in tree(recipe.scorer):
            if "inputs" not in needed(part):
                state = state_at(learnt.scorer, path)
                scored(features, Recipe(part), Learnt(state, ()))

    _attempt(trial, "state")


def _made_up(shape: _Shape, device: torch.device) -> Features:
    """Two rows of features of a shape."""
    generator = _generator()

    def drawn(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
        if not dtype.is_floating_point:
            return torch.zeros(*size, dtype=dtype, device=device)
        return torch.rand(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    return Features(
        embeddings=None if shape.D is None else drawn(2, shape.D),
        logits=None if shape.K is None else drawn(2, shape.K),
        ids=torch.arange(2, device=device),
        layers={
            name: drawn(2, *size, dtype=dtype_of(shape.types.get(name, "float32")))
            for name, size in shape.layers.items()
        },
        head=Head(drawn(shape.K, shape.D)) if shape.K and shape.D and shape.head else None,
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever fails within is the artifact's fault."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        told = str(error) if isinstance(error, OodcoreError) else repr(error)
        raise ArtifactError(f"the {what} does not fit the configuration: {told}") from error


def _attempt(work: Callable[[], Any], what: str) -> None:
    """Do what would be done with what was read; made-up rows may give what is not finite."""
    with _blamed(what):
        try:
            work()
        except DataError as error:
            if "not finite" not in str(error):
                raise


def _calibrate(decision: Decision, saved: _Calibration | None) -> None:
    if saved is None:
        return
    if saved.scores.dtype != torch.float64 or saved.scores.ndim != 1 or not len(saved.scores):
        raise ArtifactError("the calibration scores are not a row of numbers")
    decision.calibration = Calibration(saved.scores.numpy())
    decision.calibration.threshold(saved.false_alarm_rate)
    decision.false_alarm_rate = saved.false_alarm_rate
