"""The checks of scorers and of shapers."""

from __future__ import annotations

from typing import Any

import torch

from oodcore.scorer import Scorer, Shaper, check_recipe
from oodcore.testing import laws, learning, numerics
from oodcore.testing.check import Check, Law, checks_of, examine, instance
from oodcore.testing.description import configured, documented
from oodcore.testing.subject import Subject
from oodcore.testing.toy import Network

FLOOR = 0.8
"""The AUROC of known against unknown rows of the toy problem that a right score reaches."""


def scorer_checks(
    *components: Any, floor: float | None = FLOOR, network: Network | None = None
) -> list[Check]:
    """The checks of scorers, one by one, for ``pytest.mark.parametrize``.

    Args:
        components: instances, or classes without required fields.
        floor: the least AUROC on the toy problem, whose unknown rows are weaker, flatter and use
            units that known rows do not; None for a scorer that it says nothing about.
        network: makes another network than the toy network, for layers or a head that it has not.
    """
    return _checks(Scorer, components, floor, network)


def shaper_checks(
    *components: Any, floor: float | None = FLOOR, network: Network | None = None
) -> list[Check]:
    """The checks of shapers, one by one, for ``pytest.mark.parametrize``.

    Args:
        components: instances, or classes without required fields.
        floor: the least AUROC of the largest logit of shaped features on the toy problem, or None.
        network: as in ``scorer_checks``.
    """
    return _checks(Shaper, components, floor, network)


def check_scorer(
    scorer: Any, *, floor: float | None = FLOOR, network: Network | None = None
) -> None:
    """Examine a scorer; arguments as in ``scorer_checks``.

    Raises:
        AssertionError: lists every law that it breaks, and what to do.
    """
    examine(scorer_checks(scorer, floor=floor, network=network))


def check_shaper(
    shaper: Any, *, floor: float | None = FLOOR, network: Network | None = None
) -> None:
    """Examine a shaper; arguments as in ``shaper_checks``.

    Raises:
        AssertionError: lists every law that it breaks, and what to do.
    """
    examine(shaper_checks(shaper, floor=floor, network=network))


def _checks(
    base: type[Scorer] | type[Shaper],
    components: tuple[Any, ...],
    floor: float | None,
    network: Network | None,
) -> list[Check]:
    found: list[Check] = []
    for component in components:
        subject = Subject(instance(component, base), floor, network)
        check_recipe(subject.recipe.scorer, subject.recipe.shapers)
        found += checks_of(subject.part, subject, _laws(subject))
    return found


def _laws(subject: Subject) -> dict[str, Law[Subject]]:
    """The laws that hold for it, and can be examined on this machine."""
    part = subject.part
    chosen: dict[str, Law[Subject]] = {
        "documentation": lambda subject: documented(subject.part),
        "configuration": lambda subject: configured(subject.part),
        "needs": laws.needs,
        "output": laws.output,
        "independence of the batch": laws.rows_apart,
        "unchanged input": laws.unchanged,
        "few of everything": numerics.few,
        "odd rows": numerics.odd,
        "large and small": numerics.scales,
        "purity": laws.pure,
        "saving": learning.artifact,
        "before fitting": learning.unfitted,
    }
    if subject.floor is not None:
        chosen["sign"] = laws.sign
    if subject.learns:
        chosen["state"] = learning.state
        chosen["streaming"] = learning.streaming
        chosen["refit"] = learning.refit
    if subject.statistics:
        chosen["merging"] = learning.merging
    if isinstance(part, Shaper):
        chosen["kept fields"] = laws.kept
    if not isinstance(part, Scorer) or part.smooth:
        chosen["gradient"] = numerics.gradient
    if torch.cuda.is_available():
        chosen["cuda"] = laws.cuda
    return chosen
