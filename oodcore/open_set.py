"""Open-set recognition: classes divided into known and unknown ones, a model for each division."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from oodcore.component import Settings, Slot
from oodcore.extractor import Extractor
from oodcore.protocol import Fault, Protocol

Name = Annotated[str, StringConstraints(min_length=1)]
Classes = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]

UNKNOWN = "unknown"
"""The OOD set that a split makes of the classes that it does not know."""
CHOOSES = "the protocol's splits say which classes a set has; leave 'classes' out of this source"


class Split(Settings):
    """A division of classes into those that a model was trained on and the others.

    Args:
        known: the classes of the model, in the order of its outputs: they become 0, 1, ...
        unknown: the classes whose rows it should flag; left out, all others below the protocol's
            ``classes``.
        extractor: the model that was trained on the known classes.
        models: several of them by name, in place of ``extractor``.
    """

    known: Classes
    unknown: Classes | None = None
    extractor: Annotated[Extractor, Slot("extractor")] | None = None
    models: (
        Annotated[Mapping[Name, Annotated[Extractor, Slot("extractor")]], Field(min_length=1)]
        | None
    ) = None

    @model_validator(mode="after")
    def _check(self) -> Split:
        if twice := _twice([*self.known, *(self.unknown or ())]):
            raise PydanticCustomError(
                "classes", "the class {twice} is named twice", {"twice": twice[0]}
            )
        if self.extractor is not None and self.models is not None:
            raise PydanticCustomError("models", "keep one of extractor and models")
        return self


class OpenSet(Protocol):
    """Open-set recognition: rows of classes that the model was not trained on, in several splits.

    Neal et al., Open Set Learning with Counterfactual Images, ECCV 2018, and Dhamija et al.,
    Reducing Network Agnostophobia, NeurIPS 2018 (OSCR). In each split the rows to fit, calibrate
    and test on are those of its known classes, and the OOD set "unknown" is made of the test rows
    of its unknown ones. What is reported is the mean over the splits, and their standard deviation.

    Args:
        kind: "open_set".
        splits: by name.
        classes: how many classes the data has, where splits name no unknown ones.
    """

    takes_sets: ClassVar[bool] = False
    takes_labels: ClassVar[bool] = True

    kind: Literal["open_set"] = "open_set"
    splits: Annotated[Mapping[Name, Split], Field(min_length=1)]
    classes: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_unknown(self) -> OpenSet:
        for name, split in self.splits.items():
            if split.unknown is None and self.classes is None:
                text = "splits.{name}: name its unknown classes, or how many classes there are"
                raise PydanticCustomError("unknown", text, {"name": name})
            if not self.unknown(name):
                raise PydanticCustomError("unknown", "splits.{name}: all is known", {"name": name})
        return self

    @property
    def told(self) -> str:
        names = ", ".join(self.splits)
        count = len(self.splits)
        return f"{count} split{'s' if count > 1 else ''} of the classes ({names})"

    @property
    def measured(self) -> tuple[str, ...]:
        return "auroc", "oscr", "fpr95_id"

    @property
    def repeats(self) -> tuple[str, ...]:
        return tuple(self.splits) if len(self.splits) > 1 else ()

    def unknown(self, name: str) -> tuple[int, ...]:
        """The unknown classes of a split."""
        split = self.splits[name]
        if split.unknown is not None:
            return split.unknown
        return tuple(c for c in range(self.classes or 0) if c not in split.known)

    def faults(self, groups: Mapping[str, str]) -> list[Fault]:
        if UNKNOWN in groups:
            return [(("ood", UNKNOWN), "the protocol open_set makes this set itself; rename yours")]
        return []


def _twice(numbers: list[int]) -> list[int]:
    return [number for number in dict.fromkeys(numbers) if numbers.count(number) > 1]
