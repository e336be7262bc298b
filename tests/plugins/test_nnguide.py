"""NNGuide against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodcore import Detector, Features
from oodcore.errors import DataError


def features(seed: int, count: int = 60, shift: float = 0.0) -> Features:
    generator = np.random.default_rng(seed)
    return Features(
        embeddings=torch.tensor(generator.normal(size=(count, 5))),
        logits=torch.tensor(2 * generator.normal(size=(count, 3)) + shift),
    )


def definition(train: Features, asked: Features, k: int, normalize: bool) -> list[float]:
    def energy(logits):
        return np.log(np.exp(logits).sum())

    def compared(row):
        return row / max(np.linalg.norm(row), 1e-12) if normalize else row

    bank = list(zip(train.embeddings.numpy(), train.logits.numpy(), strict=True))
    scores = []
    for row, logits in zip(asked.embeddings.numpy(), asked.logits.numpy(), strict=True):
        near = sorted(compared(row) @ (compared(h) * energy(z)) for h, z in bank)[-k:]
        scores.append(energy(logits) * np.mean(near))
    return scores


@pytest.mark.parametrize("k", [1, 10, 60])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shift", [0.0, -6.0])
def test_it_is_its_definition_also_for_negative_energies(k, normalize, shift):
    train, asked = features(0, shift=shift), features(1, 20, shift)
    scorer = {"kind": "nnguide", "k": k, "normalize": normalize}
    scores = Detector(scorer=scorer).fit(train).score(asked)
    np.testing.assert_allclose(scores, definition(train, asked, k, normalize), rtol=1e-6)


def test_a_zero_row_scores_zero():
    zero = Features(embeddings=torch.zeros(1, 5).double(), logits=torch.ones(1, 3).double())
    assert Detector(scorer="nnguide").fit(features(0)).score(zero)[0] == 0


def test_fewer_rows_than_neighbours_are_warned_of():
    train, asked = features(0, 4), features(1, 5)
    with pytest.warns(UserWarning, match="all of them count"):
        detector = Detector(scorer="nnguide").fit(train)
    np.testing.assert_allclose(detector.score(asked), definition(train, asked, 4, True), rtol=1e-6)


def test_a_fraction_makes_a_smaller_bank_and_none_is_an_error():
    train, asked = features(0, 400), features(1, 20)
    part = Detector(scorer={"kind": "nnguide", "k": 3, "fraction": 0.25}).fit(train).score(asked)
    whole = Detector(scorer={"kind": "nnguide", "k": 3}).fit(train).score(asked)
    positive = asked.logits.logsumexp(dim=1).numpy() > 0
    assert (part <= whole + 1e-9)[positive].all()
    assert (part < whole)[positive].any()
    with pytest.raises(DataError, match="give a larger one"):
        Detector(scorer={"kind": "nnguide", "fraction": 1e-9}).fit(train)
