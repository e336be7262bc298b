"""The extension API: what a plugin may bring.

A plugin is a module (or any object) with functions marked ``@oodcore.hookimpl``. Each hook is
called once, with a function that registers one component class. This is a whole plugin:

    import oodcore

    class Spread(oodcore.Scorer):
        \"\"\"By how much the largest logit is above their mean.\"\"\"

        kind = "spread"

        def needs(self):
            return frozenset({"logits"})

        def score(self, features, state):
            return features.logits.amax(dim=1) - features.logits.mean(dim=1)

    @oodcore.hookimpl
    def register_scorers(register):
        register(Spread)

and this is how it is found, in its ``pyproject.toml``:

    [project.entry-points.oodcore]
    spread = "oodcore_spread"
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("oodcore")
hookimpl = pluggy.HookimplMarker("oodcore")

Register = Callable[[type[Any]], None]


@hookspec(historic=True)
def register_extractors(register: Register) -> None:
    """Register the ways to get features out of a model: subclasses of ``Extractor``."""


@hookspec(historic=True)
def register_statistics(register: Register) -> None:
    """Register mergeable summaries of features: subclasses of ``Statistic``."""


@hookspec(historic=True)
def register_scorers(register: Register) -> None:
    """Register post-hoc scorers: subclasses of ``Scorer``, combinations among them."""


@hookspec(historic=True)
def register_shapers(register: Register) -> None:
    """Register what reshapes features before they are scored: subclasses of ``Shaper``."""


@hookspec(historic=True)
def register_regularizers(register: Register) -> None:
    """Register training-time regularizers: subclasses of ``Regularizer``."""


@hookspec(historic=True)
def register_sources(register: Register) -> None:
    """Register where rows come from: subclasses of ``Source``."""
