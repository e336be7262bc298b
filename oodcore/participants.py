"""Participants: what a study compares, every candidate on every model, fitted and scored at once.

The members of ensembles are detectors like all others while rows pass, so that a model sees each
row once however many ensembles it is in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from oodcore.candidates import Candidate, Joint, Part
from oodcore.component import Slot
from oodcore.data import Batch, Stream
from oodcore.detector import Detector
from oodcore.ensemble import Ensemble
from oodcore.errors import ConfigurationError
from oodcore.features import Features
from oodcore.passes import Array
from oodcore.recipe import Recipe
from oodcore.scorer import Combination, Scorer
from oodcore.statistics import State
from oodcore.store import missing_fields

if TYPE_CHECKING:
    from oodcore.evaluation import Study

Contestant = Detector | Ensemble


@dataclass(frozen=True, eq=False)
class Participants:
    """Everything that is compared.

    Args:
        detectors: all that are fitted and scored, by name: candidates, and members of ensembles.
        ensembles: the names of the members' detectors, by ensemble and member.
        combinations: how their scores become one, by ensemble.
        models: the name of the model, by detector and ensemble.
        left_out: why others take no part, by name.
        order: the names of what is compared.
    """

    detectors: dict[str, Detector] = field(default_factory=dict)
    ensembles: dict[str, dict[str, str]] = field(default_factory=dict)
    combinations: dict[str, Combination] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def without(self, failed: Mapping[str, str]) -> Participants:
        """The same without some detectors that are in no ensemble."""
        return replace(
            self,
            detectors={name: d for name, d in self.detectors.items() if name not in failed},
            left_out={**self.left_out, **failed},
            order=[name for name in self.order if name not in failed],
        )

    def alone(self, name: str) -> str:
        """The detector whose model tells the classes that something predicts."""
        return next(iter(self.ensembles[name].values())) if name in self.ensembles else name

    def fitted(self, seed: int) -> dict[str, Contestant]:
        """What is compared, by name, once all detectors are fitted."""
        return {
            name: self._ensemble(name, seed) if name in self.ensembles else self.detectors[name]
            for name in self.order
        }

    def scores(
        self, fitted: Mapping[str, Contestant], said: Mapping[str, Array]
    ) -> dict[str, Array]:
        """The scores of all that is compared, of what all detectors said of the same rows."""
        found: dict[str, Array] = {}
        for name, one in fitted.items():
            if isinstance(one, Ensemble):
                columns = [torch.from_numpy(said[part]) for part in self.ensembles[name].values()]
                found[name] = one.combined(torch.stack(columns, dim=1))
            else:
                found[name] = said[name]
        return found

    def spent(self, name: str, seconds: Mapping[str, float]) -> float:
        """The seconds that the scorers of something took."""
        parts = self.ensembles[name].values() if name in self.ensembles else [name]
        return sum(seconds[part] for part in parts)

    def _ensemble(self, name: str, seed: int) -> Ensemble:
        parts = {title: self.detectors[part] for title, part in self.ensembles[name].items()}
        members = {title: _plain(part) for title, part in parts.items()}
        ensemble = Ensemble(members, self.combinations[name], seed=seed)
        if self.combinations[name].measures:
            rows: list[Any] = [part.ready().scorer["rows"] for part in parts.values()]
            ensemble.measure(torch.cat([column.cpu() for column in rows], dim=1))
        return ensemble


class Remembered(Scorer):
    """A member's score, which remembers what it was on held-out rows.

    Args:
        scorer: the member's.
    """

    kind = "member"
    held_out: ClassVar[bool] = True

    scorer: Annotated[Scorer, Slot("scorer")]

    def needs(self) -> frozenset[str]:
        return frozenset()

    def measure(self, features: Features, state: State) -> Tensor:
        return self.score(features, state)[:, None]

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        return {**state, "rows": rows}

    def score(self, features: Features, state: State) -> Tensor:
        return self.scorer.score(features, state.get("scorer", {}))


def participants(study: Study) -> Participants:
    """Every candidate of a study on its models.

    Raises:
        ConfigurationError: a model that is not there, two of one name, or nothing that takes part.
    """
    found = Participants()
    models = _Models(study)
    for title in study.models:
        for candidate in study.candidates:
            name = f"{title}/{candidate.name}" if title else str(candidate.name)
            if isinstance(candidate, Candidate):
                detector = models.detector(title, candidate)
                if study.installed and (reason := unusable(detector, study.train)):
                    found.left_out[name] = reason
                    continue
                _add(found, name, detector, title)
                found.order.append(name)
            elif not candidate.models:
                _join(found, name, candidate, dict.fromkeys(candidate.members, title), models)
    for candidate in study.candidates:
        if isinstance(candidate, Joint) and candidate.models:
            titles = {member: str(part.model) for member, part in candidate.members.items()}
            _join(found, str(candidate.name), candidate, titles, models)
    if not found.order:
        raise ConfigurationError(f"no detector takes part; left out: {found.left_out or 'none'}")
    return found


class _Models:
    """The models of a study, each wrapped once."""

    def __init__(self, study: Study) -> None:
        self._given: dict[str, Any] = dict(study.models)
        self._options = study.options

    def detector(self, title: str, of: Candidate | Part, *, remembers: bool = False) -> Detector:
        if title not in self._given:
            known = ", ".join(name for name in self._given if name) or "one without a name"
            raise ConfigurationError(f"there is no model '{title}'; there are: {known}")
        detector = Detector(
            self._given[title], scorer=of.scorer, shapers=of.shapers or (), **self._options
        )
        if detector.extractor is None:
            self._given[title] = detector.model
        if remembers:
            recipe = detector.recipe
            detector.recipe = Recipe(Remembered(scorer=of.scorer), recipe.shapers, recipe.seed)
        return detector


def _join(
    found: Participants, name: str, joint: Joint, titles: Mapping[str, str], models: _Models
) -> None:
    """Add an ensemble, and its members as detectors."""
    combination = joint.combine
    assert isinstance(combination, Combination)
    parts = {member: f"{name} [{member}]" for member in joint.members}
    for member, part in joint.members.items():
        detector = models.detector(titles[member], part, remembers=combination.measures)
        _add(found, parts[member], detector, titles[member])
    if name in found.models:
        raise ConfigurationError(f"'{name}' occurs twice; give one another name")
    found.ensembles[name] = parts
    found.combinations[name] = combination
    found.models[name] = " + ".join(dict.fromkeys(titles.values()))
    found.order.append(name)


def _add(found: Participants, name: str, detector: Detector, title: str) -> None:
    if name in found.models:
        raise ConfigurationError(f"'{name}' occurs twice; give one another name")
    found.detectors[name], found.models[name] = detector, title


def _plain(part: Detector) -> Detector:
    """The detector that a member of an ensemble is, without what it remembered for it."""
    scorer = part.recipe.scorer
    if not isinstance(scorer, Remembered):
        return part
    learnt, plain = part.ready(), copy.copy(part)
    plain.recipe = Recipe(scorer.scorer, part.recipe.shapers, part.recipe.seed)
    plain.learnt = type(learnt)(learnt.scorer.get("scorer", {}), learnt.shapers, learnt.record)
    plain.fitting = None
    return plain


def detectors_of(contestants: Iterable[Contestant]) -> list[Detector]:
    """Detectors, and those that ensembles are made of."""
    found: list[Detector] = []
    for one in contestants:
        found += one.members.values() if isinstance(one, Ensemble) else [one]
    return found


def unusable(detector: Detector, train: Any) -> str | None:
    """Why a detector cannot work with this data, as far as can be told before reading it."""
    needs = detector.recipe.needs(fitting=True)
    missing: Sequence[str] = ()
    if detector.extractor is None and detector.model is None:
        if "inputs" in needs:
            return "needs a model"
        sample = _sample(train, detector)
        missing = missing_fields(needs, sample) if sample is not None else ()
    elif isinstance(train, Features):
        missing = missing_fields(needs - {"inputs"}, train)
    elif detector.extractor is None and detector.model is not None:
        known = {"embeddings", "head", "inputs", "logits"}
        missing = sorted(needs & known - detector.model.gives)
    return f"needs {', '.join(missing)}" if missing else None


def _sample(train: Any, detector: Detector) -> Features | None:
    """A few of the rows to fit on, where there is no model and they can be read again."""
    if isinstance(train, Features):
        return train
    stream = Stream(train, adapt=detector.adapt)
    batch = next(iter(stream), None) if stream.repeatable else None
    if isinstance(batch, Batch) and isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 2:
        return Features(embeddings=batch.inputs, labels=batch.labels, ids=batch.ids)
    return batch if isinstance(batch, Features) else None
