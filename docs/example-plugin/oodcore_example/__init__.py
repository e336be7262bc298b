"""What this distribution brings to oodcore; the entry point in pyproject.toml leads here."""

from __future__ import annotations

import oodcore
from oodcore.hookspecs import Register
from oodcore_example.class_directions import ClassDirections
from oodcore_example.confidence_penalty import ConfidencePenalty
from oodcore_example.nearest_direction import NearestDirection
from oodcore_example.typical_range import TypicalRange

__all__ = ["ClassDirections", "ConfidencePenalty", "NearestDirection", "TypicalRange"]


@oodcore.hookimpl
def register_statistics(register: Register) -> None:
    register(ClassDirections)


@oodcore.hookimpl
def register_scorers(register: Register) -> None:
    register(NearestDirection)


@oodcore.hookimpl
def register_shapers(register: Register) -> None:
    register(TypicalRange)


@oodcore.hookimpl
def register_regularizers(register: Register) -> None:
    register(ConfidencePenalty)
