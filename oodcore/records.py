"""Records: what results are made of, a detector, a data set, a number, each checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from oodcore.component import Paper
from oodcore.errors import ConfigurationError

ID = "id"
"""The group of the in-distribution test data."""
MEAN, POOLED, ALL = "mean", "pooled", "all"
"""The data of a mean, that of all OOD sets' rows taken together, and the group of both where it is
every OOD set."""

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Method:
    """What a component of a detector computes, in its author's words, and where that is from.

    Args:
        slot: that the component fills.
        kind: its name in configurations.
        about: its docstring, without the list of its fields.
        paper: the source, if it has one.

    Raises:
        ConfigurationError: a text that cannot be written.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    slot: str
    kind: str
    about: str = ""
    paper: Paper | None = None

    def __post_init__(self) -> None:
        printable(self.kind, "a method")
        words = [self.about, *(asdict(self.paper).values() if self.paper else ())]
        plain_json(words, f"what is said of {self.kind}")


@dataclass(frozen=True)
class Entry:
    """One detector of a benchmark.

    Args:
        name: unique in the benchmark.
        model: the name of the model it stands on; empty if there is only one.
        configuration: its shapers and scorer, in plain JSON values.
        citation: of the paper behind it.
        seconds: that its scorer took for the rows of all sets together, without the passes through
            the model and the shapers, which detectors share.
        methods: its shapers and scorer, and what these are made of.

    Raises:
        ConfigurationError: a name that cannot be printed, a configuration that is not plain JSON.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    model: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    citation: str | None = None
    seconds: float | None = None
    methods: tuple[Method, ...] = ()

    def __post_init__(self) -> None:
        printable(self.name, "a detector")
        printable(self.model or "one", "a model")
        plain_json(self.citation, f"the citation of {self.name}")
        plain = plain_json(self.configuration, f"the configuration of {self.name}")
        object.__setattr__(self, "configuration", plain)


@dataclass(frozen=True)
class DataSet:
    """A data set of a benchmark; its group is ``id``, or that of an OOD set (empty for none).

    Where classes are divided in several ways, ``rows`` are those of all divisions together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    group: str
    rows: int

    def __post_init__(self) -> None:
        printable(self.name, "a data set")
        printable(self.group or "none", "a group")
        if self.name in (MEAN, POOLED) or self.group == ALL:
            raise ConfigurationError(
                f"no data set can be called '{MEAN}' or '{POOLED}' and no group '{ALL}': these "
                "stand for all sets"
            )


@dataclass(frozen=True)
class Row:
    """One number: a metric of a detector on a data set, a share in [0, 1].

    A mean over the OOD sets of a group has the data ``mean`` and that group; over all of them, the
    group ``all``. Every set weighs the same. The data ``pooled`` is all their rows together.

    Where a protocol repeats itself, ``values`` has a number for each of the results' ``repeats``
    and ``value`` is their mean; else it is empty.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    detector: str
    model: str
    data: str
    group: str
    metric: str
    value: float
    values: tuple[float, ...] = ()

    @property
    def sd(self) -> float | None:
        """The standard deviation over the repeats, of the population: divided by their number."""
        return float(np.std(self.values)) if self.values else None


def printable(name: str, what: str) -> None:
    """Raise a ConfigurationError for a name that cannot be printed on one line."""
    if not (name.isprintable() and name.strip()):
        raise ConfigurationError(f"{name!r} cannot name {what}: it cannot be printed on one line")


def plain_json(value: Any, what: str) -> Any:
    """A copy in plain JSON values, as it will be read back.

    Raises:
        ConfigurationError: something in it is no JSON.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{what} cannot be recorded as JSON: {error}") from None


def same_names(what: str, one: Iterable[str], other: Iterable[str]) -> None:
    """Raise a ConfigurationError where two sets of names are not the same."""
    if only := sorted(set(one) ^ set(other)):
        raise ConfigurationError(f"the {what} do not match: only one side has {', '.join(only)}")


def known_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ConfigurationError for a name that is not among those known."""
    known = list(dict.fromkeys(known))
    if strange := [name for name in given if name not in known]:
        raise ConfigurationError(f"unknown {what} '{strange[0]}'; there are: {', '.join(known)}")
