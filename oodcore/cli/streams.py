"""What goes to stdout and stderr: results, complaints, warnings, bars."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID

PATIENCE = 1.0
"""Seconds that work may take before it shows a bar."""

_OPTIONS = {"overwrite=True": "--overwrite", "resume=True": "--resume", "store=True": "--store"}


class Unread(Exception):
    """Nobody reads stdout any more, as when a pipe ends in ``head``."""


def write(text: str) -> None:
    """A result, on stdout.

    Raises:
        Unread: nobody reads it; stdout is left in peace until the process ends.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, sys.stdout.fileno())
        raise Unread from None


def write_json(value: Any) -> None:
    """A result for another program, on stdout."""
    write(json.dumps(value, indent=2, allow_nan=False))


def draw(*parts: RenderableType) -> None:
    """Results as rich draws them, on stdout, as wide as the terminal or COLUMNS columns."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    # Drawn first and written afterwards, for rich would answer a closed pipe by leaving.
    with console.capture() as drawn:
        console.print(*parts, sep="\n")
    write("\n".join(line.rstrip() for line in drawn.get().splitlines()))


def complain(text: str, word: str = "error") -> None:
    """What went wrong, on stderr; options are called as the command line calls them."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    first, *others = [line.rstrip() for line in text.splitlines() if line.strip()] or [""]
    indent = " " * (len(word) + 2)
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write("\n".join([f"{word}: {first}", *(indent + line for line in others)]))
        sys.stderr.write("\n")
        sys.stderr.flush()


@contextlib.contextmanager
def readable_warnings() -> Iterator[None]:
    """Within it a warning is one line on stderr, said once."""
    said = set()

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            complain(text, "warning")

    with warnings.catch_warnings():
        warnings.showwarning = say
        yield


class Bars:
    """Progress bars on stderr, for whatever takes longer than a second; none without a terminal.

    Args:
        rows: the length of data that does not tell it.
    """

    def __init__(self, progress: Progress, rows: int | None = None) -> None:
        self._progress = progress
        self.rows = rows

    def watch(self, batches: Iterable[Any], title: str, rows: int | None) -> Iterator[Any]:
        """The same batches, with a bar for the rows in them; see ``oodcore.progress``."""
        task = self._begin(title, self.rows if rows is None else rows)
        try:
            for batch in batches:
                yield batch
                if isinstance(batch, Sized):
                    self._advance(task, advance=len(batch))
        finally:
            self._progress.remove_task(task)

    def steps(self, title: str) -> Callable[[int, int, Mapping[str, float]], None]:
        """What ``oodcore.training.train`` calls after every step of a run."""
        tasks: list[TaskID] = []

        def report(done: int, total: int, numbers: Mapping[str, float]) -> None:
            if not tasks:
                tasks.append(self._begin(title, total))
            self._advance(tasks[0], completed=done, note=_accuracies(numbers))
            if done == total:
                self._progress.remove_task(tasks.pop())

        return report

    def _begin(self, title: str, total: int | None) -> TaskID:
        return self._progress.add_task(title, total=total, visible=False, note="")

    def _advance(self, task: TaskID, **change: Any) -> None:
        elapsed = next(t.elapsed for t in self._progress.tasks if t.id == task)
        self._progress.update(task, visible=(elapsed or 0) > PATIENCE, **change)


@contextlib.contextmanager
def bars() -> Iterator[Bars]:
    """Bars for the passes over data within it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from oodcore.progress import watching

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Remaining(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        disable=not sys.stderr.isatty(),
    )
    shown = Bars(progress)
    with progress, watching(shown.watch):
        yield shown


def _accuracies(numbers: Mapping[str, float]) -> str:
    names = {"accuracy": "accuracy", "validation/accuracy": "validation"}
    shown = (f"{word} {numbers[name]:.3f}" for name, word in names.items() if name in numbers)
    return ", ".join(shown)
