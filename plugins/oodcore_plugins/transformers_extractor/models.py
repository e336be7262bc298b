"""Classifiers of transformers: read from a folder of one's own, or drawn from a configuration."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from oodcore.component import suggestion
from oodcore.errors import ConfigurationError, ExtraError, OodcoreError

Task = Literal["image", "text"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_CLASSES: dict[Task, tuple[str, str]] = {
    "image": ("ForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    "text": ("ForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
}
_ATTENTION = ("attn_implementation", "_attn_implementation")
_NAMED = 5
_ASIDE = ("_name_or_path", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")
"""What a configuration says besides the architecture."""

logger = logging.getLogger("oodcore")


def library() -> Any:
    """The package transformers.

    Raises:
        ExtraError: it is not installed, or cannot be imported.
    """
    try:
        import transformers
    except ImportError as error:
        raise ExtraError(
            f"this extractor needs transformers, which cannot be imported ({error}); "
            "pip install 'oodcore[text]'"
        ) from error
    return transformers


def read(folder: Path, classes: int | None = None, seed: int = 0) -> tuple[nn.Module, Task]:
    """The classifier in a folder, with float32 weights, and what it classifies.

    The weights are read here and not by transformers, which would take pickles, adapters and more:
    safetensors is all that is ever opened. No code from the folder is run, nothing is downloaded.

    Args:
        folder: that ``save_pretrained`` wrote.
        classes: K, where it is to be another than the folder's: the head is random then.
        seed: of a random head.

    Raises:
        ConfigurationError: no such folder, files that are missing or damaged, a model that is no
            classifier of images or texts, weights that do not fit it.
    """
    transformers = library()
    _check_config(folder)
    with _private(transformers, seed), _explained(str(folder)):
        config, before = _config(transformers, folder, classes)
        cls, task = _class(transformers, config)
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=_weights(folder),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if config.num_labels != before:
        shape = (before, config.num_labels)
        odd = info["mismatched_keys"]
        info["mismatched_keys"] = [one for one in odd if (one[1][0], one[2][0]) != shape]
    _check_fit(info, folder, cls.__name__)
    return model.float(), task


def described(folder: Path, classes: int | None = None) -> dict[str, Any]:
    """What ``drawn`` needs to make the architecture of the classifier in a folder.

    Raises:
        ConfigurationError: no such folder, or a configuration that cannot be read.
    """
    transformers = library()
    _check_config(folder)
    with _private(transformers), _explained(str(folder)):
        config, _ = _config(transformers, folder, classes)
        kept = {name: value for name, value in config.to_diff_dict().items() if name not in _ASIDE}
        return {**kept, "model_type": config.model_type, "num_labels": config.num_labels}


def _config(transformers: Any, folder: Path, classes: int | None) -> tuple[Any, int]:
    """The configuration in a folder, of so many classes, and how many it has itself."""
    config = transformers.AutoConfig.from_pretrained(
        str(folder.resolve()), local_files_only=True, trust_remote_code=False
    )
    before = config.num_labels
    if classes is not None and classes != before:
        config.num_labels = classes
    return config, before


def drawn(arguments: Mapping[str, Any], seed: int) -> tuple[nn.Module, Task]:
    """A classifier with random weights, and what it classifies.

    Args:
        arguments: ``model_type``, and whatever the configuration of such models takes.
        seed: of the weights; the global random generator is the same afterwards as before.

    Raises:
        ConfigurationError: no known type, an argument that it does not have, a model that is no
            classifier.
    """
    transformers = library()
    given = {name: _listed(value) for name, value in arguments.items()}
    kind = given.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigurationError(
            "configuration needs a model_type, such as vit, deit, bert or distilbert"
        )
    with _private(transformers, seed), _explained("configuration"):
        if kind not in transformers.CONFIG_MAPPING:
            near = suggestion(kind, list(transformers.CONFIG_MAPPING.keys()))
            raise ConfigurationError(
                f"configuration: transformers has no model_type '{kind}'{near}"
            )
        usual = transformers.AutoConfig.for_model(kind)
        # What begins with _ is no setting of a model; how attention is computed may name code.
        strange = [name for name in given if not hasattr(usual, name) or name.startswith("_")]
        if strange:
            near = suggestion(strange[0], list(usual.to_dict()))
            raise ConfigurationError(f"configuration: a {kind} has no '{strange[0]}'{near}")
        config = transformers.AutoConfig.for_model(kind, **given)
        cls, task = _class(transformers, config)
        return cls(config).float().eval(), task


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever transformers raises is a ConfigurationError, which says of what."""
    try:
        yield
    except OodcoreError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{what}: transformers cannot use it: {error}") from error


