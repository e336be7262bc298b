"""Shapers for the conformance kit: healthy ones, and ones with a single fault each."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from oodcore import Features, Shaper
from oodcore.statistics import ClassMoments


class Damped(Shaper):
    """``min(h, c)``, c a multiple of the largest mean activation of a class.

    Args:
        factor: of the largest mean.
    """

    kind = "damped"
    factor: Annotated[float, Field(gt=0)] = 0.8

    def needs(self):
        return frozenset({"embeddings"})

    def statistics(self):
        return (ClassMoments(),)

    def fit(self, store):
        return {"most": self.factor * store[ClassMoments()].mean.max()}

    def apply(self, features, state):
        return features.with_embeddings(features.embeddings.clamp_max(state["most"]))


class Halved(Shaper):
    """``h / 2``; nothing to fit."""

    kind = "halved"

    def needs(self):
        return frozenset({"embeddings"})

    def apply(self, features, state):
        return features.with_embeddings(features.embeddings / 2)


class ShapesInPlace(Damped):
    kind = "shapes_in_place"

    def apply(self, features, state):
        features.embeddings[features.embeddings > state["most"]] = state["most"]
        return features.with_embeddings(features.embeddings)


class ShapesBatch(Halved):
    kind = "shapes_batch"

    def apply(self, features, state):
        return features.with_embeddings(features.embeddings.clamp_max(features.embeddings.mean()))


class ShapesSign(Halved):
    kind = "shapes_sign"

    def apply(self, features, state):
        return features.with_embeddings(-features.embeddings)


class ShapesNumpy(Halved):
    kind = "shapes_numpy"

    def apply(self, features, state):
        rows = np.minimum(features.embeddings.detach().numpy(), 2.0)
        return features.with_embeddings(torch.from_numpy(rows))


class ShapesZero(Halved):
    kind = "shapes_zero"

    def apply(self, features, state):
        rows = features.embeddings
        return features.with_embeddings(rows / rows.sum(dim=1, keepdim=True))


class ShapesFewer(Halved):
    kind = "shapes_fewer"

    def apply(self, features, state):
        return features[features.embeddings.sum(dim=1) > 10.0]


class ShapesNarrow(Halved):
    kind = "shapes_narrow"

    def apply(self, features, state):
        return Features(embeddings=features.embeddings.float())


class ShapesForgets(Halved):
    kind = "shapes_forgets"

    def apply(self, features, state):
        return Features(embeddings=features.embeddings / 2, head=features.head)


class ShapesHeadless(Halved):
    kind = "shapes_headless"

    def apply(self, features, state):
        halved = features.embeddings / 2
        return Features(embeddings=halved, labels=features.labels, ids=features.ids)


class ShapesFirst(Damped):
    kind = "shapes_first"
    most: ClassVar[list] = []

    def fit(self, store):
        self.most.append(super().fit(store)["most"])
        return {"count": store[ClassMoments()].count}

    def apply(self, features, state):
        return features.with_embeddings(features.embeddings.clamp_max(self.most[-1]))


SHAPER_FAULTS = [
    (ShapesInPlace, "unchanged input", "in place: embeddings"),
    (ShapesBatch, "independence of the batch", "embeddings at"),
    (ShapesSign, "sign", "its AUROC on the toy problem is"),
    (ShapesNumpy, "gradient", "leave detach, no_grad, item and numpy out of apply"),
    (ShapesZero, "odd rows", "a row of zeros.* is nan"),
    (ShapesFewer, "output", "of 80 rows is"),
    (ShapesNarrow, "output", "float32"),
    (ShapesForgets, "kept fields", "loses or changes labels"),
    (ShapesHeadless, "kept fields", "loses the logits"),
    (ShapesFirst, "saving", "must be in the state"),
    (ShapesFirst, "state", "on the component"),
]
