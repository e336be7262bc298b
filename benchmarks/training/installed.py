"""Every installed regularizer, and SURE whole, as the regularizers of a short run on digits."""

from __future__ import annotations

from typing import Any

from recipes import Config, regularizers

from oodcore.plugins import registry

HASTY: dict[str, Config] = {
    "center": {"weights": [0.01, 0.05], "starts": [0, 1]},
    "swa": {"start": 1, "anneal": 1},
    "vos": {"start": 0, "queue": 8},
}
"""Fields of those that would begin behind the end of a short run."""
WHOLE = "SURE, whole"


def runs() -> dict[str, list[Config]]:
    """By name, the regularizers of a run of three epochs; those that need a field are left out."""
    found: dict[str, list[Config]] = {}
    for kind, cls in registry.all("regularizer").items():
        if any(field.is_required() for field in cls.model_fields.values()):
            continue
        found[kind] = [{"kind": kind, **HASTY.get(kind, {})}]
    found[WHOLE] = regularizers("sure", epochs=3, rate=0.05)
    return found


def needs_outliers(parts: list[Config]) -> bool:
    """Whether one of some regularizers reads outliers."""
    kinds = registry.all("regularizer")
    return any(getattr(kinds[part["kind"]], "needs_outliers", False) for part in parts)


def training(parts: list[Config], *, network: Config, size: int, batch: int, **more: Any) -> Config:
    """A run on the first six digits, of images of ``size`` pixels."""
    config = {
        "network": network,
        "train": {"kind": "digits", "split": "train", "classes": list(range(6)), "size": size},
        "regularizers": parts,
        "epochs": 3,
        "batch_size": batch,
        "optimizer": {"kind": "sgd", "lr": 0.05, "momentum": 0.9},
        "gradient_clip": 1.0,
        "device": "cpu",
        **more,
    }
    if needs_outliers(parts):
        config["outliers"] = {"kind": "noise", "shape": [1, size, size], "rows": 200}
    return config
