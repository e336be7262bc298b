"""A model that is built by an importable function, and whose weights are in a file."""

from __future__ import annotations

from oodcore import Extractor, FeatureModel, hookimpl
from oodcore.component import FilePath
from oodcore.factory import Arguments, Importable, load_weights, network
from oodcore.hookspecs import Register


class TorchExtractor(Extractor):
    """A ``torch.nn.Module`` from a factory, with its weights.

    What a configuration names as factory is code: loading imports and calls it. Where no weights
    are given, they are what the factory makes of them; random ones are drawn from seed 0.

    Args:
        factory: ``package.module:function``, which gives the module.
        arguments: its keyword arguments; lists arrive as tuples.
        weights: a ``.safetensors`` or torch checkpoint with the whole state dict, or None.
        head: "auto", the name of the head, or None, as in ``FeatureModel.wrap``.
        layers: names of further submodules whose activations are captured.
        preprocess: what becomes of images before the model gets them.
    """

    kind = "torch"

    factory: Importable
    arguments: Arguments = Arguments()
    weights: FilePath | None = None
    head: str | None = "auto"
    layers: tuple[str, ...] = ()

    def load(self) -> FeatureModel:
        """The model, on the CPU.

        Raises:
            ConfigurationError: the factory cannot be imported, does not take the arguments or gives
                no module; the weights cannot be read or do not fit; no such head or layer.
        """
        module = network(self.factory, self.arguments)
        if self.weights is not None:
            load_weights(module, self.weights)
        return FeatureModel.wrap(module, self.head, self.layers, self.preprocess)

    def code(self) -> tuple[str, ...]:
        return (self.factory,)


@hookimpl
def register_extractors(register: Register) -> None:
    register(TorchExtractor)
