"""Temperature scaling: a scorer behind the temperature that calibrates the classifier."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from oodcore import Features, Paper, Scorer, Slot, hookimpl
from oodcore.errors import DataError
from oodcore.features import Rerun, required
from oodcore.hookspecs import Register
from oodcore.scorer import needed, tree
from oodcore.statistics import State


class TemperatureScaled(Scorer):
    """``s(z / T)``: a score s of logits that are divided by the temperature T fitted to labels.

    T minimises ``mean_i -log softmax(z_i / T)_y_i`` over labelled in-distribution rows held out
    from all fitting. That is convex in 1/T, and solved by bisection to the last digit. There is no
    minimum where every held-out row is classified right (T would go to 0), nor where the logits say
    less than nothing about the labels (T would go to infinity): T is then 1, with a warning. With
    one class it is 1.

    The reference implementations take 50 steps of LBFGS, which often stops before the minimum. The
    paper calibrates probabilities; as a score for OOD detection it is MSP at that temperature.

    Args:
        scorer: the score s, of logits. One that learns from logits itself is refused: it would
            learn from those before the temperature.
    """

    kind = "temperature_scaled"
    paper = Paper(
        "On Calibration of Modern Neural Networks",
        "Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Q. Weinberger",
        "ICML",
        2017,
        "https://arxiv.org/abs/1706.04599",
    )
    held_out: ClassVar[bool] = True
    scorer: Annotated[Scorer, Slot("scorer")] = Field("msp", validate_default=True)

    @model_validator(mode="after")
    def _learns_nothing_from_logits(self) -> TemperatureScaled:
        for _, part in tree(self.scorer):
            measured = part.measures and "logits" in needed(part)
            if measured or any("logits" in s.needs() for s in part.statistics()):
                raise ValueError(
                    f"'{part.kind}' learns from logits before they are divided by the temperature; "
                    "use a scorer that only reads them"
                )
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"logits"})

    def measure(self, features: Features, state: State) -> Tensor | None:
        if features.labels is None:
            raise DataError(
                "temperature_scaled: the temperature is fitted to labels, and these rows have "
                "none; give labelled data"
            )
        return required(features.logits, "logits")

    def finish(self, state: State, rows: Tensor, labels: Tensor | None) -> State:
        assert labels is not None
        return {**state, "temperature": calibrating(rows, labels)}

    def score(self, features: Features, state: State) -> Tensor:
        return self.scorer.score(tempered(features, state["temperature"]), state.get("scorer", {}))


def tempered(features: Features, temperature: Tensor) -> Features:
    """Features with logits divided by a temperature, also when their inputs pass again."""
    logits = required(features.logits, "logits") / temperature
    return replace(features, logits=logits, rerun=_tempered_road(features.rerun, temperature))


def _tempered_road(road: Rerun | None, temperature: Tensor) -> Rerun | None:
    if road is None:
        return None
    return lambda inputs, edit=None: tempered(road(inputs, edit=edit), temperature)


def calibrating(logits: Tensor, labels: Tensor) -> Tensor:
    """The temperature at which the labels are most probable under ``softmax(logits / T)``, ``[]``.

    Args:
        logits: ``[N, K]`` float64.
        labels: ``[N]`` int64.
    """
    centred = logits - logits.gather(1, labels[:, None])

    def slope(inverse: float) -> float:
        """Of the mean negative log-likelihood, in 1/T; it grows with 1/T."""
        return float(((centred * inverse).softmax(dim=1) * centred).sum(dim=1).mean())

    if logits.shape[1] == 1:
        return logits.new_ones(())
    right = bool((centred <= 0).all())
    if right or slope(0.0) >= 0:
        why = (
            "every held-out row is classified right" if right else "the labels are as if by chance"
        )
        warnings.warn(
            f"temperature_scaled: no temperature is best, for {why}; it stays 1", stacklevel=2
        )
        return logits.new_ones(())
    high = 1 / float(centred.abs().max())
    while slope(high) < 0:
        high *= 2
    low = high / 2
    while slope(low) > 0:
        low, high = low / 2, low
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return logits.new_tensor(1 / high)


@hookimpl
def register_scorers(register: Register) -> None:
    register(TemperatureScaled)
