"""Blocks: the fenced code of a page, and what it takes to run it as a reader would."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oodcore.cli import run
from oodcore.config import BenchmarkConfig, DetectorConfig, EnsembleConfig, validate
from oodcore.document import parse
from oodcore.plugins import SLOTS, registry
from oodcore.training_config import TrainingConfig

FENCE = re.compile(
    r"(?P<notes>(?:^ *<!-- [^\n]*? -->\n)*)^(?P<indent> *)```(?P<info>[^\n`]*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
NOTE = re.compile(r"<!-- ((?!begin|end).*?) -->")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")
ELSEWHERE = ("pip", "git", "make", "cd", "python", "pytest", "torchrun")
"""Programs that examples may call, and that no test of the documentation runs."""


@dataclass
class Block:
    """One fenced block.

    Args:
        where: page and line, for messages.
        language: the first word after the fence; ``output`` is what the block before it prints.
        title: the file that it is the content of, or "".
        text: without the fence and its indentation.
        notes: the comments right above it. ``not run: why``; ``wrong on purpose`` for what is
            refused; ``varies`` for output whose numbers differ between machines;
            ``example`` for output of which only the first line is certain.
    """

    where: str
    language: str
    title: str
    text: str
    notes: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> str:
        """Why it is not run, or ""."""
        return next((note[9:] for note in self.notes if note.startswith("not run: ")), "")


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        found.append(
            Block(
                f"{page.name}:{text.count(chr(10), 0, match.start('indent')) + 1}",
                language,
                title[1] if title else "",
                textwrap.dedent(match["text"]),
                NOTE.findall(match["notes"]),
            )
        )
    return found


def run_page(page: Path, given: Mapping[str, Any]) -> None:
    """Run a page in the working directory: write its files, run its code, compare what is printed.

    Raises:
        AssertionError: a block that fails, or prints something else than the page says.
    """
    names = {"__name__": "__page__", **given}
    every = blocks(page)
    for block, after in zip(every, [*every[1:], None], strict=True):
        if block.skipped or block.language == "output":
            continue
        said = after if after is not None and after.language == "output" else None
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
        if block.language == "python":
            _run_python(block, said, names)
        elif block.language in ("sh", "console"):
            _run_commands(block)
        elif block.language == "yaml" and "wrong on purpose" not in block.notes:
            _validate(block)
        elif block.language == "json":
            json.loads(block.text)


def _run_python(block: Block, said: Block | None, names: dict[str, Any]) -> None:
    printed = io.StringIO()
    raised = re.match(r"\w+(?:Error|Diverged)(?=:)", said.text) if said else None
    code = compile(block.text, block.where, "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, names)
    except Exception as error:
        if raised is None:
            raise AssertionError(f"{block.where}: {type(error).__name__}: {error}") from error
        printed.write(f"{type(error).__name__}: {error}")
    else:
        assert raised is None, f"{block.where}: raises nothing, and the page says {said}"
    _compare(block, printed.getvalue(), said)


def _run_commands(block: Block) -> None:
    """Run the lines that call oodcore; in a ``console`` what follows a command is what it says.

    What goes to a file on the page (``> file``) goes nowhere.
    """
    for command, said in _commands(block):
        program, *arguments = shlex.split(command.partition(" > ")[0], comments=True)
        if program != "oodcore":
            assert program in ELSEWHERE, f"{block.where}: {program} is not a known program"
            continue
        printed = io.StringIO()
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            code = run(arguments)
        fails = said.startswith("error:")
        assert (code != 0) == fails, f"{block.where}: {command} gives {code}: {printed.getvalue()}"
        if block.language == "console":
            _compare(block, printed.getvalue(), Block(block.where, "output", "", said, block.notes))


def _commands(block: Block) -> Iterator[tuple[str, str]]:
    if block.language == "sh":
        joined = block.text.replace("\\\n", " ")
        yield from ((line, "") for line in joined.splitlines() if line.strip(" #"))
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, said = part.replace("\\\n", " ").partition("\n")
        yield command, said


def _compare(block: Block, printed: str, said: Block | None) -> None:
    """What was printed is what the page says, up to white space.

    ``...`` on the page stands for any text; where output varies, numbers are not compared.
    """
    if said is None:
        return
    wanted, given = said.text, printed
    if "example" in said.notes:
        wanted, given = wanted.partition("\n")[0], given.partition("\n")[0]
    wanted, given = _words(wanted), _words(given)
    if "varies" in said.notes:
        wanted, given = NUMBER.sub("0", wanted), NUMBER.sub("0", given)
    pattern = ".*?".join(re.escape(part) for part in wanted.split("..."))
    if not re.fullmatch(pattern, given):
        raise AssertionError(f"{block.where} prints\n{printed}\nand the page says\n{said.text}")


def _words(text: str) -> str:
    """A text without line breaks and indentation, also those inside printed arrays."""
    return re.sub(r"(?<=\[) +| +(?=\])", "", " ".join(text.split()))


def _validate(block: Block) -> None:
    """A whole configuration, or a part of one, is what oodcore accepts."""
    document = parse(block.text, block.title or block.where)
    names = set(document.data)
    if "kind" in names:
        slots = [slot for slot in SLOTS if registry.find(slot, document.data["kind"])]
        assert slots, f"{block.where}: no slot has the kind {document.data['kind']}"
        registry.build(slots[0], document.data)
    elif names & {"network", "regularizers", "optimizer"}:
        least = {"network": {"factory": "a:b"}, "train": "digits", "epochs": 9}
        whole = least.keys() <= names
        validate(TrainingConfig, document if whole else {**least, **document.data})
    elif "members" in names:
        validate(EnsembleConfig, document)
    elif names & {"scorers", "models", "groups", "trainings"}:
        rest = {"scorers": ["msp"], "train": "digits", "id_test": "digits", "ood": {"x": "noise"}}
        whole = {"id_test", "scorers"} <= names
        validate(BenchmarkConfig, document if whole else {**rest, **document.data})
    else:
        validate(
            DetectorConfig, document if "scorer" in names else {**document.data, "scorer": "msp"}
        )
