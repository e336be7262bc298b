"""Citing: a paper as bibliographies take it."""

from __future__ import annotations

import re
import unicodedata

from oodcore.component import Paper

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}


def bibtex(paper: Paper) -> str:
    """A paper as an entry of a bibliography, in BibTeX's syntax and in UTF-8.

    Its type is ``misc``, for a paper's record does not say whether its venue is a journal or a
    conference; the key is the first author's last name, the year and the title's first long word.
    """
    first, *_ = authors = paper.authors.split(", ")
    words = [_plain(word) for word in paper.title.split()]
    word = next((word for word in words if len(word) > 3), "".join(words[:1]))
    fields = {
        "author": _escaped(" and ".join(authors)),
        "title": f"{{{_escaped(paper.title)}}}",
        "howpublished": _escaped(paper.venue),
        "year": str(paper.year),
        "url": re.sub(r"[{}\\\s]", "", paper.url),
    }
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    key = f"{_plain(first.rpartition(' ')[2])}{paper.year}{word}"
    return f"@misc{{{key},\n{lines}}}"


def _plain(word: str) -> str:
    """The letters and digits of a word, without accents and in lower case."""
    bare = unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", bare)


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(mark, mark) for mark in text)
