"""average: several models as one, by the mean of their probabilities, logits or parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from oodcore import Extractor, FeatureModel, Features, Head, Paper, Slot, hookimpl
from oodcore.composite import Composite, averaged
from oodcore.data import to_device
from oodcore.errors import ConfigurationError
from oodcore.extractor import Edit, PreprocessInside
from oodcore.features import required, unit
from oodcore.hookspecs import Register
from oodcore.inputs import readable
from oodcore.module_model import ModuleModel

_COUNTER = "num_batches_tracked"
"""The buffer of integers that differs between models of one architecture and decides nothing."""


class AveragedModels(Composite):
    """Several models as one, by what they say of a row; ``Average`` says how.

    A layer is named after its model's place: "0.conv" is layer "conv" of the first one.

    Args:
        models: at least one FeatureModel; all give logits of the same classes.
        of: "probabilities" or "logits".

    Raises:
        ConfigurationError: no model, or one that gives no logits.
    """

    def __init__(
        self,
        models: Sequence[FeatureModel],
        of: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        if not models:
            raise ConfigurationError("average: there are no models to average")
        for number, model in enumerate(models):
            if "logits" not in model.gives:
                raise ConfigurationError(
                    f"average: model {number} ({model.title}) gives no logits to average"
                )
        layers = [f"{i}.{name}" for i, model in enumerate(models) for name in model.layers]
        super().__init__("average", tuple(models), {"of": of}, tuple(layers))
        self.of = of

    @property
    def gives(self) -> frozenset[str]:
        common = frozenset.intersection(*(part.gives for part in self.parts))
        if self.of == "logits" and "head" in common:
            return common
        return common & {"logits", "inputs"}

    def _capture(self) -> None:
        wanted = self._by_part(dict.fromkeys(self.layers))
        self.parts = tuple(
            part.with_layers(names) for part, names in zip(self.parts, wanted, strict=True)
        )

    def prepared(self, inputs: Any) -> Any:
        """Inputs as they are, on the device: each model has a preprocessing of its own."""
        return to_device(readable(inputs), self.device)

    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        edits = self._by_part(edit or {})
        said = [part.forward(inputs, own) for part, own in zip(self.parts, edits, strict=True)]
        _check_classes(said)
        bare = [Features(logits=required(one.logits, "logits")) for one in said]
        joined = averaged(bare, self.of)
        if "head" in self.gives:
            joined = replace(joined, **_concatenated(said))
        layers = {f"{i}.{name}": v for i, one in enumerate(said) for name, v in one.layers.items()}
        layers = {name: layers[name] for name in self.layers}
        return replace(joined, layers=layers, inputs=inputs, rerun=self.rerun)

    def _by_part(self, named: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What has names such as "0.conv", for each model under the names that the model knows."""
        parts: list[dict[str, Any]] = [{} for _ in self.parts]
        for name, value in named.items():
            number, _, layer = name.partition(".")
            if not number.isdecimal() or int(number) >= len(parts):
                raise ConfigurationError(
                    f"average: there is no layer '{name}'; of {len(parts)} models, write the "
                    "number of one first: '0.conv' is layer 'conv' of the first"
                )
            parts[int(number)][layer] = value
        return parts


class Average(Extractor):
    """One model of M: ``z = log mean_m softmax(z_m)``, ``z = mean_m z_m``, or ``theta = mean_m
    theta_m``, of logits z and parameters theta.

    ``probabilities`` is the deep ensemble of the paper. Its logits come from no head, and the
    embeddings of different networks have nothing in common, so that there are logits alone.

    ``logits`` gives embeddings too: those of all models side by side, ``[N, D_1 + ... + D_M]``, and
    the head that makes the mean logits of them, ``[W_1, ..., W_M] / M``. Where a head normalises
    embeddings or weights, the normalised ones stand there.

    ``parameters`` is one network with the mean of the weights, and of the running statistics of
    batch normalisation, which are not estimated again (Wortsman et al., Model soups, ICML 2022:
    of networks that were fine-tuned from the same weights; others have nothing to average). It
    costs one pass, the others M. Names, shapes and types of all weights, the kinds of all layers,
    heads and preprocessing must be the same. Buffers of integers must be equal, but for the counter
    of batches, which decides nothing.

    With probabilities and logits each model prepares inputs in its own way, so that inputs, where a
    scorer moves them, are those before preprocessing; and a layer is named after its model's place:
    "0.conv" is layer "conv" of the first.

    Args:
        extractors: the models.
        of: ``probabilities``, ``logits`` or ``parameters``.
        preprocess: none: it is the inner extractors'.

    ``load`` raises a ConfigurationError if a model is not where or what the configuration says,
    gives no logits, or is of another architecture; models of other classes are one when they run.
    """

    kind = "average"
    paper = Paper(
        "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
        "Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell",
        "NeurIPS",
        2017,
        "https://arxiv.org/abs/1612.01474",
    )

    extractors: Annotated[tuple[Annotated[Extractor, Slot("extractor")], ...], Field(min_length=1)]
    of: Literal["probabilities", "logits", "parameters"] = "probabilities"
    preprocess: PreprocessInside = None

    def load(self) -> FeatureModel:
        if self.of == "parameters":
            return mean_parameters(extractor.load() for extractor in self.extractors)
        return AveragedModels([extractor.load() for extractor in self.extractors], self.of)

    def code(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.extractors for name in part.code()))


