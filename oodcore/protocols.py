"""The protocols: OpenOOD, Outlier Exposure, open-set recognition, selective prediction, SSB-OSR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import (
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from oodcore.component import suggestion
from oodcore.confidence import accuracy_at, aurc, eaurc
from oodcore.curves import Floats, curve
from oodcore.document import Document
from oodcore.errors import ConfigurationError, DataError
from oodcore.messages import explain
from oodcore.metrics import READINGS
from oodcore.open_set import OpenSet
from oodcore.protocol import Bools, Fault, Pair, Protocol
from oodcore.selection import hashed


class Separation(Protocol):
    """How well ID and OOD rows come apart, on all rows of every set.

    Args:
        kind: "separation".
    """

    kind: Literal["separation"] = "separation"

    @property
    def told(self) -> str:
        return "every row of every set counts once"


class OpenOOD(Protocol):
    """OpenOOD 1.5: near and far OOD sets, and the mean over each of the two groups.

    Zhang et al., OpenOOD v1.5: Enhanced Benchmark for Out-of-Distribution Detection, 2023. What
    OpenOOD prints as FPR@95 is ``fpr95_ood``: it takes OOD for the positive class. Its AUPR_IN and
    AUPR_OUT are areas by the trapezoid rule; ``aupr_id`` and ``aupr_ood`` are the step-wise sums,
    a little lower.

    Args:
        kind: "openood".
    """

    kind: Literal["openood"] = "openood"

    @property
    def told(self) -> str:
        return (
            "near and far OOD sets, each group's mean over its sets; FPR@95 of OpenOOD is that "
            "with OOD positive"
        )

    def faults(self, groups: Mapping[str, str]) -> list[Fault]:
        faults = super().faults(groups)
        near_or_far = [name for name, group in groups.items() if group in ("near", "far")]
        if others := [name for name in groups if name not in near_or_far]:
            text = f"the protocol openood needs every OOD set in 'near' or 'far', and {others[0]} "
            faults.append((("groups",), f"{text}is in neither"))
        elif groups and len(set(groups.values())) < 2:
            missing = "far" if "near" in groups.values() else "near"
            text = f"the protocol openood needs OOD sets in 'near' and in 'far'; '{missing}' has "
            faults.append((("groups",), f"{text}none"))
        return faults


class OutlierExposure(Protocol):
    """As Outlier Exposure was evaluated: few OOD rows for many ID rows, drawn several times.

    Hendrycks, Mazeika, Dietterich, Deep Anomaly Detection with Outlier Exposure, ICLR 2019. A draw
    takes ``floor(N / id_per_ood)`` rows of an OOD set without replacement, against all N rows of
    the in-distribution test set. Which rows those are is decided by a hash of seed, draw, set and
    row number, so that all detectors are measured on the same draws. A smaller OOD set is an error,
    where the paper's code goes on at another base rate. Of a set of just that size all draws are
    the same.

    Args:
        kind: "outlier_exposure".
        level: of the FPR, in percent: read at the share of OOD rows nearest to it. The paper has 95
            for images and 90 for text.
        id_per_ood: ID rows for every OOD row.
        draws: how many.
        seed: of the draws.
    """

    counts_rows: ClassVar[bool] = True

    kind: Literal["outlier_exposure"] = "outlier_exposure"
    level: Literal[90, 95, 99] = 95
    id_per_ood: PositiveInt = 5
    draws: PositiveInt = 10
    seed: NonNegativeInt = 0

    @property
    def told(self) -> str:
        return (
            f"{self.draws} draws (seed {self.seed}) of 1 OOD row for every {self.id_per_ood} ID "
            f"rows, FPR at the recall nearest to {self.level} %"
        )

    @property
    def measured(self) -> tuple[str, ...]:
        return "auroc", f"fpr{self.level}_ood_nearest", "aupr_ood"

    @property
    def repeats(self) -> tuple[str, ...]:
        return tuple(f"draw {number}" for number in range(1, self.draws + 1))

    def check_rows(self, inside: int, outside: Mapping[str, int]) -> None:
        wanted = inside // self.id_per_ood
        if not wanted:
            raise DataError(
                f"{inside} in-distribution test rows are too few for 1 OOD row for every "
                f"{self.id_per_ood}"
            )
        for name, rows in outside.items():
            if rows < wanted:
                raise DataError(
                    f"a draw takes {wanted} rows of {name}, 1 for every {self.id_per_ood} of "
                    f"{inside} in-distribution ones, and there are {rows}: give more rows, or set "
                    f"the protocol's id_per_ood to {ceil((inside + 1) / (rows + 1))}"
                )

    def numbers(self, pair: Pair) -> dict[str, tuple[float, ...]]:
        rows = torch.arange(len(pair.outside))
        taken = len(pair.inside) // self.id_per_ood
        curves = []
        for draw in self.repeats:
            place = hashed(rows, self.seed, f"{draw} of {pair.name}").numpy()
            chosen = np.argsort(place, kind="stable")[:taken]
            curves.append(curve(pair.inside, pair.outside[chosen]))
        return {name: tuple(READINGS[name](one) for one in curves) for name in self.measured}


class Selective(Protocol):
    """Selective prediction: whether a high score says that the predicted class is right.

    Geifman, El-Yaniv, Selective Classification for Deep Neural Networks, NIPS 2017. Only the
    in-distribution test rows are looked at, which need labels; there are no OOD sets.

    Args:
        kind: "selective".
    """

    takes_sets: ClassVar[bool] = False
    takes_labels: ClassVar[bool] = True

    kind: Literal["selective"] = "selective"

    @property
    def told(self) -> str:
        return "right predictions against wrong ones, on the in-distribution test rows alone"

    @property
    def measured(self) -> tuple[str, ...]:
        return ()

    def faults(self, groups: Mapping[str, str]) -> list[Fault]:
        if groups:
            return [(("ood",), "the protocol selective looks at id_test alone; leave out ood")]
        return []

    def alone(self, inside: Floats, correct: Bools | None) -> dict[str, float]:
        assert correct is not None
        found = {"aurc": aurc(inside, correct), "eaurc": eaurc(inside, correct)}
        if correct.any() and not correct.all():
            points = curve(inside[correct], inside[~correct])
            found["error_auroc"] = points.auroc()
            found["error_aupr"] = points.average_precision("ood")
        for level in (80, 90):
            found[f"accuracy_at_{level}"] = accuracy_at(level / 100, inside, correct)
        return found


class SSBOSR(Protocol):
    """The open-set challenge on the Semantic Shift Benchmark: ImageNet-1k known, 21k unknown.

    Vaze et al., Open-Set Recognition: a Good Closed-Set Classifier is All You Need, ICLR 2022. The
    OOD sets are the benchmark's easy and hard classes, each by itself and, as in the challenge's
    code, all rows pooled. FPR95 is read at the threshold that accepts at least 95 % of the known
    rows, where that code takes the score at a rounded rank; OSCR pairs each score with the
    prediction of its own row, where that code sorts the scores alone.

    Args:
        kind: "ssb_osr".
    """

    takes_labels: ClassVar[bool] = True
    pools: ClassVar[bool] = True

    kind: Literal["ssb_osr"] = "ssb_osr"

    @property
    def told(self) -> str:
        return "known classes against unknown ones, on each OOD set and on all of them pooled"

    @property
    def measured(self) -> tuple[str, ...]:
        return "auroc", "fpr95_id", "auin", "auout", "dterr", "oscr"


Known = Separation | OpenOOD | OutlierExposure | OpenSet | Selective | SSBOSR
KINDS: Mapping[str, type[Protocol]] = {
    cls.model_fields["kind"].default: cls for cls in get_args(Known)
}
"""Every protocol by its kind."""


@dataclass(frozen=True)
class Choice:
    """Marks a field that takes a protocol: its kind alone, or a mapping with a kind."""

    word: ClassVar[str] = "protocol"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_from_kind, handler(source))

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        alone = [kind for kind, cls in KINDS.items() if not _required(cls)]
        return {"anyOf": [{"enum": alone}, {**handler(core), "required": ["kind"]}]}


Chosen = Annotated[Known, Field(discriminator="kind"), Choice()]
"""The field of a configuration that holds a protocol."""


def protocol_of(value: Any) -> Protocol:
    """The protocol that a kind, a mapping with a kind, or an instance stands for.

    Raises:
        ConfigurationError: an unknown kind, or fields that it does not have.
    """
    adapter: TypeAdapter[Protocol] = TypeAdapter(Chosen)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        given = value if isinstance(value, Mapping) else {}
        wanted = KINDS.get(given.get("kind", ""))
        text = explain(error, at="protocol", document=Document(given), wanted=wanted)
        raise ConfigurationError(text) from None


def _from_kind(value: Any) -> Any:
    if isinstance(value, Protocol):
        return value
    value = {"kind": value} if isinstance(value, str) else value
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str):
        raise PydanticCustomError(
            "no_kind", "write a protocol as its kind ('name') or as a mapping with a 'kind'"
        )
    if kind not in KINDS:
        known = list(KINDS)
        raise PydanticCustomError(
            "unknown_kind",
            "{message}",
            {
                "message": f"unknown protocol '{kind}'{suggestion(kind, known) or ';'} there are: "
                f"{', '.join(known)}"
            },
        )
    return value


def _required(cls: type[Protocol]) -> bool:
    return any(field.is_required() for field in cls.model_fields.values())
