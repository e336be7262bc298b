"""Rows keep what they are given."""

from __future__ import annotations

import pickle
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oodcore import Rows
from oodcore import rows as room
from oodcore.errors import DataError


def random(count: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that a few rows exceed."""
    monkeypatch.setattr(room, "MEMORY_LIMIT", 200)


def resident(rows: Rows) -> int:
    return sum(segment.values.nbytes for segment in rows._segments if segment.loose)


def assert_holds(rows: Rows, expected: Tensor) -> None:
    assert len(rows) == len(expected)
    assert rows.tensor().dtype == rows.dtype
    assert torch.equal(rows.tensor().double(), expected.double())
    blocks = list(rows.blocks(3))
    assert all(len(block) <= 3 and block.dtype == rows.dtype for block in blocks)
    assert torch.equal(torch.cat([*blocks, rows.tensor()[:0]]).double(), expected.double())
    for first, last in ((0, len(expected)), (2, 5), (len(expected) - 1, len(expected) + 4), (3, 3)):
        assert torch.equal(rows.between(first, last).double(), expected[first:last].double())
    read = list(rows.read(4))
    assert all(len(part) == 4 for part in read[:-1])
    assert all(0 < len(part) <= 4 and part.dtype == rows.dtype for part in read)
    assert torch.equal(torch.cat([*read, rows.tensor()[:0]]).double(), expected.double())
    if len(expected):
        order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
        for numbers in (order, order[: len(order) // 2]):
            picked = rows.picked(numbers)
            assert torch.equal(picked.tensor().double(), expected[numbers].double())
        numbers = torch.tensor([[len(expected) - 1, 0], [len(expected) // 2, 0]])
        assert torch.equal(rows[numbers].double(), expected[numbers].double())


def test_rows_are_read_and_picked_where_they_are() -> None:
    rows = Rows((3,))
    parts = [random(count, 3, count).float() for count in (5, 1, 9)]
    for part in parts:
        rows.append(part)
    whole = torch.cat(parts)
    assert [len(part) for part in rows.read(6)] == [6, 6, 3]
    assert torch.equal(torch.cat(list(rows.read(6))), whole)
    numbers = torch.tensor([14, 0, 6])
    assert torch.equal(rows.picked(numbers).tensor(), whole[numbers])
    assert len(rows.picked(numbers[:0])) == 0
    assert len(rows._segments) == 3, "nothing was moved"


def test_rows_picked_of_wide_ones_are_narrow_where_that_loses_nothing() -> None:
    rows = Rows((2,))
    narrow = random(4, 2).float()
    rows.append(narrow)
    rows.append(random(1, 2) / 3)
    assert rows.dtype == torch.float64
    assert rows.picked(torch.tensor([4, 1])).dtype == torch.float64
    picked = rows.picked(torch.tensor([2, 0]))
    assert picked.dtype == torch.float32
    assert torch.equal(picked.tensor(), narrow[[2, 0]])


def test_rows_that_are_put_together_let_go_of_their_parts():
    parts = [room._Segment(random(5, 3, seed), loose=True) for seed in range(4)]
    expected = torch.cat([part.values for part in parts])
    kept = [weakref.ref(part.values) for part in parts]
    whole = room._in_memory(parts)
    assert torch.equal(whole.values, expected)
    assert all(part() is None for part in kept)


def test_rows_are_not_lost_where_putting_them_together_fails():
    rows, batches = Rows((3,)), [random(5, 3, seed) for seed in range(4)]
    for batch in batches:
        rows.append(batch)
    good = rows._segments[1]
    rows._segments[1] = room._Segment(torch.zeros(5, 2, dtype=torch.float64), loose=True)
    with pytest.raises(RuntimeError):
        rows.tensor()
    broken = next(n for n, part in enumerate(rows._segments) if part.values.shape == (5, 2))
    rows._segments[broken] = good
    assert torch.equal(rows.tensor(), torch.cat(batches))


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12),
    limit=st.sampled_from([0, 100, 10**9]),
)
def test_rows_hold_what_was_appended(batches: list[tuple[int, bool]], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "MEMORY_LIMIT", limit)
        rows, parts = Rows((3,)), [torch.zeros(0, 3)]
        for number, (count, wide) in enumerate(batches):
            part = random(count, 3, number)
            part = part if wide else part.float()
            rows.append(part)
            parts.append(part.double())
            if number % 4 == 2:
                assert_holds(rows, torch.cat(parts))
        assert_holds(rows, torch.cat(parts))
        assert resident(rows) <= limit


def test_floating_rows_are_narrow_while_that_loses_nothing() -> None:
    rows = Rows((2,), torch.float64)
    rows.append(torch.tensor([[0.5, 1.0]], dtype=torch.float64))
    rows.append(torch.tensor([[0.25, 3.0]], dtype=torch.bfloat16))
    assert rows.dtype == torch.float32
    rows.append(torch.tensor([[0.1, 1.0]], dtype=torch.float64))
    assert rows.dtype == torch.float64
    rows.append(torch.tensor([[2.0, 1.0]]))
    expected = torch.tensor([[0.5, 1], [0.25, 3], [0.1, 1], [2, 1]], dtype=torch.float64)
    assert_holds(rows, expected)


def test_numbers_stay_whole() -> None:
    rows = Rows(dtype=torch.int64)
    rows.append(torch.tensor([2**62 + 1, -3]))
    rows.append(torch.tensor([7], dtype=torch.int32))
    assert rows.tensor().tolist() == [2**62 + 1, -3, 7]
    with pytest.raises(DataError, match="cannot take"):
        rows.append(torch.tensor([0.5]))
    with pytest.raises(DataError, match=r"shape \[\] cannot take \[2\]"):
        rows.append(torch.zeros(1, 2))


def test_what_is_appended_is_a_copy() -> None:
    given = torch.zeros(3, 2)
    rows = Rows.of(given)
    given += 1
    assert not rows.tensor().any()


def test_rows_past_the_limit_lie_in_files(small: None) -> None:
    rows, parts = Rows((4,)), []
    for number in range(20):
        parts.append(random(5, 4, number).float())
        rows.append(parts[-1])
    assert resident(rows) <= 200
    assert len(rows._segments) < 10
    assert_holds(rows, torch.cat(parts))


def test_copies_grow_apart(small: None) -> None:
    rows = Rows.of(random(30, 2).float())
    other = rows.copy()
    assert other.identity == rows.identity
    other.append(torch.ones(40, 2))
    rows.append(torch.zeros(1, 2))
    assert (len(rows), len(other)) == (31, 70)
    assert_holds(rows, torch.cat([random(30, 2).float(), torch.zeros(1, 2)]))
    assert_holds(other, torch.cat([random(30, 2).float(), torch.ones(40, 2)]))
    assert other.identity != rows.identity


def test_joined_rows_stay_in_order_when_more_come(small: None) -> None:
    def grown(seed: int) -> Rows:
        rows = Rows.of(random(60, 2, seed).float())
        rows.append(random(3, 2, seed + 1).float())
        return rows

    both = grown(1).joined(grown(5))
    both.append(random(40, 2, 9).float())
    pieces = [(60, 1), (3, 2), (60, 5), (3, 6), (40, 9)]
    assert_holds(both, torch.cat([random(count, 2, seed).float() for count, seed in pieces]))
    assert resident(both) <= 200


def test_joining_promotes_and_refuses() -> None:
    narrow, wide = Rows.of(random(3, 2).float()), Rows.of(random(4, 2, 1))
    both = narrow.joined(wide)
    assert (narrow.dtype, both.dtype) == (torch.float32, torch.float64)
    assert_holds(both, torch.cat([random(3, 2).float().double(), random(4, 2, 1)]))
    with pytest.raises(DataError, match=r"shapes \[2\] and \[3\]"):
        narrow.joined(Rows((3,)))
    with pytest.raises(DataError, match="cannot be joined"):
        Rows(dtype=torch.int64).joined(Rows())


def test_rows_without_rows() -> None:
    numbers, vectors = Rows(dtype=torch.int64), Rows((2,))
    assert numbers.identity != vectors.identity
    assert_holds(vectors, torch.zeros(0, 2))
    assert vectors[torch.zeros(0, dtype=torch.int64)].shape == (0, 2)
    vectors.append(torch.zeros(0, 2))
    assert len(vectors.joined(Rows((2,)))) == 0
    assert len(Rows.mapped(torch.zeros(0, 2))) == 0


def test_mapped_rows_are_used_in_place() -> None:
    values = random(4, 2)
    rows = Rows.mapped(values)
    assert rows.dtype == torch.float64
    assert rows.tensor().data_ptr() == values.data_ptr()
    rows.append(torch.ones(1, 2))
    assert_holds(rows, torch.cat([values, torch.ones(1, 2)]))
    assert torch.equal(values, random(4, 2))


def test_rows_in_files_can_be_pickled(small: None) -> None:
    rows = Rows((2,))
    for number in range(9):
        rows.append(random(20, 2, number))
    again = pickle.loads(pickle.dumps(rows))
    assert_holds(again, rows.tensor())
    assert resident(again) <= 200
    np.testing.assert_array_equal(again.tensor(), rows.tensor())


def test_a_broken_batch_changes_nothing() -> None:
    rows = Rows.of(random(3, 2))
    with pytest.raises(DataError):
        rows.append(random(3, 3))
    assert_holds(rows, random(3, 2))
