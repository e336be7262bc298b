"""What stands between inputs and a transformer: tokens of texts, images of another size."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.transformers_extractor.models import library

FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What a tokenizer may be made of."""
_UNLIMITED = 10**9
_INTERPOLATE = "interpolate_pos_encoding"


class Tokens(nn.Module):
    """Texts as a model wants them: tokenised, truncated, padded to the longest of the batch.

    It is a part of the model, and the hash of its files is in a buffer, so that the model's
    fingerprint covers it. Where a model takes no mask, texts are padded to the full length, so that
    they do not depend on their batch.

    Args:
        tokenizer: of transformers.
        max_length: of a text, in tokens.
        takes: the arguments of the model.
        digest: of whatever the tokens depend on.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, takes: frozenset[str], digest: bytes
    ) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._takes = takes
        self.register_buffer("digest", torch.tensor(list(digest), dtype=torch.uint8))

    def forward(self, texts: list[str]) -> dict[str, Tensor]:
        """``input_ids`` ``[N, tokens]`` and what else the model takes, on its device."""
        tokens = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._max_length,
            padding="longest" if "attention_mask" in self._takes else "max_length",
            return_tensors="pt",
        )
        device = self.digest.device
        return {name: part.to(device) for name, part in tokens.items() if name in self._takes}


def give_tokens(model: nn.Module, folder: Path | None, max_length: int | None) -> None:
    """Have a model take lists of texts beside mappings of tokens.

    Args:
        model: a classifier of texts.
        folder: of the tokenizer; without one, the model takes tokens alone.
        max_length: of a text in tokens; what the tokenizer says where it is None.

    Raises:
        ConfigurationError: no tokenizer in the folder, or no length that it and the model can do.
    """
    if folder is None:
        model.register_forward_pre_hook(_only_tokens, with_kwargs=True)
        return
    tokenizer = _tokenizer(folder)
    takes = frozenset(inspect.signature(model.forward).parameters)
    length = _length(model, tokenizer, max_length, folder)
    model.add_module("tokenizer", Tokens(tokenizer, length, takes, _digest(folder, length)))
    model.register_forward_pre_hook(_tokenised, with_kwargs=True)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)


def _tokenizer(folder: Path) -> Any:
    if not has_tokenizer(folder):
        raise ConfigurationError(f"{folder} has no tokenizer: no {', '.join(FILES)}")
    try:
        tokenizer = library().AutoTokenizer.from_pretrained(
            str(folder.resolve()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ConfigurationError(f"the tokenizer in {folder} cannot be used: {error}") from error
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            f"the tokenizer in {folder} has no padding token, so texts do not go in a batch"
        )
    return tokenizer


def _length(model: Any, tokenizer: Any, max_length: int | None, folder: Path) -> int:
    length = tokenizer.model_max_length if max_length is None else max_length
    if length >= _UNLIMITED:
        raise ConfigurationError(
            f"the tokenizer in {folder} does not say how long a text may be; set max_length"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ConfigurationError(
            f"the model takes {longest} tokens, and max_length is {length}; set a smaller one"
        )
    special = tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise ConfigurationError(
            f"max_length is {length}, and {special} tokens are taken by marks; set a larger one"
        )
    return int(length)


def _digest(folder: Path, length: int) -> bytes:
    digest = hashlib.sha256(str(length).encode())
    for name in FILES:
        if (folder / name).is_file():
            digest.update(f"\n{name}\n".encode())
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.digest()


def _tokenised(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return ((), {**kwargs, **model.tokenizer(args[0])}) if _texts(args) else (args, kwargs)


def _only_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _texts(args):
        raise DataError(
            "this model has no tokenizer, so it takes no texts; set the extractor's tokenizer to a "
            "folder that has one"
        )


def _texts(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and isinstance(args[0], list)


class ImageSize(nn.Module):
    """The size of a model's images where it is not the one that the model was trained with.

    It is a part of the model, and the number is in a buffer, so that the fingerprint covers it.
    """

    def __init__(self, side: int, interpolates: bool) -> None:
        super().__init__()
        self._side = side
        self._interpolates = interpolates
        self.register_buffer("side", torch.tensor(side))

    def forward(self, images: Tensor) -> dict[str, Any]:
        """The arguments that the model needs beside images ``[N, C, side, side]``."""
        if images.shape[-2:] != (self._side, self._side):
            raise DataError(
                f"image_size is {self._side}, and the images are {list(images.shape)}; have "
                f"preprocess make them squares of {self._side} pixels"
            )
        return {_INTERPOLATE: True} if self._interpolates else {}


def give_size(model: nn.Module, side: int) -> None:
    """Have a model take images of another size, its position embeddings interpolated.

    Models without such embeddings, as convolutional ones, need nothing for that.

    Raises:
        ConfigurationError: the model cannot do it.
    """
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int) and side % patch:
        raise ConfigurationError(
            f"image_size is {side}, which is no multiple of patches of {patch}"
        )
    takes = inspect.signature(model.forward).parameters
    model.add_module("image_size", ImageSize(side, _INTERPOLATE in takes))
    model.register_forward_pre_hook(_sized, with_kwargs=True)
    channels = getattr(model.config, "num_channels", 3)
    try:
        with torch.no_grad():
            model(torch.zeros(1, channels, side, side))
    except Exception as error:
        raise ConfigurationError(
            f"a {type(model).__name__} does not take images of {side} pixels: {error}"
        ) from error


def _sized(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    images = args[0] if args else kwargs.get("pixel_values")
    if isinstance(images, Tensor):
        kwargs = {**kwargs, **model.image_size(images)}
    return args, kwargs
