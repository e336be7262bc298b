from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from oodcore.data import Stream
from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.dataset import ImportedDataset


@pytest.fixture
def rows(monkeypatch: Any) -> Any:
    """Makes what it is given what the factory ``mydata:rows`` returns."""

    def given(data: Any) -> ImportedDataset:
        module = ModuleType("mydata")
        module.rows = lambda: data
        monkeypatch.setitem(sys.modules, "mydata", module)
        return ImportedDataset(factory="mydata:rows")

    return given


def tensors(rows: int = 10, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.arange(float(rows))[:, None], torch.arange(rows) % classes)


class Stored(Dataset[Any]):
    """A data set as torch's protocol has it, importable by the tests of pickling."""

    def __init__(self, start: int = 0) -> None:
        self.start = start

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), index / 10), self.start + index


class Batched(Stored):
    def __getitem__(self, index: int) -> Any:
        raise AssertionError("rows are to be read together")

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [Stored.__getitem__(self, index) for index in indices]


@pytest.mark.parametrize(
    ("row", "label", "number"),
    [
        (torch.ones(2), -1, 0),
        ((torch.ones(2),), -1, 0),
        ((torch.ones(2), 3), 3, 0),
        ([torch.ones(2), torch.tensor(3)], 3, 0),
        ((torch.ones(2), np.uint8(3), np.int64(8)), 3, 8),
        ((torch.ones(2), None, torch.tensor(8)), -1, 8),
        (np.ones(2, np.float32), -1, 0),
        ((np.ones(2, ">f4"), 3), 3, 0),
        ({"input": torch.ones(2)}, -1, 0),
        ({"input": np.ones(2, np.float32), "label": 3, "id": 8}, 3, 8),
        ({"input": torch.ones(2), "label": None, "id": None, "name": "x"}, -1, 0),
    ],
)
def test_every_kind_of_row(rows: Any, row: Any, label: int, number: int) -> None:
    opened = rows([row]).open()
    inputs, *rest = opened[0]
    assert torch.equal(inputs, torch.ones(2))
    assert rest == [label, number]
    assert type(rest[0]) is type(rest[1]) is int
    batch = next(iter(Stream(rows([row]))))
    assert torch.equal(batch.inputs, torch.ones(1, 2))
    labels = None if batch.labels is None else batch.labels.tolist()
    assert (labels, batch.ids.tolist()) == (None if label == -1 else [label], [number])


def test_texts_and_mappings_of_arrays(rows: Any) -> None:
    batch = next(iter(Stream(rows(["one", "two"]))))
    assert (list(batch.inputs), batch.ids.tolist()) == (["one", "two"], [0, 1])
    batch = next(iter(Stream(rows([("one", 1), ("two", 0)]))))
    assert (list(batch.inputs), batch.labels.tolist()) == (["one", "two"], [1, 0])
    tokens = {"input_ids": np.arange(3), "attention_mask": torch.ones(3)}
    batch = next(iter(Stream(rows([{"input": tokens, "label": 2}] * 4))))
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 2]] * 4
    assert batch.labels.tolist() == [2] * 4


def test_an_array_of_the_caller_is_not_shared(rows: Any) -> None:
    array = np.ones(2)
    rows([array]).open()[0][0].fill_(7)
    assert array.tolist() == [1, 1]


def test_classes_are_relabelled_and_ids_stay(rows: Any) -> None:
    source = rows(tensors()).model_copy(update={"classes": (2, 0)})
    batch = next(iter(Stream(source)))
    assert batch.ids.tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert batch.inputs[:, 0].tolist() == batch.ids.tolist()
    assert batch.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]


def test_parts_share_no_row_and_ids_of_the_data_stay(rows: Any) -> None:
    data = [(torch.ones(1), 0, 100 + row) for row in range(50)]
    halves = [rows(data).model_copy(update={"part": part}).open() for part in ((0, 0.4), (0.4, 1))]
    ids = [[number for _, _, number in half] for half in halves]
    assert sorted(ids[0] + ids[1]) == list(range(100, 150))
    assert len(ids[0]) in range(10, 31)


def test_subsets_and_rows_read_together(rows: Any) -> None:
    batch = next(iter(Stream(rows(Subset(tensors(), [7, 3])))))
    assert batch.inputs[:, 0].tolist() == [7, 3]
    assert batch.ids.tolist() == [0, 1]
    batch = next(iter(Stream(rows(Batched()))))
    assert batch.labels.tolist() == list(range(6))


def test_arguments_reach_the_factory_and_workers_its_rows() -> None:
    source = ImportedDataset(factory=f"{__name__}:Stored", arguments={"start": 5})
    assert source.code() == (f"{__name__}:Stored",)
    assert source.dump()["arguments"] == {"start": 5}
    assert ImportedDataset.model_validate(source.dump()) == source
    alone = list(Stream(source, batch_size=4))
    together = list(Stream(source, batch_size=4, num_workers=2))
    assert [batch.labels.tolist() for batch in together] == [[5, 6, 7, 8], [9, 10]]
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.inputs, other.inputs)
    assert pickle.loads(pickle.dumps(source.open()))[2][1] == 7


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("never read")


@pytest.mark.parametrize(
    "data", [None, 3, "text", Endless(), {"train": tensors()}, {1, 2}, iter([1]), TensorDataset]
)
def test_what_is_no_data_set_by_number_is_refused(rows: Any, data: Any) -> None:
    with pytest.raises(DataError, match=r"'mydata:rows' gave a .* rows by number is needed"):
        rows(data).open()


def test_an_empty_data_set_is_refused(rows: Any) -> None:
    with pytest.raises(DataError, match="without rows"):
        rows([]).open()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((), "row 1 of 'mydata:rows' has 0 parts"),
        ((1, 2, 3, 4), "has 4 parts"),
        ({"image": 1, "label": 0}, "has the keys image, label; it needs 'input'"),
        ((3.5, 0), "the input of row 1 of 'mydata:rows' is a float"),
        ((np.array(["a"], object), 0), "is a ndarray"),
        ((torch.ones(2), 1.0), "the label of row 1 .* must be an integer, not 1.0"),
        ((torch.ones(2), "cat"), "must be an integer, not 'cat'"),
        ((torch.ones(2), torch.tensor([0, 1])), "the label of row 1"),
        ((torch.ones(2), 1, "a.png"), "the id of row 1"),
    ],
)
def test_a_row_that_is_none_of_these_is_named(rows: Any, row: Any, message: str) -> None:
    opened = rows([torch.ones(2), row]).open()
    with pytest.raises(DataError, match=message):
        opened[1]
    with pytest.raises(DataError, match=message):
        opened.__getitems__([0, 1])


def test_what_cannot_be_imported_or_called_is_a_configuration_error() -> None:
    for factory in ("no_such_package:rows", f"{__name__}:no_such_name"):
        with pytest.raises(ConfigurationError, match="cannot import"):
            ImportedDataset(factory=factory).open()
    with pytest.raises(ConfigurationError, match="cannot be called"):
        ImportedDataset(factory=f"{__name__}:Stored", arguments={"stop": 1}).open()
    for factory in ("rows", "a.b", "a:b:c", "../x:y"):
        with pytest.raises(ValidationError):
            ImportedDataset(factory=factory)


def test_rows_beyond_the_end_are_an_index_error(rows: Any) -> None:
    opened = rows(tensors()).open()
    for row in (10, -1):
        with pytest.raises(IndexError):
            opened[row]
    assert len(list(iter(opened))) == 10
