"""deit3: the published checkpoints of DeiT-III as a folder that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oodcore.errors import ConfigurationError
from oodcore_plugins.transformers_extractor.models import CONFIG, WEIGHTS

_HEAD_SIZE = 64
_EPS = 1e-6
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def convert(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the classifier in a checkpoint of DeiT-III to a folder, as a BEiT.

    A BEiT with absolute position embeddings, without relative ones, that classifies the class token
    computes the same function: its class token has a position, which is 0 here, and its keys have
    no bias, which the softmax of attention takes no notice of. Sizes are those of the tensors, and
    heads of 64 numbers, as in all of DeiT-III. Nothing is dropped at random in training.

    Touvron, Cord, Jegou, DeiT III: Revenge of the ViT, ECCV 2022, https://arxiv.org/abs/2204.07118.

    Args:
        checkpoint: ``.safetensors``, or a torch file, which is read without running code in it:
            the authors' names of tensors, or timm's.
        folder: to write; it must not exist.

    Returns:
        The folder.

    Raises:
        ConfigurationError: no such file, one that is no checkpoint of DeiT-III, or a folder that is
            there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigurationError(f"{folder} exists already; name another folder")
    state = _state(Path(checkpoint))
    try:
        config, weights = _config(state), _weights(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{checkpoint} is no checkpoint of DeiT-III: {error}") from None
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ConfigurationError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigurationError(
            f"{path} cannot be read without running code in it: {error}"
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path} holds a {type(found).__name__}, not a state dict")
    for ours, timms in (("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
        found = {name.replace(timms, ours): value for name, value in found.items()}
    return {name: value.float() for name, value in found.items()}


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    side = round(state["pos_embed"].shape[1] ** 0.5)
    if side**2 != state["pos_embed"].shape[1]:
        raise ValueError(f"{state['pos_embed'].shape[1]} positions are no square of patches")
    if width % _HEAD_SIZE:
        raise ValueError(f"{width} numbers are no heads of {_HEAD_SIZE}")
    classes = len(state["head.weight"])
    return {
        "architectures": ["BeitForImageClassification"],
        "model_type": "beit",
        "hidden_size": width,
        "num_hidden_layers": _depth(state),
        "num_attention_heads": width // _HEAD_SIZE,
        "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": _EPS,
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mask_token": False,
        "use_mean_pooling": False,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "id2label": {str(number): f"LABEL_{number}" for number in range(classes)},
        "label2id": {f"LABEL_{number}": number for number in range(classes)},
    }


def _weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that transformers writes."""
    positions = state["pos_embed"]
    nowhere = torch.zeros_like(positions[:, :1])
    found = {
        "beit.embeddings.cls_token": state["cls_token"],
        "beit.embeddings.position_embeddings": torch.cat([nowhere, positions], dim=1),
    }
    for old, new in (
        ("patch_embed.proj", "beit.embeddings.patch_embeddings.projection"),
        ("norm", "beit.layernorm"),
        ("head", "classifier"),
    ):
        found |= {f"{new}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    for number in range(_depth(state)):
        old, new = f"blocks.{number}", f"beit.encoder.layer.{number}"
        for one, other in _BLOCK.items():
            for part in ("weight", "bias"):
                found[f"{new}.{other}.{part}"] = state[f"{old}.{one}.{part}"]
        found[f"{new}.lambda_1"] = state[f"{old}.gamma_1"]
        found[f"{new}.lambda_2"] = state[f"{old}.gamma_2"]
        query, key, value = state[f"{old}.attn.qkv.weight"].chunk(3)
        query_bias, _, value_bias = state[f"{old}.attn.qkv.bias"].chunk(3)
        attention = f"{new}.attention.attention"
        found[f"{attention}.query.weight"], found[f"{attention}.query.bias"] = query, query_bias
        found[f"{attention}.value.weight"], found[f"{attention}.value.bias"] = value, value_bias
        found[f"{attention}.key.weight"] = key
    return {name: value.clone().contiguous() for name, value in found.items()}
