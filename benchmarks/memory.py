"""Memory of fitting on a stream: it does not grow with the rows."""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from measure import Table, number, peak

import oodcore
from oodcore.statistics import ClassMoments, CorrectMeans, LogitMoments, NormMoments

WIDTH = 512
CLASSES = 1000
BATCH = 1024
LIMIT = 700
"""MiB that fitting may take, whatever the number of rows."""


def tables(*, quick: bool = False) -> list[Table]:
    """The table, a process of its own for each line."""
    counts = (2 * BATCH, 4 * BATCH) if quick else (10_000, 100_000, 1_000_000)
    table = Table(
        "Fitting on a stream",
        f"Class, norm and logit moments of rows of {WIDTH} numbers in {CLASSES:,} classes, in "
        f"batches of {BATCH:,}: the peak of a process of its own above what it held before, of "
        f"which at most {LIMIT} MiB are allowed. Statistics take K D, K² and D² numbers, and "
        "batches do not pile up.",
        ["rows", "peak, MiB", "rows a second"],
    )
    for rows in counts:
        command = [sys.executable, __file__, str(rows), str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        most, seconds = map(float, done.stdout.split())
        if most > LIMIT:
            raise SystemExit(f"fitting {rows:,} rows took {most:.0f} MiB, more than {LIMIT}")
        table.rows.append([f"{rows:,}", number(most), f"{rows / seconds:,.0f}"])
    return [table]


def stream(rows: int) -> None:
    """Fit the moments on rows that are made batch by batch."""
    generator = torch.Generator().manual_seed(0)
    head = oodcore.Head(torch.randn(CLASSES, WIDTH, generator=generator) / WIDTH**0.5)
    store = oodcore.FeatureStore(
        statistics=[ClassMoments(), NormMoments(), LogitMoments(), CorrectMeans()]
    )
    for first in range(0, rows, BATCH):
        count = min(BATCH, rows - first)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        embeddings = torch.randn(count, WIDTH, generator=generator) + head.weight[labels]
        store.update(oodcore.Features(embeddings=embeddings, labels=labels, head=head))


def main() -> None:
    """Print the peak memory and the seconds of a stream of some rows."""
    rows, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    began = time.perf_counter()
    most = peak(lambda: stream(rows))
    sys.stdout.write(f"{most} {time.perf_counter() - began}\n")


if __name__ == "__main__":
    main()
