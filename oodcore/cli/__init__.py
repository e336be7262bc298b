"""The command line."""

from __future__ import annotations

from oodcore.cli.program import main, run

__all__ = ["main", "run"]
