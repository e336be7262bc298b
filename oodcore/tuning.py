"""Tuning: values of fields, chosen on validation rows among those that methods declare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from oodcore.cache import Cache
from oodcore.component import Component
from oodcore.config import DetectorConfig, read, validate
from oodcore.data import Adapt
from oodcore.document import Route
from oodcore.errors import ConfigurationError
from oodcore.metrics import SEPARATION
from oodcore.packing import versions
from oodcore.passes import Classes
from oodcore.plugins import registry
from oodcore.samplers import Grid, Values, size_of, tree
from oodcore.scorer import Scorer, Shaper
from oodcore.space import Space
from oodcore.trials import Trial, Trials, Tuning

__all__ = ["Trial", "Tuned", "Tuning", "choose", "searched", "tune", "tuning_of"]

log = logging.getLogger("oodcore")

TRIALS = 50
"""How many sets of values are tried if nobody says."""
PATIENCE = 20
"""How many draws in a row may be sets of values that were tried before."""

OnProgress = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and what it was chosen from.

    Args:
        scorer: with the best values.
        shapers: with the best values.
        best: the trial with the best value, of several the first.
        trials: all of them; the first is the configuration as it was written.
        searched: the search spaces, by place.
        sampler: ``grid`` where everything was tried, else ``tpe``.
        metric: what is best.
        seed: of the sampler.
        data: the rows, in words.
        versions: of the distributions that took part.
    """

    scorer: Scorer
    shapers: tuple[Shaper, ...]
    best: Trial
    trials: tuple[Trial, ...]
    searched: Mapping[str, Space]
    sampler: str
    metric: str
    seed: int
    data: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def values(self) -> dict[Route, Any]:
        """The chosen values by place, with the kinds of all components on the way."""
        parts = dict(_parts(self.scorer, self.shapers))
        found: dict[Route, Any] = {}
        for route in searched(self.scorer, self.shapers):
            for end in range(1, len(route)):
                if route[:end] in parts:
                    place: Route = (*route[:end], "kind")
                    found[place] = type(parts[route[:end]]).kind
            found[route] = getattr(parts[route[:-1]], str(route[-1]))
        return found

    def dump(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "metric": self.metric,
            "best": self.best.value,
            "written": self.trials[0].value,
            "chosen": dict(self.best.values),
            "sampler": self.sampler,
            "seed": self.seed,
            "searched": {place: space.dump() for place, space in self.searched.items()},
            "data": dict(self.data),
            "versions": dict(self.versions),
            "trials": [trial.dump() for trial in self.trials],
        }


def tune(
    model: Any = None,
    *,
    scorer: Any,
    shapers: Sequence[Any] = (),
    train: Any,
    validation: Any = None,
    ood: Mapping[str, Any] | None = None,
    held_out: Any = None,
    metric: str = "auroc",
    trials: int = TRIALS,
    classes: Classes = None,
    device: str = "auto",
    batch_size: int = 256,
    num_workers: int = 0,
    seed: int = 0,
    adapt: Adapt | None = None,
    cache: str | Path | Cache | None = None,
) -> Tuned:
    """Choose values of a scorer's and shapers' fields on validation rows.

    The model sees each row once, and trials work on its features; for methods that pass through
    the model again it is asked for those passes alone. What is written is tried first, so that the
    choice is never worse than it on these rows.

    Args:
        model: as in ``Detector``.
        scorer: as in ``Detector``; scorers inside it are searched too.
        shapers: as in ``Detector``.
        train: in-distribution rows to fit on; data as in ``Detector.fit``.
        validation: in-distribution rows to choose on. Left out, those of ``held_out``, or a tenth
            of ``train`` that nothing is fitted on.
        ood: rows that are not in-distribution, by name; never those of a benchmark. Left out,
            Gaussian noise in the shape of the inputs.
        held_out: as in ``Detector.fit``.
        metric: ``auroc``, ``fpr95_id``, ``fpr95_ood``, ``aupr_id`` or ``aupr_ood``; its mean over
            ``ood`` decides.
        trials: how many sets of values are tried at most. Where there are no more, all are.
        classes: as in ``Detector.fit``.
        device: as in ``Detector``; so are ``batch_size``, ``num_workers``, ``adapt`` and ``cache``.
        seed: as in ``Detector``; the sampler's too.

    Raises:
        ConfigurationError: nothing to search, rows that are fitted on and chosen on, no images to
            make noise like.
        ExtraError: optuna is not installed.
        OodcoreError: that of the first trial, where no set of values works.
    """
    tuning = Tuning(
        model,
        registry.build("scorer", scorer),  # type: ignore[arg-type]
        tuple(registry.build("shaper", shaper) for shaper in shapers),  # type: ignore[misc]
        train,
        validation,
        ood,
        held_out,
        metric,
        classes,
        options={
            "device": device,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "seed": seed,
            "adapt": adapt,
            "cache": cache,
        },
    )
    return choose(tuning, trials)


