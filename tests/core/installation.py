"""Distributions built and installed into a fresh place, beside the environment of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")


@dataclass(frozen=True)
class Installation:
    """A distribution that was built from its sources and installed.

    Args:
        wheel: the file that was built.
        site: the folder it was installed into, to be put on the path.
    """

    wheel: Path
    site: Path

    @property
    def files(self) -> list[str]:
        """What is in the wheel, besides its metadata."""
        names = zipfile.ZipFile(self.wheel).namelist()
        return sorted(name for name in names if ".dist-info/" not in name)

    def run(self, *command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        """Run Python with what was installed on its path; no plugin may fail silently."""
        settings = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OODCORE_STRICT_PLUGINS": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        return subprocess.run(
            [sys.executable, *command], cwd=cwd, env=settings, capture_output=True, text=True
        )


def install(source: Path, folder: Path) -> Installation:
    """Build a wheel of a distribution and install it, without network, under ``folder``."""
    wheels, site = folder / "wheels", folder / "site"
    build = ("-m", "build", "--no-isolation", "--wheel", "--outdir", str(wheels), str(source))
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = wheels.glob("*.whl")
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(site))
    done = subprocess.run([*PIP, "install", *options, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Installation(wheel, site)
