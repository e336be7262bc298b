"""Writes the parts of the documentation that the code knows best, and checks that they are current.

A page has them between two comments, ``<!-- begin: NAME arguments -->`` and ``<!-- end: NAME -->``;
the names are in ``PARTS``. ``python docs/generate.py`` rewrites them all, with ``--check`` it only
says which pages differ.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from docstrings import called, cited, document, marked, prose, sentence, short_citation, table

DOCS = Path(__file__).parent
HEADINGS = {
    "scorer": "Scorers",
    "shaper": "Shapers",
    "regularizer": "Regularizers",
    "statistic": "Statistics",
    "extractor": "Extractors",
    "source": "Sources",
}
"""The slots in the order in which a reader wants them."""
LEARNING = ("scorer", "shaper")
"""The slots whose components say what they read and learn from."""
BEST = 4
"""How many detectors of each network the README shows."""

_PART = re.compile(r"(<!-- begin: (\w+)([^>]*?)\s-->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def main() -> int:
    """Rewrite the generated parts of all pages, or with ``--check`` report those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page is old")
    parser.add_argument("--results", help="also the README's table, from what the demo wrote")
    options = parser.parse_args()
    check = options.check
    # The pages are about what oodcore brings, whatever else is installed here.
    os.environ["OODCORE_PLUGINS"] = ""
    pages = current()
    if options.results:
        readme = DOCS.parent / "README.md"
        pages[readme] = filled(readme.read_text("utf-8"), {"demo": partial(demo, options.results)})
    old = {page: text for page, text in pages.items() if text != page.read_text("utf-8")}
    for page, text in old.items():
        if check:
            sys.stderr.write(f"{page.relative_to(DOCS.parent)} is not current\n")
        else:
            page.write_text(text, "utf-8")
    if old and check:
        sys.stderr.write("run python docs/generate.py, and commit what it writes\n")
    return int(bool(old) and check)


def current() -> dict[Path, str]:
    """Every page that has generated parts, as it should be."""
    pages = {page: page.read_text("utf-8") for page in sorted(DOCS.glob("*.md"))}
    return {page: filled(text) for page, text in pages.items() if _PART.search(text)}


def filled(page: str, parts: Mapping[str, Callable[..., str]] | None = None) -> str:
    """A page with its generated parts written anew."""

    def write(found: re.Match[str]) -> str:
        text = (parts or PARTS)[found[2]](*found[3].split()).strip("\n")
        return f"{found[1]}\n{text}\n\n{found[5]}"

    return _PART.sub(write, page)


def kinds() -> str:
    """Every kind of every slot, a table each."""
    sections = []
    for slot, heading in HEADINGS.items():
        header = ["kind", "what it is"]
        header += ["reads", "learns from"] if slot in LEARNING else []
        header += ["source"] if any(cls.paper for cls in built_in(slot).values()) else []
        lines = []
        for kind, cls in built_in(slot).items():
            line = [f"[`{kind}`](#{anchor(slot, kind)})", sentence(cls)]
            line += [_reads(cls), _learns(cls)] if slot in LEARNING else []
            line += [short_citation(cls.paper)] if "source" in header else []
            lines.append(line)
        sections.append(f"### {heading}\n\n{table(header, lines)}")
    return "\n".join(sections)


def components(slot: str) -> str:
    """A section for each component of a slot: docstring, fields, citation, plugin."""
    from oodcore.plugins import registry

    sections = []
    for kind, cls in built_in(slot).items():
        owner = registry.owner(cls)
        assert owner is not None
        body, after = prose(cls)
        paper = f"Source: {cited(cls.paper)}" if cls.paper else ""
        brought = f"Plugin: `{owner.name}` (`{owner.module}`)"
        title = f"### {kind} {{ #{anchor(slot, kind)} }}"
        parts = [title, body, _fields_of(cls), after, paper, brought]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(sections)


def fields(target: str) -> str:
    """The fields of a model, ``module:class``, as a table."""
    module, _, name = target.partition(":")
    return _fields_of(getattr(import_module(module), name))


def metrics() -> str:
    """What a benchmark measures."""
    from oodcore.metrics import METRICS

    lines = [
        [f"`{name}`", metric.title, metric.better or "neither", metric.meaning]
        for name, metric in METRICS.items()
    ]
    return table(["name", "title", "better", "meaning"], lines)


def hooks() -> str:
    """Every hook with its signature, and the base class of what it registers."""
    from oodcore import hookspecs
    from oodcore.plugins import SLOTS

    sections = []
    for slot, base in SLOTS.items():
        hook = getattr(hookspecs, f"register_{slot}s")
        text = inspect.cleandoc(hook.__doc__ or "")
        home = base.replace(":", ".")
        sections.append(
            f"#### `{hook.__name__}`\n\n```text\n{signature(hook)}\n```\n\n"
            f"{marked(text)} The class is `{home}`."
        )
    return "\n\n".join(sections)


