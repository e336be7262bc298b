"""What the tests of scorers on embeddings share: labelled rows, a head, and a fitted state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from oodcore import Features, FeatureStore, Head

DRAWN = np.random.default_rng(0)
LABELS = DRAWN.integers(0, 4, 60)
ROWS = np.abs(DRAWN.normal(size=(60, 5)) + 2 * np.eye(4, 5)[LABELS])
TESTED = np.abs(DRAWN.normal(size=(15, 5))) * 2
HEAD = Head(torch.as_tensor(DRAWN.normal(size=(4, 5)) + 2 * np.eye(4, 5)), torch.ones(4).double())


def features(rows, labels=None, head: Head | None = HEAD) -> Features:
    wide = torch.as_tensor(np.asarray(rows, dtype=np.float64))
    numbers = None if labels is None else torch.as_tensor(np.asarray(labels))
    return Features(embeddings=wide, labels=numbers, head=head, ids=torch.arange(len(wide)))


def fitted(scorer, rows=ROWS, labels=LABELS, head: Head | None = HEAD) -> Any:
    given = features(rows, labels, head)
    return scorer.fit(FeatureStore(given.head, scorer.statistics()).update(given))


def score(scorer, rows=TESTED, state=None, head: Head | None = HEAD) -> np.ndarray:
    known = fitted(scorer, head=head) if state is None else state
    return scorer.score(features(rows, head=head), known).numpy()


def logits(row) -> np.ndarray:
    return HEAD.weight.numpy() @ row + HEAD.bias.numpy()
