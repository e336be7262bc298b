"""oodcore finds inputs that a trained model should not be trusted on.

Everything here is imported on first use: ``import oodcore`` alone imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from oodcore.component import Component, Paper, Slot
    from oodcore.data import Source
    from oodcore.detector import Detector, fit, load
    from oodcore.ensemble import Ensemble
    from oodcore.evaluation import benchmark
    from oodcore.extractor import Extractor, FeatureModel
    from oodcore.features import Features, Head
    from oodcore.hookspecs import hookimpl
    from oodcore.index import Index
    from oodcore.plugins import registry
    from oodcore.regularizer import Memory, Regularizer, Run, Step
    from oodcore.rows import Rows
    from oodcore.scorer import Combination, Scorer, Shaper
    from oodcore.statistics import Shape, Statistic
    from oodcore.store import FeatureStore

_HOMES = {
    "component": ("Component", "Paper", "Slot"),
    "data": ("Source",),
    "detector": ("Detector", "fit", "load"),
    "ensemble": ("Ensemble",),
    "evaluation": ("benchmark",),
    "extractor": ("Extractor", "FeatureModel"),
    "features": ("Features", "Head"),
    "hookspecs": ("hookimpl",),
    "index": ("Index",),
    "plugins": ("registry",),
    "regularizer": ("Memory", "Regularizer", "Run", "Step"),
    "rows": ("Rows",),
    "scorer": ("Combination", "Scorer", "Shaper"),
    "statistics": ("Shape", "Statistic"),
    "store": ("FeatureStore",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Combination",
    "Component",
    "Detector",
    "Ensemble",
    "Extractor",
    "FeatureModel",
    "FeatureStore",
    "Features",
    "Head",
    "Index",
    "Memory",
    "Paper",
    "Regularizer",
    "Rows",
    "Run",
    "Scorer",
    "Shape",
    "Shaper",
    "Slot",
    "Source",
    "Statistic",
    "Step",
    "benchmark",
    "fit",
    "hookimpl",
    "load",
    "registry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oodcore' has no attribute '{name}'")
    value = getattr(import_module(f"oodcore.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
