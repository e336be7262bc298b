"""Memory of fitting the moment statistics on a stream, above an interpreter with torch loaded."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 700


def measured(name: str) -> float:
    """A field of this process's status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"this machine's /proc/self/status has no {name}; the benchmark needs Linux")


def stream(rows: int, width: int, classes: int, batch: int) -> None:
    """Fit on made-up rows, and print the row of the table."""
    import torch

    import oodcore
    from oodcore.statistics import ClassMoments, CorrectMeans, LogitMoments, NormMoments

    generator = torch.Generator().manual_seed(0)
    head = oodcore.Head(torch.randn(classes, width, generator=generator) / width**0.5)
    statistics = [ClassMoments(), NormMoments(), LogitMoments(), CorrectMeans()]
    store = oodcore.FeatureStore(statistics=statistics)
    before = measured("VmRSS")
    began = time.perf_counter()
    most = 0.0
    for first in range(0, rows, batch):
        count = min(batch, rows - first)
        labels = torch.randint(0, classes, (count,), generator=generator)
        embeddings = torch.randn(count, width, generator=generator) + head.weight[labels]
        store.update(oodcore.Features(embeddings=embeddings, labels=labels, head=head))
        most = max(most, measured("RssAnon"))
    seconds = time.perf_counter() - began
    peak, files = measured("VmHWM") - before, measured("RssFile")
    print(
        f"| {rows:,} | {width} | {classes} | {batch} | {peak:.0f} | {most:.0f} | {files:.0f} "
        f"| {rows / seconds:,.0f} |",
        flush=True,
    )
    if peak > LIMIT:
        raise SystemExit(f"{peak:.0f} MiB is more than {LIMIT}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512, help="D, the size of an embedding")
    parser.add_argument("--classes", type=int, default=1000, help="K")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        stream(options.rows, options.width, options.classes, options.batch)
        return
    print("| rows | D | K | batch | peak above start, MiB | anonymous, MiB | files, MiB | rows/s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for rows in (options.rows // 10, options.rows):
        # A process of its own each, so that one run's peak is not the other's.
        given = ["--rows", str(rows), "--width", str(options.width), "--batch", str(options.batch)]
        command = [sys.executable, __file__, "--inner", *given, "--classes", str(options.classes)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
