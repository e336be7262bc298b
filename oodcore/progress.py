"""How long work shows itself: a bar where the command line asks for one, nothing in the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watch = Callable[[Iterable[T], str, "int | None"], Iterable[T]]

_watch: ContextVar[Watch[object] | None] = ContextVar("oodcore_progress", default=None)


def track(batches: Iterable[T], title: str, rows: int | None = None) -> Iterator[T]:
    """The same batches, shown to whoever watches (``rows`` is their total length, if known)."""
    watch = _watch.get()
    yield from batches if watch is None else watch(batches, title, rows)  # type: ignore[misc]


@contextmanager
def watching(watch: Watch[object]) -> Iterator[None]:
    """Have ``watch(batches, title, rows)`` see all that is tracked in this block."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
