"""text: the rows of a file of texts."""

from __future__ import annotations

import csv
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch.utils.data import Dataset

import oodcore
from oodcore.component import FilePath, suggestion
from oodcore.data import Part, select
from oodcore.errors import DataError

Format = Literal["lines", "tsv", "csv", "jsonl"]
Column = int | str

_SUFFIXES: dict[str, Format] = {".txt": "lines", ".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
_MARK = b"\xef\xbb\xbf"
_ROOM = 65_536
"""Bytes that a record may have beyond those of its text: other columns, quotes, escapes."""
_SHOWN = 8


class TextFile(oodcore.Source):
    """Texts in one file of UTF-8: a line each, a table, or JSON lines.

    A row is ``(text, label, id)``. Opening reads the file through once, and keeps where each row
    begins and its label; texts are read as they are asked for. Lines without any character are no
    rows. Nothing is stripped off a text but the end of its line.

    Where every label in the file is an integer, these are the labels. Otherwise they are names, and
    become 0, 1, ... in alphabetical order (by code point: capitals come first). That order depends
    on which labels the file has: of files that should agree, name the ``classes``.

    Args:
        path: of the file.
        format: "lines" has a text a line, and every label is -1. "tsv" has columns between tabs,
            and quotes mean nothing. "csv" has columns between commas, and a text in double quotes
            may have commas and lines. "jsonl" has an object a line. "auto" tells by the file's
            suffix: .txt, .tsv, .csv, .jsonl.
        text: where texts are: the column's name in the first line of a table, or the name in an
            object; or, in a table without such a line, the column's number, from 0.
        label: where labels are, in the same way; null where there are none, and every label is -1.
        classes: the labels to keep, by name or number, which become 0, 1, ... in this order; null
            keeps all.
        without: labels to leave out; the others become 0, 1, ... in their order.
        part: a share of the rows, such as [0, 0.9] to fit on and [0.9, 1] to calibrate on.
        seed: decides which rows are in a part.
        max_length: of a text, in characters. A longer one is an error: it seldom is a text. A csv
            has Python's own limit of 131,072 besides.

    ``open`` raises a DataError for a file that is missing or empty, a line that is no UTF-8, no
    record of this format or too long, and a column or class that is missing. Reading a row raises
    one if the file has changed since.
    """

    kind = "text"

    path: FilePath
    format: Literal["auto", "lines", "tsv", "csv", "jsonl"] = "auto"
    text: Column = "text"
    label: Column | None = "label"
    classes: tuple[Column, ...] | None = None
    without: tuple[Column, ...] = ()
    part: Part | None = None
    seed: int = 0
    max_length: PositiveInt = 100_000

    @model_validator(mode="after")
    def _check_columns(self) -> TextFile:
        columns = [self.text] if self.label is None else [self.text, self.label]
        numbers = [column for column in columns if isinstance(column, int)]
        if numbers and len(numbers) < len(columns):
            raise PydanticCustomError(
                "mixed_columns", "name both columns, or give the numbers of both"
            )
        if any(number < 0 for number in numbers) or len(set(columns)) < len(columns):
            raise PydanticCustomError(
                "bad_columns", "text and label are two columns, numbered from 0"
            )
        if self.classes is not None and self.without:
            raise PydanticCustomError("two_choices", "give classes or without, not both")
        return self

    def open(self) -> Dataset[Any]:
        rows = _Rows(self._file())
        chosen = None if self.classes is None else [rows.number(label) for label in self.classes]
        if self.without:
            left_out = {rows.number(label) for label in self.without}
            chosen = [int(label) for label in np.unique(rows.labels) if label not in left_out]
        return select(rows, chosen, rows.labels, part=self.part, seed=self.seed)

    def _file(self) -> _File:
        if not self.path.is_file():
            raise DataError(f"there is no file {self.path}")
        form = _SUFFIXES.get(self.path.suffix.lower()) if self.format == "auto" else self.format
        if form is None:
            raise DataError(
                f"the format of {self.path} cannot be told from its name; set format to "
                f"{', '.join(_SUFFIXES.values())}"
            )
        if form == "lines":
            return _File(self.path, form, 0, None, self.max_length)
        if form == "jsonl" and isinstance(self.text, int):
            raise DataError(f"{self.path}: JSON lines have names, so text cannot be a number")
        return _File(self.path, form, self.text, self.label, self.max_length)


@dataclass(frozen=True)
class _File:
    """A file, and where its texts and labels are."""

    path: Path
    form: Format
    text: Column
    label: Column | None
    max_length: int

    def records(self, stream: BinaryIO) -> Iterator[_Record]:
        """The records from where the stream is, a first line with names among them."""
        lines = _Lines(stream, self.path, 4 * self.max_length + _ROOM)
        fields = csv.reader(lines, strict=True) if self.form == "csv" else _split(lines, self.form)
        while True:
            start, where = lines.position, f"{self.path}, line {lines.number + 1}"
            try:
                found = next(fields)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{where} begins no record of a csv table: {error}") from None
            if found:
                yield _Record(start, where, found)

    def text_of(self, record: _Record) -> str:
        text = record.at(self.text)
        if not isinstance(text, str):
            raise DataError(f"{record.where}: the text is {text!r:.40}, which is no text")
        if len(text) > self.max_length:
            raise DataError(
                f"{record.where} has a text of {len(text)} characters, and max_length is "
                f"{self.max_length}; is this a file of texts?"
            )
        return text

    def label_of(self, record: _Record) -> str:
        label = "-1" if self.label is None else record.at(self.label)
        if isinstance(label, bool) or not isinstance(label, str | int):
            raise DataError(
                f"{record.where}: the label is {label!r:.40}; a text or an integer is needed"
            )
        return str(label)


@dataclass(frozen=True)
class _Record:
    start: int
    where: str
    fields: list[str] | dict[str, Any]

    def at(self, column: Column) -> Any:
        if isinstance(self.fields, dict):
            if column not in self.fields:
                raise DataError(f"{self.where} has no {column!r}; it has {_some(self.fields)}")
            return self.fields[str(column)]
        return self.fields[int(column)]


class _Lines:
    """The lines of a stream, decoded and of bounded length, and how far it has been read."""

    def __init__(self, stream: BinaryIO, path: Path, limit: int) -> None:
        self._stream, self._path, self._limit = stream, path, limit
        self.position = stream.tell()
        self.number = 0

    @property
    def where(self) -> str:
        return f"{self._path}, line {self.number}"

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.position += len(line)
        if len(line) > self._limit:
            raise DataError(
                f"{self.where} has more than {self._limit} bytes; is this a file of texts? If so, "
                "give a larger max_length"
            )
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where} is not UTF-8 ({error}); save the file as UTF-8"
            ) from None


