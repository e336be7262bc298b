"""What is recorded of a study: its components, models and data, as configurations write them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from oodcore.component import Component
from oodcore.data import Source, Stream
from oodcore.detector import Detector
from oodcore.ensemble import Ensemble
from oodcore.extractor import FeatureModel
from oodcore.plugins import registry
from oodcore.records import Method

if TYPE_CHECKING:
    from oodcore.evaluation import Study


def taking_part(study: Study, detectors: Iterable[Detector | Ensemble]) -> list[Component]:
    """The components of a study: methods, extractors and sources."""
    detectors = list(detectors)
    parts: list[Component] = [one.combination for one in detectors if isinstance(one, Ensemble)]
    for detector in (part for one in detectors for part in _members(one)):
        parts += [*detector.shapers, detector.scorer]
        parts += [detector.extractor] if detector.extractor is not None else []
    rows = [study.train, study.held_out, study.calibrate, study.id_test, *study.ood.values()]
    for data in rows:
        if isinstance(data, str) or (isinstance(data, Mapping) and "kind" in data):
            data = registry.build("source", data)
        if isinstance(data, Source):
            parts.append(data)
    return parts


def described(detector: Detector | Ensemble) -> dict[str, Any]:
    """The shapers and the scorer of a detector, or of each member of an ensemble, in plain JSON."""
    if isinstance(detector, Ensemble):
        members = {name: described(member) for name, member in detector.members.items()}
        return {"members": members, "combine": detector.combination.dump()}
    return {
        "shapers": [shaper.dump() for shaper in detector.shapers],
        "scorer": detector.scorer.dump(),
    }


def cited(detector: Detector | Ensemble) -> str | None:
    """The papers behind a detector."""
    papers = [part.paper for part in _methods(detector) if part.paper]
    return " ".join(str(paper) for paper in dict.fromkeys(papers)) or None


def methods(detector: Detector | Ensemble) -> tuple[Method, ...]:
    """What a detector's components compute and where that is from: shapers, then the scorer."""
    parts = [one for part in _methods(detector) for one in part.walk()]
    return tuple(dict.fromkeys(Method(p.slot, p.kind, about(type(p)), p.paper) for p in parts))


def _members(detector: Detector | Ensemble) -> list[Detector]:
    return list(detector.members.values()) if isinstance(detector, Ensemble) else [detector]


def _methods(detector: Detector | Ensemble) -> list[Component]:
    """Shapers and scorers, and what combines them."""
    parts: list[Component] = []
    for member in _members(detector):
        parts += [*member.shapers, member.scorer]
    return [*parts, detector.combination] if isinstance(detector, Ensemble) else parts


def about(cls: type[Component]) -> str:
    """A component's docstring without the list of its fields."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return re.sub(r"^Args:\n(?: {4}.*\n?|\n)*", "", text, flags=re.MULTILINE).strip()


def configuration(study: Study, left_out: Mapping[str, str]) -> dict[str, Any]:
    """What a study was asked for, and what was left out of it with the reason."""
    one = {"train": study.train, "held_out": study.held_out, "calibrate": study.calibrate}
    about_reading = ("adapt", "cache")
    options = {name: value for name, value in study.options.items() if name not in about_reading}
    return {
        "models": {name or "model": _shown(model) for name, model in study.models.items()},
        **{name: _shown(rows) for name, rows in one.items() if rows is not None},
        "id_test": _shown(study.id_test),
        "ood": {name: _shown(rows) for name, rows in study.ood.items()},
        "groups": {group: list(names) for group, names in study.groups.items()},
        "left_out": dict(left_out),
        **options,
    }


def _shown(thing: Any) -> Any:
    """A component as its configuration, anything else as what it is and how large."""
    if isinstance(thing, Component):
        return thing.dump()
    if isinstance(thing, Mapping) and "kind" not in thing:
        return {str(name): _shown(part) for name, part in thing.items()}
    if thing is None or isinstance(thing, str | Mapping):
        return thing
    if isinstance(thing, FeatureModel):
        return {"module": thing.title, "fingerprint": thing.fingerprint()}
    if isinstance(thing, nn.Module):
        return _shown(FeatureModel.wrap(thing))
    try:
        rows = Stream(thing).rows
    except (TypeError, ValueError):
        rows = None
    return {"type": type(thing).__name__, **({} if rows is None else {"rows": rows})}