@contextmanager
def _private(transformers: Any, seed: int = 0) -> Iterator[None]:
    """Random numbers and messages of transformers, kept from whoever calls.

    What it says of weights that are missing is said in an error here.
    """
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _check_config(folder: Path) -> None:
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigurationError(
            f"there is no {path}; path is a folder that save_pretrained wrote, on this machine: "
            "nothing is downloaded"
        )
    config = document(path)
    if _mentions(config, _ATTENTION):
        raise ConfigurationError(
            f"{path} chooses how attention is computed, which may name code elsewhere; remove it"
        )
    if config.get("quantization_config") is not None:
        raise ConfigurationError(f"{path} is of a quantised model; save it in floating point")
    if (folder / ADAPTER).exists():
        raise ConfigurationError(f"{folder} holds an adapter; merge it, and save the whole model")


def document(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigurationError: it cannot be read, or is none.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} is no JSON object")
    return found


def _mentions(value: Any, names: tuple[str, ...]) -> bool:
    if isinstance(value, dict):
        return any(name in value for name in names) or _mentions(list(value.values()), names)
    return isinstance(value, list) and any(_mentions(item, names) for item in value)


def _class(transformers: Any, config: Any) -> tuple[Any, Task]:
    """The class of classifiers that a configuration is of, and what they classify."""
    stated = config.architectures or []
    tasks: list[Task] = [
        task
        for task, (_, mapping) in _CLASSES.items()
        if type(config) in getattr(transformers, mapping)
    ]
    if not tasks:
        raise ConfigurationError(
            f"transformers has no classifier of images or texts of the type '{config.model_type}'"
        )
    if len(tasks) > 1:
        tasks = [task for task in tasks if any(_CLASSES[task][0] in name for name in stated)]
    if len(tasks) != 1:
        raise ConfigurationError(
            f"a '{config.model_type}' may classify images or texts; name its class in the "
            f"configuration's architectures, not {stated}"
        )
    found = getattr(transformers, _CLASSES[tasks[0]][1])[type(config)]
    choices = found if isinstance(found, tuple | list) else [found]
    return next((cls for cls in choices if cls.__name__ in stated), choices[0]), tasks[0]


def _weights(folder: Path) -> dict[str, Tensor]:
    whole, index = folder / WEIGHTS, folder / INDEX
    if not whole.is_file() and not index.is_file():
        raise ConfigurationError(
            f"{folder} has no {WEIGHTS}; weights in any other format are not read: save the model "
            "with save_pretrained, as safetensors"
        )
    files = [whole] if whole.is_file() else _shards(index)
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            # Copies, for what is mapped from a file changes with it.
            weights |= {name: value.clone() for name, value in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"the weights in {file} cannot be read: {error}") from None
    return weights


def _shards(index: Path) -> list[Path]:
    places = document(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(
        Path(name).name != name or not name.endswith(".safetensors") for name in names
    ):
        raise ConfigurationError(f"{index} does not list .safetensors files of its own folder")
    return [index.parent / name for name in names]


def _check_fit(info: Mapping[str, Any], folder: Path, name: str) -> None:
    if missing := sorted(info["missing_keys"]):
        raise ConfigurationError(
            f"the weights in {folder} lack {_some(missing)} of {name}; is it a classifier? Train "
            "its head, and save the whole model"
        )
    if odd := sorted(info["mismatched_keys"]):
        key, given, wanted = odd[0]
        raise ConfigurationError(
            f"the weights in {folder} do not fit its {CONFIG}: {key} is {list(given)}, and {name} "
            f"has {list(wanted)}"
        )
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s has weights that %s does not use: %s", folder, name, _some(unused))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return f"{shown}, and {len(names) - _NAMED} more" if len(names) > _NAMED else shown
