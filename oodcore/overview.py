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

from oodcore.metrics import METRICS
from oodcore.tables import Column, best_of, cell_text, columns, percent, protocol_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

    from oodcore.results import Results

MEAN, POOLED, ALL = "mean", "pooled", "all"
"""What the results call a mean, all OOD rows together, and the group of all OOD sets."""
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
    widest: str = "100.00"

    @property
    def width(self) -> int:
        return min(WIDEST, max(cell_len(text) for text in (*self.head, self.widest)))


class Overview:
    """Results in as many tables as the width asks for; rich draws it.

    For each detector there are the mean of every metric over the OOD sets, the false-alarm rate,
    and one metric on each set. Detectors stand below their model, best first.

    Args:
        results: what to show.
        metric: what to show of each OOD set; left out, the protocol's first.

    Raises:
        ConfigurationError: the metric is not among those that a table can show.
    """

    def __init__(self, results: Results, metric: str | None = None) -> None:
        metric = results.main if metric is None else metric
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
                cells = [cell_text(self._results, name, n.column) for n in chunk]
                marked = zip(cells, top, strict=True)
                bold = (
                    Text(c, "bold" if best and c.startswith(best) else "") for c, best in marked
                )
                body.add_row(Text(short), *bold)
            yield body

    def _accuracy(self, model: str, form: str) -> str:
        """The accuracy of a model, put into a form; nothing if it was not measured."""
        name, inside = next(iter(self._models[model])), self._results.id_data
        column = Column("accuracy", "accuracy", inside.name, inside.group)
        told = cell_text(self._results, name, column)
        return form.format(told) if told else ""

    def _best(self, column: Column) -> float | None:
        cells = [self._results.cell(entry.name, column) for entry in self._results.entries]
        return best_of([cell for cell in cells if cell is not None], column.metric)

    def _spread(self) -> str:
        """What stands behind the numbers of a protocol with repeats."""
        repeats = len(self._results.repeats)
        return f", mean ± standard deviation over {repeats} repeats" if repeats else ""

    def _caption(self) -> str:
        """How the numbers are to be read."""
        results = self._results
        inside = results.id_data
        lines = [line] if (line := protocol_line(results)) else []
        lines.append(f"In percent{self._spread()}. {_readings(results)}")
        if len(results.ood_data) == 1:
            lines.append(f"The OOD set is {results.ood_data[0].name}.")
        asked = results.configuration.get("false_alarm_rate")
        if asked is not None:
            lines.append(
                f"False alarms: the share of {inside.name} ({inside.rows} rows) that is flagged, "
                f"where {100 * asked:g} was asked for."
            )
        if not results.metrics:
            return "\n".join(lines)
        if "" in self._models and (told := self._accuracy("", f"Accuracy on {inside.name}: {{}}.")):
            lines.append(told)
        return "\n".join(lines)


def _readings(results: Results) -> str:
    """Which end of each metric is better, and which class is positive."""
    metrics = [METRICS[name] for name in results.metrics or results.id_metrics]
    ends = []
    for end in ("higher", "lower"):
        names = dict.fromkeys(m.title.partition(", ")[0] for m in metrics if m.better == end)
        if names:
            *others, last = names
            said = f"{', '.join(others)} and {last}" if others else last
            ends.append(f"{said}: {end} is better")
    positive = dict.fromkeys(
        word for m in metrics if (word := m.title.partition(", ")[2].partition(" ")[0])
    )
    told = [f"{' or '.join(positive)} is the positive class"] if positive else []
    return f"{'; '.join([*ends, *told])}."


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
        _Numbers(Column("mean", each, MEAN, ALL), (*mean, *_title(each)), _widest(results))
        for each in results.metrics
    ]
    others = []
    for column in columns(results, metric):
        widest = _widest(results)
        if column.metric == "false_alarm_rate":
            over_all.append(_Numbers(column, ("false", "alarms"), widest))
        elif column.group == results.id_data.group and not results.metrics:
            over_all.append(_Numbers(column, _title(column.metric), widest))
        elif column.data == POOLED:
            others.append(_Numbers(column, ("pooled", *_title(metric)), widest))
        elif column.data == MEAN and members[column.group] > 1:
            others.append(_Numbers(column, (column.group, "mean", *_title(metric)), widest))
    return over_all + others


def _on_each(results: Results, metric: str) -> list[_Numbers]:
    """One metric on every OOD set; of a single one the means have told all."""
    return [
        _Numbers(column, (*_title(metric), column.title), _widest(results))
        for column in columns(results, metric)
        if column.metric in results.metrics
        and column.data not in (MEAN, POOLED)
        and len(results.ood_data) > 1
    ]


def _filled(block: Sequence[_Numbers], room: int) -> list[list[_Numbers]]:
    """Columns in turn, in as few tables as have room for them."""
    chunks: list[list[_Numbers]] = []
    for numbers in block:
        if not chunks or _width([*chunks[-1], numbers]) > room:
            chunks.append([])
        chunks[-1].append(numbers)
    return chunks


def _widest(results: Results) -> str:
    """The longest text that a number can have."""
    return "100.00 ± 50.00" if results.repeats else "100.00"


def _title(metric: str) -> tuple[str, ...]:
    """A metric's name in lines that are short: FPR95 and ID."""
    return tuple(METRICS[metric].title.removesuffix(" positive").split(", "))


def _width(chunk: Sequence[_Numbers]) -> int:
    """The width of columns with the gaps before them."""
    return sum(GAP + numbers.width for numbers in chunk)
