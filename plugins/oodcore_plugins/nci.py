"""NCI: how near a centred embedding is to the weight of its class, and its norm."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.space import Choice, spaces
from oodcore.statistics import ClassMeans, State
from oodcore_plugins.fdbd import directions


class NCI(Scorer):
    """``w_m' (h - mean) / ||h - mean|| + alpha ||h||_1``, in units of the head's weight.

    m is the predicted class, w_m its row of the head's weight, mean that of the training
    embeddings: under neural collapse h - mean points along w_m, and known rows are far from the
    origin. The first term is the cosine times ``||w_m||``. A row at the mean has 0 there. One class
    makes no difference.

    Args:
        alpha: the weight of the norm; the paper tunes it (the reference has 1e-4, and looks up to
            0.1).
    """

    kind = "nci"
    paper = Paper(
        "Detecting Out-of-Distribution through the Lens of Neural Collapse",
        "Litian Liu, Yao Qin",
        "CVPR",
        2025,
        "https://arxiv.org/abs/2311.01479",
    )
    search = spaces(alpha=Choice((1e-4, 1e-3, 1e-2, 1e-1), "OpenOOD's sweep"))
    alpha: NonNegativeFloat = 1e-4

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (ClassMeans(),)

    def fit(self, store: FeatureStore) -> State:
        return {"centre": store[ClassMeans()].total_mean}

    def score(self, features: Features, state: State) -> Tensor:
        if features.head is None:
            raise DataError("nci: the weight is that of the head, and these features have none")
        rows = required(features.embeddings, "embeddings")
        weight = directions(features.head)[features.predicted]
        return (weight * unit(rows - state["centre"])).sum(dim=1) + self.alpha * rows.abs().sum(1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(NCI)
