"""Writes the parts of the documentation that the code knows best, and checks that they are current.

A page has them between two comments, ``<!-- begin: NAME arguments -->`` and ``<!-- end: NAME -->``;
the names are in ``PARTS``. ``python docs/generate.py`` rewrites them all, with ``--check`` it only
says which pages differ.
"""

from __future__ import annotations

import argparse
import ast
import html
import inspect
import io
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

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
_PART = re.compile(r"(<!-- begin: (\w+)([^>]*?)\s-->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)


def main() -> int:
    """Rewrite the generated parts of all pages, or with ``--check`` report those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if a page is old")
    check = parser.parse_args().check
    # The pages are about what oodcore brings, whatever else is installed here.
    os.environ["OODCORE_PLUGINS"] = ""
    old = {page: text for page, text in current().items() if text != page.read_text("utf-8")}
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


def filled(page: str) -> str:
    """A page with its generated parts written anew."""

    def write(found: re.Match[str]) -> str:
        text = PARTS[found[2]](*found[3].split()).strip("\n")
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
            line += [_short_citation(cls)] if "source" in header else []
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
            f"{_markdown(text)} The class is `{home}`."
        )
    return "\n\n".join(sections)


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
        lines.append([f"`{name}`", _markdown(text.split("\n\n")[0]).rstrip(".")])
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


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def signature(function: Callable[..., Any]) -> str:
    """A function's name and parameters as its file has them."""
    return f"{function.__name__}{inspect.signature(function)}".replace("'", "")


def called(name: str, thing: Any) -> str:
    """How a class or function is called; a property is read."""
    if isinstance(thing, property):
        return f"```text\n{name}\n```"
    parameters = []
    for one in inspect.signature(thing).parameters.values():
        if one.name != "self":
            plain = one.default is None or isinstance(one.default, str | bool | int | float | tuple)
            default = one.empty if one.default is one.empty else one.default if plain else ...
            parameters.append(one.replace(annotation=one.empty, default=default))
    shown = f"{name}{inspect.Signature(parameters)}".replace("=Ellipsis", "=...")
    hanging = textwrap.wrap(shown, 88, subsequent_indent=" " * (len(name) + 1))
    return "\n".join(["```text", *hanging, "```"])


def document(thing: Any) -> str:
    """A docstring whose sections (arguments, results, errors) are lists."""
    parts = re.split(r"^(Args|Returns|Raises):\n", f"{inspect.getdoc(thing) or ''}\n", flags=re.M)
    text = [_markdown(parts[0].strip())]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        listed, after = _indented(body)
        items = [listed] if title == "Returns" else re.split(r"^ {4}(?! )", listed, flags=re.M)
        lines = [" ".join(item.split()) for item in items if item.strip()]
        named = [re.sub(r"^([\w, ]+?): ", r"`\1`: ", line) for line in lines]
        text.append(f"*{title}*\n\n" + "\n".join(f"- {_markdown(line)}" for line in named))
        text.append(_markdown(after.strip()))
    return "\n\n".join(part for part in text if part)


def built_in(slot: str) -> Mapping[str, Any]:
    """The classes of a slot that oodcore itself brings, by kind."""
    from oodcore.plugins import OWN, registry

    found = registry.all(slot)
    own = {kind: registry.owner(cls) for kind, cls in found.items()}
    return {k: cls for k, cls in found.items() if (owner := own[k]) and owner.distribution == OWN}


def anchor(slot: str, kind: str) -> str:
    """Where in the page of methods a component is."""
    return f"{slot}-{kind}"


def prose(cls: type[Any]) -> tuple[str, str]:
    """What a docstring says before its fields, and after them."""
    text = inspect.cleandoc(cls.__doc__ or "")
    before, _, rest = f"{text}\n".partition("\nArgs:\n")
    return _markdown(before.strip()), _markdown(_indented(rest)[1].strip())


def sentence(cls: type[Any]) -> str:
    """The first sentence of a docstring, without what only the section can show."""
    first = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    found = re.match(r"(?:``.*?``|[^`])*?\.(?=\s|$)", first)
    return _markdown(found[0] if found else first).rstrip(".:")


def cited(paper: Any) -> str:
    """A full citation whose title is a link."""
    return f"{paper.authors}. [{paper.title}]({paper.url}). {paper.venue} {paper.year}."


def _indented(text: str) -> tuple[str, str]:
    """The lines at the beginning of a text that are indented or empty, and what comes after."""
    lines = text.splitlines(keepends=True)
    end = next(
        (i for i, line in enumerate(lines) if not line.startswith(("    ", "\n"))), len(lines)
    )
    return "".join(lines[:end]), "".join(lines[end:])


def _markdown(text: str) -> str:
    """A docstring's words as Markdown; only its code may hold what looks like a tag."""
    parts = re.split(r"(``.*?``)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("``") else part.replace("<", "\\<") for part in parts)


def _short_citation(cls: type[Any]) -> str:
    paper = cls.paper
    if paper is None:
        return ""
    first, *others = paper.authors.split(", ")
    names = first.split()[-1] + {0: "", 1: f" and {others[0].split()[-1]}" if others else ""}.get(
        len(others), " et al."
    )
    return f"[{names}, {paper.venue} {paper.year}]({paper.url})"


def _cell(text: str) -> str:
    """A text on one line; a bar in it is written so that every dialect of Markdown shows it."""

    def code(found: re.Match[str]) -> str:
        if "|" not in found[0]:
            return found[0]
        return f"<code>{html.escape(found[2].strip(), quote=False)}</code>"

    text = re.sub(r"(`+)(.+?)\1", code, " ".join(text.split()))
    return text.replace("|", "&#124;")


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

    try:
        return cls()
    except ValidationError:
        given = {name: _Part() for name, field in cls.model_fields.items() if field.is_required()}
        return cls.model_construct(**given)


def _reads(cls: type[Any]) -> str:
    names = ", ".join(sorted(_example(cls).needs()))
    inner = "what its parts read" if _has_parts(cls) else ""
    return ", ".join(filter(None, [names, inner])) or "nothing"


def _learns(cls: type[Any]) -> str:
    example = _example(cls)
    learnt = [f"[`{s.kind}`](#{anchor('statistic', s.kind)})" for s in example.statistics()]
    if getattr(example, "measures", False):
        learnt.append("its scores" if cls.held_out else "numbers of its own")
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
            _markdown(said.get(name, "")),
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
