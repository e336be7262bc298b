"""The kit lets healthy scorers and shapers pass; a planted fault is caught by the law it breaks."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import faulty_scorers
import numpy as np
import pytest
import torch
from faulty_scorers import HEALTHY_SCORERS, SCORER_FAULTS, Ascent, Chance, Nearest, Peak, WrongSign
from faulty_shapers import SHAPER_FAULTS, Damped, Halved, ShapesFirst
from torch import nn

from oodcore import Scorer, registry
from oodcore.errors import ConfigurationError
from oodcore.statistics import ClassMoments
from oodcore.testing import (
    ToyNetwork,
    check_scorer,
    check_shaper,
    scorer_checks,
    shaper_checks,
)
from oodcore.testing import laws as scorer_laws
from oodcore.testing import statistics as statistic_laws
from oodcore.testing.subject import Subject


def broken(checks, law: str, message: str) -> None:
    """The law among these checks fails, and says this."""
    [check] = [check for check in checks if check.name == law]
    with pytest.raises(AssertionError, match=message):
        check()


@pytest.mark.parametrize("check", scorer_checks(*HEALTHY_SCORERS))
def test_healthy_scorers_pass(check):
    check()


@pytest.fixture(autouse=True)
def _forgetful():
    """Faulty components remember things on their class; no test sees another's."""
    yield
    remembering = [ShapesFirst, *vars(faulty_scorers).values()]
    for cls in remembering:
        for name, value in getattr(cls, "__dict__", {}).items():
            if name in ("met", "learnt", "cache", "fits", "most"):
                value.clear()


@pytest.mark.parametrize(
    ("fault", "law", "message"), SCORER_FAULTS, ids=lambda v: getattr(v, "kind", None) or ""
)
def test_faulty_scorers_are_caught(fault, law, message):
    broken(scorer_checks(fault), law, message)


@pytest.mark.parametrize("check", shaper_checks(Damped(factor=0.7), Damped(factor=50.0), Halved))
def test_healthy_shapers_pass(check):
    check()


@pytest.mark.parametrize(
    ("fault", "law", "message"), SHAPER_FAULTS, ids=lambda v: getattr(v, "kind", None) or ""
)
def test_faulty_shapers_are_caught(fault, law, message):
    broken(shaper_checks(fault), law, message)


def test_every_law_has_a_fault_that_breaks_it():
    laws = {law for _, law, _ in SCORER_FAULTS}
    assert laws == {check.name for check in scorer_checks(Nearest)} - {"cuda"}
    laws |= {law for _, law, _ in SHAPER_FAULTS}
    assert laws == {check.name for check in shaper_checks(Damped)} - {"cuda"}


def test_everything_that_is_wrong_is_listed_at_once():
    with pytest.raises(AssertionError) as caught:
        check_scorer(WrongSign)
    text = str(caught.value)
    assert re.match(r"2 of 18 checks failed:\n- scorer 'wrong_sign', documentation: ", text)
    assert "- scorer 'wrong_sign', sign: its AUROC on the toy problem is 0.000, below 0.8" in text
    assert "turn the sign" in text


def test_the_healthy_pass_at_once():
    check_scorer(Peak)
    check_shaper(Halved())


def test_checks_are_named_for_pytest():
    names = [check.__name__ for check in scorer_checks(Peak, Nearest())]
    assert names[0] == "peak-documentation"
    assert "nearest-independence_of_the_batch" in names
    assert len(set(names)) == len(names)


def test_laws_that_do_not_apply_are_left_out():
    peak, nearest = ({c.name for c in scorer_checks(part)} for part in (Peak, Nearest))
    assert nearest - peak == {"state", "streaming", "refit", "merging"}
    assert not {"gradient"} & {check.name for check in scorer_checks(Ascent)}
    assert not {"sign"} & {check.name for check in scorer_checks(Chance, floor=None)}


def test_a_floor_may_be_lower_or_higher():
    broken(scorer_checks(Nearest, floor=1.1), "sign", "below 1.1")
    [sign] = [check for check in scorer_checks(Chance, floor=0.01) if check.name == "sign"]
    sign()


def test_what_is_no_scorer_is_refused():
    class Required(Nearest):
        kind = "required"
        power: float

    with pytest.raises(ConfigurationError, match="cannot be made without arguments"):
        scorer_checks(Required)
    with pytest.raises(ConfigurationError, match="the kit examines a Scorer"):
        scorer_checks("nearest")
    with pytest.raises(ConfigurationError, match="the kit examines a Shaper"):
        shaper_checks(Nearest())


def test_a_kind_that_is_taken_is_said():
    class Twin(Peak):
        kind = "msp"

    if registry.find("scorer", "msp") is None:
        pytest.skip("the built-in plugins are not installed, so that the kind is free")
    broken(scorer_checks(Twin), "saving", "brings the scorer 'msp', which .* has brought already")


def test_nothing_is_left_behind():
    kinds = {slot: list(registry.all(slot)) for slot in ("scorer", "shaper", "statistic")}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    check_scorer(Nearest)
    assert kinds == {slot: list(registry.all(slot)) for slot in kinds}
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_a_scorer_that_reads_a_branch_is_examined_with_a_network_of_its_own():
    class Branched(ToyNetwork):
        def __init__(self, classes, width, layers):
            super().__init__(classes, width)
            self.confidence = nn.Linear(width, 1)
            with torch.no_grad():
                self.confidence.weight.fill_(0.0)
                self.confidence.weight[0, : 2 * width // 3].fill_(1.0)

        def forward(self, inputs):
            self.confidence(inputs.mean(dim=(2, 3)))
            return super().forward(inputs)

    class Confidence(Scorer):
        """``v``, what the branch says."""

        kind = "confidence_of_the_branch"

        def needs(self):
            return frozenset({"layers.confidence"})

        def score(self, features, state):
            return features.layers["confidence"][:, 0]

    check_scorer(Confidence, network=Branched)


def test_the_law_of_other_devices_compares():
    scorer_laws.cuda(Subject(Nearest()), device="cpu")
    statistic_laws.cuda(statistic_laws.Summary(ClassMoments()), device="cpu")

    @dataclass(frozen=True)
    class Elsewhere(Subject):
        def outputs(self, made, rows, learnt, size=None):
            return {"score": super().outputs(made, rows, learnt, size)["score"] + 1.0}

    with pytest.raises(AssertionError, match="something else on cpu than on the CPU"):
        scorer_laws.cuda(Elsewhere(Nearest()), device="cpu")


def test_the_kit_needs_no_pytest():
    folder = Path(scorer_laws.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.startswith(("pytest", "hypothesis")) for name in names), path
