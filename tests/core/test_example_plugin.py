"""The example plugin is a distribution like any third party's: it is built, installed, used."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from installation import Installation, install

SOURCE = Path(__file__).parents[2] / "docs" / "example-plugin"

COMMAND = "import sys; from oodcore.cli import main; sys.exit(main())"
BEFORE = {found.name: found.version for found in importlib.metadata.distributions()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installation:
    return install(SOURCE, tmp_path_factory.mktemp("example"))


@pytest.fixture
def work(tmp_path) -> Path:
    """The plugin's tests and configurations, away from its sources."""
    for name in ("tests", "pyproject.toml", "detector.yaml", "training.yaml"):
        copy = shutil.copytree if (SOURCE / name).is_dir() else shutil.copy
        copy(SOURCE / name, tmp_path / name)
    return tmp_path


def test_the_wheel_holds_the_package_alone(installed):
    assert installed.files == [
        "oodcore_example/__init__.py",
        "oodcore_example/class_directions.py",
        "oodcore_example/confidence_penalty.py",
        "oodcore_example/nearest_direction.py",
        "oodcore_example/typical_range.py",
    ]


def test_its_own_tests_pass_where_it_is_installed(installed, work):
    done = installed.run("-m", "pytest", "-p", "no:cacheprovider", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_a_command_uses_it_by_its_kinds(installed, work):
    done = installed.run("-c", COMMAND, "fit", "detector.yaml", "--out", "artifact", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((work / "artifact" / "detector.json").read_text())
    assert document["made_with"]["plugins"]["oodcore-example"] == "0.1.0"
    assert document["configuration"]["scorer"] == {"kind": "nearest_direction"}
    assert document["configuration"]["shapers"] == [{"kind": "typical_range", "width": 2.5}]


def test_without_it_the_configuration_says_what_is_missing(installed, work):
    done = installed.run("-c", COMMAND, "check", "detector.yaml", cwd=work, OODCORE_PLUGINS="")
    assert done.returncode == 2
    assert "unknown scorer 'nearest_direction'" in done.stderr
    assert "unknown shaper 'typical_range'" in done.stderr


def test_the_environment_stays_as_it_was(installed):
    assert {d.name: d.version for d in importlib.metadata.distributions()} == BEFORE
    assert not any((SOURCE / name).exists() for name in ("dist", "build"))
