"""feature_norm: norms by the definition, puzzles, and the block that they choose."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodcore import Detector, Features, registry
from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.feature_norm import FeatureNorm, jigsaw, norm

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


class Edges(nn.Module):
    """How smooth an image is: a puzzle lowers it, for its tiles do not fit."""

    def forward(self, inputs: Tensor) -> Tensor:
        steep = inputs.diff(dim=2).abs()[..., :-1] + inputs.diff(dim=3).abs()[:, :, :-1]
        return 1 / (0.05 + steep)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.smooth = nn.Identity(), Edges()
        self.head = nn.Linear(2, 3)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
            self.head.bias.zero_()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.smooth(self.same(inputs)).mean(dim=(2, 3)))
        return logits


def images(count: int) -> Tensor:
    """Smooth ones, ``[N, 2, 9, 9]``, whose sides differ most."""
    ramp = torch.linspace(1, 5, 9)
    places = ramp[:, None] + ramp
    return places + 0.01 * drawn(count, 2, 9, 9)


def test_it_is_the_mean_norm_of_positive_maps():
    maps = drawn(5, 3, 2, 4)
    wanted = [
        sum(math.sqrt(sum(max(v, 0) ** 2 for v in channel)) for channel in row) / 3
        for row in maps.double().flatten(2).tolist()
    ]
    features = Features(layers={"b": maps}, logits=drawn(5, 2))
    np.testing.assert_allclose(FeatureNorm(blocks=("b",)).score(features, {}), wanted, rtol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1), (4, 3, 1, 1)])
def test_a_block_without_places_has_channels_of_one_number(shape):
    values = drawn(4, 3)
    wanted = values.double().clamp_min(0).mean(dim=1)
    np.testing.assert_allclose(norm(values.reshape(shape)), wanted, rtol=1e-12)


def test_a_silent_row_scores_zero_and_other_types_are_read():
    assert norm(-torch.ones(2, 3, 4, 4)).tolist() == [0, 0]
    assert norm(torch.ones(1, 3, 4, 4, dtype=torch.float16)).tolist() == [4]
    assert norm(torch.ones(1, 3, 4, 4)).dtype == torch.float64


def test_a_puzzle_has_the_same_tiles_in_another_order():
    given = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6) + 1

    def tiles(image: Tensor) -> list[bytes]:
        return [
            image[:, i : i + 2, j : j + 2].contiguous().numpy().tobytes()
            for i in range(0, 6, 2)
            for j in range(0, 6, 2)
        ]

    puzzles = jigsaw(given, torch.tensor([3, 9]), 3, seed=0)
    for image, puzzle in zip(given, puzzles, strict=True):
        assert tiles(image) != tiles(puzzle)
        assert sorted(tiles(image)) == sorted(tiles(puzzle))
    assert not torch.equal(puzzles[0], jigsaw(given, torch.tensor([4, 9]), 3, seed=0)[0])
    assert not torch.equal(puzzles, jigsaw(given, torch.tensor([3, 9]), 3, seed=1))
    alone = jigsaw(given[1:], torch.tensor([9]), 3, seed=0)
    assert torch.equal(alone[0], puzzles[1])


def test_every_place_gets_every_tile():
    image = torch.zeros(1, 1, 2, 2)
    image[0, 0, 0, 0] = 1
    ids = torch.arange(400)
    found = jigsaw(image.expand(400, 1, 2, 2), ids, 2, seed=0).mean(dim=0)
    np.testing.assert_allclose(found.flatten(), 0.25, atol=0.08)


def test_pixels_beyond_the_last_tile_are_dark():
    puzzle = jigsaw(torch.ones(1, 1, 8, 10), torch.tensor([0]), 3, seed=0)[0, 0]
    assert puzzle[:6, :9].min() == 1
    assert puzzle[6:].max() == 0
    assert puzzle[:, 9:].max() == 0


def test_the_block_that_puzzles_quiet_is_chosen(caplog):
    scorer = {"kind": "feature_norm", "blocks": ["same", "smooth"]}
    train, asked = images(20), images(5)
    with caplog.at_level(logging.INFO, "oodcore"):
        detector = Detector(Network(), scorer=scorer).fit((train, torch.zeros(20).long()))
    assert "NormRatio {'same': 1.0" in caplog.text
    assert int(detector.ready().scorer["block"]) == 1
    alone = Detector(Network(), scorer={"kind": "feature_norm", "blocks": ["smooth"]})
    np.testing.assert_allclose(detector.score(asked), alone.score(asked), rtol=1e-12)
    ratio = norm(Edges()(train)) / norm(Edges()(jigsaw(train, torch.arange(20), 3, 0)))
    measured = FeatureNorm(blocks=("same", "smooth")).measure(_seen(train), {})
    assert measured is not None
    np.testing.assert_allclose(measured[:, 1], ratio, rtol=1e-6)
    assert ratio.mean() > 1.05


def _seen(inputs: Tensor) -> Features:
    def rerun(given: Tensor, edit=None) -> Features:
        layers = {"same": given, "smooth": Edges()(given)}
        ids = torch.arange(len(given))
        return Features(layers=layers, ids=ids, inputs=given, rerun=rerun)

    return rerun(inputs)


def test_of_equal_blocks_the_first_is_chosen():
    rows = torch.tensor([[1.0, 1.1, 1.1], [1.0, 1.1 - 1e-13, 1.1 + 1e-13]], dtype=torch.float64)
    for order in ([0, 1], [1, 0]):
        state = FeatureNorm(blocks=("a", "b", "c")).finish({}, rows[order], None)
        assert int(state["block"]) == 1


def test_one_block_scores_stored_features_and_several_want_inputs():
    features = Features(layers={"a": drawn(3, 2), "b": drawn(3, 2)}, logits=drawn(3, 2))
    assert len(Detector(scorer={"kind": "feature_norm", "blocks": ["a"]}).score(features)) == 3
    several = Detector(scorer={"kind": "feature_norm", "blocks": ["a", "b"]})
    with pytest.raises(DataError, match="inputs"):
        several.fit(features)


def test_inputs_that_cannot_be_cut_are_refused():
    scorer = FeatureNorm(blocks=("same", "smooth"), pieces=12)
    with pytest.raises(DataError, match="9 x 9 pixels cannot be cut into 12 x 12"):
        scorer.measure(_seen(images(2)), {})
    flat = Features(logits=drawn(2, 3), inputs=drawn(2, 3), rerun=_seen, ids=torch.arange(2))
    with pytest.raises(DataError, match="takes images"):
        scorer.measure(flat, {})


@pytest.mark.parametrize("fields", [{"blocks": []}, {"blocks": ["a"], "pieces": 1}, {}])
def test_no_blocks_and_puzzles_of_one_piece_are_refused(fields):
    with pytest.raises(ConfigurationError, match="blocks|pieces"):
        registry.build("scorer", {"kind": "feature_norm", **fields})
