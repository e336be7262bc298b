"""Configurations: what a file says about a detector, an ensemble or a benchmark, checked.

Paths in a configuration are relative to the working directory, as on a command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from oodcore.candidates import (
    Candidate,
    Combine,
    Contender,
    Fault,
    Item,
    Joint,
    Name,
    Names,
    Shapers,
    installed,
    recipe_faults,
    titled,
    weight_faults,
)
from oodcore.component import FilePath, Settings, Slot, canonical, suggestion
from oodcore.data import Source
from oodcore.document import Document, Route, read
from oodcore.errors import ConfigurationError
from oodcore.extractor import Extractor
from oodcore.messages import explain
from oodcore.open_set import CHOOSES, OpenSet
from oodcore.plugins import registry
from oodcore.protocols import Chosen, Separation
from oodcore.scorer import Scorer
from oodcore.training_config import TrainingConfig

__all__ = [
    "BenchmarkConfig",
    "Candidate",
    "DetectorConfig",
    "Document",
    "EnsembleConfig",
    "Joint",
    "candidates",
    "canonical",
    "explain",
    "read",
    "validate",
]

Model = TypeVar("Model", bound=BaseModel)
Rows = Annotated[Source, Slot("source")]


class Tune(Settings):
    """The rows on which ``oodcore tune`` chooses values of fields: never those of a benchmark.

    Args:
        id: in-distribution rows; left out, ``held_out``, or a tenth of ``train`` that nothing is
            fitted on then.
        ood: rows that are not in-distribution, by name; left out, Gaussian ``noise``.
        metric: what is best, as a mean over ``ood``.
    """

    id: Rows | None = None
    ood: Annotated[Mapping[Name, Rows], Field(min_length=1)] | None = None
    metric: Literal["auroc", "fpr95_id", "fpr95_ood", "aupr_id", "aupr_ood"] = "auroc"


class Configuration(Settings):
    """What a detector's and a benchmark's configuration have in common.

    One file may serve both: a detector leaves ``id_test``, ``ood`` and ``groups`` alone.

    Args:
        extractor: the model; left out, data is features or embeddings already.
        shapers: what reshapes features before they are scored, in turn.
        train: in-distribution rows to fit on.
        held_out: in-distribution rows for what is measured on rows that nothing was fitted on.
        calibrate: in-distribution rows for p-values, neither fitted on nor held out.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name.
        groups: names of such rows that are averaged, by the group's name: ``near: [cifar100]``.
        false_alarm_rate: the share of in-distribution inputs that may be flagged, in (0, 1).
        batch_size: rows that pass through the model at once.
        num_workers: processes that read data; 0 reads in this one.
        device: "auto", or as torch names it: "cpu", "cuda", "cuda:1", "mps".
        seed: of everything random.
        cache: a folder that keeps what the model says of a batch, so that it is not asked twice.
        tune: the rows on which values are chosen.
    """

    extractor: Annotated[Extractor, Slot("extractor")] | None = None
    shapers: Shapers = ()
    train: Rows | None = None
    held_out: Rows | None = None
    calibrate: Rows | None = None
    id_test: Rows | None = None
    ood: Mapping[Name, Rows] | None = None
    groups: Mapping[Name, Names] | None = None
    false_alarm_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    batch_size: PositiveInt = 256
    num_workers: NonNegativeInt = 0
    device: Annotated[str, StringConstraints(pattern="^[a-z]+(:[0-9]+)?$")] = "auto"
    seed: NonNegativeInt = 0
    cache: FilePath | None = None
    tune: Tune | None = None

    @model_validator(mode="after")
    def _check_rules(self) -> Configuration:
        if faults := self._faults():
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("rule", "{text}", {"text": text}),
                    loc=route,
                    input=None,
                )
                for route, text in faults
            ]
            raise ValidationError.from_exception_data(type(self).__name__, details)
        return self

    def _faults(self) -> list[Fault]:
        """What is wrong between fields, each with its place."""
        known = list(self.ood or ())
        return self._leaks() + [
            (("groups", group, index), f"there is no '{name}' in ood{suggestion(name, known)}")
            for group, names in (self.groups or {}).items()
            for index, name in enumerate(names)
            if name not in known
        ]

    def _leaks(self) -> list[Fault]:
        """Rows to choose values on that have another part to play."""
        if self.tune is None:
            return []
        chosen: dict[Route, Source | None] = {("tune", "id"): self.tune.id}
        chosen |= {("tune", "ood", name): rows for name, rows in (self.tune.ood or {}).items()}
        others = {"train": self.train, "calibrate": self.calibrate, "id_test": self.id_test}
        others |= {f"ood.{name}": rows for name, rows in (self.ood or {}).items()}
        return [
            (route, f"is {name} as well: choose values on rows that have no other part to play")
            for route, rows in chosen.items()
            for name, other in others.items()
            if rows is not None and rows == other
        ]


class DetectorConfig(Configuration):
    """A detector: an extractor, shapers, a scorer, and the rows it is fitted and calibrated on.

    Args:
        scorer: the method.
    """

    scorer: Annotated[Scorer, Slot("scorer")]

    def _faults(self) -> list[Fault]:
        return super()._faults() + recipe_faults(self.scorer, self.shapers, ("scorer",))


class Member(Settings):
    """A detector in an ensemble.

    Args:
        extractor: its model; left out, the ensemble's.
        shapers: its own, in place of the ensemble's.
        scorer: the method.
    """

    extractor: Annotated[Extractor, Slot("extractor")] | None = None
    shapers: Shapers | None = None
    scorer: Annotated[Scorer, Slot("scorer")]


class EnsembleConfig(Configuration):
    """Several detectors as one, and the rows they are fitted and calibrated on.

    Args:
        extractor: the model of every member that names none.
        shapers: of every member that names none.
        members: by name.
        combine: how their scores become one: a combination without scorers of its own.
    """

    members: Annotated[Mapping[Name, Member], Field(min_length=1)]
    combine: Combine = Field(default="sum")  # type: ignore[assignment]

    def _faults(self) -> list[Fault]:
        wrong = super()._faults() + weight_faults(self.combine, len(self.members), ())
        for name, member in self.members.items():
            wrong += recipe_faults(member.scorer, member.shapers or (), ("members", name))
        return wrong


class BenchmarkConfig(Configuration):
    """Many detectors on many data sets.

    Args:
        scorer: one method, where a detector's file is used for a benchmark.
        scorers: the methods, each a scorer, a mapping ``{name, shapers, scorer}`` or an ensemble,
            ``{name, members, combine}``; or ``installed``, every scorer that needs no field.
        models: extractors by name, in place of ``extractor``: everything is done for each.
        trainings: training runs by name, whose results are models of these names.
        train: in-distribution rows to fit on.
        id_test: in-distribution rows to evaluate on.
        ood: rows that are not in-distribution, by name; nearly every protocol needs some.
        protocol: what is measured, a kind or a mapping with a kind.
    """

    scorer: Annotated[Scorer, Slot("scorer")] | None = None
    scorers: Annotated[tuple[Item, ...], Field(min_length=1)] | Literal["installed"] | None = None
    models: (
        Annotated[Mapping[Name, Annotated[Extractor, Slot("extractor")]], Field(min_length=1)]
        | None
    ) = None
    trainings: Annotated[Mapping[Name, TrainingConfig], Field(min_length=1)] | None = None
    train: Rows
    id_test: Rows
    ood: Annotated[Mapping[Name, Rows], Field(min_length=1)] | None = None
    protocol: Chosen = Separation()

    def _faults(self) -> list[Fault]:
        wrong = super()._faults()
        if self.scorer is None and self.scorers is None:
            wrong.append((("scorers",), "is needed: a list of scorers, or 'installed'"))
        if self.scorer is not None and self.scorers is not None:
            wrong.append((("scorer",), "is in the way of scorers; keep one of the two"))
        for title in ("models", "trainings"):
            if self.extractor is not None and getattr(self, title) is not None:
                wrong.append((("extractor",), f"is in the way of {title}; keep one of the two"))
        wrong += self._faults_of_names()
        names: dict[str, int] = {}
        listed = self.scorers if isinstance(self.scorers, tuple) else ()
        for index, candidate in enumerate(self.candidates() if listed else ()):
            route: Route = ("scorers", index)
            if isinstance(candidate, Joint):
                wrong += candidate.faults(self._common_models(), route)
            else:
                wrong += recipe_faults(candidate.scorer, candidate.shapers or (), route)
            first = names.setdefault(str(candidate.name), index)
            if first != index:
                text = f"'{candidate.name}' is scorers.{first} already; give it another name"
                wrong.append((route, text))
        if self.scorer is not None:
            wrong += recipe_faults(self.scorer, self.shapers, ("scorer",))
        groups = {name: group for group, names in (self.groups or {}).items() for name in names}
        wrong += self.protocol.faults({name: groups.get(name, "") for name in self.ood or ()})
        if isinstance(self.protocol, OpenSet):
            for title in ("train", "held_out", "calibrate", "id_test"):
                if getattr(getattr(self, title), "classes", None) is not None:
                    wrong.append(((title, "classes"), CHOOSES))
        return wrong

    def _faults_of_names(self) -> list[Fault]:
        """Trainings whose name is a model's, or no name of a folder."""
        wrong: list[Fault] = []
        for name in self.trainings or ():
            route: Route = ("trainings", name)
            if name in (self.models or ()):
                wrong.append((route, "is one of models already; give it another name"))
            if name.startswith(".") or "\\" in name or PurePath(name).name != name:
                wrong.append((route, "is to be the name of a folder; give it another name"))
        return wrong

    def _common_models(self) -> list[str]:
        """The names of models that an ensemble may use, in every division of the classes."""
        own = [*(self.models or ()), *(self.trainings or ())]
        if not isinstance(self.protocol, OpenSet):
            return own
        first, *others = [list(split.models or ()) for split in self.protocol.splits.values()]
        return [name for name in first if all(name in other for other in others)]

    def candidates(self) -> tuple[Contender, ...]:
        """What takes part, each with its name and its shapers."""
        items: tuple[Scorer | Contender, ...]
        if self.scorers == "installed":
            items = installed()
        elif self.scorers is None:
            items = () if self.scorer is None else (self.scorer,)
        else:
            items = self.scorers
        return titled(items, self.shapers)


