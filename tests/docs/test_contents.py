"""The table of contents: every method, hook and plugin is declared, cited and documented."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

from oodcore import hookspecs
from oodcore.plugins import SLOTS, registry
from oodcore.scorer import Combination
from oodcore.testing.description import documented

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NO_PAPER = {
    ("scorer", "entropy"): "a measure of uncertainty older than any paper on OOD detection",
    ("scorer", "margin"): "a measure of uncertainty older than any paper on OOD detection",
}
"""Methods without a paper of their own, and why; combinations are arithmetic."""


def built_in() -> list[tuple[str, str]]:
    kinds = [(slot, kind) for slot in SLOTS for kind in registry.all(slot)]
    owners = {pair: registry.owner(registry.get(*pair)) for pair in kinds}
    return [pair for pair in kinds if (o := owners[pair]) and o.distribution == "oodcore"]


def test_every_kind_is_in_the_table_and_has_a_section() -> None:
    page = (DOCS / "methods.md").read_text("utf-8")
    for slot, kind in built_in():
        assert re.search(rf"^\| \[`{kind}`\]\(#{slot}-{kind}\) \| \S", page, re.MULTILINE), kind
        assert f"### {kind} {{ #{slot}-{kind} }}" in page


@pytest.mark.parametrize(("slot", "kind"), built_in())
def test_component_says_what_it_is(slot: str, kind: str) -> None:
    documented(registry.get(slot, kind).model_construct())


@pytest.mark.parametrize(
    ("slot", "kind"), [p for p in built_in() if p[0] in ("scorer", "shaper", "regularizer")]
)
def test_method_cites_its_paper(slot: str, kind: str) -> None:
    cls = registry.get(slot, kind)
    if not issubclass(cls, Combination):
        assert (cls.paper is None) == ((slot, kind) in NO_PAPER), "give a paper, or the reason"


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (DOCS / "plugins.md").read_text("utf-8")
    hooks = [f for name, f in vars(hookspecs).items() if name.startswith("register_")]
    assert len(hooks) == len(SLOTS)
    for hook in hooks:
        parameters = [
            f"{p.name}: {p.annotation}" for p in inspect.signature(hook).parameters.values()
        ]
        assert f"{hook.__name__}({', '.join(parameters)}) -> None" in page


def declared() -> dict[str, str]:
    """The entry points of pyproject.toml; Python 3.10 cannot read TOML by itself."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    _, _, section = text.partition("[project.entry-points.oodcore]\n")
    return dict(re.findall(r'^(\w+) = "(.+)"$', section.partition("\n[")[0], re.MULTILINE))


def test_every_plugin_module_is_declared() -> None:
    root = ROOT / "plugins" / "oodcore_plugins"
    marked = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        if any("hookimpl" in ast.unparse(d) for f in functions for d in f.decorator_list):
            parts = path.relative_to(root.parent).with_suffix("").parts
            marked.add(".".join(parts).removesuffix(".__init__"))
    assert marked
    assert marked == {m for m in declared().values() if m.startswith("oodcore_plugins")}


def test_installed_metadata_is_that_of_pyproject() -> None:
    distribution = importlib.metadata.distribution("oodcore")
    points = {e.name: e.value for e in distribution.entry_points if e.group == "oodcore"}
    assert points == declared(), "run pip install --no-deps -e ."
    assert list(declared()) == sorted(declared())
