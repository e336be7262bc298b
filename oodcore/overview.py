"""Overview: what a benchmark found, as a terminal shows it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from oodcore.metrics import METRICS, SEPARATION
from oodcore.tables import Column, best_of, columns, percent

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from oodcore.results import Results

MEAN, ALL = "mean", "all"
"""What the results call a mean, and the group of all OOD sets."""
GAP = 2
"""Blanks between two columns."""
NARROWEST = 12
"""What a detector's name gets on the narrowest of terminals."""
WIDEST = 20
"""What the name of an OOD set gets at most; a longer one takes several lines."""


@dataclass(frozen=True)
class _Numbers:
    """A column of the overview: a column of the results under a head of several lines."""

    column: Column
    head: tuple[str, ...]

    @property
    def width(self) -> int:
        return min(WIDEST, max(cell_len(text) for text in (*self.head, "100.00")))


class Overview:
    """Results in as many tables as the width asks for; rich draws it.

    For each detector there are the mean of every metric over the OOD sets, the false-alarm rate,
    and one metric on each set. Detectors stand below their model, best first.

    Args:
        results: what to show.
        metric: what to show of each OOD set.

    Raises:
        ConfigurationError: the metric does not compare ID with OOD data.
    """

    def __init__(self, results: Results, metric: str = "auroc") -> None:
        self._results = results
        self._blocks = (_means(results, metric), _on_each(results, metric))
        self._models: dict[str, dict[str, str]] = {}
        models = {entry.name: entry.model for entry in results.entries}
        for name in results.ranked(metric):
            model = models[name]
            self._models.setdefault(model, {})[name] = name.removeprefix(f"{model}/")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The tables. A name may take several lines; neither name nor number is cut off."""
        shown = [short for names in self._models.values() for short in names.values()]
        room = max(NARROWEST, options.max_width * 2 // 5)
        first = min(room, max(cell_len(name) for name in (*shown, "detector")))
        for chunk in self._chunks(options.max_width - first):
            yield from self._table(chunk, first)
            yield ""
        yield Text(self._caption())

    def _chunks(self, room: int) -> Iterator[list[_Numbers]]:
        """The columns side by side; if there is no room for that, block by block."""
        everything = [numbers for block in self._blocks for numbers in block]
        for block in (everything,) if _width(everything) <= room else self._blocks:
            chunks = _filled(block, room)
            # Tables of about the same width, rather than wide ones and a rest.
            for less in range(room - 1, 0, -1):
                if len(tighter := _filled(block, less)) > len(chunks):
                    break
                chunks = tighter
            yield from chunks

    def _table(self, chunk: Sequence[_Numbers], first: int) -> Iterator[RenderableType]:
        """A head, and below it the detectors of each model."""
        yield _grid(chunk, first, header=True)
        top = [percent(self._best(numbers.column)) for numbers in chunk]
        for number, (model, names) in enumerate(self._models.items()):
            if number:
                yield ""
            if model:
                yield Text(model, "bold") + Text(self._accuracy(model, " (accuracy {})"))
            body = _grid(chunk, first, header=False)
            for name, short in names.items():
                cells = [percent(self._results.cell(name, n.column)) for n in chunk]
                marked = zip(cells, top, strict=True)
                bold = (Text(cell, "bold" if cell == best else "") for cell, best in marked)
                body.add_row(Text(short), *bold)
            yield body

    def _accuracy(self, model: str, form: str) -> str:
        """The accuracy of a model, put into a form; nothing if it was not measured."""
        name = next(iter(self._models[model]))
        value = self._results.value(name, "accuracy", self._results.id_data.name)
        return "" if value is None else form.format(percent(value))

    def _best(self, column: Column) -> float | None:
        cells = [self._results.cell(entry.name, column) for entry in self._results.entries]
        return best_of([cell for cell in cells if cell is not None], column.metric)

    def _caption(self) -> str:
        """How the numbers are to be read."""
        results = self._results
        inside = results.id_data
        lines = [
            "In percent. AUROC and AUPR: higher is better; FPR95: lower is better; ID or OOD is "
            "the positive class."
        ]
        if len(results.ood_data) == 1:
            lines.append(f"The OOD set is {results.ood_data[0].name}.")
        asked = results.configuration.get("false_alarm_rate")
        if asked is not None:
            lines.append(
                f"False alarms: the share of {inside.name} ({inside.rows} rows) that is flagged, "
                f"where {100 * asked:g} was asked for."
            )
        if "" in self._models and (told := self._accuracy("", f"Accuracy on {inside.name}: {{}}.")):
            lines.append(told)
        return "\n".join(lines)


def _grid(chunk: Sequence[_Numbers], first: int, *, header: bool) -> Table:
    """A table of these columns without rows; all of them have the same widths."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        show_header=header,
    )
    table.add_column("detector", width=first, overflow="fold", vertical="top")
    for numbers in chunk:
        head = Text("\n".join(numbers.head))
        table.add_column(head, width=numbers.width, justify="right", overflow="fold")
    return table


def _means(results: Results, metric: str) -> list[_Numbers]:
    """The mean of every metric over all OOD sets, the false alarms, one metric's other means."""
    mean = ["mean"] if len(results.ood_data) > 1 else []
    members = Counter(ood.group for ood in results.ood_data)
    over_all = [
        _Numbers(Column("mean", each, MEAN, ALL), (*mean, *_title(each))) for each in SEPARATION
    ]
    others = []
    for column in columns(results, metric):
        if column.metric == "false_alarm_rate":
            over_all.append(_Numbers(column, ("false", "alarms")))
        elif column.data == MEAN and members[column.group] > 1:
            others.append(_Numbers(column, (column.group, "mean", *_title(metric))))
    return over_all + others


def _on_each(results: Results, metric: str) -> list[_Numbers]:
    """One metric on every OOD set; of a single one the means have told all."""
    return [
        _Numbers(column, (*_title(metric), column.title))
        for column in columns(results, metric)
        if column.metric in SEPARATION and column.data != MEAN and len(results.ood_data) > 1
    ]


def _filled(block: Sequence[_Numbers], room: int) -> list[list[_Numbers]]:
    """Columns in turn, in as few tables as have room for them."""
    chunks: list[list[_Numbers]] = []
    for numbers in block:
        if not chunks or _width([*chunks[-1], numbers]) > room:
            chunks.append([])
        chunks[-1].append(numbers)
    return chunks


def _title(metric: str) -> tuple[str, ...]:
    """A metric's name in lines that are short: FPR95 and ID."""
    return tuple(METRICS[metric].title.removesuffix(" positive").split(", "))


def _width(chunk: Sequence[_Numbers]) -> int:
    """The width of columns with the gaps before them."""
    return sum(GAP + numbers.width for numbers in chunk)
