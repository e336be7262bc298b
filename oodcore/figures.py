"""What scores look like, without a single score: histograms and ROC curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from oodcore.curves import Curve, Floats

BINS = 48
ROC_POINTS = 200


@dataclass(frozen=True)
class Figure:
    """How a detector's scores are spread, and how well they part ID from OOD.

    ``counts`` holds the rows of each data set in the bins between ``edges``, the same for all; what
    lies outside is in the first or the last bin. ``roc`` holds for each OOD set up to 200 points
    (share of OOD accepted, share of ID accepted). ``threshold`` is the calibrated one, below which
    a row is flagged. ``coverage``, of selective prediction, holds up to 200 points (share of ID
    rows kept, those with the highest scores; accuracy on them).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    edges: tuple[float, ...]
    counts: Mapping[str, tuple[int, ...]]
    roc: Mapping[str, tuple[tuple[float, float], ...]]
    threshold: float | None = None
    coverage: tuple[tuple[float, float], ...] = ()

    def sound(self) -> bool:
        """Whether the parts fit together, as those of a drawn figure do."""
        edges = np.asarray(self.edges)
        shares = chain.from_iterable(chain(*self.roc.values(), self.coverage))
        return (
            len(edges) > 1
            and bool(np.isfinite(edges).all() and (edges[1:] > edges[:-1]).all())
            and all(len(bins) == len(edges) - 1 for bins in self.counts.values())
            and all(min(bins) >= 0 < sum(bins) for bins in self.counts.values())
            and all(len(points) > 1 for points in self.roc.values())
            and all(0 <= share <= 1 for share in shares)
            and (self.threshold is None or bool(np.isfinite(self.threshold)))
        )


def draw(
    scores: Mapping[str, Floats],
    id_name: str,
    curves: Mapping[str, Curve],
    threshold: float | None = None,
    risks: Floats | None = None,
) -> Figure:
    """The figure of a detector.

    Args:
        scores: by data set, ``[N]`` each, finite.
        id_name: the in-distribution one.
        curves: by OOD set.
        threshold: the calibrated one, if there is any.
        risks: the error rate among the i ID rows with the highest scores, ``[N]``, where accuracy
            is to be drawn over coverage.
    """
    edges = bin_edges(scores, id_name)
    counts = {}
    for name, values in scores.items():
        bins = np.searchsorted(edges[1:-1], values, side="right")
        counts[name] = tuple(np.bincount(bins, minlength=BINS).tolist())
    roc = {name: thinned(points) for name, points in curves.items()}
    coverage = () if risks is None else covered(risks)
    return Figure(tuple(edges.tolist()), counts, roc, threshold, coverage)


def bin_edges(scores: Mapping[str, Floats], id_name: str) -> Floats:
    """Bin edges ``[BINS + 1]`` that show ID and OOD together, however far off some scores lie.

    They span the central 99 % of every set, but no more than three widths of the ID set's own on
    either side of it: a squared distance of a million would leave ID a single bin.
    """
    spans = {name: _central(values) for name, values in scores.items()}
    low = min(span[0] for span in spans.values())
    high = max(span[1] for span in spans.values())
    inner_low, inner_high = spans[id_name]
    if width := inner_high - inner_low:
        low, high = max(low, inner_low - 3 * width), min(high, inner_high + 3 * width)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-10 * size, 1e-300):
        # Bins narrower than that would fall together in float64.
        pad = 1e-9 * size if size > 1e-280 else 0.5
        limit = float(np.finfo(np.float64).max)
        low, high = max(low - pad, -limit), min(high + pad, limit)
    share = np.linspace(0, 1, BINS + 1)
    edges: Floats = low * (1 - share) + high * share
    return edges


def thinned(points: Curve) -> tuple[tuple[float, float], ...]:
    """Up to 200 points of the ROC curve, evenly spread along it, to five digits."""
    across = points.ood_accepted / points.ood_accepted[-1]
    up = points.id_accepted / points.id_accepted[-1]
    if len(across) > ROC_POINTS:
        way = np.linspace(0, 2, ROC_POINTS)
        kept = np.unique(np.minimum(np.searchsorted(across + up, way), len(across) - 1))
        across, up = across[kept], up[kept]
    return tuple(zip(across.round(5).tolist(), up.round(5).tolist(), strict=True))


def covered(risks: Floats) -> tuple[tuple[float, float], ...]:
    """Up to 200 points of accuracy over coverage, evenly from one row to all, to five digits."""
    rows = len(risks)
    kept = np.unique(np.linspace(1, rows, min(rows, ROC_POINTS)).round().astype(np.int64))
    accuracy = (1 - risks[kept - 1]).round(5)
    return tuple(zip((kept / rows).round(5).tolist(), accuracy.tolist(), strict=True))


def _central(values: Floats) -> tuple[float, float]:
    """The scores between which the central 99 % lie, by rank: nothing is interpolated."""
    cut = round(0.005 * (len(values) - 1))
    ranked = np.partition(values, [cut, len(values) - 1 - cut])
    return float(ranked[cut]), float(ranked[len(values) - 1 - cut])
