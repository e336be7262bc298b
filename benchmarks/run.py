"""Runs the benchmarks, prints their tables, and writes them into the documentation.

``python benchmarks/run.py`` runs all of them, a process for each; ``--write`` puts what was
measured into ``docs/benchmarks.md``; ``--quick`` is for seeing that they run, not for numbers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

PARTS = ("scoring", "peers", "memory", "metrics", "costs")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--threads", type=int, default=1, help="that torch and faiss may use; 1")
    parser.add_argument("--quick", action="store_true", help="few rows, in one process")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"there is no part '{unknown[0]}'; there are: {', '.join(PARTS)}")
    if options.write and (options.quick or options.parts):
        parser.error("what is written is all of it, and not the quick one")
    chosen = options.parts or list(PARTS)
    if options.quick or options.within:
        run_here(chosen, options.threads, quick=options.quick)
        return
    pieces = [began(options.threads)]
    sys.stdout.write(f"{pieces[0]}\n\n")
    for part in chosen:
        command = [sys.executable, __file__, part, "--within", "--threads", str(options.threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        sys.stdout.write(done.stdout)
        sys.stdout.flush()
        pieces.append(done.stdout.strip())
    if options.write:
        page = PAGE.read_text("utf-8")
        PAGE.write_text(filled(page, "\n\n".join(pieces)), "utf-8")


def began(threads: int) -> str:
    """Where, when and with what is measured."""
    limit(threads)
    return str(import_module("measure").provenance())


def run_here(parts: list[str], threads: int, *, quick: bool) -> None:
    """Run some parts in this process, and print their tables."""
    limit(threads)
    for part in parts:
        for table in import_module(part).tables(quick=quick):
            sys.stdout.write(f"{table.markdown()}\n\n")
            sys.stdout.flush()


def limit(threads: int) -> None:
    """Let torch, and faiss which shares its threads, compute with so many."""
    import torch

    torch.set_num_threads(threads)


def filled(page: str, text: str) -> str:
    """A page with other text between the two marks."""
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"the page has no {BEGIN} before a {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    main()
