"""Five measures of many scores, from one sort in oodcore and from scikit-learn."""

from __future__ import annotations

import numpy as np
from measure import Table, number, seconds, timed
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from oodcore.metrics import measures


def by_scikit_learn(known: np.ndarray, strange: np.ndarray) -> dict[str, float]:
    """The same measures, each from a function of scikit-learn's."""
    scores = np.concatenate([known, strange])
    inside = np.concatenate([np.ones(len(known)), np.zeros(len(strange))])
    alarms, hits, _ = roc_curve(inside, scores)
    missed, found, _ = roc_curve(1 - inside, -scores)
    return {
        "auroc": roc_auc_score(inside, scores),
        "aupr_id": average_precision_score(inside, scores),
        "aupr_ood": average_precision_score(1 - inside, -scores),
        "fpr95_id": alarms[np.argmax(hits >= 0.95)],
        "fpr95_ood": missed[np.argmax(found >= 0.95)],
    }


def tables(*, quick: bool = False) -> list[Table]:
    """The table."""
    rows, repeats = (2000, 1) if quick else (1_000_000, 5)
    generator = np.random.default_rng(0)
    table = Table(
        "Measures",
        f"AUROC, both AUPR and both FPR95 of 2 x {rows:,} scores, from one sort in oodcore and "
        "from scikit-learn's functions.",
        ["scores", "oodcore, s", "scikit-learn, s", "ratio", "agree to"],
    )
    for title, step in (("no ties", 0.0), ("heavy ties", 0.1)):
        known, strange = generator.normal(1, 1, rows), generator.normal(0, 1, rows)
        if step:
            known, strange = np.round(known / step) * step, np.round(strange / step) * step
        ours, theirs = measures(known, strange), by_scikit_learn(known, strange)
        worst = max(abs(ours[name] - value) for name, value in theirs.items())
        timing = timed(
            {
                "ours": lambda a=known, b=strange: measures(a, b),
                "theirs": lambda a=known, b=strange: by_scikit_learn(a, b),
            },
            repeats,
        )
        taken = [seconds(timing.seconds(name)) for name in ("ours", "theirs")]
        ratio = number(timing.ratio("ours", "theirs"))
        table.rows.append([title, *taken, ratio, f"{worst:.0e}"])
    return [table]
