"""What the papers say of their methods, asked of the networks trained here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from measure import Table

Row = dict[str, Any]
LOWER = ("fpr95_id", "ece", "aurc", "wfc", "cfc")
"""Metrics of which less is better."""
SHOWN = {
    "auroc": ("AUROC", 100, " points"),
    "fpr95_id": ("FPR95", 100, " points"),
    "accuracy": ("accuracy", 100, " points"),
    "aurc": ("AURC x 1000", 1000, ""),
    "wfc": ("WFC", 1, ""),
    "cfc": ("CFC", 1, ""),
}
"""The metrics of claims: title, by how much they are multiplied, and unit."""
SURE_ENOUGH = 2.0
"""Standard errors that a mean difference has to be away from 0."""


@dataclass(frozen=True)
class Claim:
    """One score of a method is better than one of another, by a metric.

    Args:
        text: the claim in words.
        source: whose it is.
        better, worse: a method and a scorer; or a method and "", for metrics of a network.
        metric: its name.
    """

    text: str
    source: str
    better: tuple[str, str]
    worse: tuple[str, str]
    metric: str

    def differences(self, rows: Sequence[Row]) -> list[float]:
        """For each division and seed, how much better; what was not measured is left out."""
        one, two = self._values(rows, *self.better), self._values(rows, *self.worse)
        sign = -1 if self.metric in LOWER else 1
        return [sign * (one[key] - two[key]) for key in one if key in two]

    def _values(self, rows: Sequence[Row], method: str, scorer: str) -> dict[Any, float]:
        found = {}
        for row in rows:
            numbers = row["scores"].get(scorer, {}) if scorer else row
            if row["method"] == method and self.metric in numbers:
                found[row["division"], row["seed"]] = numbers[self.metric]
        return found


PLAIN = "cross_entropy"
CLAIMS = (
    Claim(
        "on a network trained with cross-entropy, MaxCosine is better than MaxLogit",
        "DML",
        (PLAIN, "max_cosine"),
        (PLAIN, "max_logit"),
        "auroc",
    ),
    Claim(
        "and MaxNorm is worse than MaxLogit",
        "DML",
        (PLAIN, "max_logit"),
        (PLAIN, "max_norm"),
        "auroc",
    ),
    Claim("DML is better than MaxLogit", "DML", (PLAIN, "dml"), (PLAIN, "max_logit"), "auroc"),
    Claim(
        "focal loss and a cosine head make MaxCosine better",
        "DML",
        ("focal_cosine", "max_cosine"),
        (PLAIN, "max_cosine"),
        "auroc",
    ),
    Claim("and CFC smaller", "DML", ("focal_cosine", ""), (PLAIN, ""), "cfc"),
    Claim(
        "center loss and a weight-normalised head make MaxNorm better",
        "DML",
        ("center_weight", "max_norm"),
        (PLAIN, "max_norm"),
        "auroc",
    ),
    Claim("and WFC smaller", "DML", ("center_weight", ""), (PLAIN, ""), "wfc"),
    Claim(
        "DML+ is better than DML on one network",
        "DML",
        ("dml_plus", "dml"),
        (PLAIN, "dml"),
        "auroc",
    ),
    Claim("and than MaxLogit", "DML", ("dml_plus", "dml"), (PLAIN, "max_logit"), "auroc"),
    Claim("LogitNorm makes MSP better", "LogitNorm", ("logitnorm", "msp"), (PLAIN, "msp"), "auroc"),
    Claim("also by FPR95", "LogitNorm", ("logitnorm", "msp"), (PLAIN, "msp"), "fpr95_id"),
    Claim("RegMixup raises accuracy", "RegMixup", ("regmixup", ""), (PLAIN, ""), "accuracy"),
    Claim("and makes MSP better", "RegMixup", ("regmixup", "msp"), (PLAIN, "msp"), "auroc"),
    Claim("CRL lowers AURC", "CRL", ("crl", ""), (PLAIN, ""), "aurc"),
    Claim("SAM raises accuracy", "SAM", ("sam", ""), (PLAIN, ""), "accuracy"),
    Claim("SWA raises accuracy", "SWA", ("swa", ""), (PLAIN, ""), "accuracy"),
    Claim("SURE raises accuracy", "SURE", ("sure", ""), (PLAIN, ""), "accuracy"),
    Claim("and lowers AURC", "SURE", ("sure", ""), (PLAIN, ""), "aurc"),
    Claim(
        "RP+GradNorm is better after SURE than after cross-entropy",
        "SURE-OOD",
        ("sure", "rp_gradnorm"),
        (PLAIN, "rp_gradnorm"),
        "auroc",
    ),
    Claim(
        "and after SURE better than MSP",
        "SURE-OOD",
        ("sure", "rp_gradnorm"),
        ("sure", "msp"),
        "auroc",
    ),
    Claim("and than Energy", "SURE-OOD", ("sure", "rp_gradnorm"), ("sure", "energy"), "auroc"),
)


def table(rows: Sequence[Row]) -> Table:
    """Each claim, how much better it is here, and the verdict."""
    count = max(len(claim.differences(rows)) for claim in CLAIMS)
    how = (
        f"The mean over {count} pairs of runs (the same division of the classes, the same seed) of "
        "how much better the first is than the second, ± the standard error of that mean. A claim "
        f"holds where the mean is more than {SURE_ENOUGH:.0f} standard errors above 0, and its "
        "opposite where it is as far below. The seeds of a division share their test rows, and "
        "there are many claims: this is a rule of thumb, no test."
        if count > 1
        else "One pair of runs each, which says what came out once, and no more."
    )
    found = Table("The papers' claims", how, ["claim", "whose", "by", "better by", "verdict"])
    for claim in CLAIMS:
        differences = claim.differences(rows)
        if differences:
            size, verdict = judged(differences, claim.metric)
            by = SHOWN[claim.metric][0]
            found.rows.append([claim.text, claim.source, by, size, verdict])
    return found


def judged(differences: Sequence[float], metric: str) -> tuple[str, str]:
    """The mean difference as text, and whether the claim holds."""
    _, scale, unit = SHOWN[metric]
    middle = mean(differences)
    if len(differences) == 1:
        verdict = "yes" if middle > 0 else "no" if middle < 0 else "the same"
        return f"{scale * middle:+.2f}{unit}", f"{verdict}, once"
    error = stdev(differences) / len(differences) ** 0.5
    text = f"{scale * middle:+.2f} ± {scale * error:.2f}{unit}"
    wins = f"{sum(d > 0 for d in differences)} of {len(differences)}"
    if middle == error == 0:
        return text, "no difference"
    if abs(middle) <= SURE_ENOUGH * error:
        return text, f"cannot be told ({wins})"
    return text, f"**holds** ({wins})" if middle > 0 else f"**the opposite** ({wins})"
