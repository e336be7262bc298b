"""Check: one law for one component, as a function that a test calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from oodcore.component import Component
from oodcore.errors import ConfigurationError
from oodcore.hookspecs import hookimpl
from oodcore.plugins import registry
from oodcore.scorer import Scorer, Shaper

Subject = TypeVar("Subject")
Law = Callable[[Subject], None]
"""Raises an AssertionError that says what is wrong and what to do."""


@dataclass(frozen=True)
class Check:
    """One law for one component: call it, and it returns or raises an AssertionError.

    Args:
        name: of the law.
        component: that is examined.
        run: examines it.
    """

    name: str
    component: Component
    run: Callable[[], None] = field(repr=False)

    @property
    def __name__(self) -> str:
        """What pytest calls a test that is parametrized with this."""
        return f"{type(self.component).kind}-{self.name.replace(' ', '_')}"

    def __call__(self) -> None:
        who = f"{self.component.slot} '{type(self.component).kind}', {self.name}"
        with warnings.catch_warnings(), one_thread():
            # What a component warns of (few rows, a constant score) is meant for its users.
            warnings.simplefilter("ignore", UserWarning)
            try:
                self.run()
            except AssertionError as error:
                raise AssertionError(f"{who}: {error}") from error
            except Exception as error:
                raise AssertionError(f"{who}: {type(error).__name__}: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, torch computes in one thread: sums are repeatable, and small tensors fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def checks_of(
    component: Component, subject: Subject, laws: Mapping[str, Law[Subject]]
) -> list[Check]:
    """A check a law."""
    return [Check(name, component, partial(law, subject)) for name, law in laws.items()]


def examine(checks: Iterable[Check]) -> None:
    """Run all checks.

    Raises:
        AssertionError: lists every one that failed.
    """
    failed, total = [], 0
    for check in checks:
        total += 1
        try:
            check()
        except AssertionError as error:
            failed.append(error)
    if failed:
        faults = "\n".join(f"- {error}" for error in failed)
        raise AssertionError(f"{len(failed)} of {total} checks failed:\n{faults}") from failed[0]


def instance(component: Any, base: type[Component]) -> Any:
    """A component to examine, of an instance or of a class that needs no arguments.

    Raises:
        ConfigurationError: neither, or a class with required fields.
    """
    if isinstance(component, type) and issubclass(component, base):
        try:
            return component()
        except ValidationError as error:
            raise ConfigurationError(
                f"{component.__name__} cannot be made without arguments; give an instance "
                f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']})"
            ) from None
    if isinstance(component, base):
        return component
    raise ConfigurationError(
        f"the kit examines a {base.__name__} (an instance, or a class without required fields), "
        f"not {component!r:.100}"
    )


@contextmanager
def registered(*components: Component) -> Iterator[None]:
    """Register, within it, the classes of these components that no plugin has brought.

    Raises:
        PluginError: a class that cannot be registered, or whose kind is taken.
    """
    parts = [part for component in components for part in _family(component)]
    missing = [part for part in parts if registry.owner(part) is None]
    if not missing:
        yield
        return
    classes = {type(part): part.slot for part in missing}
    with registry.using(_Plugin(classes)):
        yield


def _family(component: Component) -> Iterator[Component]:
    """A component, those inside it, and the statistics they are fitted on."""
    for part in component.walk():
        yield part
        if isinstance(part, Scorer | Shaper):
            for statistic in part.statistics():
                yield from _family(statistic)


class _Plugin:
    """Brings some classes, for the length of a check."""

    def __init__(self, classes: Mapping[type[Component], str]) -> None:
        for slot in set(classes.values()):
            mine = [cls for cls, where in classes.items() if where == slot]
            setattr(self, f"register_{slot}s", _hook(f"register_{slot}s", mine))


def _hook(name: str, classes: list[type[Component]]) -> Callable[..., None]:
    def bring(register: Callable[[type[Any]], None]) -> None:
        for cls in classes:
            register(cls)

    bring.__name__ = name
    return hookimpl(bring)
