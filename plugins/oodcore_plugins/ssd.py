"""SSD: Mahalanobis distance to clusters of embeddings of unit norm, without labels."""

from __future__ import annotations

import warnings

import torch
from pydantic import PositiveInt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import ClassMoments, Normalized, Sample, State
from oodcore_plugins.mahalanobis import whiten


class SSD(Scorer):
    """``-min_m (h - mu_m)' S_m^+ (h - mu_m)``, in squared standard deviations, at most 0.

    h are embeddings of unit norm (a zero row stays zero), and mu_m and S_m the mean and covariance
    of cluster m, divided by its number of rows. Labels are not used. Clusters are found by k-means
    on a uniform sample of the training rows. Each pseudo-inverse ignores directions with less than
    1e-10 of its largest variance; a cluster whose rows are all equal is refused.

    The paper trains the network by contrast, without labels; any embeddings will do here.

    Args:
        clusters: how many; 1 is the paper's choice, and needs no sample.
        sample: how many training rows clusters are found on.
        seed: of k-means.
    """

    kind = "ssd"
    paper = Paper(
        "SSD: A Unified Framework for Self-Supervised Outlier Detection",
        "Vikash Sehwag, Mung Chiang, Prateek Mittal",
        "ICLR",
        2021,
        "https://arxiv.org/abs/2103.12051",
    )
    clusters: PositiveInt = 1
    sample: PositiveInt = 50_000
    seed: int = 0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        inner = ClassMoments() if self.clusters == 1 else Sample(capacity=self.sample)
        return (Normalized(statistic=inner),)

    def fit(self, store: FeatureStore) -> State:
        kept = store[self.statistics()[0]]
        if self.clusters == 1:
            parts = [(kept.total_mean, kept.total_covariance)]
        else:
            parts = self._parts(kept.embeddings.tensor().double())
        states = {}
        for number, (mean, covariance) in enumerate(parts):
            try:
                whitening = whiten(covariance, mean[None])
            except DataError as error:
                raise DataError(
                    f"ssd: the rows of cluster {number} of {self.clusters} are all equal, so it "
                    "has no covariance; give fewer clusters or more rows"
                ) from error
            states[str(number)] = {"mean": mean, "whitening": whitening}
        return states

    def _parts(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean and covariance of each cluster."""
        if len(rows) < self.clusters:
            raise DataError(
                f"ssd: {len(rows)} training rows cannot make {self.clusters} clusters; give fewer"
            )
        found = KMeans(self.clusters, n_init=10, random_state=self.seed)
        with warnings.catch_warnings():
            # Fewer different rows than clusters leave one without rows, which is refused later.
            warnings.simplefilter("ignore", ConvergenceWarning)
            classes = torch.from_numpy(found.fit_predict(rows.numpy()))
        parts = []
        for number in range(self.clusters):
            members = rows[classes == number]
            mean = members.mean(dim=0)
            parts.append((mean, (members - mean).T @ (members - mean) / len(members)))
        return parts

    def score(self, features: Features, state: State) -> Tensor:
        rows = unit(required(features.embeddings, "embeddings"))
        distances = [
            ((rows - part["mean"].to(rows)) @ part["whitening"].to(rows)).square().sum(dim=1)
            for part in state.values()
        ]
        return -torch.stack(distances).amin(dim=0)


@hookimpl
def register_scorers(register: Register) -> None:
    register(SSD)
