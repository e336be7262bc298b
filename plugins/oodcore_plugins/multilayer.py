"""Scores of further layers: one score on a layer's activations, and one on several together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from oodcore import Combination, Features, FeatureStore, Paper, Scorer, Slot, Statistic, hookimpl
from oodcore.hookspecs import Register
from oodcore.scorer import Path, needed, put_state, tree
from oodcore.statistics import AtLayer, State

PAPER = Paper(
    "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    "Kimin Lee, Kibok Lee, Honglak Lee, Jinwoo Shin",
    "NeurIPS",
    2018,
    "https://arxiv.org/abs/1807.03888",
)

Pool = Literal["mean", "max", "flatten"]


class LayerScorer(Scorer):
    """``s(a_l)``: any score s of embeddings, of a layer's activations a_l in place of them.

    s is fitted on the activations of the training rows at this layer. Logits and labels are the
    model's own. Its units are those of s.

    Args:
        layer: the module's name.
        scorer: the score s. It may not read the head, which does not fit these activations, pass
            through the model again, or be measured on rows once it is fitted.
        pool: what becomes of axes after the second (the places of a map): their ``mean``, as in
            the paper, their ``max``, or all of them side by side (``flatten``).
    """

    kind = "at_layer"
    paper = PAPER
    layer: str
    scorer: Annotated[Scorer, Slot("scorer")] = Field("mahalanobis", validate_default=True)
    pool: Pool = "mean"

    @model_validator(mode="after")
    def _fits_activations(self) -> LayerScorer:
        refuse_elsewhere(self.scorer)
        return self

    def inside(self) -> tuple[tuple[Path, Scorer], ...]:
        # The score is fitted here, on statistics of the layer, and not on those of the embeddings.
        return ()

    @property
    def smooth(self) -> bool:
        return self.scorer.smooth

    def needs(self) -> frozenset[str]:
        return needed(self.scorer) - {"embeddings"} | {f"layers.{self.layer}"}

    def statistics(self) -> tuple[Statistic, ...]:
        wanted = (statistic for _, part in tree(self.scorer) for statistic in part.statistics())
        return tuple(AtLayer(layer=self.layer, statistic=s, pool=self.pool) for s in wanted)

    @property
    def learns(self) -> bool:
        return any(part.learns for _, part in tree(self.scorer))

    def fit(self, store: FeatureStore) -> State:
        state: State = {}
        place: Any = store.at(self.layer, self.pool)
        for path, part in tree(self.scorer):
            state = put_state(state, path, part.fit(place))
        return state

    def score(self, features: Features, state: State) -> Tensor:
        return self.scorer.score(features.at(self.layer, self.pool), state)


class MultiLayer(Scorer):
    """``C_l(s(a_l))``: a combination C of one score s, at each of several layers l.

    It is short for the combination of as many ``at_layer``, so the layers' scores are normalised on
    held-out in-distribution rows by C's ``normalize``, as in any combination. They are in units of
    their own, and one layer would drown the others without: the default divides by their standard
    deviation.

    Mahalanobis distances at several layers with weights is the paper's ensemble. The paper finds
    the weights by a logistic regression on held-out OOD data; give such weights as C's
    ``weights``, one a layer. None are fitted here, where no such data is seen.

    Args:
        layers: names of the layers.
        scorer: the score s; what it may be is said at ``at_layer``.
        pool: what becomes of axes after the second: ``mean``, as in the paper, ``max`` or
            ``flatten``.
        combination: C, a combination without scorers of its own.
    """

    kind = "multilayer"
    paper = PAPER
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    scorer: Annotated[Scorer, Slot("scorer")] = Field("mahalanobis", validate_default=True)
    pool: Pool = "mean"
    combination: Annotated[Scorer, Slot("scorer")] = Field(
        {"kind": "sum", "normalize": "zscore"}, validate_default=True
    )

    @model_validator(mode="after")
    def _one_score_a_layer(self) -> MultiLayer:
        refuse_elsewhere(self.scorer)
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"a layer is named twice: {', '.join(self.layers)}")
        if not isinstance(self.combination, Combination) or self.combination.scorers:
            raise ValueError(
                f"combination: '{self.combination.kind}' is not a combination without scorers; "
                "write one such as sum, with its normalize and weights"
            )
        weights = self.combination.weights
        if weights is not None and len(weights) != len(self.layers):
            raise ValueError(f"there are {len(weights)} weights for {len(self.layers)} layers")
        return self

    @property
    def whole(self) -> Scorer:
        """The combination that this is short for."""
        parts = tuple(
            LayerScorer(layer=name, scorer=self.scorer, pool=self.pool) for name in self.layers
        )
        return self.combination.model_copy(update={"scorers": parts})

    def inside(self) -> tuple[tuple[Path, Scorer], ...]:
        return ((("combination",), self.whole),)

    def needs(self) -> frozenset[str]:
        return frozenset(f"layers.{name}" for name in self.layers)

    def score(self, features: Features, state: State) -> Tensor:
        return self.whole.score(features, state.get("combination", {}))


def refuse_elsewhere(scorer: Scorer) -> None:
    """Raise a ValueError unless a scorer can be fitted on other activations than the embeddings."""
    for _, part in tree(scorer):
        if part.measures:
            raise ValueError(f"'{part.kind}' is measured once it is fitted, which no layer can be")
        for name in ("head", "inputs"):
            if name in part.needs():
                raise ValueError(
                    f"'{part.kind}' needs {name}, which do not belong to a layer's activations; "
                    "use a scorer of embeddings, such as mahalanobis or knn"
                )


@hookimpl
def register_scorers(register: Register) -> None:
    register(LayerScorer)
    register(MultiLayer)
