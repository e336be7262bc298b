"""The size of a score's gradient with respect to the input: JEM's approximate mass."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, Slot, hookimpl
from oodcore.hookspecs import Register
from oodcore.statistics import State
from oodcore_plugins.perturbed import slope


class InputGradient(Scorer):
    """``-||ds/dx||_2`` over all coordinates of a row's input, at most 0.

    With s = ``energy`` it is the approximate mass of JEM, for energy is log p(x) up to a constant
    there: a row that lies in much probability mass is where the density is flat. That holds for
    models trained as JEM; of an ordinary classifier it may say nothing, as larger logits have
    larger gradients. In units of s for each unit of the model's input, after preprocessing.

    The authors add noise of standard deviation 0.03 to each input that they score, as in training;
    nothing is added here, so that a row has one score. The model sees each row once more, with a
    gradient.

    Args:
        scorer: the score s; it must have a gradient.
    """

    kind = "input_gradient"
    paper = Paper(
        "Your Classifier is Secretly an Energy Based Model and You Should Treat it Like One",
        "Will Grathwohl, Kuan-Chieh Wang, Joern-Henrik Jacobsen, David Duvenaud, Mohammad Norouzi, "
        "Kevin Swersky",
        "ICLR",
        2020,
        "https://arxiv.org/abs/1912.03263",
    )
    differentiable: ClassVar[bool] = False
    scorer: Annotated[Scorer, Slot("scorer")] = Field("energy", validate_default=True)

    @model_validator(mode="after")
    def _has_a_gradient(self) -> InputGradient:
        if not self.scorer.smooth:
            raise ValueError(f"the score of '{self.scorer.kind}' has no gradient to measure")
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"inputs"})

    def score(self, features: Features, state: State) -> Tensor:
        gradient = slope(self.scorer, features, state.get("scorer", {}))
        # On devices without float64 the numbers come to where the features are.
        wide = gradient.to(features.device, torch.float64).flatten(1)
        size: Tensor = torch.linalg.vector_norm(wide, dim=1)
        return -size


@hookimpl
def register_scorers(register: Register) -> None:
    register(InputGradient)
