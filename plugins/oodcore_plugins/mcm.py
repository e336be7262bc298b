"""MCM: the softmax over cosines to what texts say of the classes."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import PositiveFloat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from oodcore import Features, FeatureStore, Paper, Scorer, hookimpl
from oodcore.component import FilePath
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.statistics import State


class MCM(Scorer):
    """``max_k softmax(cos(h, t) / T)_k`` of an image's embedding h and texts t_k, in [1/K, 1].

    For models such as CLIP that embed images and texts in one space: t_k is the embedding of a text
    about class k, or the mean of several, each of unit norm. The cosines are taken as they are: the
    factor of 100 with which CLIP was trained is a temperature of 0.01 here. A zero embedding has
    cosine 0 to every text and scores 1/K, and so does every row where all texts are the same.

    Without a file the texts are the rows of the head's weight, and there is nothing to fit: an
    image encoder wrapped with the head ``Head(texts, normalize_weight=True,
    normalize_features=True)``, of which it is ``msp`` with this temperature. Any linear classifier
    has directions of classes too. With a file the texts are read when the detector is fitted, and
    are then part of what it has learnt: a saved detector never looks for the file again.

    Args:
        temperature: T; the paper has 1.
        text: a ``.safetensors`` file with one tensor ``[K, D]``, a row for each class; None for the
            head's weight. It is read again at each fit.
    """

    kind = "mcm"
    paper = Paper(
        "Delving into Out-of-Distribution Detection with Vision-Language Representations",
        "Yifei Ming, Ziyang Cai, Jiuxiang Gu, Yiyou Sun, Wei Li, Yixuan Li",
        "NeurIPS",
        2022,
        "https://arxiv.org/abs/2211.13445",
    )
    temperature: PositiveFloat = 1.0
    text: FilePath | None = None

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings", "head"} if self.text is None else {"embeddings"})

    @property
    def learns(self) -> bool:
        return self.text is not None

    def fit(self, store: FeatureStore) -> State:
        return {} if self.text is None else {"text": embedded(self.text)}

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        if self.text is not None:
            texts = state["text"].to(rows)
        elif features.head is not None:
            texts = features.head.weight
        else:
            raise DataError("mcm: these features have no head; give text= a file of embeddings")
        if texts.shape[1] != rows.shape[1]:
            raise DataError(
                f"mcm: the texts have {texts.shape[1]} columns and the embeddings {rows.shape[1]}; "
                "both are of one space, after the projection"
            )
        cosines = unit(rows) @ unit(texts).T
        return (cosines / self.temperature).softmax(dim=1).amax(dim=1)


def embedded(path: Path) -> Tensor:
    """The one tensor in a file, ``[K, D]`` float64.

    Raises:
        ConfigurationError: no such file, not safetensors, or not one tensor of finite rows of which
            none is zero.
    """
    if not path.is_file():
        raise ConfigurationError(f"mcm: there is no file of text embeddings {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"mcm: {path} cannot be read as safetensors: {error}") from None
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if len(tensors) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise ConfigurationError(
            f"mcm: {path} must hold one tensor [K, D] of text embeddings, and it holds {shapes}"
        )
    texts = next(iter(tensors.values())).to(torch.float64)
    wrong = ~torch.isfinite(texts).all(dim=1) | ~texts.any(dim=1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ConfigurationError(f"mcm: row {row} of {path} is zero or not finite")
    return texts


@hookimpl
def register_scorers(register: Register) -> None:
    register(MCM)