def candidates(scorers: Any, shapers: Sequence[Any] = ()) -> tuple[Contender, ...]:
    """What a list of scorers stands for, each with its name and its shapers.

    Args:
        scorers: as in ``BenchmarkConfig``; instances are taken too.
        shapers: for every item that names none of its own.

    Raises:
        ConfigurationError: an item that is none, or two of one name.
    """
    if isinstance(scorers, str) and scorers != "installed":
        raise ConfigurationError(f"scorers is a list or 'installed', not {scorers!r}")
    built: Any = tuple(registry.build("shaper", shaper) for shaper in shapers)
    items = installed() if isinstance(scorers, str) else [_item(item) for item in scorers]
    found = titled(items, built)
    often = Counter(candidate.name for candidate in found)
    if twice := [name for name, times in often.items() if times > 1]:
        raise ConfigurationError(f"scorers: '{twice[0]}' occurs twice; give one another name")
    return found


def _item(item: Any) -> Scorer | Contender:
    if isinstance(item, Candidate | Joint):
        return item
    if isinstance(item, Mapping) and "kind" not in item:
        return validate(Joint, item) if "members" in item else validate(Candidate, item)
    scorer: Any = registry.build("scorer", item)
    return scorer  # type: ignore[no-any-return]


def validate(model: type[Model], data: Document | Mapping[str, Any]) -> Model:
    """The configuration that a document or a mapping holds.

    Raises:
        ConfigurationError: with all that is wrong, one line each, as ``explain`` puts it.
    """
    document = data if isinstance(data, Document) else Document(data)
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise ConfigurationError(explain(error, document=document, wanted=model)) from None
