"""What docstrings, signatures, citations and tables look like in Markdown."""

from __future__ import annotations

import html
import inspect
import re
import textwrap
from typing import Any


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _cell(text: str) -> str:
    """A text on one line; a bar in it is written so that every dialect of Markdown shows it."""

    def code(found: re.Match[str]) -> str:
        if "|" not in found[0]:
            return found[0]
        return f"<code>{html.escape(found[2].strip(), quote=False)}</code>"

    text = re.sub(r"(`+)(.+?)\1", code, " ".join(text.split()))
    return text.replace("|", "&#124;")


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
    text = [marked(parts[0].strip())]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        listed, after = _indented(body)
        items = [listed] if title == "Returns" else re.split(r"^ {4}(?! )", listed, flags=re.M)
        lines = [" ".join(item.split()) for item in items if item.strip()]
        named = [re.sub(r"^([\w, ]+?): ", r"`\1`: ", line) for line in lines]
        text.append(f"*{title}*\n\n" + "\n".join(f"- {marked(line)}" for line in named))
        text.append(marked(after.strip()))
    return "\n\n".join(part for part in text if part)


def prose(cls: type[Any]) -> tuple[str, str]:
    """What a docstring says before its fields, and after them."""
    text = inspect.cleandoc(cls.__doc__ or "")
    before, _, rest = f"{text}\n".partition("\nArgs:\n")
    return marked(before.strip()), marked(_indented(rest)[1].strip())


def sentence(cls: type[Any]) -> str:
    """The first sentence of a docstring, without what only the section can show."""
    first = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    found = re.match(r"(?:``.*?``|[^`])*?\.(?=\s|$)", first)
    return marked(found[0] if found else first).rstrip(".:")


def cited(paper: Any) -> str:
    """A full citation whose title is a link."""
    return f"{paper.authors}. [{paper.title}]({paper.url}). {paper.venue} {paper.year}."


def short_citation(paper: Any) -> str:
    """First author, venue and year, as a link; nothing for None."""
    if paper is None:
        return ""
    names = [author.split()[-1] for author in paper.authors.split(", ")]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"[{who}, {paper.venue} {paper.year}]({paper.url})"


def _indented(text: str) -> tuple[str, str]:
    """The lines at the beginning of a text that are indented or empty, and what comes after."""
    lines = text.splitlines(keepends=True)
    end = next(
        (i for i, line in enumerate(lines) if not line.startswith(("    ", "\n"))), len(lines)
    )
    return "".join(lines[:end]), "".join(lines[end:])


def marked(text: str) -> str:
    """A docstring's words as Markdown; only its code may hold what looks like a tag."""
    parts = re.split(r"(``.*?``)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("``") else part.replace("<", "\\<") for part in parts)