def demo(folder: str) -> str:
    """The best detectors of a demonstration, for each of its models."""
    from oodcore.results import Results
    from oodcore.tables import percent

    results = Results.load(folder)
    near, far = (partial(results.mean, metric="auroc", group=group) for group in ("near", "far"))
    header = ["network", "detector", "AUROC", "near OOD", "far OOD", "FPR95", "false alarms"]
    lines = []
    for model in sorted({entry.model for entry in results.entries}):
        own = [name for name in results.ranked() if name.startswith(f"{model}/")]
        for name in own[:BEST]:
            numbers = [
                results.mean(name, "auroc"),
                near(name),
                far(name),
                results.mean(name, "fpr95_id"),
                results.value(name, "false_alarm_rate", results.id_data.name),
            ]
            lines.append([model, name.partition("/")[2], *map(percent, numbers)])
    count = len(results.entries) // len({entry.model for entry in results.entries})
    said = f"The {BEST} best of {count} detectors for each network, in percent:"
    return f"{said}\n\n{table(header, lines)}"


def api(*targets: str) -> str:
    """How things (``module:name``) are called, and what their docstrings say."""
    sections = []
    for target in targets:
        module, _, name = target.partition(":")
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        level = "####" if "." in name else "###"
        sections.append(f"{level} {name}\n\n{called(name, found)}\n\n{document(found)}")
    return "\n\n".join(sections)


def house() -> str:
    """Every room of the core, and what it is for."""
    import oodcore

    lines = []
    for path in sorted(Path(oodcore.__path__[0]).rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        name = path.relative_to(Path(oodcore.__path__[0]).parent).as_posix()
        lines.append([f"`{name}`", marked(text.split("\n\n")[0]).rstrip(".")])
    return table(["file", "what it is for"], lines)


def commands() -> str:
    """The help of every command, as it prints it."""
    from oodcore.cli import run
    from oodcore.cli.program import app

    sections = []
    for name in ("", *(command.name for command in app.registered_commands)):
        said = io.StringIO()
        with _plain_terminal(), redirect_stdout(said):
            run([*filter(None, [name]), "--help"])
        title = f"oodcore {name}".strip()
        sections.append(f"### {title}\n\n```text\n{said.getvalue().strip()}\n```")
    return "\n\n".join(sections)


def signature(function: Callable[..., Any]) -> str:
    """A function's name and parameters as its file has them."""
    return f"{function.__name__}{inspect.signature(function)}".replace("'", "")


def built_in(slot: str) -> Mapping[str, Any]:
    """The classes of a slot that oodcore itself brings, by kind."""
    from oodcore.plugins import OWN, registry

    found = registry.all(slot)
    own = {kind: registry.owner(cls) for kind, cls in found.items()}
    return {k: cls for k, cls in found.items() if (owner := own[k]) and owner.distribution == OWN}


def anchor(slot: str, kind: str) -> str:
    """Where in the page of methods a component is."""
    return f"{slot}-{kind}"


class _Part:
    """Stands for a component inside another, whichever it may be."""

    measures = False

    def needs(self) -> frozenset[str]:
        return frozenset()

    def statistics(self) -> tuple[Any, ...]:
        return ()


def _example(cls: type[Any]) -> Any:
    """An instance to ask; where fields are needed, one that holds stand-ins."""
    from pydantic import ValidationError

    needed = [name for name, field in cls.model_fields.items() if field.is_required()]
    for value in ({}, "NAME", ("NAME",)):
        try:
            return cls(**({} if value == {} else dict.fromkeys(needed, value)))
        except ValidationError:
            continue
    return cls.model_construct(**{name: _Part() for name in needed})


def _reads(cls: type[Any]) -> str:
    names = ", ".join(sorted(_example(cls).needs()))
    inner = "what its parts read" if _has_parts(cls) else ""
    return ", ".join(filter(None, [names, inner])) or "nothing"


def _learns(cls: type[Any]) -> str:
    example = _example(cls)
    learnt = [f"[`{s.kind}`](#{anchor('statistic', s.kind)})" for s in example.statistics()]
    if getattr(example, "measures", False):
        learnt.append("held-out rows" if cls.held_out else "the rows again")
    return ", ".join(dict.fromkeys(learnt))


def _fields_of(cls: type[Any]) -> str:
    from oodcore.cli.description import type_of
    from oodcore.component import notes

    said = notes(cls)
    lines = [
        [
            f"`{name}`",
            type_of(field.annotation, field.metadata).replace("<", "\\<"),
            _default(field),
            marked(said.get(name, "")),
        ]
        for name, field in cls.model_fields.items()
    ]
    return table(["field", "values", "default", "meaning"], lines) if lines else ""


def _default(field: Any) -> str:
    from oodcore.component import canonical

    if field.is_required():
        return "*needed*"
    return f"`{canonical(field.get_default(call_default_factory=True))}`"


def _has_parts(cls: type[Any]) -> bool:
    return '"x-slot": "scorer"' in json.dumps(cls.model_json_schema()["properties"])


@contextmanager
def _plain_terminal() -> Iterator[None]:
    """Within it the command line writes as to a file that is 80 columns wide."""
    kept = dict(os.environ)
    os.environ.update(COLUMNS="80", TERM="dumb", NO_COLOR="1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


PARTS: dict[str, Callable[..., str]] = {
    "kinds": kinds,
    "components": components,
    "fields": fields,
    "metrics": metrics,
    "hooks": hooks,
    "commands": commands,
    "house": house,
    "api": api,
}

if __name__ == "__main__":
    sys.exit(main())
