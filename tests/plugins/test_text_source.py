"""The source kind "text": lines, tables and JSON lines, read as they are asked for."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import oodcore
from oodcore.data import Stream
from oodcore.errors import DataError
from oodcore_plugins.text_source import TextFile

DATA = Path(__file__).parents[2] / "../shared/data/text"
ROWS = [("neg", "a dull film"), ("pos", "naïve, and “fine”"), ("neg", "no\tplot"), ("pos", "")]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(**fields: Any) -> list[tuple[str, int, int]]:
    data = TextFile(**fields).open()
    return [data[row] for row in range(len(data))]


def test_a_text_a_line(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "first\n\n  second \r\nlabel,text\u2028same line\n\nlast")
    texts = ["first", "  second ", "label,text\u2028same line", "last"]
    assert rows(path=path) == [(text, -1, row) for row, text in enumerate(texts)]
    (batch,) = Stream(TextFile(path=path))
    assert list(batch.inputs) == texts
    assert batch.labels is None
    assert batch.ids.tolist() == [0, 1, 2, 3]


def test_a_table_with_names(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", 'id\tlabel\ttext\n7\tpos\tsay "hi", \'so\n8\tneg\t "\n')
    assert rows(path=path) == [('say "hi", \'so', 1, 0), (' "', 0, 1)]
    assert rows(path=path, text="id", label=None) == [("7", -1, 0), ("8", -1, 1)]


def test_a_table_without_names(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", "b\tone\nB\ttwo\na\tthree\n")
    assert rows(path=path, text=1, label=0) == [("one", 2, 0), ("two", 0, 1), ("three", 1, 2)]
    assert rows(path=path, text=0, label=None)[1] == ("B", -1, 1)


def test_a_text_in_quotes_may_have_commas_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("label", "text"), *ROWS, ("pos", 'two\r\n\nlines, "quoted"')])
    texts = [text for _, text in ROWS] + ['two\r\n\nlines, "quoted"']
    assert [text for text, _, _ in rows(path=path)] == texts
    assert [label for _, label, _ in rows(path=path)] == [0, 1, 0, 1, 1]


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label, "more": [1]}) for label, text in ROWS]
    path = put(tmp_path / "a.jsonl", "\n".join([*lines, ""]))
    assert [text for text, _, _ in rows(path=path)] == [text for _, text in ROWS]
    assert [label for _, label, _ in rows(path=path)] == [0, 1, 0, 1]
    numbered = put(tmp_path / "b.jsonl", '{"x": "a", "y": 10}\n{"x": "b", "y": 9}\n')
    assert rows(path=numbered, text="x", label="y") == [("a", 10, 0), ("b", 9, 1)]


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    lines = put(tmp_path / "a.txt", b"\xef\xbb\xbffirst\n\xef\xbb\xbfsecond")
    assert [text for text, _, _ in rows(path=lines)] == ["first", "\ufeffsecond"]
    table = put(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nx,1\n")
    assert rows(path=table) == [("x", 1, 0)]


def test_integers_are_labels_as_they_are(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "label,text\n10,a\n2,b\n-1,c\n10,d\n")
    assert [label for _, label, _ in rows(path=path)] == [10, 2, -1, 10]
    assert rows(path=path, classes=(10, 2)) == [("a", 0, 0), ("b", 1, 1), ("d", 0, 3)]
    assert rows(path=path, without=(-1,)) == [("a", 1, 0), ("b", 0, 1), ("d", 1, 3)]
    with pytest.raises(DataError, match="no label '2'; it has integers"):
        rows(path=path, classes=("2",))
    mixed = put(tmp_path / "b.csv", "label,text\n10,a\n2,b\nx,c\n")
    assert [label for _, label, _ in rows(path=mixed)] == [0, 1, 2]


def test_classes_are_chosen_by_name_or_number(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "label,text\noos,a\nbank,b\ncard,c\noos,d\ntalk,e\n")
    assert rows(path=path, classes=("talk", "bank")) == [("b", 1, 1), ("e", 0, 4)]
    assert rows(path=path, classes=(3, 0)) == rows(path=path, classes=("talk", "bank"))
    assert rows(path=path, classes=("oos",)) == [("a", 0, 0), ("d", 0, 3)]
    assert rows(path=path, without=("oos",)) == [("b", 0, 1), ("c", 1, 2), ("e", 2, 4)]
    with pytest.raises(DataError, match=r"no label 'bnak'; did you mean 'bank'\?"):
        rows(path=path, classes=("bnak",))
    with pytest.raises(DataError, match="no row"):
        rows(path=path, classes=(9,))


def test_parts_share_no_row(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "\n".join(f"text {row}" for row in range(200)))
    parts = [rows(path=path, part=part) for part in ((0, 0.7), (0.7, 1))]
    assert sorted(number for part in parts for _, _, number in part) == list(range(200))
    assert all(text == f"text {number}" for part in parts for text, _, number in part)
    assert 110 < len(parts[0]) < 170
    assert rows(path=path, part=(0, 0.7), seed=1) != parts[0]


def test_workers_and_pickle_give_the_same_rows(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", "label,text\n" + 'a,"x\ny"\nb,z\n' * 9)
    source = TextFile(path=path, classes=("b", "a"))
    alone = list(Stream(source, batch_size=4))
    for one, other in zip(alone, Stream(source, batch_size=4, num_workers=2), strict=True):
        assert one.inputs == other.inputs
        assert one.labels.tolist() == other.labels.tolist()
    assert pickle.loads(pickle.dumps(source.open()))[3] == ("z", 0, 3)
    for row in (-1, 18):
        with pytest.raises(IndexError):
            TextFile(path=path).open()[row]


def test_rows_stay_in_the_file_until_they_are_asked_for(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "x" * 60_000 + "\n" + "y" * 60_000)
    data = TextFile(path=path).open()
    assert len(pickle.dumps(data)) < 5_000
    assert data[1][0] == "y" * 60_000


def test_a_file_that_has_changed_is_an_error(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "first\nsecond\n")
    data = TextFile(path=path).open()
    put(path, "other\nlines\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"a.txt has changed since it was opened"):
        data[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a.txt cannot be read"):
        data[0]


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.txt", "", {}, "a.txt has no rows"),
        ("a.txt", "\n\r\n", {}, "a.txt has no rows"),
        ("a.csv", "", {}, "a.csv is empty"),
        ("a.csv", "label,text\n", {}, "a.csv has no rows"),
        ("a.dat", "x", {}, "set format to lines, tsv, csv, jsonl"),
        ("a.txt", b"fine\n\xff\xfe\n", {}, "line 2 is not UTF-8"),
        ("a.txt", "x" * 11, {"max_length": 10}, "line 1 has a text of 11 characters"),
        ("a.txt", "x" * 70_000, {"max_length": 10}, "line 1 has more than 65576 bytes"),
        ("a.csv", "label,txt\n0,x\n", {}, "names no column 'text', but 'label', 'txt'; set"),
        ("a.csv", "text\nx\n", {}, r"names no column 'label', but 'text'.*label: null"),
        ("a.csv", "text,text,label\nx,y,1\n", {}, "names 2 column 'text'"),
        ("a.csv", "label,text\n0,x\n1,a,b\n", {}, "line 3 has 3 columns, and the first line has 2"),
        ("a.tsv", "0\tx\n", {"text": 2, "label": 0}, "2 columns, so there is no column 2"),
        ("a.csv", 'label,text\n0,"x\ny\n', {}, "line 2 begins no record of a csv"),
        ("a.csv", f"label,text\n0,{'x' * 140_000}\n", {}, "line 2 begins no record of a csv"),
        ("a.csv", f"label,text\n{'9' * 30},x\n", {}, "label 9+, which is too large"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', {}, "line 2 is no JSON"),
        ("a.jsonl", "[" * 100_000, {}, "line 1 is no JSON"),
        ("a.jsonl", '["x"]\n', {}, "line 1 is no JSON object"),
        ("a.jsonl", '{"label": 1}\n', {}, "line 1 has no 'text'; it has 'label'"),
        ("a.jsonl", '{"text": 3, "label": 1}\n', {}, "the text is 3, which is no text"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', {}, "the label is 1.5; a text or an integer"),
        ("a.jsonl", '{"text": "x", "label": true}\n', {}, "the label is True"),
        ("a.jsonl", '{"text": "x"}\n', {"text": 0, "label": None}, "JSON lines have names"),
    ],
)
def test_files_that_hold_no_texts(
    tmp_path: Path, name: str, content: str | bytes, fields: dict[str, Any], message: str
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        TextFile(path=path, **fields).open()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match="there is no file"):
            TextFile(path=path).open()


def test_fields_are_checked(tmp_path: Path) -> None:
    for fields in (
        {"text": 0},
        {"text": 1, "label": 1},
        {"text": -1, "label": 0},
        {"text": "x", "label": "x"},
        {"format": "xml"},
        {"classes": (1,), "without": (2,)},
        {"max_length": 0},
        {"classes": (True,)},
        {"part": (0.5, 0.5)},
    ):
        with pytest.raises(ValidationError):
            TextFile(**{"path": tmp_path, **fields})
    source = TextFile(path=tmp_path / "a.tsv", text=1, label=0, without=("oos",), part=(0, 0.5))
    assert oodcore.registry.build("source", json.loads(json.dumps(source.dump()))) == source


WORD = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\t\0"), max_size=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(st.tuples(st.sampled_from("abc"), WORD), min_size=1, max_size=8))
def test_every_format_gives_back_what_was_written(
    tmp_path: Path, table: list[tuple[str, str]]
) -> None:
    names = sorted({label for label, _ in table})
    wanted = [(text, names.index(label), row) for row, (label, text) in enumerate(table)]
    tsv = "".join(f"{label}\t{text}\n" for label, text in table)
    assert rows(path=put(tmp_path / "a.tsv", tsv), text=1, label=0) == wanted
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *table])
    assert rows(path=tmp_path / "a.csv") == wanted
    lines = "\n".join(json.dumps({"label": label, "text": text}) for label, text in table)
    assert rows(path=put(tmp_path / "a.jsonl", lines)) == wanted
    kept = [text for _, text in table if text]
    if kept:
        path = put(tmp_path / "a.txt", "\n".join(kept))
        # A byte order mark at the very beginning belongs to the file, not to its first text.
        if not kept[0].startswith("\ufeff"):
            assert [text for text, _, _ in rows(path=path)] == kept


@pytest.mark.skipif(not DATA.is_dir(), reason="the texts are not beside the repository")
def test_files_as_they_are_published() -> None:
    clinc = {"text": 1, "label": 0}
    inside = TextFile(path=DATA / "clinc150_test.tsv", without=("oos",), **clinc).open()
    outside = TextFile(path=DATA / "clinc150_test.tsv", classes=("oos",), **clinc).open()
    assert (len(inside), len(outside)) == (4500, 1000)
    assert sorted({inside[row][1] for row in range(4500)}) == list(range(150))
    sst = TextFile(path=DATA / "sst2_dev.tsv", classes=("neg", "pos"), **clinc).open()
    labels = [sst[row][1] for row in range(len(sst))]
    assert [labels.count(0), labels.count(1)] == [428, 444]
    assert len(TextFile(path=DATA / "multi30k_val.txt").open()) == 1014
    assert len(TextFile(path=DATA / "wmt16_sentences.txt").open()) == 22191
