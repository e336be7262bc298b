"""Choice and Range: the values of a field that are worth trying, and who has tried them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from oodcore.errors import ConfigurationError


@dataclass(frozen=True)
class Choice:
    """Some values of a field.

    Args:
        values: numbers, texts, true, false or None; all different.
        source: who takes or sweeps them: a paper, a library.

    Raises:
        ConfigurationError: no values, one twice, or no source.
    """

    values: tuple[Any, ...]
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple) or not self.values:
            raise ConfigurationError(f"a Choice has a tuple of values, not {self.values!r}")
        if len({(value, isinstance(value, bool)) for value in self.values}) < len(self.values):
            raise ConfigurationError(f"a Choice has different values, not {self.values!r}")
        _check_source(self.source)

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values that must be ones of the field."""
        return self.values

    def dump(self) -> dict[str, Any]:
        """The space as plain JSON values."""
        return {"values": list(self.values), "source": self.source}


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, both taken; whole numbers where both are ``int``.

    Args:
        low: the smallest.
        high: the largest.
        source: who takes or sweeps them: a paper, a library.
        log: whether the logarithm is spread evenly, not the number.

    Raises:
        ConfigurationError: no interval, one that reaches 0 with ``log``, or no source.
    """

    low: float
    high: float
    source: str
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigurationError(
                f"a Range goes from a number up to a larger one, not from {self.low} to {self.high}"
            )
        if self.log and self.low <= 0:
            raise ConfigurationError(f"a Range with log begins above 0, not at {self.low}")
        _check_source(self.source)

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole ones."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def examples(self) -> tuple[Any, ...]:
        """Values that must be ones of the field."""
        return self.low, self.high

    def dump(self) -> dict[str, Any]:
        """The space as plain JSON values."""
        return {"low": self.low, "high": self.high, "log": self.log, "source": self.source}


Space = Choice | Range


def spaces(**fields: Space) -> Mapping[str, Space]:
    """The search space of a component, by field: ``search = spaces(k=Choice((1, 10), "..."))``."""
    return MappingProxyType(fields)


def _check_source(source: str) -> None:
    if not isinstance(source, str) or not source.strip():
        raise ConfigurationError("a search space names its source: a paper, a library")
