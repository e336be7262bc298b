from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

import oodcore
from oodcore.data import Batch, Part, Source, Stream, fetch, hashed, select, to_device
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features

ROWS = 10
X = torch.arange(ROWS * 3.0).reshape(ROWS, 3)
Y = torch.arange(ROWS) % 3


class Numbered(Dataset[Any]):
    """Rows with ids of their own."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        if not 0 <= index < ROWS:
            raise IndexError(index)
        return X[index], int(Y[index]), 100 + index


class Mapped(Numbered):
    def __getitem__(self, index: int) -> Any:
        return {"input": X[index], "label": int(Y[index])}


class Texts(Numbered):
    def __getitem__(self, index: int) -> Any:
        return f"text {index}", int(Y[index])


class Flowing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class ByProtocol:
    """Length and rows by number, without being torch's Dataset."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return X[index], int(Y[index])


class Counting(Source):
    """Ten rows of three numbers."""

    kind = "counting"

    first: int = 100

    def open(self) -> Dataset[Any]:
        return Numbered()


class Plugin:
    @staticmethod
    @oodcore.hookimpl
    def register_sources(register: Any) -> None:
        register(Counting)


def read(data: Any, **options: Any) -> tuple[Any, list[int] | None, list[int]]:
    """Inputs, labels and ids of everything in a stream of small batches."""
    batches = list(Stream(data, **{"batch_size": 4, **options}))
    assert all(len(batch) > 0 for batch in batches)
    inputs: Any = [row for batch in batches for row in batch.inputs]
    if all(isinstance(row, torch.Tensor) for row in inputs):
        inputs = torch.stack(inputs)
    labels = None
    if all(batch.labels is not None for batch in batches):
        labels = torch.cat([batch.labels for batch in batches]).tolist()
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.dtype == torch.int64
    return inputs, labels, ids.tolist()


COUNTED = list(range(ROWS))
OWN = [100 + row for row in COUNTED]
KINDS = {
    "data set": (lambda: TensorDataset(X, Y), True, COUNTED),
    "data set with ids": (Numbered, True, OWN),
    "data set of inputs": (lambda: TensorDataset(X), False, COUNTED),
    "data set of mappings": (Mapped, True, COUNTED),
    "data set by protocol": (ByProtocol, True, COUNTED),
    "iterable data set": (Flowing, True, COUNTED),
    "source": (Counting, True, OWN),
    "selection": (lambda: select(Numbered(), (0, 1, 2)), True, OWN),
    "loader": (lambda: DataLoader(TensorDataset(X, Y), batch_size=3), True, COUNTED),
    "loader of inputs": (lambda: DataLoader(TensorDataset(X), batch_size=3), False, COUNTED),
    "loader with ids": (lambda: DataLoader(Numbered(), batch_size=3), True, OWN),
    "tensor": (lambda: X, False, COUNTED),
    "array": (lambda: X.numpy(), False, COUNTED),
    "inputs and labels": (lambda: (X, Y), True, COUNTED),
    "arrays and lists": (lambda: (X.numpy(), Y.tolist(), OWN), True, OWN),
    "mapping": (lambda: {"input": X, "label": Y, "id": torch.tensor(OWN)}, True, OWN),
    "batch": (lambda: Batch(X, Y), True, COUNTED),
    "list of batches": (lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])], True, COUNTED),
    "generator": (lambda: (pair for pair in [(X[:1], Y[:1]), [X[1:], Y[1:]]]), True, COUNTED),
    "mappings": (lambda: [{"input": X[:4], "label": Y[:4]}, {"input": X[4:]}], None, COUNTED),
    "empty batches": (lambda: [X[:0], X[:4], X[4:4], X[4:]], False, COUNTED),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_data_is_a_stream_of_its_rows(name: str) -> None:
    make, labelled, ids = KINDS[name]
    inputs, labels, numbers = read(make())
    assert torch.equal(inputs, X)
    assert labels == (Y.tolist() if labelled else None)
    assert numbers == ids


@pytest.mark.parametrize("name", KINDS)
def test_rows_without_ids_are_numbered_from_start(name: str) -> None:
    make, _, ids = KINDS[name]
    expected = ids if ids is OWN else [50 + row for row in range(ROWS)]
    assert read(make(), start=50)[2] == expected


