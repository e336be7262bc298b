"""Trains networks in the ways that the regularizers bring, and measures what that is worth.

``python benchmarks/training/run.py`` runs every part: ``digits``, ``mnist`` and ``cifar`` (with the
archives that ``--mnist`` and ``--cifar`` name), ``resume`` and ``cost``. What was trained is kept
under ``--work``, so that a run that was interrupted goes on. ``--write`` puts the tables into
``docs/benchmarks.md``, each part where its mark is, and the numbers into ``results`` beside this
file; ``--kept`` writes the page from these, and measures nothing. ``--quick`` is for seeing that
it runs, not for numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import archives  # noqa: E402
import known_unknown  # noqa: E402
import recipes  # noqa: E402
import resuming  # noqa: E402
import step_cost  # noqa: E402
import tables  # noqa: E402
import torch  # noqa: E402
from measure import Table, provenance  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "benchmarks.md"
RESULTS = HERE / "results"
PARTS = ("digits", "mnist", "cifar", "resume", "cost")
AMOUNTS = {
    "mnist": archives.Amount(train=250, held_out=100, test=400),
    "cifar": archives.Amount(train=2000, held_out=200, size=16),
}
FEW = {"train": 20, "held_out": 5, "test": 10}

Part = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="run this; may be repeated")
    parser.add_argument("--mnist", type=Path, help="archive with x_train, y_train, x_test, y_test")
    parser.add_argument("--cifar", type=Path, help="the same of CIFAR-10")
    parser.add_argument("--work", type=Path, default=Path("runs/training"), help="runs/training")
    parser.add_argument("--threads", type=int, default=1, help="that torch may use; 1")
    parser.add_argument("--quick", action="store_true", help="so little that it says nothing")
    parser.add_argument("--write", action="store_true", help="write results and the page")
    parser.add_argument("--kept", action="store_true", help="write the page from the results")
    options = parser.parse_args(arguments)
    if options.quick and (options.write or options.kept):
        parser.error("what is written is not the quick one")
    asked = options.part or PARTS
    if options.kept:
        for part in asked:
            if (RESULTS / f"{part}.json").exists():
                write(part, json.loads((RESULTS / f"{part}.json").read_text("utf-8")))
        return
    for part in asked:
        if part in ("mnist", "cifar") and getattr(options, part) is None:
            if options.part:
                parser.error(f"--part {part} needs the archive: --{part} PATH")
            sys.stderr.write(f"{part} is left out: name its archive with --{part}\n")
            continue
        done = measured(part, options)
        sys.stdout.write(f"{text(part, done)}\n\n")
        sys.stdout.flush()
        if options.write:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{part}.json").write_text(compact(done), "utf-8")
            write(part, done)


def measured(part: str, options: argparse.Namespace) -> Part:
    """Rows of a task, or the table of another part, and where they were measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with warnings.catch_warnings():
            # Small runs make Lightning say that they are small.
            warnings.simplefilter("ignore")
            made = provenance()
            if part in ("resume", "cost"):
                make = resuming.table if part == "resume" else step_cost.table
                return {"made": made, "table": asdict(make(quick=options.quick))}
            folder = (options.work / part).resolve()
            task = task_of(part, folder, options)
            rows = known_unknown.rows(task, folder)
            return {"made": made, "rows": rows, "quick": options.quick}
    finally:
        torch.set_num_threads(before)


def task_of(part: str, folder: Path, options: argparse.Namespace) -> recipes.Task:
    """A task with its data made ready."""
    if part == "digits":
        task = recipes.digits()
    else:
        amount = AMOUNTS[part]
        amount = replace(amount, **FEW) if options.quick else amount
        sources = archives.prepared(getattr(options, part), folder / "rows", amount)
        task = recipes.mnist(sources) if part == "mnist" else recipes.cifar(sources)
    return task.quick() if options.quick else task


def text(part: str, done: Part) -> str:
    """A part as Markdown."""
    if "table" in done:
        table = Table(**done["table"])
        return f"{table.markdown()}\n\n{done['made']}"
    tasks = {"digits": recipes.digits(), "mnist": recipes.mnist({}), "cifar": recipes.cifar({})}
    task = tasks[part]
    task = task.quick() if done.get("quick") else task
    found = tables.of(task, done["rows"])
    if part == "cifar":
        found.append(tables.published())
    pieces = [
        f"### {task.title}",
        f"{tables.about(task, done['rows'])} {amount_of(part)}".strip(),
        done["made"],
        *(table.markdown().replace("### ", "#### ", 1) for table in found),
    ]
    return "\n\n".join(pieces)


def amount_of(part: str) -> str:
    """How much of an archive is taken, in a sentence."""
    amount = AMOUNTS.get(part)
    if amount is None:
        return ""
    tested = "all" if amount.test is None else f"{amount.test:,}"
    size = f", all at {amount.size} pixels" if amount.size else ""
    return (
        f"Of each class, {amount.train:,} images are trained on, {amount.held_out} held out, and "
        f"{tested} of the test set tested on{size}: so much two cores can do. Nothing is augmented."
    )


def write(part: str, done: Part) -> None:
    """Put a part where its mark in the page is."""
    begin, end = f"<!-- trained: {part} -->", f"<!-- trained: end {part} -->"
    page = PAGE.read_text("utf-8")
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{PAGE.name} has no {begin} before a {end}")
    PAGE.write_text(f"{before}{begin}\n\n{text(part, done)}\n\n{end}{after}", "utf-8")


def compact(done: Part) -> str:
    """JSON with a line for each row."""
    if "rows" not in done:
        return json.dumps(done, indent=1) + "\n"
    rows = ",\n".join(f"  {json.dumps(row)}" for row in done["rows"])
    return f'{{\n "made": {json.dumps(done["made"])},\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    main()
