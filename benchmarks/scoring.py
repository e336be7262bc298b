"""What scoring costs beyond the least it can: the bare forward pass, the bare search."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from measure import Table, joined, seconds, timed
from rows import World
from torch import Tensor, nn

import oodcore
from oodcore.passes import score
from oodcore.plugins import registry
from oodcore.search import faiss_module
from oodcore_plugins.networks import resnet18

SCORERS = (
    "msp",
    "max_logit",
    "energy",
    "entropy",
    "margin",
    "gen",
    "doctor",
    "kl_uniform",
    "kl_matching",
    "gradnorm",
    "max_cosine",
    "dml",
    "fdbd",
    "nci",
    "neco",
    "she",
    "mahalanobis",
    "relative_mahalanobis",
    "ssd",
    "residual",
    "vim",
    "pnml",
)
"""22 scorers of embeddings and logits that keep no rows."""
MODEL_BOUND = 1.05
SEARCH_BOUND = 1.2
K = 50
"""Neighbours: those of kNN's default, and of the bare search."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    train: int = 1024
    images: int = 256
    sets: int = 6
    bank: int = 50_000
    queries: int = 2048
    width: int = 512
    classes: int = 10
    batch: int = 256
    repeats: int = 5
    size: int = 32
    channels: int = 64


QUICK = Sizes(
    train=60,
    images=8,
    sets=2,
    bank=300,
    queries=64,
    width=16,
    batch=32,
    repeats=1,
    size=8,
    channels=4,
)


def tables(*, quick: bool = False) -> list[Table]:
    """The two tables."""
    sizes = QUICK if quick else Sizes()
    return [beyond_the_model(sizes), beyond_the_search(sizes)]


def beyond_the_model(sizes: Sizes) -> Table:
    """Many scorers on several data sets, against the model alone on the same batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet18(classes=sizes.classes, width=sizes.channels)
    images = torch.Generator().manual_seed(0)
    shape = (3, sizes.size, sizes.size)
    train = torch.rand(sizes.train, *shape, generator=images)
    labels = torch.arange(sizes.train) % sizes.classes
    data = [torch.rand(sizes.images, *shape, generator=images) for _ in range(sizes.sets)]
    # What is learnt has no part in how long scoring takes; so the weights are as they were drawn,
    # but batch normalisation has seen images, or else nothing would come out at the other end.
    _settle(network, train[: 2 * sizes.batch])
    model = oodcore.FeatureModel.wrap(network)
    detectors = {kind: _detector(kind, model, sizes) for kind in SCORERS}
    with warnings.catch_warnings():
        # Untrained logits make some scorers say so.
        warnings.simplefilter("ignore", UserWarning)
        oodcore.fit(detectors, (train, labels))
    one = {"msp": detectors["msp"]}

    def bare() -> None:
        with torch.no_grad():
            for rows in data:
                for batch in rows.split(sizes.batch):
                    network(batch)

    works = {
        "bare": bare,
        "one": lambda: [score(one, rows) for rows in data],
        "all": lambda: [score(detectors, rows) for rows in data],
    }
    timing = timed(works, sizes.repeats)
    table = Table(
        "Scoring, beyond the forward pass",
        f"{len(SCORERS)} scorers ({joined(SCORERS)}) on {sizes.sets} data sets of {sizes.images} "
        f"images of {sizes.size} pixels, in batches of {sizes.batch}, against a ResNet-18 called "
        "on the same batches without oodcore.",
        ["what", "seconds", "forward pass alone, s", "ratio", "at most"],
    )
    floor = seconds(timing.seconds("bare"))
    for name, what in (("one", "1 scorer"), ("all", f"{len(SCORERS)} scorers")):
        ratio = timing.ratio(name, "bare")
        line = [what, seconds(timing.seconds(name)), floor, f"{ratio:.3f}"]
        table.rows.append([*line, f"{MODEL_BOUND:.2f}"])
    return table


def _detector(kind: str, model: oodcore.FeatureModel, sizes: Sizes) -> oodcore.Detector:
    return oodcore.Detector(model, scorer=kind, batch_size=sizes.batch)


def _settle(network: nn.Module, images: Tensor) -> None:
    """Let batch normalisation take its averages from some images."""
    network.train()
    with torch.no_grad():
        network(images)
    network.eval()


def banks() -> list[str]:
    """The installed scorers that need no field, and keep every row of the training data."""
    found = []
    for kind, cls in registry.all("scorer").items():
        if any(field.is_required() for field in cls.model_fields.values()):
            continue
        scorer = cls()
        kept = any(statistic.kind == "bank" for statistic in scorer.statistics())
        if kept and not scorer.needs() & {"inputs"}:
            found.append(kind)
    return found


def beyond_the_search(sizes: Sizes) -> Table:
    """Each scorer with a bank, against faiss's search for the nearest rows of the same queries."""
    table = Table(
        "Scoring with a bank, beyond the search",
        f"{sizes.queries:,} queries, half of them in-distribution and half between two classes, on "
        f"{sizes.bank:,} rows of {sizes.width} numbers in {sizes.classes} classes, in batches of "
        f"{sizes.batch}, against faiss's exact search (float32) for the {K} nearest rows of unit "
        "norm. What `relation` costs depends on how certain predictions are: the less, the more "
        "rows it has to be compared with.",
        ["what", "seconds", "search alone, s", "ratio", "at most"],
    )
    faiss = faiss_module()
    if faiss is None:
        table.left_out = "Left out: faiss is not installed."
        return table
    world = World(sizes.classes, sizes.width)
    train = world.features(*world.known(sizes.bank))
    asked = world.mixed(sizes.queries)
    test = world.features(asked)
    index = faiss.IndexFlatL2(sizes.width)
    index.add(_unit(train.embeddings))
    queries = _unit(asked)
    # Below this many queries at once faiss takes another, slower road; its default is 128,000.
    faiss.cvar.distance_compute_blas_threshold = 20

    def bare() -> None:
        for first in range(0, len(queries), sizes.batch):
            index.search(queries[first : first + sizes.batch], K)

    works = {"bare": bare}
    for kind in banks():
        detector = oodcore.Detector(scorer=kind, batch_size=sizes.batch).fit(train)
        works[kind] = lambda detector=detector: detector.score(test)
    timing = timed(works, sizes.repeats)
    floor = seconds(timing.seconds("bare"))
    for kind in list(works)[1:]:
        ratio = timing.ratio(kind, "bare")
        line = [f"`{kind}`", seconds(timing.seconds(kind)), floor, f"{ratio:.2f}"]
        table.rows.append([*line, f"{SEARCH_BOUND:.2f}"])
    return table


def _unit(rows: Tensor | None) -> np.ndarray:
    assert rows is not None
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()
