"""A shaper: activations kept within the range that is usual for their unit."""

from __future__ import annotations

from pydantic import PositiveFloat

import oodcore
from oodcore.features import required
from oodcore.statistics import ClassMoments, State


class TypicalRange(oodcore.Shaper):
    """``h_j`` clipped to ``[m_j - width * s_j, m_j + width * s_j]``, for each unit j.

    ``m_j`` and ``s_j`` are mean and standard deviation of the unit over the training rows, in the
    embedding's units; a unit that never varied becomes a constant. The paper reads both off batch
    normalisation layers; here they are measured, so that any network will do.

    Args:
        width: of the range on both sides of the mean, in standard deviations.
    """

    kind = "typical_range"
    paper = oodcore.Paper(
        title="Boosting Out-of-distribution Detection with Typical Features",
        authors="Yao Zhu, Yuefeng Chen, Chuanlong Xie, Xiaodan Li, Rong Zhang, Hui Xue, "
        "Xiang Tian, Bolun Zheng, Yaowu Chen",
        venue="NeurIPS",
        year=2022,
        url="https://arxiv.org/abs/2210.04200",
    )
    width: PositiveFloat = 3.0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[oodcore.Statistic, ...]:
        return (ClassMoments(),)

    def fit(self, store: oodcore.FeatureStore) -> State:
        moments = store[ClassMoments()]
        reach = self.width * moments.total_covariance.diagonal().clamp_min(0).sqrt()
        return {"lowest": moments.total_mean - reach, "highest": moments.total_mean + reach}

    def apply(self, features: oodcore.Features, state: State) -> oodcore.Features:
        rows = required(features.embeddings, "embeddings")
        return features.with_embeddings(rows.clamp(state["lowest"], state["highest"]))
