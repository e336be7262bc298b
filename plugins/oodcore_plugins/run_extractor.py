"""run_extractor: the model that a training run left in its folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from oodcore import Extractor, FeatureModel, hookimpl
from oodcore.capture import submodule
from oodcore.component import FilePath
from oodcore.errors import ConfigurationError
from oodcore.hookspecs import Register
from oodcore.regularizer import TrainModel
from oodcore.run_folder import RunFolder


class RunExtractor(Extractor):
    """The network that ``oodcore train`` left, with its head as trained and its branches.

    The run's factory is called and its regularizers prepare the model as they did for training, so
    their plugins must be installed; training data is not needed. A branch that a regularizer added
    is a layer of its own name, one of ``layers`` if it is to be captured.

    Args:
        path: the run's folder.
        layers: names of submodules of the network, and of branches, whose activations are captured.
        drop: names of submodules of the network that are left out: what they get passes on as it
            is. SURE-OOD leaves the last layer norm out of a network that was trained with it.
        preprocess: what becomes of images before the network gets them; the run's where it is left
            out.
    """

    kind = "run"

    path: FilePath
    layers: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def load(self) -> FeatureModel:
        """The model, on the CPU.

        Raises:
            ArtifactError: no finished run, or a file of it that is damaged.
            ConfigurationError: the factory cannot be imported or called; no such layer, or nothing
                of that name to leave out.
        """
        model, blueprint = RunFolder(self.path).load()
        for name in self.drop:
            _leave_out(model, name)
        preprocess = blueprint.preprocess if self.preprocess is None else self.preprocess
        return FeatureModel.wrap(_branched(model), model.head_name, self.layers, preprocess)

    def code(self) -> tuple[str, ...]:
        return (RunFolder(self.path).blueprint().network.factory,)


class _Sequence(nn.Module):
    """The parts of a ``Sequential`` one after another; what is added later takes no part."""

    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        for name, part in parts.named_children():
            self.add_module(name, part)
        self._order = tuple(self._modules)

    def forward(self, inputs: Any) -> Any:
        for name in self._order:
            inputs = self._modules[name](inputs)  # type: ignore[misc]
        return inputs


class _Beside:
    """A forward hook of the head that has the branches see the embeddings as well."""

    def __init__(self, branches: list[nn.Module]) -> None:
        self._branches = branches

    def __call__(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for branch in self._branches:
            branch(args[0])


def _leave_out(model: TrainModel, name: str) -> None:
    """Put the identity in place of a submodule of the network."""
    submodule(model.network, name)
    head = model.head_name
    if not name or head == name or head.startswith(f"{name}."):
        raise ConfigurationError(f"drop: '{name}' holds the head, without which there is no model")
    parent, _, leaf = name.rpartition(".")
    setattr(model.network.get_submodule(parent), leaf, nn.Identity())


def _branched(model: TrainModel) -> nn.Module:
    """The network, with the branches as layers of its own."""
    network, branches = model.network, dict(model.branches.items())
    for name in branches:
        if hasattr(network, name):
            raise ConfigurationError(
                f"the network has a layer '{name}' already, so the branch '{name}' cannot be told "
                "from it; rename that layer"
            )
    if branches and type(network).forward is nn.Sequential.forward:
        network = _Sequence(network)  # type: ignore[arg-type]
    for name, branch in branches.items():
        network.add_module(name, branch)
    if branches:
        model.head.register_forward_hook(_Beside(list(branches.values())))
    return network


@hookimpl
def register_extractors(register: Register) -> None:
    register(RunExtractor)
