"""classifier: a network of transformers to train, made again without the folder it came from."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oodcore.errors import ConfigurationError
from oodcore_plugins.transformers_extractor.models import described, drawn, read

_INTERPOLATE = "interpolate_pos_encoding"


def classifier(
    path: str | None = None,
    classes: int | None = None,
    configuration: str | None = None,
    **fields: Any,
) -> nn.Module:
    """A classifier of images or of tokens, for the ``network`` of a training.

    It starts from a folder that ``save_pretrained`` wrote, or from random weights. A run keeps the
    configuration of the model, so that the extractor ``run`` needs no such folder. A model with
    position embeddings takes images of any size: they are interpolated (bicubic). Texts come as a
    mapping with ``input_ids`` and ``attention_mask``.

    Args:
        path: the folder; nothing is downloaded, unpickled, or run from it.
        classes: K; where the folder has another number of classes, the head is random.
        configuration: in place of a folder, what its ``config.json`` would say, as a text.
        fields: in place of both, ``model_type`` and what else the configuration class of such
            models takes, such as ``image_size`` and ``num_hidden_layers``.

    Raises:
        ExtraError: transformers is not installed.
        ConfigurationError: not one of the three, or as ``TransformersExtractor``.
    """
    _check_origin(path, configuration, fields)
    seed = torch.initial_seed()
    if path is not None:
        model, _ = read(Path(path), classes, seed)
    else:
        model, _ = drawn(_given(configuration, fields, classes), seed)
    if _INTERPOLATE in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_interpolating, with_kwargs=True)
    return model


def settled(
    path: str | None = None,
    classes: int | None = None,
    configuration: str | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """The arguments with which ``classifier`` gives the same architecture without a folder."""
    _check_origin(path, configuration, fields)
    if path is not None:
        return {"configuration": json.dumps(described(Path(path), classes), sort_keys=True)}
    return {"configuration": json.dumps(_given(configuration, fields, classes), sort_keys=True)}


classifier.settled = settled  # type: ignore[attr-defined]


def _check_origin(path: str | None, configuration: str | None, fields: dict[str, Any]) -> None:
    if sum((path is not None, configuration is not None, bool(fields))) != 1:
        raise ConfigurationError(
            "a classifier is made of path, the folder of a model, of configuration, or of "
            "model_type and other fields: give one of the three"
        )


def _given(
    configuration: str | None, fields: dict[str, Any], classes: int | None
) -> dict[str, Any]:
    given = fields
    if configuration is not None:
        try:
            given = json.loads(configuration)
        except ValueError as error:
            raise ConfigurationError(f"configuration is no JSON: {error}") from None
        if not isinstance(given, dict):
            raise ConfigurationError("configuration is no JSON object")
    return given if classes is None else {**given, "num_labels": classes}


def _interpolating(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {_INTERPOLATE: True, **kwargs}
