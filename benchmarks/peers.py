"""oodcore and pytorch-ood on the same features: time, peak memory, and whether they agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Table, Timing, number, peak, seconds, timed
from rows import World
from torch import Tensor

import oodcore
from oodcore.search import faiss_module

STAND_IN = Path(__file__).parent / "stand_in"
BATCH = 256
DICE_PERCENTILE = 70.0
REACT_PERCENTILE = 90.0
NEIGHBOURS = 50
REPEATS = 5
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""The C library gives memory back as it is freed; else the peak depends on what was before."""

Array = np.ndarray
Fit = Callable[["Rows"], Any]
Score = Callable[[Any, "Rows"], Array]


@dataclass(frozen=True)
class Rows:
    """What both sides get: float32 embeddings to fit on, and others to score."""

    world: World
    train: Tensor
    labels: Tensor
    test: Tensor


@dataclass(frozen=True)
class Size:
    """How many rows are fitted on and scored, of how many numbers, in how many classes."""

    fitted: int
    scored: int
    classes: int
    width: int = 512

    def rows(self) -> Rows:
        """The rows themselves, the same in every process."""
        world = World(self.classes, self.width)
        train, labels = world.known(self.fitted)
        return Rows(world, train, labels, world.mixed(self.scored))

    def small(self) -> Size:
        """Few enough to be quick, and to load all libraries with."""
        return Size(200, 60, min(self.classes, 4), 16)


@dataclass(frozen=True)
class Side:
    """How one library fits, and how it scores: higher is more in-distribution."""

    fit: Fit
    score: Score


@dataclass(frozen=True)
class Method:
    """One method in both libraries, and the least that its scoring can cost.

    Args:
        title: as in the table.
        size: of the rows.
        ours, theirs: the two libraries.
        floor: one matrix product or search over the rows to score.
        factor: by which theirs is multiplied to be ours, given the rows.
    """

    title: str
    size: Size
    ours: Side
    theirs: Side
    floor: Callable[[Rows], Callable[[], Any]]
    factor: Callable[[Rows], float] = lambda rows: 1.0


def composed(*, head: bool = True, **arguments: Any) -> Side:
    """A detector of oodcore, on embeddings alone or with the logits that a head makes of them."""

    def fit(rows: Rows) -> oodcore.Detector:
        given = rows.world.features(rows.train, rows.labels) if head else (rows.train, rows.labels)
        return oodcore.Detector(**arguments, batch_size=BATCH).fit(given)

    def score(detector: oodcore.Detector, rows: Rows) -> Array:
        return detector.score(rows.world.features(rows.test) if head else rows.test)

    return Side(fit, score)


def peer(make: Callable[[Rows], Any], batch: int | None = None) -> Side:
    """A detector of pytorch-ood, which scores all rows in one call, or some at a time.

    It does so in the way that suits it: in batches where that is faster, or where one call would
    take more memory than there is.
    """

    def fit(rows: Rows) -> Any:
        detector = make(rows)
        learn = getattr(detector, "fit_features", None) or detector.fit_feature_maps
        learn(rows.train, rows.labels)
        return detector

    def score(detector: Any, rows: Rows) -> Array:
        tell = getattr(detector, "predict_features", None) or detector.predict_feature_maps
        parts = rows.test.split(batch or len(rows.test))
        return -torch.cat([tell(part) for part in parts]).double().numpy()

    return Side(fit, score)


def mahalanobis(rows: Rows) -> Any:
    """Their covariance is not divided by the number of rows, and their distance is halved."""
    from pytorch_ood.detector import Mahalanobis

    return Mahalanobis(None)


def knn(rows: Rows) -> Any:
    """k and unit norm are the same on both sides."""
    from pytorch_ood.detector import KNN

    return KNN(None, k=NEIGHBOURS)


