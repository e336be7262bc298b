from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from oodcore.data import Stream
from oodcore.errors import ConfigurationError, ExtraError
from oodcore_plugins.photographs import Photographs


def test_rows_are_patches_of_the_asked_size_and_colour() -> None:
    batch = next(iter(Stream(Photographs(rows=40, size=16))))
    assert batch.inputs.shape == (40, 3, 16, 16)
    assert batch.inputs.dtype == torch.float32
    assert batch.labels is None
    assert batch.ids.tolist() == list(range(40))
    assert float(batch.inputs.min()) >= 0
    assert float(batch.inputs.max()) <= 1
    grey = next(iter(Stream(Photographs(rows=40, size=16, colour="grey")))).inputs
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(grey, (batch.inputs * weights).sum(1, keepdim=True), atol=1e-5)


def test_a_patch_as_large_as_a_photograph_is_a_piece_of_it() -> None:
    # At full size nothing is shrunk, so that the pixels are those of the file.
    whole = [
        load_sample_image(name).transpose(2, 0, 1) / 255 for name in ("china.jpg", "flower.jpg")
    ]
    seen = set()
    for image, _, _ in Photographs(rows=12, size=427).open():
        found = [
            (photograph, left)
            for photograph in range(2)
            for left in range(214)
            if np.allclose(whole[photograph][:, 0, left], image[:, 0, 0].numpy(), atol=1e-6)
            and np.allclose(whole[photograph][:, :, left : left + 427], image.numpy(), atol=1e-6)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {photograph for photograph, _ in seen} == {0, 1}
    assert len({left for _, left in seen}) > 6


def test_patches_of_every_scale_are_shrunk_to_size() -> None:
    whole = [
        load_sample_image(name).astype(np.float32) / 255 for name in ("china.jpg", "flower.jpg")
    ]
    sides = []
    for row, (image, _, _) in enumerate(Photographs(rows=60, size=16, seed=2).open()):
        random = np.random.default_rng(np.random.SeedSequence(2, spawn_key=(row,)))
        photograph = whole[random.integers(2)]
        side = round(16 * (427 / 16) ** random.random())
        top, left = random.integers(427 - side + 1), random.integers(640 - side + 1)
        for channel in range(3):
            patch = Image.fromarray(photograph[top : top + side, left : left + side, channel])
            small = patch.resize((16, 16), Image.Resampling.BILINEAR)
            assert np.allclose(image[channel].numpy(), np.array(small), atol=1e-5)
        sides.append(side)
    assert min(sides) < 24
    assert max(sides) > 280
    assert 60 < np.median(sides) < 115  # uniform in the logarithm: the middle is 83


def test_a_row_depends_on_seed_and_number_alone() -> None:
    few, many = Photographs(rows=5, seed=3).open(), Photographs(rows=500, seed=3).open()
    for row in (4, 0, 2):
        assert torch.equal(few[row][0], many[row][0])
    assert not torch.equal(few[1][0], Photographs(seed=4).open()[1][0])
    for row in (5, -1):
        with pytest.raises(IndexError):
            few[row]


def test_workers_and_pickle_give_the_same_rows() -> None:
    source = Photographs(rows=10, size=8)
    alone = torch.cat([batch.inputs for batch in Stream(source, batch_size=4)])
    together = Stream(source, batch_size=4, num_workers=2)
    assert torch.equal(torch.cat([batch.inputs for batch in together]), alone)
    assert torch.equal(pickle.loads(pickle.dumps(source.open()))[7][0], alone[7])
    assert Photographs.model_validate(source.dump()) == source


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="size is 428, and the photographs are 427"):
        Photographs(size=428).open()
    with pytest.raises(ValidationError):
        Photographs(seed=-1)


def test_without_pillow_the_error_says_how_to_get_it(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ExtraError, match="pip install pillow"):
        Photographs().open()
