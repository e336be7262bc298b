"""Features that were set aside come back as they were."""

from __future__ import annotations

import pytest
import torch

from oodcore import Features, Head
from oodcore.errors import DataError
from oodcore.spool import Spool, dtype_of

CPU = torch.device("cpu")


def rows(count: int, **fields: torch.Tensor | None) -> Features:
    given = {
        "embeddings": torch.arange(2.0 * count).reshape(count, 2).double() / 3,
        "labels": torch.arange(count) % 2,
        "ids": torch.arange(count),
    }
    layers = {"half": torch.ones(count, 3).half(), "flags": torch.ones(count, dtype=torch.bool)}
    return Features(**{**given, **fields}, layers=layers, head=Head(torch.ones(2, 2).double()))


def test_rows_come_back_in_order_with_their_types() -> None:
    spool = Spool()
    for batch in (rows(5), rows(3)):
        spool.append(batch)
    assert len(spool) == 8
    parts = list(spool.batches(CPU, size=3))
    assert [len(part) for part in parts] == [3, 3, 2]
    whole, given = Features.cat(parts), Features.cat([rows(5), rows(3)])
    for name in ("embeddings", "logits", "labels", "ids"):
        assert torch.equal(getattr(whole, name), getattr(given, name))
        assert getattr(whole, name).dtype == getattr(given, name).dtype
    assert {name: value.dtype for name, value in whole.layers.items()} == {
        "half": torch.float16,
        "flags": torch.bool,
    }


def test_a_field_is_in_all_batches_or_in_none() -> None:
    spool = Spool()
    spool.append(rows(5))
    with pytest.raises(DataError, match="some batches have labels"):
        spool.append(rows(5, labels=None))
    assert len(spool) == 5


def test_a_copy_goes_on_apart_with_some_of_the_layers() -> None:
    spool = Spool()
    spool.append(rows(5))
    other = spool.copy({"half"})
    spool.append(rows(5))
    assert len(other) == 5
    assert list(next(other.batches(CPU)).layers) == ["half"]


def test_packed_and_unpacked() -> None:
    spool = Spool()
    spool.append(rows(5))
    again = next(Spool.unpacked(spool.packed()).batches(CPU))
    assert torch.equal(again.layers["half"], rows(5).layers["half"])
    packed = spool.packed()
    packed["columns"]["ids"] = packed["columns"]["ids"].copy()
    packed["columns"]["ids"].append(torch.arange(2))
    with pytest.raises(DataError, match="different lengths"):
        Spool.unpacked(packed)


@pytest.mark.parametrize("name", ["Tensor", "nonesuch", None, 3])
def test_what_is_no_type(name: object) -> None:
    assert dtype_of("bfloat16") == torch.bfloat16
    with pytest.raises(DataError, match="no type of tensors"):
        dtype_of(name)
