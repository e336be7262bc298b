"""What the tests of scorers on logits share: softmax by the definition, and logits to try."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from oodcore import Features

logit_arrays = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
    elements=st.floats(-30, 30),
)


def softmax(row) -> list[float]:
    """Of one row, as it is defined; for moderate logits."""
    powers = [math.exp(float(z)) for z in row]
    return [power / math.fsum(powers) for power in powers]


def score(scorer, logits, state=None) -> np.ndarray:
    values = torch.as_tensor(np.asarray(logits, dtype=np.float64))
    given = scorer.score(Features(logits=values), state or {})
    assert given.dtype == torch.float64
    return given.numpy()