class _Rows(Dataset[Any]):
    """The rows of a file: where each begins, and its label."""

    def __init__(self, file: _File) -> None:
        starts, codes = array("q"), array("q")
        seen: dict[str, int] = {}
        with open(file.path, "rb") as stream:
            self._stamp = _stamp(stream)
            if stream.read(len(_MARK)) != _MARK:
                stream.seek(0)
            records = file.records(stream)
            width = None
            if file.form in ("tsv", "csv"):
                file, width, records = _with_columns(file, records)
            for record in records:
                if width is not None and len(record.fields) != width:
                    raise DataError(
                        f"{record.where} has {len(record.fields)} columns, and the first line has "
                        f"{width}"
                    )
                file.text_of(record)
                starts.append(record.start)
                codes.append(seen.setdefault(file.label_of(record), len(seen)))
        if not starts:
            raise DataError(f"{file.path} has no rows")
        self._file, self._starts = file, np.array(starts)
        self._names, numbers = _numbered(list(seen), file.path)
        self.labels = numbers[np.array(codes)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[str, int, int]]:
        try:
            with open(self._file.path, "rb") as stream:
                if _stamp(stream) != self._stamp:
                    raise DataError(f"{self._file.path} has changed since it was opened")
                return [(self._text(stream, i), int(self.labels[i]), int(i)) for i in indices]
        except OSError as error:
            raise DataError(f"{self._file.path} cannot be read: {error}") from None

    def _text(self, stream: BinaryIO, index: int) -> str:
        stream.seek(int(self._starts[index]))
        return self._file.text_of(next(self._file.records(stream)))

    def number(self, label: Column) -> int:
        """The number of a label that a configuration names."""
        if isinstance(label, int):
            return label
        if label not in self._names:
            raise DataError(
                f"{self._file.path} has no label {label!r}{suggestion(label, self._names)}; it has "
                f"{_some(self._names) if self._names else 'integers'}"
            )
        return self._names.index(label)


def _with_columns(file: _File, records: Iterator[_Record]) -> tuple[_File, int, Iterator[_Record]]:
    """A table's file with its columns as numbers, how many there are, and its rows."""
    first = next(records, None)
    if first is None:
        raise DataError(f"{file.path} is empty")
    names = list(first.fields)
    if isinstance(file.text, int):
        if (last := max(file.text, int(file.label or 0))) >= len(names):
            raise DataError(
                f"{first.where} has {len(names)} columns, so there is no column {last}, counting "
                "from 0"
            )
        return file, len(names), chain([first], records)
    for name in (file.text, file.label):
        if name is not None and names.count(str(name)) != 1:
            raise DataError(
                f"{first.where} names {names.count(str(name)) or 'no'} column {name!r}, but "
                f"{_some(names)}; set text and label to names that are there (label: null without "
                "labels), or to numbers, from 0, where the first line is a row"
            )
    label = None if file.label is None else names.index(str(file.label))
    return replace(file, text=names.index(file.text), label=label), len(names), records


def _split(lines: _Lines, form: Format) -> Iterator[Any]:
    for line in lines:
        content = line.removesuffix("\n").removesuffix("\r")
        if not content or form == "lines":
            yield [content] if content else []
        elif form == "tsv":
            yield content.split("\t")
        else:
            yield _object(content, lines)


def _object(content: str, lines: _Lines) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{lines.where} is no JSON: {error}") from None
    if not isinstance(found, dict) or not found:
        raise DataError(f"{lines.where} is no JSON object with a text in it")
    return found


def _numbered(labels: list[str], path: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The names of the classes in order (none where labels are integers), each label's number."""
    if not all(re.fullmatch(r"-?[0-9]+", label) for label in labels):
        names = sorted(labels)
        return names, np.array([names.index(label) for label in labels], np.int64)
    if odd := [label for label in labels if len(label) > 18]:
        raise DataError(f"{path} has the label {odd[0]:.40}, which is too large")
    return [], np.array([int(label) for label in labels], np.int64)


def _stamp(stream: BinaryIO) -> tuple[int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _some(names: Iterable[str]) -> str:
    shown = [repr(name)[:40] for name in islice(names, _SHOWN + 1)]
    return ", ".join(shown[:_SHOWN]) + (", ..." if len(shown) > _SHOWN else "")


@oodcore.hookimpl
def register_sources(register: Any) -> None:
    register(TextFile)
