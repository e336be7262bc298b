"""Batches: each row once an epoch, shared among processes, outliers again and again."""

from __future__ import annotations

import pytest
import torch
from toy_runs import STEPS, Clusters

from oodcore.batches import Batches, Rows


@pytest.mark.parametrize(("rows", "batch"), [(42, 11), (7, 7), (10, 3), (5, 100), (3, 1)])
def test_an_epoch_has_each_row_once_in_batches_of_one_size(rows, batch):
    batches = Batches(
        Rows(Clusters(rows=rows).open(), "rows"),
        None,
        batch_size=batch,
        outlier_batch_size=1,
        seed=0,
    )
    orders = []
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        parts = [batches.numbers(first + step) for step in range(batches.steps_per_epoch)]
        assert max(map(len, parts)) <= batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        orders.append([row for part in parts for row in part])
        assert sorted(orders[-1]) == list(range(rows))
    assert rows < 6 or orders[0] != orders[1]


def test_processes_share_each_batch_and_its_outliers():
    def batches(rank, world):
        return Batches(
            Rows(Clusters().open(), "rows"),
            Rows(Clusters(rows=7, seed=9).open(), "outliers"),
            batch_size=11,
            outlier_batch_size=5,
            seed=0,
            rank=rank,
            world=world,
        )

    for step in range(2 * STEPS):
        _, labels, ids, outliers = batches(0, 1)[step]
        parts = [batches(rank, 2)[step] for rank in range(2)]
        joined = torch.cat([part[2] for part in parts])
        order = torch.argsort(joined)
        assert torch.equal(joined[order], ids.sort().values)
        assert torch.equal(torch.cat([part[1] for part in parts])[order], labels[ids.argsort()])
        shared = torch.cat([part[3] for part in parts])
        assert torch.equal(shared.sort(0).values, outliers.sort(0).values)


def test_outliers_are_read_through_again_and_again():
    batches = Batches(
        Rows(Clusters().open(), "rows"),
        Rows(Clusters(rows=7, seed=9).open(), "outliers"),
        batch_size=11,
        outlier_batch_size=3,
        seed=0,
    )
    seen = torch.cat([batches[step][3] for step in range(7)])
    every = Clusters(rows=7, seed=9).open().inputs
    for turn in range(3):
        part = seen[7 * turn : 7 * turn + 7]
        assert torch.equal(part.sort(0).values, every.sort(0).values)