@pytest.mark.parametrize(
    "name", ["data set", "source", "selection", "tensor", "inputs and labels", "batch"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_the_batch_size_cuts_rows_and_changes_nothing(name: str, batch_size: int) -> None:
    make = KINDS[name][0]
    sizes = [len(batch) for batch in Stream(make(), batch_size=batch_size)]
    assert sum(sizes) == ROWS
    assert set(sizes[:-1]) <= {batch_size}
    assert read(make(), batch_size=batch_size)[2] == KINDS[name][2]


def test_features_are_cut_and_numbered() -> None:
    batches = list(Stream(Features(embeddings=X, labels=Y), batch_size=4, start=5))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    whole = Features.cat(batches)
    assert torch.equal(whole.embeddings, X)
    assert torch.equal(whole.labels, Y)
    assert whole.ids.tolist() == list(range(5, 15))
    own = Features(embeddings=X, ids=torch.tensor(OWN))
    assert Features.cat(Stream([own[:3], own[3:]])).ids.tolist() == OWN


def test_texts() -> None:
    words = [f"text {row}" for row in range(ROWS)]
    for data in (words, np.array(words), DataLoader(words, batch_size=3), {"input": words}):
        assert read(data)[0] == words
    for data in (Texts(), (words, Y)):
        inputs, labels, ids = read(data)
        assert (inputs, labels, ids) == (words, Y.tolist(), COUNTED)


def test_mappings_of_tensors_stay_mappings() -> None:
    tokens = {"input_ids": torch.arange(20).reshape(10, 2), "mask": np.ones((10, 2))}
    batches = list(Stream({"input": tokens, "label": Y}, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(
        torch.cat([batch.inputs["input_ids"] for batch in batches]), tokens["input_ids"]
    )
    assert batches[0].inputs["mask"].dtype == torch.float64


def test_adapt_turns_anything_into_a_batch() -> None:
    rows = [{"image": X[row], "target": int(Y[row])} for row in range(ROWS)]
    loader = DataLoader(rows, batch_size=3)
    for data in (loader, {"image": X, "target": Y}):
        inputs, labels, _ = read(data, adapt=lambda item: (item["image"], item["target"]))
        assert torch.equal(inputs, X)
        assert labels == Y.tolist()
    inputs, labels, _ = read((X, Y, Y, Y), adapt=lambda item: item[:2])
    assert labels == Y.tolist()


def test_a_source_by_its_kind_and_its_mapping() -> None:
    with oodcore.registry.using(Plugin):
        assert read("counting")[2] == OWN
        assert read({"kind": "counting", "first": 3})[2] == OWN
    with pytest.raises(ConfigurationError, match="unknown source 'counting'"):
        Stream("counting")


@pytest.mark.parametrize(
    "array",
    [
        X.numpy()[::-1],
        X.numpy().astype(">f4"),
        np.asfortranarray(X.numpy()),
        X.numpy()[:, ::2],
        X.numpy().astype(np.float16),
        np.arange(10)[:, None] > 4,
    ],
)
def test_arrays_however_they_lie_in_memory(array: np.ndarray) -> None:
    inputs, labels, _ = read((array, Y.numpy()[::-1]))
    assert np.array_equal(inputs.numpy(), array)
    assert labels == Y.flip(0).tolist()


def test_a_read_only_array_is_read_without_a_copy() -> None:
    array = X.numpy().copy()
    array.setflags(write=False)
    batch = next(iter(Stream(array, batch_size=4)))
    assert np.shares_memory(batch.inputs.numpy(), array)


def test_what_the_caller_gave_is_as_it_was() -> None:
    inputs, labels = X.numpy().copy(), Y.tolist()
    data = {"input": inputs, "label": labels}
    read(data)
    assert list(data) == ["input", "label"]
    assert data["label"] is labels
    assert np.array_equal(inputs, X.numpy())


def test_reading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    read(TensorDataset(X, Y))
    read(TensorDataset(X, Y), num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_read_the_same_rows() -> None:
    assert read(Numbered(), num_workers=2)[2] == OWN


class Picky(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter([[3, 1], [2]])

    def __len__(self) -> int:
        return 2


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **options)


@pytest.mark.parametrize(
    ("data", "repeatable", "rows"),
    [
        (TensorDataset(X, Y), True, ROWS),
        (ByProtocol(), True, ROWS),
        (X, True, ROWS),
        (Features(embeddings=X), True, ROWS),
        (loader(batch_size=4), True, ROWS),
        (loader(batch_size=4, drop_last=True), True, 8),
        (loader(batch_size=4, shuffle=True), False, ROWS),
        (loader(sampler=SubsetRandomSampler([1, 2])), False, 2),
        (loader(batch_sampler=BatchSampler(RandomSampler(Y), 4, True)), False, 8),
        (loader(batch_sampler=Picky()), False, None),
        (DataLoader(Flowing(), batch_size=4), False, None),
        (Flowing(), False, None),
        ([X, X], True, None),
        (iter([X, X]), False, None),
    ],
)
def test_what_is_known_before_reading(data: Any, repeatable: bool, rows: int | None) -> None:
    stream = Stream(data)
    assert stream.repeatable is repeatable
    assert stream.rows == rows
    if rows is not None:
        assert sum(len(batch) for batch in stream) == rows
    if repeatable:
        first, second = ([batch.ids.tolist() for batch in Stream(data)] for _ in range(2))
        assert first == second


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data of type NoneType cannot be read"),
        (3, "data of type int"),
        ([3], "data of type int"),
        (torch.tensor(3.0), "a single number"),
        (np.array(3.0), "a single number"),
        ({"image": X}, r"needs the key 'input' .*\['image'\]"),
        ({"input": {}}, "parts of equal length"),
        ({"input": {"a": X, "b": X[:3]}}, "parts of equal length.*'a': 10, 'b': 3"),
        ((X, Y, Y, Y), "a batch of 4 parts"),
        ((), "a batch of 0 parts"),
        ((X, Y.float()), "labels must be integers, not float32"),
        ((X, Y > 0), "labels must be integers, not bool"),
        ((X, ["cat"] * ROWS), "labels must be integers, one a row"),
        ((X, np.array(["cat"] * ROWS)), "labels are an array of <U3"),
        ((X, Y[:4]), r"labels must be \[10\], one number a row, not \[4\]"),
        ((X, Y[:, None]), r"not \[10, 1\]"),
        ((X, Y, Y.float()), "ids must be integers"),
        (np.array([object()]), "array of objects"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "array of datetime64"),
        (({1, 2}, Y), "inputs of type set"),
        ([[[1.0, 2.0]]], "inputs of type list"),
    ],
)
def test_what_cannot_be_read_says_why(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(Stream(data))


# -- select


def labels_of(data: Dataset[Any]) -> list[tuple[int, int]]:
    return [(label, number) for _, label, number in data]


def test_selected_rows_are_relabelled_and_keep_their_ids() -> None:
    kept = select(Numbered(), (2, 0))
    assert labels_of(kept) == [(1, 100), (0, 102), (1, 103), (0, 105), (1, 106), (0, 108), (1, 109)]
    assert torch.equal(kept[1][0], X[2])
    assert labels_of(select(TensorDataset(X, Y), (1,))) == [(0, 1), (0, 4), (0, 7)]
    again = select(kept, (1,))
    assert labels_of(again) == [(0, 100), (0, 103), (0, 106), (0, 109)]


def test_known_labels_spare_reading_the_inputs() -> None:
    class Unread(Numbered):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an input was read")

    for labels in (Y.tolist(), Y.numpy()):
        assert len(select(Unread(), (0,), labels)) == 4
    assert len(select(Unread(), part=(0, 0.99))) > 5


def test_rows_are_fetched_together_where_the_data_can() -> None:
    class Together(Numbered):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("one row was read")

        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [Numbered()[index] for index in indices]

    assert [row[2] for row in fetch(Together(), [3, 1])] == [103, 101]
    assert [row[2] for row in fetch(Numbered(), [3, 1])] == [103, 101]
    assert read(select(Together(), (0, 2), Y.tolist()))[2] == [100, 102, 103, 105, 106, 108, 109]


def test_selecting_nothing_gives_the_data_itself() -> None:
    data = Numbered()
    assert select(data) is data


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.floats(0.001, 0.999), max_size=4),
    seed=st.integers(-(2**70), 2**70),
    rows=st.integers(30, 60),
)
def test_parts_divide_the_rows_and_classes_commute_with_them(
    cuts: list[float], seed: int, rows: int
) -> None:
    labels = torch.arange(rows) % 3
    data = TensorDataset(torch.arange(rows), labels)
    edges = sorted({0.0, *cuts, 1.0})
    found: list[int] = []
    for part in pairwise(edges):
        try:
            members = [number for _, _, number in select(data, part=part, seed=seed)]
        except DataError:
            continue
        found += members
        wanted = [(int(labels[row]) == 2, row) for row in members if labels[row] != 0]
        if wanted:
            kept = select(data, (1, 2), labels.tolist(), part=part, seed=seed)
            assert labels_of(kept) == wanted
    assert sorted(found) == list(range(rows))


def test_a_part_holds_its_share_and_grows_with_it() -> None:
    data = TensorDataset(torch.zeros(20_000))
    small, large = (
        {int(row) for row in select(data, part=(0.0, share))._rows} for share in (0.1, 0.3)
    )
    assert abs(len(small) - 2000) < 200
    assert abs(len(large) - 6000) < 300
    assert small < large
    other = {int(row) for row in select(data, part=(0.0, 0.1), seed=1)._rows}
    assert abs(len(small & other) - 200) < 60


def test_what_cannot_be_selected() -> None:
    with pytest.raises(DataError, match=r"no row of 10 has a label in \[7\]"):
        select(Numbered(), (7,))
    with pytest.raises(ConfigurationError, match=r"classes are named twice: \[1, 1\]"):
        select(Numbered(), (1, 1))
    with pytest.raises(DataError, match="3 labels for 10 rows"):
        select(Numbered(), (1,), [0, 1, 2])
    with pytest.raises(DataError, match=r"no row of 10 .*part was \(0.5, 0.5001\)"):
        select(Numbered(), part=(0.5, 0.5001))
    for part in ((0.5, 0.5), (-0.1, 1), (0, 1.1), (1, 0)):
        with pytest.raises(ConfigurationError, match="within"):
            select(Numbered(), part=part)


def test_labels_that_change_are_noticed() -> None:
    kept = select(Numbered(), (0, 1), ((Y + 1) % 3).tolist())
    with pytest.raises(DataError, match="row 2 has the label 2, and had another"):
        [kept[row] for row in range(len(kept))]


def test_a_selection_can_be_pickled() -> None:
    kept = select(Numbered(), (2,), part=(0, 0.999))
    assert labels_of(pickle.loads(pickle.dumps(kept))) == labels_of(kept)


def test_a_part_as_a_field() -> None:
    class Settings(BaseModel):
        part: Part | None = None

    assert Settings(part=(0, 0.5)).part == (0, 0.5)
    for part in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.5), (0.9, 0.1), (float("nan"), 1)):
        with pytest.raises(ValidationError, match="0 <= from < to <= 1"):
            Settings(part=part)


