"""Samplers: sets of values from search spaces, one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from oodcore.document import Route
from oodcore.errors import ExtraError
from oodcore.space import Choice, Space

Values = Mapping[Route, Any]
"""Values of fields, by place."""

DIGITS = 4
"""Significant digits of a number that is drawn from a range."""


class Grid:
    """Every set of values, one after the other."""

    name = "grid"
    versions: Mapping[str, str] = MappingProxyType({})

    def __init__(self, searched: Mapping[Route, Space]) -> None:
        self._routes = tuple(searched)
        self._points = itertools.product(*(space.examples for space in searched.values()))

    def draw(self) -> Values:
        return dict(zip(self._routes, next(self._points), strict=True))

    def tell(self, merit: float) -> None:
        """Nothing is learnt from it."""


class Tree:
    """Sets of values where those before suggest that it is worth it, by optuna's TPE.

    Choices of numbers in ascending order are told to it as such, others as unordered.
    """

    name = "tpe"

    def __init__(self, optuna: Any, searched: Mapping[Route, Space], seed: int) -> None:
        self.versions = {"optuna": optuna.__version__}
        self._searched = searched
        self._kinds = {
            str(route): _distribution(optuna.distributions, space)
            for route, space in searched.items()
        }
        sampler = optuna.samplers.TPESampler(seed=seed)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._trial: Any = None

    def draw(self) -> Values:
        self._trial = self._study.ask(self._kinds)
        return {
            route: _taken(space, self._trial.params[str(route)])
            for route, space in self._searched.items()
        }

    def tell(self, merit: float) -> None:
        """What the values that were drawn last are worth."""
        if self._trial is not None:
            self._study.tell(self._trial, merit)


@contextmanager
def tree(searched: Mapping[Route, Space], seed: int) -> Iterator[Tree]:
    """Optuna's sampler, and its log quiet meanwhile.

    Raises:
        ExtraError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ExtraError(
            f"searching {len(searched)} fields needs optuna, which cannot be imported ({error}); "
            "pip install 'oodcore[tune]', or allow as many trials as there are sets of values"
        ) from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield Tree(optuna, searched, seed)
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(kinds: Any, space: Space) -> Any:
    if isinstance(space, Choice):
        last = len(space.values) - 1
        numbers = all(type(value) in (int, float) for value in space.values)
        if numbers and last > 0 and list(space.values) == sorted(space.values):
            return kinds.IntDistribution(0, last)
        return kinds.CategoricalDistribution(tuple(range(last + 1)))
    if space.whole:
        return kinds.IntDistribution(int(space.low), int(space.high), log=space.log)
    return kinds.FloatDistribution(space.low, space.high, log=space.log)


def _taken(space: Space, drawn: Any) -> Any:
    """The value that was drawn; one from a range with as many digits as anyone wants to read."""
    if isinstance(space, Choice):
        return space.values[drawn]
    if space.whole:
        return drawn
    return min(max(float(f"{drawn:.{DIGITS}g}"), space.low), space.high)


def size_of(searched: Mapping[Route, Space], written: Values) -> float:
    """How many sets of values there are, with what is written."""
    if not all(isinstance(space, Choice) for space in searched.values()):
        return math.inf
    inside = all(
        any(value == one for one in searched[route].examples) for route, value in written.items()
    )
    return math.prod(len(space.examples) for space in searched.values()) + (not inside)
