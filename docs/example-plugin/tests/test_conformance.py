"""Everything that this plugin brings keeps the laws of oodcore's conformance kit."""

import pytest
from oodcore_example import ClassDirections, ConfidencePenalty, NearestDirection, TypicalRange

from oodcore.testing import regularizer_checks, scorer_checks, shaper_checks, statistic_checks

CHECKS = [
    *statistic_checks(ClassDirections),
    *scorer_checks(NearestDirection),
    *shaper_checks(TypicalRange, TypicalRange(width=0.5)),
    *regularizer_checks(ConfidencePenalty),
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()
