"""Classifiers of images and texts that transformers builds."""

from __future__ import annotations

from typing import Any

from pydantic import NonNegativeInt, PositiveInt, model_validator
from pydantic_core import PydanticCustomError
from torch import nn

from oodcore import Extractor, FeatureModel, hookimpl
from oodcore.component import FilePath
from oodcore.errors import ConfigurationError
from oodcore.factory import Arguments
from oodcore.hookspecs import Register
from oodcore_plugins.transformers_extractor.classifier import classifier
from oodcore_plugins.transformers_extractor.inputs import give_size, give_tokens, has_tokenizer
from oodcore_plugins.transformers_extractor.models import Task, drawn, read
from oodcore_plugins.transformers_extractor.norms import drop_last_norm
from oodcore_plugins.transformers_extractor.processor import preprocessing

__all__ = ["TransformersExtractor", "classifier"]


class TransformersExtractor(Extractor):
    """A classifier of images or texts in a folder that transformers' ``save_pretrained`` wrote.

    The folder has ``config.json`` and ``model.safetensors`` (or its parts and their index).
    Nothing is downloaded, unpickled, or run from the folder. Weights become float32. The embeddings
    are what the head gets: of a ViT the class token, of a BERT the pooled output. Models whose
    head sees every token, as decoders do, have no such embeddings, and are refused with the first
    batch. Names of layers, and with them fingerprints, differ between versions of transformers.

    Images come as a tensor ``[N, C, H, W]``. Texts come as a list, which the folder's tokenizer
    makes tokens of, or as a mapping with ``input_ids`` and ``attention_mask`` ``[N, tokens]``. A
    longer text is cut at ``max_length`` tokens.

    Args:
        path: the folder.
        configuration: in place of a folder, ``model_type`` and what else the configuration class of
            such models takes; weights are random then.
        seed: of random weights.
        head: "auto", or the name of the head, as in ``FeatureModel.wrap``.
        layers: names of further submodules whose activations are captured.
        preprocess: what becomes of images before the model gets them; where it is left out, what
            the folder's ``preprocessor_config.json`` says, and nothing if there is none. Images
            that are no squares are cut, not squeezed.
        drop_last_norm: takes the last layer norm of an image model's backbone away, between blocks
            and head (Li et al., SURE-OOD, 2024), though the model was trained with it.
        image_size: the side of images, where it is not the one that the model was trained with.
            Position embeddings are interpolated (bicubic), and the sizes of the folder's
            preprocessing are scaled.
        tokenizer: a folder with the tokenizer, where it is not ``path``.
        max_length: of a text in tokens, marks included; unless given, the tokenizer says it.
    """

    kind = "transformers"

    path: FilePath | None = None
    configuration: Arguments = Arguments()
    seed: NonNegativeInt = 0
    head: str = "auto"
    layers: tuple[str, ...] = ()
    drop_last_norm: bool = False
    image_size: PositiveInt | None = None
    tokenizer: FilePath | None = None
    max_length: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_origin(self) -> TransformersExtractor:
        if (self.path is None) == (not self.configuration):
            raise PydanticCustomError(
                "one_origin", "give path, the folder of a model, or configuration, and not both"
            )
        return self

    def load(self) -> FeatureModel:
        """The model, on the CPU.

        Raises:
            ExtraError: transformers is not installed.
            ConfigurationError: files that are missing or damaged, weights that do not fit, a model
                that is no classifier, a field that is not for such models, no such head or layer.
        """
        if self.path is None:
            model, task = drawn(self.configuration, self.seed)
        else:
            model, task = read(self.path)
        self._refuse(task)
        preprocess = self.preprocess
        if task == "text":
            self._tokenise(model)
        else:
            if self.drop_last_norm:
                drop_last_norm(model)
            if self.image_size is not None:
                give_size(model, self.image_size)
            if preprocess is None and self.path is not None:
                preprocess = preprocessing(self.path, self.image_size)
        return FeatureModel.wrap(model, self.head, self.layers, preprocess)

    def _refuse(self, task: Task) -> None:
        others: dict[str, Any] = (
            {"tokenizer": self.tokenizer, "max_length": self.max_length}
            if task == "image"
            else {
                "preprocess": self.preprocess,
                "drop_last_norm": self.drop_last_norm or None,
                "image_size": self.image_size,
            }
        )
        if given := [name for name, value in others.items() if value is not None]:
            raise ConfigurationError(
                f"this model is a classifier of {task}s, which does without {', '.join(given)}; "
                "leave it out"
            )

    def _tokenise(self, model: nn.Module) -> None:
        folder = self.tokenizer
        if folder is None and self.path is not None and has_tokenizer(self.path):
            folder = self.path
        if folder is None and self.max_length is not None:
            raise ConfigurationError(
                "max_length is the tokenizer's, and there is none; set tokenizer to its folder"
            )
        give_tokens(model, folder, self.max_length)


@hookimpl
def register_extractors(register: Register) -> None:
    register(TransformersExtractor)
