"""What every component owes its readers and its configuration files."""

from __future__ import annotations

import inspect
import json
import re

from pydantic import ValidationError

from oodcore.component import Component, Paper, Settings, canonical, faults
from oodcore.errors import ConfigurationError
from oodcore.plugins import registry
from oodcore.testing.check import registered

_FORMULA = re.compile(r"``[^`]+``|^ {4,}\S.*[=(].*$", re.MULTILINE)


def documented(component: Component) -> None:
    """A docstring with every field in it (and a formula, for a method), and a paper or None."""
    cls = type(component)
    text = inspect.cleandoc(cls.__doc__ or "")
    if not text or text == inspect.cleandoc(Settings.__doc__ or ""):
        raise AssertionError(
            f"{cls.__name__} has no docstring; say what it computes, and in what units"
        )
    if component.slot != "statistic" and not _FORMULA.search(text):
        raise AssertionError(
            f"the docstring of {cls.__name__} shows no formula; write it in ``double backquotes``, "
            "or indented on a line of its own"
        )
    own = [name for name in cls.__annotations__ if name in cls.model_fields]
    if missing := [name for name in own if not re.search(rf"\b{name}\b[^:\n]*:", text)]:
        raise AssertionError(
            f"the docstring of {cls.__name__} does not explain {', '.join(missing)}; add "
            "'Args:' with a line for each field"
        )
    paper = cls.paper
    if paper is None:
        return
    if not isinstance(paper, Paper):
        raise AssertionError(f"{cls.__name__}.paper is an oodcore.Paper or None, not {paper!r:.80}")
    empty = [name for name in ("title", "authors", "venue") if not getattr(paper, name).strip()]
    if empty or not 1800 < paper.year < 2200 or not re.match(r"https?://\S+$", paper.url):
        raise AssertionError(
            f"the paper's {', '.join(empty) or 'year or url'} cannot be: {paper!r}"
        )


def configured(component: Component) -> None:
    """A configuration says everything: dumped, written as JSON and read again, it is the same."""
    cls = type(component)
    base = next(c for c in reversed(cls.__mro__) if "slot" in vars(c) and hasattr(c, "slot"))
    if fault := faults(cls, base):
        raise AssertionError(fault)
    text = json.dumps(component.dump())
    with registered(component):
        again = registry.build(component.slot, json.loads(text))
        written = registry.build(component.slot, json.loads(canonical(component)))
    for other in (again, written):
        if (
            other != component
            or hash(other) != hash(component)
            or canonical(other) != canonical(component)
        ):
            raise AssertionError(
                f"{text} is read as {other!r}, which is not {component!r}; a component is nothing "
                "but its fields: keep no private attributes, and change no field when validating"
            )
    try:
        cls.model_validate({**component.dump(), "no_such_field": 1})
    except ValidationError:
        pass
    else:
        raise AssertionError('it takes fields that it does not have; keep extra="forbid"')
    if type(component).model_fields:
        name = next(iter(cls.model_fields))
        try:
            setattr(component, name, getattr(component, name))
        except (ValidationError, ConfigurationError):
            return
        raise AssertionError("its fields can be assigned to; keep it frozen")