def tuning_of(config: Any) -> Tuning:
    """What a detector's YAML file (its path) or a mapping says is to be tuned.

    Raises:
        ConfigurationError: names the file, the line and the field; no ``train``.
    """
    document = read(config) if isinstance(config, str | Path) else config
    checked = validate(DetectorConfig, document)
    if checked.train is None:
        raise ConfigurationError("train: is needed to tune; name the rows to fit on")
    rows = checked.tune
    return Tuning(
        checked.extractor,
        checked.scorer,
        checked.shapers,
        checked.train,
        None if rows is None else rows.id,
        None if rows is None else rows.ood,
        checked.held_out,
        "auroc" if rows is None else rows.metric,
        taken=tuple((checked.ood or {}).values()),
        options={
            "device": checked.device,
            "batch_size": checked.batch_size,
            "num_workers": checked.num_workers,
            "seed": checked.seed,
            "cache": checked.cache,
        },
    )


def searched(scorer: Scorer, shapers: Iterable[Shaper] = ()) -> dict[Route, Space]:
    """What scorer and shapers, and all that is inside them, declare to be worth trying, by place:
    ``("scorer", "k")``, ``("shapers", 0, "percentile")``, ``("scorer", "scorers", 1, "k")``."""
    return {
        (*route, name): space
        for route, part in _parts(scorer, shapers)
        for name, space in type(part).search.items()
    }


def choose(tuning: Tuning, trials: int = TRIALS, on_progress: OnProgress | None = None) -> Tuned:
    """Try values, and choose the best.

    Args:
        tuning: what, and on what.
        trials: how many sets of values are tried at most.
        on_progress: called after every trial: how many, of how many, and the best value so far.

    Raises:
        ConfigurationError, ExtraError, OodcoreError: as ``tune``.
    """
    fields = searched(tuning.scorer, tuning.shapers)
    _refuse(tuning, fields, trials)
    parts = dict(_parts(tuning.scorer, tuning.shapers))
    written = {route: getattr(parts[route[:-1]], str(route[-1])) for route in fields}
    size = size_of(fields, written)
    seed = tuning.options.get("seed", 0)
    done: dict[tuple[Any, ...], tuple[Values, Trial]] = {}
    limit = int(min(size, trials))
    with ExitStack() as stack:
        sampler = Grid(fields) if size <= trials else stack.enter_context(tree(fields, seed))
        at_work = Trials(tuning, stack)
        values: Values = written
        repeated = 0
        while True:
            key = tuple((isinstance(value, bool), value) for value in values.values())
            repeated = repeated + 1 if key in done else 0
            if key not in done:
                made = partial(_with, tuning, values)
                done[key] = values, at_work.run(_named(values), made)
                if on_progress is not None:
                    best = max((trial for _, trial in done.values()), key=at_work.merit)
                    on_progress(
                        len(done), limit, {} if best.value is None else {"best": best.value}
                    )
            sampler.tell(at_work.merit(done[key][1]))
            if len(done) >= limit or repeated >= PATIENCE:
                break
            values = sampler.draw()
        chosen, best = max(done.values(), key=lambda item: at_work.merit(item[1]))
        if best.value is None:
            assert at_work.first_error is not None
            raise at_work.first_error
    for text in best.warnings:
        log.warning("with the chosen values: %s", text)
    scorer, shapers = _with(tuning, chosen)
    return Tuned(
        scorer,
        shapers,
        best,
        tuple(trial for _, trial in done.values()),
        _named(fields),
        sampler.name,
        tuning.metric,
        seed,
        at_work.data,
        {**versions([scorer, *shapers]), **sampler.versions},
    )


def _refuse(tuning: Tuning, fields: Mapping[Route, Space], trials: int) -> None:
    if not fields:
        kinds = [type(part).kind for _, part in _parts(tuning.scorer, tuning.shapers)]
        verb = "declares" if len(kinds) == 1 else "declare"
        raise ConfigurationError(
            f"there is nothing to search: {', '.join(kinds)} {verb} no values worth trying"
        )
    if tuning.metric not in SEPARATION:
        raise ConfigurationError(f"metric is one of {', '.join(SEPARATION)}, not {tuning.metric!r}")
    if trials < 1:
        raise ConfigurationError(f"trials must be at least 1, not {trials}")


def _parts(scorer: Scorer, shapers: Iterable[Shaper]) -> Iterator[tuple[Route, Component]]:
    """All components, outer ones before those inside them, each with its place."""
    for number, shaper in enumerate(shapers):
        yield from _within(shaper, ("shapers", number))
    yield from _within(scorer, ("scorer",))


def _within(part: Component, at: Route) -> Iterator[tuple[Route, Component]]:
    yield at, part
    for path, inner in part.components():
        yield from _within(inner, (*at, *(int(s) if s.isdigit() else s for s in path)))


def _with(tuning: Tuning, values: Values) -> tuple[Scorer, tuple[Shaper, ...]]:
    """Scorer and shapers with other values.

    Raises:
        ConfigurationError: values that do not go together.
    """
    dumps: dict[str, Any] = {
        "scorer": tuning.scorer.dump(),
        "shapers": [shaper.dump() for shaper in tuning.shapers],
    }
    for route, value in values.items():
        inner: Any = dumps
        for step in route[:-1]:
            inner = inner[step]
        inner[route[-1]] = value
    scorer: Any = registry.build("scorer", dumps["scorer"])
    shapers: Any = tuple(registry.build("shaper", dump) for dump in dumps["shapers"])
    return scorer, shapers


def _named(values: Mapping[Route, Any]) -> dict[str, Any]:
    return {_dotted(route): value for route, value in values.items()}


def _dotted(route: Route) -> str:
    return ".".join(map(str, route))