def mean_parameters(models: Iterable[FeatureModel]) -> ModuleModel:
    """One model with the mean of the parameters of several; what is given stays as it is.

    Args:
        models: around torch modules of one architecture; they are asked for one after another, and
            one is kept.

    Raises:
        ConfigurationError: no model, one around no torch module, or another architecture, head or
            preprocessing than the first's.
    """
    first: ModuleModel | None = None
    sums: dict[str, Tensor] = {}
    count = 0
    layers: list[str] = []
    for count, model in enumerate(models, start=1):
        if not isinstance(model, ModuleModel):
            raise ConfigurationError(
                f"average: parameters are those of torch modules, and model {count - 1} is "
                f"{model.title}"
            )
        state = _tensors(model.module)
        layers += model.layers
        if first is None:
            own = copy.deepcopy(model.module)
            first = FeatureModel.wrap(own, model.head, (), model.preprocess)
            sums = {name: _wide(value) for name, value in state.items() if _averages(value)}
            continue
        if fault := _differs(first, model):
            raise ConfigurationError(
                f"average: the parameters of model {count - 1} cannot be averaged with those of "
                f"model 0: {fault}"
            )
        for name in sums:
            sums[name] = sums[name] + _wide(state[name].to(sums[name].device))
    if first is None:
        raise ConfigurationError("average: there are no models to average")
    means = _tensors(first.module)
    for name, total in sums.items():
        means[name].copy_(total / count)
    return first.with_layers(layers)


def _differs(one: ModuleModel, other: ModuleModel) -> str | None:
    """What keeps the parameters of two models from being averaged, or None."""
    a, b = _tensors(one.module), _tensors(other.module)
    if odd := sorted(a.keys() ^ b.keys()):
        return f"'{odd[0]}' is in one of them alone"
    for name, value in a.items():
        if value.shape != b[name].shape or value.dtype != b[name].dtype:
            shapes = f"{list(value.shape)} and {list(b[name].shape)}"
            return f"'{name}' is {shapes}, {value.dtype} and {b[name].dtype}"
        same = name.endswith(_COUNTER) or torch.equal(value, b[name].to(value.device))
        if not _averages(value) and not same:
            return f"'{name}' holds {value.dtype}, which has no mean, and they differ"
    kinds = [[type(part) for part in model.module.modules()] for model in (one, other)]
    if kinds[0] != kinds[1]:
        return "their layers are of other kinds"
    if one.preprocess != other.preprocess:
        return "their preprocessing differs"
    if not isinstance(one.head, str | None) or one.head != other.head:
        return "they have heads of their own" if isinstance(one.head, Head) else "other heads"
    return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _averages(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _check_classes(said: Sequence[Features]) -> None:
    numbers = [required(one.logits, "logits").shape[1] for one in said]
    if len(set(numbers)) > 1:
        raise ConfigurationError(
            f"average: the models give {', '.join(map(str, numbers))} logits; average models of "
            "the same classes"
        )


def _concatenated(said: Sequence[Features]) -> dict[str, Any]:
    """Embeddings of several models side by side, and the plain head that gives the mean logits."""
    rows, weights, biases = [], [], []
    for one in said:
        assert one.head is not None
        head, embeddings = one.head, required(one.embeddings, "embeddings")
        rows.append(unit(embeddings) if head.normalize_features else embeddings)
        weights.append(head.scale * (unit(head.weight) if head.normalize_weight else head.weight))
        bias = head.weight.new_zeros(len(head.weight)) if head.bias is None else head.bias
        biases.append(bias)
    weight = torch.cat(weights, dim=1) / len(said)
    return {
        "embeddings": torch.cat(rows, dim=1),
        "head": Head(weight, torch.stack(biases).mean(dim=0)),
    }


@hookimpl
def register_extractors(register: Register) -> None:
    register(Average)