# -- hashed


def naive_hash(number: int, seed: int) -> int:
    mask = 2**64 - 1
    z = (number + seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8), seed=st.integers(-(2**70), 2**70)
)
def test_the_hash_is_splitmix_of_seed_and_id(ids: list[int], seed: int) -> None:
    given = torch.tensor(ids, dtype=torch.int64)
    result = hashed(given, seed)
    assert result.dtype == torch.int64
    assert result.tolist() == [naive_hash(number, seed) for number in ids]
    assert given.tolist() == ids


def test_the_hash_spreads_evenly_and_seeds_are_independent() -> None:
    ids = torch.arange(40_000)
    first, second = (hashed(ids, seed).double() / 2.0**63 for seed in (0, 1))
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    counts = torch.histc(first, bins=20, min=0, max=1)
    assert float((counts - 2000).abs().max()) < 200
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.02
    assert len(hashed(ids, 3).unique()) == len(ids)


def test_to_device_moves_tensors_in_mappings_and_leaves_texts() -> None:
    moved = to_device({"a": X, "b": {"c": Y}}, torch.device("meta"))
    assert (moved["a"].device.type, moved["b"]["c"].device.type) == ("meta", "meta")
    assert to_device(["one", "two"], torch.device("meta")) == ["one", "two"]


def test_labels_that_are_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="labels must be integers"):
        Stream((X, [None] * len(X)))


def test_what_is_adapted_already_is_left_as_it_is() -> None:
    batch = Batch(X, Y)
    [given] = list(Stream([batch], adapt=lambda item: item["nonesuch"]))
    assert given.inputs is X


def test_whole_data_is_here_at_once() -> None:
    assert Stream((X, Y)).whole
    assert Stream(Features(embeddings=X)).whole
    assert not Stream([(X, Y)]).whole
