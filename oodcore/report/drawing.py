"""Drawings: histograms, curves and scattered points as numbers and paths in whole steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oodcore.curves import Polarity
from oodcore.figures import Figure
from oodcore.picture import GRID, Point

HEIGHT = 100
"""Steps from the foot of a histogram to its tallest bin."""
SIDE = 500
"""Steps along a side of the square in which curves are drawn."""
TOLERANCE = 0.002
"""How far a drawn line may be from the curve, in sides of the square: a pixel at most."""

Place = tuple[float, float]


def heights(counts: Sequence[int]) -> list[int]:
    """The bins of a histogram, scaled to its own tallest one; a row alone can still be seen."""
    tallest = max(counts)
    return [max(round(HEIGHT * count / tallest), int(count > 0)) for count in counts]


def position(figure: Figure) -> float | None:
    """Where the threshold stands in a histogram, counted in bins, if it is among them."""
    low, high = figure.edges[0], figure.edges[-1]
    if figure.threshold is None or not low <= figure.threshold <= high:
        return None
    # Halved, for the width of scores near the limits of float64 is no float64.
    share = (figure.threshold / 2 - low / 2) / (high / 2 - low / 2)
    return round(share * (len(figure.edges) - 1), 2)


def precision_recall(
    roc: Sequence[Place], inside: int, outside: int, positive: Polarity
) -> list[Place]:
    """Points (recall, precision) of the points (OOD accepted, ID accepted) of an ROC curve.

    Args:
        roc: shares, from nothing accepted to everything.
        inside: how many ID rows there are.
        outside: how many OOD rows.
        positive: what is to be found: ``id`` by accepting, ``ood`` by flagging.
    """
    found = []
    for ood_share, id_share in roc if positive == "id" else roc[::-1]:
        recall = id_share if positive == "id" else 1 - ood_share
        hits = recall * (inside if positive == "id" else outside)
        alarms = ood_share * outside if positive == "id" else (1 - id_share) * inside
        if hits + alarms > 0:
            found.append((recall, hits / (hits + alarms)))
    return [(0.0, found[0][1]), *found]


def line(points: Sequence[Place]) -> str:
    """A curve in the unit square as an SVG path, without points that the eye would not miss."""
    corners = [(round(SIDE * x), round(SIDE * (1 - y))) for x, y in simplified(points, TOLERANCE)]
    text, (x, y) = f"M{corners[0][0]} {corners[0][1]}", corners[0]
    for right, down in corners[1:]:
        text += f"l{right - x} {down - y}"
        x, y = right, down
    return text


def simplified(points: Sequence[Place], tolerance: float) -> list[Place]:
    """The points that keep a line within a tolerance of all (Douglas and Peucker, 1973)."""
    x, y = np.asarray(points, np.float64).T
    kept = {0, len(points) - 1}
    pending = [(0, len(points) - 1)]
    while pending:
        first, last = pending.pop()
        across, up = x[last] - x[first], y[last] - y[first]
        length = max(float(np.hypot(across, up)), 1e-12)
        some = slice(first, last + 1)
        offsets = np.abs(across * (y[some] - y[first]) - up * (x[some] - x[first]))
        at = int(offsets.argmax())
        if offsets[at] > tolerance * length:
            kept.add(first + at)
            pending += [(first, first + at), (first + at, last)]
    return [points[i] for i in sorted(kept)]


def scatter(points: Sequence[Point]) -> str:
    """Points as an SVG path of dots, from the top of the picture downwards."""
    return "".join(f"M{x} {GRID - y}h0" for x, y in points)
