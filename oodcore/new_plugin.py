"""A plugin to begin with: the files of a distribution with one scorer and its tests."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from importlib.resources import files
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from oodcore.errors import ConfigurationError
from oodcore.plugins import registry

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_PREFIX = re.compile(r"oodcore[-_]")


@dataclass(frozen=True)
class Names:
    """What a plugin's parts are called, from its name.

    Args:
        distribution: ``oodcore-my-method``.
        module: ``oodcore_my_method``.
        entry: the entry point, ``my-method``.
        kind: ``my_method``.
        cls: ``MyMethod``.
    """

    distribution: str
    module: str
    entry: str
    kind: str
    cls: str


def names(name: str) -> Names:
    """The names that follow from a plugin's name, with or without ``oodcore-`` in front.

    Raises:
        ConfigurationError: a name that cannot be a distribution's, a module's or a kind's, or that
            is taken.
    """
    bare = _PREFIX.sub("", name, count=1)
    if not _NAME.fullmatch(bare):
        raise ConfigurationError(
            f"a plugin cannot be called {name!r}: write a word of lower-case letters and digits "
            "that begins with a letter, or several joined by '-', such as 'my-method'"
        )
    kind, entry = bare.replace("-", "_"), bare.replace("_", "-")
    cls = "".join(word.capitalize() for word in kind.split("_"))
    module = f"oodcore_{kind}"
    if iskeyword(cls):
        raise ConfigurationError(f"a class cannot be called {cls}; give the plugin another name")
    if (taken := registry.find("scorer", kind)) is not None:
        owner = registry.owner(taken)
        raise ConfigurationError(
            f"there is a scorer '{kind}' already, of plugin {owner}; give the plugin another name"
        )
    if find_spec(module) is not None:
        raise ConfigurationError(
            f"there is a module {module} already; give the plugin another name"
        )
    return Names(f"oodcore-{entry}", module, entry, kind, cls)


def new_plugin(name: str, folder: str | Path | None = None) -> Path:
    """Write a distribution that can be installed, and whose tests pass as they are.

    Args:
        name: of the method, such as ``my-method``.
        folder: where to; ``oodcore-<name>`` in the working directory if not given.

    Returns:
        The folder.

    Raises:
        ConfigurationError: a name that cannot be or is taken, or a folder that exists.
    """
    called = names(name)
    target = Path(called.distribution if folder is None else folder)
    if os.path.lexists(target):
        raise ConfigurationError(f"{target} exists; choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for path, text in _rendered(called).items():
            (fresh / path).parent.mkdir(exist_ok=True)
            (fresh / path).write_text(text, encoding="utf-8")
        fresh.chmod(0o755)
        fresh.rename(target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return target


def _rendered(called: Names) -> dict[str, str]:
    """The text of each file, by its path in the distribution."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    templates = files("oodcore") / "templates" / "plugin"
    places = {
        "pyproject.toml.jinja": "pyproject.toml",
        "README.md.jinja": "README.md",
        "module.py.jinja": f"{called.module}.py",
        "test_module.py.jinja": f"tests/test_{called.kind}.py",
    }
    return {
        path: environment.from_string((templates / template).read_text(encoding="utf-8")).render(
            asdict(called)
        )
        for template, path in places.items()
    }
