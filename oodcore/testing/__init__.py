"""The conformance kit: what scorers, shapers, statistics and regularizers of any plugin must keep.

``check_scorer(MyScorer())`` examines everything at once; with pytest, one test for each law:

    @pytest.mark.parametrize("check", scorer_checks(MyScorer(), MyScorer(k=3)))
    def test_conformance(check):
        check()

A check is a plain function that raises an AssertionError which says what is wrong and what to do.
"""

from __future__ import annotations

from oodcore.testing.check import Check
from oodcore.testing.regularizers import check_regularizer, regularizer_checks
from oodcore.testing.scorers import check_scorer, check_shaper, scorer_checks, shaper_checks
from oodcore.testing.statistics import check_statistic, statistic_checks
from oodcore.testing.toy import ToyNetwork

__all__ = [
    "Check",
    "ToyNetwork",
    "check_regularizer",
    "check_scorer",
    "check_shaper",
    "check_statistic",
    "regularizer_checks",
    "scorer_checks",
    "shaper_checks",
    "statistic_checks",
]
