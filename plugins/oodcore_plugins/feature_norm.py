"""FeatureNorm: how active a block is, and the block where shuffled images are least so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from oodcore import Features, Paper, Scorer, hookimpl
from oodcore.errors import DataError
from oodcore.features import EPS, required
from oodcore.hookspecs import Register
from oodcore.selection import hashed
from oodcore.statistics import State

logger = logging.getLogger("oodcore")


class FeatureNorm(Scorer):
    """``mean_c ||max(a_c, 0)||_2`` over the channels c of a block's activations a, at least 0.

    ``a_c`` are the places of channel c: ``[H, W]`` in a convolutional network, one number where a
    block has no places.

    With one block nothing is learnt. Of several, the first with the largest NormRatio is chosen:
    the mean over the training rows of the norm of an image over the norm of the same image as a
    jigsaw puzzle, which is cut into ``pieces`` by ``pieces`` tiles and put together in a random
    order (a function of seed and id). Pixels beyond the last whole tile are 0, as in the authors'
    code. A puzzle that leaves a block silent counts as a norm of 1e-12. The ratios are logged.
    Fitting then passes through the model three times a row (the row, the row again, its puzzle),
    and scoring wants a model and inputs: name the block that was chosen alone to score stored
    features. The paper chooses among all blocks of a network; which submodules are blocks has to be
    said here.

    Args:
        blocks: names of the submodules to choose from, or one name.
        pieces: tiles along each side of a puzzle.
        seed: of the order of the tiles.
    """

    kind = "feature_norm"
    paper = Paper(
        "Block Selection Method for Using Feature Norm in Out-of-Distribution Detection",
        "Yeonguk Yu, Sungho Shin, Seongju Lee, Changhyun Jun, Kyoobin Lee",
        "CVPR",
        2023,
        "https://arxiv.org/abs/2212.02295",
    )
    blocks: Annotated[tuple[str, ...], Field(min_length=1)]
    pieces: Annotated[int, Field(ge=2)] = 3
    seed: int = 0

    def needs(self) -> frozenset[str]:
        blocks = frozenset(f"layers.{block}" for block in self.blocks)
        return blocks | {"inputs"} if self.measures else blocks

    @property
    def measures(self) -> bool:
        return len(self.blocks) > 1

    def measure(self, features: Features, state: State) -> Tensor | None:
        """The norm of each row over that of its puzzle, in each block."""
        if not self.measures:
            return None
        inputs, rerun = features.inputs, features.rerun
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or rerun is None:
            raise DataError(
                "feature_norm: choosing a block takes images [N, C, H, W] as inputs; name one "
                "block for anything else"
            )
        puzzles = jigsaw(inputs, required(features.ids, "ids"), self.pieces, self.seed)
        return self._norms(features.layers) / self._norms(rerun(puzzles).layers).clamp_min(EPS)

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        ratios = rows.mean(dim=0)
        # The first of those that differ by rounding alone, whatever the order of the rows.
        best = (ratios >= (1 - 1e-9) * ratios.max()).int().argmax()
        logger.info(
            "feature_norm: NormRatio %s", dict(zip(self.blocks, ratios.tolist(), strict=True))
        )
        return {**state, "block": best}

    def score(self, features: Features, state: State) -> Tensor:
        block = self.blocks[int(state["block"]) if self.measures else 0]
        return norm(features.layers[block])

    def _norms(self, layers: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([norm(layers[block]) for block in self.blocks], dim=1)


def norm(activations: Tensor) -> Tensor:
    """The mean over channels of the norm of the positive activations ``[N, C, ...]``, ``[N]``."""
    positive = activations.double().clamp_min(0)
    channels = positive.flatten(2) if positive.ndim > 2 else positive.reshape(len(positive), -1, 1)
    norms: Tensor = torch.linalg.vector_norm(channels, dim=2)
    return norms.mean(dim=1)


def jigsaw(images: Tensor, ids: Tensor, pieces: int, seed: int) -> Tensor:
    """Images ``[N, C, H, W]`` whose tiles are in another order, drawn by seed and id.

    Raises:
        DataError: images with fewer pixels along a side than pieces.
    """
    count, channels, height, width = images.shape
    tall, wide = height // pieces, width // pieces
    if not tall or not wide:
        raise DataError(
            f"feature_norm: images of {height} x {width} pixels cannot be cut into {pieces} x "
            f"{pieces} tiles; give fewer pieces"
        )
    cut = images[:, :, : tall * pieces, : wide * pieces]
    tiles = cut.reshape(count, channels, pieces, tall, pieces, wide).permute(0, 2, 4, 1, 3, 5)
    numbers = ids[:, None] * pieces**2 + torch.arange(pieces**2).to(ids)
    order = hashed(numbers.flatten(), seed, "jigsaw").reshape(numbers.shape).argsort(dim=1)
    rows = torch.arange(count, device=images.device)[:, None]
    shuffled = tiles.flatten(1, 2)[rows, order.to(images.device)].reshape(tiles.shape)
    puzzles = torch.zeros_like(images)
    joined = shuffled.permute(0, 3, 1, 4, 2, 5).reshape(cut.shape)
    puzzles[:, :, : tall * pieces, : wide * pieces] = joined
    return puzzles


@hookimpl
def register_scorers(register: Register) -> None:
    register(FeatureNorm)
