"""A scorer: the cosine between an embedding and the nearest class."""

from __future__ import annotations

from torch import Tensor

import oodcore
from oodcore.features import required, unit
from oodcore.statistics import State
from oodcore_example.class_directions import ClassDirections


class NearestDirection(oodcore.Scorer):
    """``max_k cos(h, d_k)``, in [-1, 1], with ``d_k`` the mean of the unit embeddings of class k.

    The length of the embedding h does not matter; an embedding of zeros has cosine 0. Classes
    without training rows are left out. The score has no paper of its own.
    """

    kind = "nearest_direction"

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[oodcore.Statistic, ...]:
        return (ClassDirections(),)

    def fit(self, store: oodcore.FeatureStore) -> State:
        directions = store[ClassDirections()]
        return {"directions": unit(directions.mean[directions.count > 0])}

    def score(self, features: oodcore.Features, state: State) -> Tensor:
        rows = unit(required(features.embeddings, "embeddings"))
        return (rows @ state["directions"].T).amax(dim=1)
