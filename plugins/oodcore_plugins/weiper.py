"""WeiPer+KLD: how unlike the training rows' the histogram of a row's activations is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from oodcore import Features, FeatureStore, Head, Paper, Scorer, Statistic, hookimpl
from oodcore.errors import DataError
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.statistics import Sample, State

FLOORS = (0.01, 0.025)
"""Added to every share of a histogram, of activations and of perturbed logits: the authors'."""

ROOM = 2**22
"""Perturbed logits that are held at once."""


class WeiPer(Scorer):
    """``-(D(h) + lam_kld D(W~h) - lam_msp MSP(W~h))``, from random neighbours of the head's rows.

    For each row w_k of the head there are r perturbed ones, ``w_k + delta ||w_k|| u`` with u drawn
    from the unit sphere; the bias stays. ``W~h`` are the r K logits that they give, and MSP is the
    mean over the r heads of the largest softmax probability.

    D compares histograms. The D activations of a row, or its r K logits, are counted in bins of
    equal width between the smallest and the largest number that occurs in training, and numbers
    outside are left out. q is the row's histogram, smoothed by a running mean over s bins (the ends
    are repeated; an even s reaches one bin further to the right), p the mean histogram of the
    training rows, not smoothed. To both a small number is added in each bin, 0.01 for activations
    and 0.025 for logits, and both are made to sum to 1. Then ``D = KL(p, q) + KL(q, p)``, in nats.

    Histograms and their ends come from a uniform sample of training rows; the authors take all of
    them. The heads are drawn once, when fitted, and kept: r K D numbers. A row costs as much as r
    heads. The defaults are what the authors found for CIFAR-10; for ImageNet with a ResNet-50 they
    have delta 2.4, smoothing 40 and 15, and lam_msp 0.25. The score jumps where an activation goes
    from one bin to the next, so it has no gradient.

    Args:
        repeats: r.
        delta: the length of the perturbation, in lengths of the row of the head.
        bins: of each histogram.
        lam_kld: weight of the logits' histogram.
        lam_msp: weight of the largest probability.
        smoothing: s for activations, in bins; 1 leaves the histogram as it is.
        smoothing_perturbed: s for logits.
        rows: how many training rows to keep for the histograms.
        seed: of the perturbations and of the sample.
    """

    kind = "weiper"
    paper = Paper(
        "WeiPer: OOD Detection using Weight Perturbations of Class Projections",
        "Maximilian Granz, Manuel Heurich, Tim Landgraf",
        "NeurIPS",
        2024,
        "https://arxiv.org/abs/2405.17164",
    )
    differentiable: ClassVar[bool] = False
    repeats: PositiveInt = 100
    delta: NonNegativeFloat = 1.8
    bins: PositiveInt = 100
    lam_kld: NonNegativeFloat = 2.5
    lam_msp: NonNegativeFloat = 0.1
    smoothing: PositiveInt = 4
    smoothing_perturbed: PositiveInt = 15
    rows: PositiveInt = 10_000
    seed: int = 0

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"})

    def statistics(self) -> tuple[Statistic, ...]:
        return (Sample(capacity=self.rows, seed=self.seed),)

    def fit(self, store: FeatureStore) -> State:
        head, sample = store.head, store[self.statistics()[0]].embeddings
        assert head is not None
        heads = self._perturbed(head)
        ends = head.weight.new_tensor([[torch.inf, -torch.inf]] * 2, dtype=torch.float64)
        for block in sample.blocks(1024):
            rows = block.to(ends)
            for place, seen in ((0, [rows]), (1, logits(head, heads, rows))):
                for values in seen:
                    ends[place, 0] = torch.minimum(ends[place, 0], values.min())
                    ends[place, 1] = torch.maximum(ends[place, 1], values.max())
        total = ends.new_zeros(2, self.bins)
        for block in sample.blocks(1024):
            shares, _ = self._seen(head, heads, ends, block.to(ends))
            total += shares.sum(dim=1)
        return {"heads": heads, "ends": ends, "density": total / len(sample)}

    def score(self, features: Features, state: State) -> Tensor:
        rows, head = required(features.embeddings, "embeddings"), features.head
        if head is None:
            raise DataError("weiper: the head is perturbed, and these features have none")
        heads, ends, density = (state[name].to(rows) for name in ("heads", "ends", "density"))
        (plain, perturbed), msp = self._seen(head, heads, ends, rows)
        activations = divergence(density[0], smoothed(plain, self.smoothing), FLOORS[0])
        logits = divergence(density[1], smoothed(perturbed, self.smoothing_perturbed), FLOORS[1])
        return self.lam_msp * msp - activations - self.lam_kld * logits

    def _perturbed(self, head: Head) -> Tensor:
        """The perturbed rows of the head, ``[r, K, D]``."""
        generator = torch.Generator().manual_seed(self.seed)
        weight = head.weight.double()
        size = (self.repeats, *weight.shape)
        noise = torch.randn(size, generator=generator, dtype=torch.float64).to(weight.device)
        steps = self.delta * weight.norm(dim=1, keepdim=True)
        heads: Tensor = weight + steps * noise / noise.norm(dim=2, keepdim=True)
        return heads

    def _seen(self, head: Head, heads: Tensor, ends: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Histograms of activations and of perturbed logits ``[2, N, B]``, and MSP ``[N]``."""
        shares = rows.new_zeros(2, len(rows), self.bins)
        count_in(shares[0], rows, ends[0])
        msp = rows.new_zeros(len(rows))
        for values in logits(head, heads, rows):
            count_in(shares[1], values.flatten(1), ends[1])
            msp += values.softmax(dim=2).amax(dim=2).sum(dim=1)
        shares[0] /= max(rows.shape[1], 1)
        shares[1] /= heads.shape[0] * heads.shape[1]
        return shares, msp / len(heads)


def logits(head: Head, heads: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """The logits of rows by perturbed heads ``[r, K, D]``, some at a time: ``[N, some, K]``."""
    some = max(1, ROOM // max(1, len(rows) * heads.shape[1]))
    for weights in torch.split(heads, some):
        bias = None if head.bias is None else head.bias.repeat(len(weights))
        together = replace(head, weight=weights.flatten(0, 1), bias=bias)
        yield together(rows).reshape(len(rows), len(weights), heads.shape[1])


def count_in(counts: Tensor, values: Tensor, ends: Tensor) -> None:
    """Add how many of each row's values ``[N, M]`` lie in each bin to ``counts`` ``[N, B]``."""
    bins = counts.shape[1]
    width = (ends[1] - ends[0]).clamp_min(torch.finfo(values.dtype).tiny)
    place = (values - ends[0]) / width * bins
    # What rounding moves over an end is a training row's smallest or largest number.
    inside = (place > -1e-6) & (place < bins + 1e-6)
    number = torch.where(inside, place, 0.0).floor().long().clamp(0, bins - 1)
    counts.scatter_add_(1, number, inside.to(counts))


def smoothed(shares: Tensor, width: int) -> Tensor:
    """The running mean of histograms ``[N, B]`` over ``width`` bins; the ends are repeated."""
    before = (width - 1) // 2
    longer = F.pad(shares[:, None], (before, width - 1 - before), mode="replicate")
    mean: Tensor = F.avg_pool1d(longer, width, stride=1)[:, 0]
    return mean


def divergence(p: Tensor, q: Tensor, floor: float) -> Tensor:
    """``KL(p, q) + KL(q, p)`` of a histogram ``[B]`` and others ``[N, B]``, ``[N]`` in nats."""
    p, q = p + floor, q + floor
    p, q = p / p.sum(), q / q.sum(dim=1, keepdim=True)
    both: Tensor = ((p - q) * (p.log() - q.log())).sum(dim=1)
    return both


@hookimpl
def register_scorers(register: Register) -> None:
    register(WeiPer)
