"""A plugin that is begun with new_plugin can be installed, and its tests pass as they are."""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from installation import install

from oodcore import Scorer, hookimpl, registry
from oodcore.errors import ConfigurationError
from oodcore.new_plugin import names, new_plugin


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_it_is_built_installed_and_its_tests_pass(tmp_path):
    made = new_plugin("my-2nd_method", tmp_path / "sources")
    installed = install(made, tmp_path)
    assert installed.files == ["oodcore_my_2nd_method.py"]
    shutil.copytree(made / "tests", tmp_path / "away" / "tests")
    shutil.copy(made / "pyproject.toml", tmp_path / "away")
    done = installed.run("-m", "pytest", "-p", "no:cacheprovider", cwd=tmp_path / "away")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    shown = "import oodcore; print(*oodcore.registry.plugins(), sep='\\n')"
    done = installed.run("-c", shown, cwd=tmp_path)
    assert "my-2nd-method (oodcore-my-2nd-method 0.1.0)" in done.stdout.splitlines()


def test_the_files(tmp_path):
    made = new_plugin("gap", tmp_path / "deep" / "gap")
    assert made == tmp_path / "deep" / "gap"
    written = contents(made)
    assert sorted(written) == [
        "README.md",
        "oodcore_gap.py",
        "pyproject.toml",
        "tests/test_gap.py",
    ]
    assert 'name = "oodcore-gap"' in written["pyproject.toml"]
    assert 'gap = "oodcore_gap"' in written["pyproject.toml"]
    assert "class Gap(oodcore.Scorer):" in written["oodcore_gap.py"]
    for path, text in written.items():
        assert "{{" not in text, path
        assert "}}" not in text, path
        assert text.endswith("\n"), path
        assert not text.endswith("\n\n"), path
    assert os.listdir(made.parent) == ["gap"]


def test_every_template_is_used(tmp_path):
    templates = files("oodcore") / "templates" / "plugin"
    assert len(list(templates.iterdir())) == len(contents(new_plugin("gap", tmp_path / "gap")))


def test_the_folder_is_named_after_the_distribution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert new_plugin("gap") == Path("oodcore-gap")
    assert (tmp_path / "oodcore-gap" / "pyproject.toml").is_file()


@pytest.mark.parametrize("existing", ["file", "folder", "link"])
def test_what_exists_is_refused_and_kept(tmp_path, existing):
    place = tmp_path / "place"
    if existing == "file":
        place.write_text("mine")
    elif existing == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="place exists; choose another folder"):
        new_plugin("gap", place)
    assert os.listdir(tmp_path) == ["place"]
    assert existing != "file" or place.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "distribution", "module", "kind", "cls"),
    [
        ("gap", "oodcore-gap", "oodcore_gap", "gap", "Gap"),
        ("my-gap", "oodcore-my-gap", "oodcore_my_gap", "my_gap", "MyGap"),
        ("my_gap2", "oodcore-my-gap2", "oodcore_my_gap2", "my_gap2", "MyGap2"),
        ("oodcore-gap", "oodcore-gap", "oodcore_gap", "gap", "Gap"),
        ("oodcore_gap", "oodcore-gap", "oodcore_gap", "gap", "Gap"),
    ],
)
def test_names_follow_from_one(name, distribution, module, kind, cls):
    called = names(name)
    assert (called.distribution, called.module, called.kind, called.cls) == (
        distribution,
        module,
        kind,
        cls,
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-",
        "oodcore-",
        "2gap",
        "Gap",
        "my gap",
        "my--gap",
        "gap-",
        "_gap",
        "../gap",
        "gäp",
        "a.b",
    ],
)
def test_names_that_cannot_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="a plugin cannot be called"):
        new_plugin(name)
    assert os.listdir(tmp_path) == []


def test_a_class_is_no_keyword():
    with pytest.raises(ConfigurationError, match="a class cannot be called None"):
        names("none")


def test_a_kind_that_is_taken_is_refused():
    class Taken(Scorer):
        """``0``."""

        kind = "taken_by_a_test"

        def needs(self):
            return frozenset({"logits"})

        def score(self, features, state):
            return features.logits[:, 0] * 0

    class Plugin:
        @staticmethod
        @hookimpl
        def register_scorers(register):
            register(Taken)

    with (
        registry.using(Plugin()),
        pytest.raises(ConfigurationError, match="there is a scorer 'taken_by_a_test' already"),
    ):
        names("taken-by-a-test")
    assert names("taken-by-a-test").kind == "taken_by_a_test"


def test_a_module_that_is_there_is_refused(tmp_path, monkeypatch):
    (tmp_path / "oodcore_there.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="a module oodcore_there already"):
        names("there")
