"""What an artifact says of a detector or an ensemble."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from oodcore.component import Component
from oodcore.decision import Decision
from oodcore.errors import NotFittedError, PluginError
from oodcore.plugins import registry
from oodcore.scorer import Scorer, Shaper

if TYPE_CHECKING:
    from oodcore.detector import Detector
    from oodcore.ensemble import Ensemble


def versions(components: Iterable[Component]) -> dict[str, str]:
    """The version of every distribution that brought one of these components, or a statistic that
    one of them is fitted on; and of oodcore."""
    found = {"oodcore": _own_version()}
    for component in components:
        for part in (*component.walk(), *_statistics(component)):
            plugin = registry.owner(part)
            if plugin is not None:
                found[plugin.distribution] = plugin.version
    return dict(sorted(found.items()))


def _statistics(component: Component) -> Iterator[Component]:
    """The statistics that a component, and all inside it, are fitted on."""
    for part in component.walk():
        if isinstance(part, Scorer | Shaper):
            for statistic in part.statistics():
                yield from statistic.walk()


def surroundings(components: Iterable[Component]) -> dict[str, Any]:
    """What results and artifacts record of where they were made."""
    return {
        "plugins": versions(components),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _own_version() -> str:
    try:
        return version("oodcore")
    except PackageNotFoundError:
        from oodcore import __version__

        return __version__


def packed_detector(detector: Detector, *, store: bool) -> dict[str, Any]:
    """A fitted detector as plain values and states."""
    return {"made_with": surroundings(_components(detector)), **_packed(detector, store=store)}


def packed_ensemble(ensemble: Ensemble, *, store: bool) -> dict[str, Any]:
    """A fitted ensemble as plain values and states.

    Raises:
        NotFittedError: a member, or the combination, has nothing learnt to save.
    """
    if ensemble.state is None:
        raise NotFittedError("this ensemble normalises scores: call fit first")
    members = {name: _packed(member, store=store) for name, member in ensemble.members.items()}
    components = [c for member in ensemble.members.values() for c in _components(member)]
    return {
        "made_with": surroundings([*components, ensemble.combination]),
        "members": [{"name": name, "detector": member} for name, member in members.items()],
        "combine": ensemble.combination.dump(),
        "components": _origins([ensemble.combination]),
        "seed": ensemble.seed,
        "state": ensemble.state,
        "calibration": _packed_calibration(ensemble),
    }


def _packed_calibration(decision: Decision) -> dict[str, Any] | None:
    if decision.calibration is None:
        return None
    scores = torch.from_numpy(decision.calibration.scores.copy())
    return {"scores": scores, "false_alarm_rate": decision.false_alarm_rate}


def _origins(components: Iterable[Component]) -> list[list[str]]:
    """Slot, kind, distribution and version of every component, each once."""
    origins = []
    for part in (part for component in components for part in component.walk()):
        plugin = registry.owner(part)
        if plugin is None:
            raise PluginError(
                f"the {part.slot} '{part.kind}' is not registered, so nothing could load it again: "
                "install the plugin that brings it, or use registry.using(plugin)"
            )
        origins.append((part.slot, part.kind, plugin.distribution, plugin.version))
    return [list(origin) for origin in dict.fromkeys(origins)]


def _components(detector: Detector) -> list[Component]:
    extractor = [] if detector.extractor is None else [detector.extractor]
    return [*extractor, *detector.shapers, detector.scorer]


def _packed(detector: Detector, *, store: bool) -> dict[str, Any]:
    learnt = detector.ready()
    weights = detector.weights() or detector.fingerprint
    if detector.fingerprint not in (None, weights):
        raise NotFittedError(
            "the model's weights are not those that this detector was fitted on: fit it again "
            "before it is saved"
        )
    if store and detector.fitting is None and not detector.recipe.fixed:
        raise NotFittedError(
            "this detector was loaded without its store, so there is none to save: leave "
            "store=True away, or fit again"
        )
    parts = _components(detector)
    if store:
        parts += [statistic for part in parts for statistic in _statistics(part)]
    return {
        "configuration": {
            "extractor": None if detector.extractor is None else detector.extractor.dump(),
            "shapers": [shaper.dump() for shaper in detector.shapers],
            "scorer": detector.scorer.dump(),
            "device": detector.device,
            "batch_size": detector.batch_size,
            "num_workers": detector.num_workers,
            "seed": detector.recipe.seed,
        },
        "components": _origins(parts),
        "fingerprint": weights,
        "shape": dict(detector.shape),
        "learnt": {
            "scorer": learnt.scorer,
            "shapers": list(learnt.shapers),
            "record": dict(learnt.record),
        },
        "calibration": _packed_calibration(detector),
        "store": _packed_fitting(detector) if store else None,
    }


def _packed_fitting(detector: Detector) -> dict[str, Any] | None:
    fitting = detector.fitting
    if fitting is None:
        return None
    if len(fitting.recipes) > 1:
        fitting = fitting.only(detector.name)
    return fitting.packed()
