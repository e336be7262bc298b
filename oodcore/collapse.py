"""Collapse: how far the embeddings of a class have come together, and how well the head fits them.

Both measures are those of Zihan Zhang and Xiang Xiang, "Decoupling MaxLogit for
Out-of-Distribution Detection" (CVPR 2023): the smaller the within-feature convergence, the better
MaxNorm works, and the smaller the class-feature convergence, the better MaxCosine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from oodcore.data import Batch
from oodcore.errors import DataError
from oodcore.features import Features, Head, check_finite, required, unit
from oodcore.moments import ClassMoments, Moments
from oodcore.statistic import Shape

CUT_OFF = 1e-10
"""Directions in which class means differ by less than this share of the largest do not count."""


def wfc(data: Features | Moments) -> float:
    """Within-feature convergence: ``trace(S_W S_B^+) / K``, at least 0; 0 is collapse.

    ``S_W`` is the within-class covariance, divided by the number of rows, and ``S_B`` the
    covariance of the class means around their own mean, divided by K. ``S_B`` is singular by
    construction: its pseudo-inverse is taken through the singular values of the centred class
    means. Classes without rows are left out of both, and of K. Where fewer than two class means
    differ there is no measure: NaN, with a warning.

    Args:
        data: labelled embeddings (without labels, the predicted class counts), or their moments.

    Raises:
        DataError: no embeddings, no rows, or embeddings that are not finite.
    """
    moments = _moments(data)
    means = moments.mean[moments.present]
    _, sizes, directions = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False)
    # Rounding leaves differences in proportion to the means themselves.
    least = CUT_OFF * torch.maximum(sizes[0], means.abs().max())
    count = min(len(means) - 1, int((sizes > least).sum()))
    if count < 1:
        warnings.warn("wfc needs two class means that differ; it is NaN", stacklevel=2)
        return math.nan
    directions, sizes = directions[:count], sizes[:count]
    spread = (directions @ moments.covariance * directions).sum(dim=1)
    return float((spread / sizes.square()).sum())


def cfc(
    data: Features | Moments,
    head: Head | None = None,
    *,
    norm: Literal["class_means", "all"] = "class_means",
    center: bool = False,
) -> float:
    """Class-feature convergence: ``sum_k || mu_k / ||H||_F - w_k / ||W||_F ||_2``, at least 0.

    0 means that head and class means are the same up to a factor (self-duality). A head that
    normalises its weight counts with unit weights. Classes without rows are left out. Where all
    class means, or all weights, are 0 there is no measure: NaN, with a warning.

    Args:
        data: labelled embeddings (without labels, the predicted class counts), or their moments.
        head: where ``data`` has none.
        norm: H is the matrix of class means ``[K, D]``; with "all" that of every embedding
            ``[N, D]``, as the paper's text says, with which even perfect collapse is not 0.
        center: subtract the mean of the class means from H first, as the third of the
            neural-collapse measures of Papyan, Han and Donoho (PNAS 2020) does.

    Raises:
        DataError: no embeddings, no rows, no head, one that is of another size, or numbers that
            are not finite.
    """
    head = head if head is not None else getattr(data, "head", None)
    if head is None:
        raise DataError("cfc compares class means with a head, and there is none")
    moments = _moments(data)
    weight = head.weight.detach().to(moments.mean)
    check_finite(weight, "collapse: the head's weights")
    if weight.shape != moments.mean.shape:
        raise DataError(
            f"the head is {list(weight.shape)} and the class means are {list(moments.mean.shape)}"
        )
    weight = (unit(weight) if head.normalize_weight else weight)[moments.present]
    means = moments.mean[moments.present]
    means = means - means.mean(dim=0) if center else means
    size = means.norm()
    if norm == "all":
        count = moments.count[moments.present]
        size = (moments.scatter.trace() + (count * means.square().sum(dim=1)).sum()).sqrt()
    if not (size > 0 and weight.norm() > 0):
        warnings.warn(
            "cfc needs class means and weights that are not all 0; it is NaN", stacklevel=2
        )
        return math.nan
    return float((means / size - weight / weight.norm()).norm(dim=1).sum())


def measured(model: nn.Module, batches: Iterable[Batch], classes: int) -> dict[str, float]:
    """The measures of a network on labelled rows, in evaluation mode: ``wfc`` and ``cfc``.

    One that does not exist (see there) is left out.

    Raises:
        DataError: no rows, or embeddings that are not finite.
    """
    statistic, state, head = ClassMoments(), None, None
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                features = replace(model(batch.inputs), labels=batch.labels, ids=batch.ids).double()
                rows = required(features.embeddings, "embeddings")
                check_finite(rows, "collapse: embeddings", features.ids)
                if state is None:
                    state = statistic.init(Shape(classes, rows.shape[1], {}, rows.device))
                state, head = statistic.update(state, features), features.head
    finally:
        for part, training in modes:
            part.training = training
    if state is None:
        raise DataError("there are no rows to measure collapse on")
    moments = statistic.view(state)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(wfc|cfc) needs", category=UserWarning)
        found = {"wfc": wfc(moments), "cfc": cfc(moments, head)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _moments(data: Features | Moments) -> Moments:
    if isinstance(data, Moments):
        moments = data
    else:
        features = data.detach().double()
        rows = required(features.embeddings, "embeddings")
        check_finite(rows, "collapse: embeddings", features.ids)
        classes = features.labels if features.labels is not None else features.predicted
        logits = features.logits
        count = int(classes.max()) + 1 if len(rows) else 0
        count = max(count, logits.shape[1]) if logits is not None else count
        statistic = ClassMoments()
        state = statistic.init(Shape(count, rows.shape[1], {}, rows.device))
        moments = statistic.view(statistic.update(state, features))
    if moments.rows == 0:
        raise DataError("there are no rows to measure collapse on")
    return moments