def vim(rows: Rows) -> Any:
    """With the dimension that oodcore chooses."""
    from pytorch_ood.detector import ViM

    return ViM(None, rows.train.shape[1] // 2, rows.world.weight, rows.world.bias)


def dice(rows: Rows) -> Any:
    """The share of weights that is left out is the same on both sides."""
    from pytorch_ood.detector import DICE

    return DICE(None, rows.world.weight, rows.world.bias, DICE_PERCENTILE / 100)


def react(rows: Rows) -> Any:
    """With the head as a function from embeddings to logits."""
    from pytorch_ood.detector import ReAct

    return ReAct(None, rows.world.head, percentile=REACT_PERCENTILE / 100)


def gradnorm(rows: Rows) -> Any:
    """On the head alone, and of its weight alone, as in the paper."""
    from pytorch_ood.detector import GradNorm

    head = torch.nn.Linear(rows.train.shape[1], len(rows.world.weight))
    head.load_state_dict({"weight": rows.world.weight, "bias": rows.world.bias})
    return GradNorm(head, param_filter=lambda name: name == "weight")


def _gradients(detector: Any, rows: Rows) -> Array:
    return -detector.predict(rows.test).double().numpy()


def product(columns: Callable[[Rows], int]) -> Callable[[Rows], Callable[[], Any]]:
    """One float32 product of the rows to score with a matrix of so many columns."""

    def floor(rows: Rows) -> Callable[[], Any]:
        matrix = torch.ones(rows.test.shape[1], columns(rows))
        return lambda: rows.test @ matrix

    return floor


def search(rows: Rows) -> Callable[[], Any]:
    """faiss's search for the nearest rows alone, in the same batches."""
    faiss = faiss_module()
    if faiss is None:
        return lambda: None
    index = faiss.IndexFlatL2(rows.train.shape[1])
    index.add(torch.nn.functional.normalize(rows.train).numpy())
    queries = torch.nn.functional.normalize(rows.test).numpy()

    def work() -> None:
        faiss.cvar.distance_compute_blas_threshold = 20
        for first in range(0, len(queries), BATCH):
            index.search(queries[first : first + BATCH], NEIGHBOURS)

    return work


def _classes(rows: Rows) -> int:
    return len(rows.world.weight)


def _whitened(rows: Rows) -> int:
    return _classes(rows) + rows.train.shape[1]


def _halved(rows: Rows) -> float:
    return 2.0 * len(rows.train)


GRADNORM = composed(scorer="gradnorm")
METHODS = {
    "mahalanobis-100": Method(
        "Mahalanobis, K = 100",
        Size(10_000, 10_000, 100),
        composed(scorer="mahalanobis", head=False),
        peer(mahalanobis, BATCH),
        product(_whitened),
        _halved,
    ),
    "mahalanobis-1000": Method(
        "Mahalanobis, K = 1000",
        Size(10_000, 10_000, 1000),
        composed(scorer="mahalanobis", head=False),
        peer(mahalanobis, BATCH),
        product(_whitened),
        _halved,
    ),
    "knn": Method(
        "kNN, 50,000 rows",
        Size(50_000, 4096, 100),
        composed(scorer={"kind": "knn", "k": NEIGHBOURS}, head=False),
        peer(knn),
        search,
    ),
    "vim": Method(
        "ViM",
        Size(50_000, 10_000, 100),
        composed(scorer="vim"),
        peer(vim),
        product(lambda rows: _classes(rows) + rows.train.shape[1] // 2),
    ),
    "gradnorm": Method(
        "GradNorm",
        Size(1000, 10_000, 100),
        Side(GRADNORM.fit, GRADNORM.score),
        Side(gradnorm, _gradients),
        product(_classes),
    ),
    "dice": Method(
        "DICE",
        Size(10_000, 10_000, 100),
        composed(shapers=[{"kind": "dice", "percentile": DICE_PERCENTILE}], scorer="energy"),
        peer(dice, BATCH),
        product(_classes),
    ),
    "react": Method(
        "ReAct",
        Size(50_000, 10_000, 100),
        composed(shapers=[{"kind": "react", "percentile": REACT_PERCENTILE}], scorer="energy"),
        peer(react),
        product(_classes),
    ),
}
TIMES = ["what", "oodcore, s", "pytorch-ood, s", "ratio", "floor, s", "agree to"]
PEAKS = ["what", "oodcore, MiB", "pytorch-ood, MiB", "ratio"]


def tables(*, quick: bool = False) -> list[Table]:
    """Time and memory, if pytorch-ood is installed."""
    times = Table(
        "Time beside pytorch-ood",
        "Fitting and scoring float32 features of 512 numbers, both libraries in turn in one "
        "process; the ratio is oodcore over pytorch-ood. The floor of scoring is one float32 "
        "product of the rows with the head (for Mahalanobis with the whitening matrix and the "
        "means, for ViM with the head and the null space), and for kNN faiss's search. Both agree "
        "to the largest difference of two scores over the larger of that score and the median one; "
        "ViM's subspace ends among directions of nearly the same variance, which float32 tells "
        "apart otherwise than float64. Where pytorch-ood takes less time, it computes in float32 "
        "and on all rows at once, and oodcore in float64, batch by batch.",
        TIMES,
    )
    memory = Table(
        "Memory beside pytorch-ood",
        "The peak of fitting and then scoring the same rows, in a process of its own for each, "
        "above what it held before: the rows, and the libraries after they had been used once.",
        PEAKS,
    )
    if not available():
        told = "Left out: pytorch-ood is not installed here; `make bench` makes an environment "
        times.left_out = memory.left_out = f"{told}that has it."
        return [times, memory]
    for name, method in METHODS.items():
        times.rows += compared(method, quick=quick)
        mib = [peak_of(name, side, quick=quick) for side in ("ours", "theirs")]
        ratio = number(mib[0] / mib[1]) if mib[1] else ""
        memory.rows.append([method.title, *map(number, mib), ratio])
    return [times, memory]


def available() -> bool:
    """Whether pytorch-ood can be imported, with the stand-in for torchvision where that is not."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        sys.path.append(str(STAND_IN))
    try:
        import pytorch_ood.detector  # noqa: F401
    except ImportError:
        return False
    return True


def compared(method: Method, *, quick: bool = False) -> list[list[str]]:
    """The lines of fitting and of scoring."""
    size = method.size.small() if quick else method.size
    rows = size.rows()
    ours, theirs = method.ours.fit(rows), method.theirs.fit(rows)
    scaled = method.factor(rows) * method.theirs.score(theirs, rows)
    off = disagreement(method.ours.score(ours, rows), scaled)
    repeats = 1 if quick else REPEATS
    fitting = timed(
        {"ours": lambda: method.ours.fit(rows), "theirs": lambda: method.theirs.fit(rows)},
        repeats,
        warm=False,
    )
    scoring = timed(
        {
            "ours": lambda: method.ours.score(ours, rows),
            "theirs": lambda: method.theirs.score(theirs, rows),
            "floor": method.floor(rows),
        },
        repeats,
        warm=False,
    )
    return [
        [f"{method.title}, fit on {size.fitted:,}", *_pair(fitting), "", ""],
        [
            f"{method.title}, score {size.scored:,}",
            *_pair(scoring),
            seconds(scoring.seconds("floor")),
            f"{off:.0e}",
        ],
    ]


def _pair(timing: Timing) -> list[str]:
    ours, theirs = seconds(timing.seconds("ours")), seconds(timing.seconds("theirs"))
    return [ours, theirs, number(timing.ratio("ours", "theirs"))]


def disagreement(ours: Array, theirs: Array) -> float:
    """The largest difference over the larger of the score and the median score."""
    size = np.maximum(np.abs(theirs), np.median(np.abs(theirs)))
    return float((np.abs(ours - theirs) / size).max())


def peak_of(name: str, side: str, *, quick: bool = False) -> float:
    """The peak memory of fitting and scoring, in MiB, in a process of its own."""
    command = [sys.executable, __file__, name, side, str(torch.get_num_threads()), str(int(quick))]
    environment = {**os.environ, **GIVEN_BACK}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def main() -> None:
    """Print the peak memory of one side of one method."""
    name, side, threads, quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if side == "theirs":
        available()
    method = METHODS[name]
    chosen: Side = getattr(method, side)
    small = method.size.small().rows()
    # All libraries are loaded then, and what they set up once is there.
    chosen.score(chosen.fit(small), small)
    rows = (method.size.small() if int(quick) else method.size).rows()
    highest = peak(lambda: chosen.score(chosen.fit(rows), rows))
    sys.stdout.write(f"{highest}\n")


if __name__ == "__main__":
    main()
