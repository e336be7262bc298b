"""Every scorer, shaper, statistic and regularizer that oodcore brings keeps the laws of the kit.

What is registered is examined by its kind alone. A component with required fields, or one about
which the toy problem says nothing, has its examples in ``EXAMPLES``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weighted_network import WeightedNetwork

from oodcore import registry
from oodcore.errors import ConfigurationError, OodcoreError
from oodcore.testing import (
    Check,
    laws,
    learning,
    regularizer_checks,
    scorer_checks,
    shaper_checks,
    statistic_checks,
    statistics,
)
from oodcore.testing.check import one_thread
from oodcore.testing.subject import Subject
from oodcore.testing.toy import Sizes

KIT: Mapping[str, Callable[..., list[Check]]] = {
    "scorer": scorer_checks,
    "shaper": shaper_checks,
    "statistic": statistic_checks,
    "regularizer": regularizer_checks,
}


@dataclass(frozen=True)
class Example:
    """Fields to examine a component with, and what the kit is told besides."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def fields(**values: Any) -> Example:
    return Example(values)


EXAMPLES: Mapping[tuple[str, str], tuple[Example, ...]] = {
    ("scorer", "perturbed"): (
        fields(scorer="msp"),
        fields(scorer="mahalanobis", epsilon=0.01),
        fields(scorer={"kind": "sum", "scorers": ["msp", "energy"], "normalize": "zscore"}),
    ),
    ("scorer", "odin"): (fields(), fields(scale=[0.5] * 12)),
    ("scorer", "iodin"): (fields(), fields(coordinates=3, epsilon=0.1)),
    ("scorer", "input_gradient"): (
        Example(options={"floor": None}),
        Example({"scorer": "msp"}, {"floor": None}),
    ),
    ("scorer", "views"): (
        fields(scorer="msp"),
        fields(scorer={"kind": "knn", "k": 3}, views="five_crop", crop=1),
        fields(scorer="energy", views="ten_crop", crop=1, resize=False),
    ),
    ("scorer", "mcm"): (fields(), fields(temperature=0.01)),
    ("scorer", "sklearn"): (
        fields(),
        fields(estimator="LocalOutlierFactor", rows=100),
        fields(estimator="GaussianMixture", arguments={"n_components": 4}),
        fields(estimator="OneClassSVM", arguments={"nu": 0.1}, rows=None),
    ),
    ("scorer", "trust_score"): (
        fields(),
        fields(alpha=0.1, k=3, neighbour=2),
    ),
    ("scorer", "weiper"): (fields(), fields(repeats=3, bins=10, smoothing=1, seed=1)),
    ("scorer", "sum"): (
        fields(scorers=["msp", "energy"]),
        fields(scorers=["msp", "energy"], normalize="mean", weights=[0.5, 2]),
        fields(scorers=["mahalanobis", "max_norm"], normalize="zscore"),
        fields(scorers=["mahalanobis", "energy"], normalize="ecdf"),
    ),
    ("scorer", "dml"): (fields(), fields(lam=2.0)),
    ("scorer", "knn"): (
        fields(),
        fields(k=3, normalize=False),
        fields(metric="inner_product", reduce="mean"),
    ),
    ("scorer", "max_cosine"): (fields(), fields(source="means")),
    ("shaper", "ash"): (
        Example(options={"floor": None}),
        fields(variant="p"),
        fields(variant="b"),
        fields(percentile=65),
    ),
    ("shaper", "scale"): (Example(options={"floor": None}), fields(percentile=0)),
    ("shaper", "lts"): (Example(options={"floor": None}), fields(percentile=0)),
    ("shaper", "vra"): (
        fields(),
        fields(gain=0.5),
        fields(low=10, high=90, pooled=True, below="raise"),
    ),
    ("shaper", "dice"): (fields(), fields(percentile=0)),
    ("scorer", "mahalanobis"): (fields(), fields(normalize=True, shrinkage=0.1)),
    ("scorer", "relative_mahalanobis"): (fields(), fields(normalize=True, shrinkage=0.1)),
    ("scorer", "residual"): (fields(), fields(dim=3, origin="mean")),
    ("scorer", "vim"): (fields(), fields(dim=3, origin="mean")),
    ("scorer", "neco"): (
        fields(),
        fields(dim=2, max_logit=False),
        Example({"denominator": "raw"}, {"floor": 0.7}),
    ),
    ("scorer", "nnguide"): (
        fields(),
        fields(k=3, normalize=False),
        fields(fraction=0.5),
    ),
    ("scorer", "gen"): (fields(), fields(gamma=0.5, top=2)),
    ("scorer", "gradnorm"): (fields(), fields(head="cosine", temperature=2)),
    ("scorer", "rp_msp"): (fields(), fields(prior=[4, 3, 2, 1])),
    ("scorer", "reweighted"): (fields(), fields(scorer="odin"), fields(scorer="dml")),
    ("scorer", "temperature_scaled"): (fields(), fields(scorer="energy"), fields(scorer="odin")),
    ("scorer", "openmax"): (fields(), fields(tail=5, alpha=2)),
    ("scorer", "fdbd"): (fields(), fields(centre=False)),
    ("scorer", "she"): (fields(), fields(metric="euclidean"), fields(metric="cosine")),
    ("scorer", "product"): (
        fields(scorers=["msp", "energy"]),
        fields(scorers=["mahalanobis", "energy"], normalize="ecdf", weights=[0.5, 2]),
    ),
    ("scorer", "minimum"): (fields(scorers=["mahalanobis", "energy"], normalize="zscore"),),
    ("scorer", "maximum"): (fields(scorers=["mahalanobis", "energy"], normalize="zscore"),),
    ("scorer", "fisher"): (fields(scorers=["mahalanobis", "energy"]),),
    ("scorer", "stouffer"): (fields(scorers=["mahalanobis", "energy"], weights=[0.5, 2]),),
    ("scorer", "simes"): (fields(scorers=["mahalanobis", "energy"]),),
    ("scorer", "at_layer"): (
        fields(layer="block.1"),
        fields(layer="last", scorer={"kind": "knn", "k": 3}, pool="flatten"),
        fields(layer="last", scorer={"kind": "sum", "scorers": ["mahalanobis", "knn"]}),
    ),
    ("scorer", "multilayer"): (
        fields(layers=["block.1", "last"]),
        fields(
            layers=["block.1", "last"],
            scorer="knn",
            pool="max",
            combination={"kind": "minimum", "normalize": "zscore", "weights": [1, 2]},
        ),
        fields(layers=["last"], scorer="relation", combination="fisher"),
    ),
    ("shaper", "adascale"): (
        Example(options={"floor": None}),
        Example({"variant": "l", "perturbation": {"k1": 50, "k2": 30}}, {"floor": None}),
    ),
    ("scorer", "nac"): (
        fields(),
        fields(layers=[{"layer": "stage", "bins": 20, "alpha": 1, "saturation": 0.1}, {}]),
    ),
    ("statistic", "neuron_states"): (
        fields(),
        fields(layers=[{"layer": "stage", "bins": 20, "alpha": 1}, {"alpha": 1}]),
    ),
    ("scorer", "gram"): (fields(), fields(layers=["block.1", "last"], powers=[1, 2, 3])),
    ("statistic", "gram_ranges"): (fields(), fields(layers=["block.1"], powers=[1, 4])),
    ("scorer", "rankfeat"): (
        Example({"layers": ["stage"]}, {"floor": None}),
        Example({"layers": ["stage"], "temperature": 2}, {"floor": None}),
    ),
    ("scorer", "cac"): (fields(), fields(centers="anchors", alpha=5)),
    ("scorer", "weighted_energy"): (Example(options={"network": WeightedNetwork}),),
    ("regularizer", "center"): (fields(weights=[0.1], starts=[0]),),
    ("regularizer", "swa"): (fields(start=1),),
    ("regularizer", "vos"): (fields(start=0, queue=4, samples=50),),
    ("scorer", "relation"): (fields(), fields(power=4)),
    ("scorer", "ssd"): (fields(), fields(clusters=3)),
    ("scorer", "gmm"): (fields(), fields(shared=True, prior="uniform", unbiased=False)),
    ("scorer", "igeood"): (fields(), fields(temperature=5, reduce="min")),
    ("scorer", "cfood"): (fields(), fields(fraction=1, k=0.1)),
    ("scorer", "feature_norm"): (
        Example({"blocks": ["block.1"]}, {"floor": 0.7}),
        Example({"blocks": ["early", "block.1"], "pieces": 2}, {"floor": 0.65}),
    ),
    ("scorer", "cop"): (fields(), fields(explained=0.5)),
    ("scorer", "corp"): (fields(dims=40), fields(dims=64, gamma=0.5, explained=0.9)),
    ("scorer", "cadref"): (
        fields(),
        fields(confidence="max_logit"),
        fields(confidence="msp"),
        fields(confidence="gen"),
    ),
    ("statistic", "fourier_moments"): (fields(dims=8), fields(dims=5, gamma=0.5, seed=3)),
    ("statistic", "mean_confidence"): (fields(), fields(confidence="gen")),
    ("statistic", "sample"): (
        fields(capacity=20),
        fields(capacity=5, per_class=True),
        fields(fraction=0.2, fields=["logits"]),
    ),
    ("statistic", "bank"): (fields(), fields(fields=["embeddings", "logits"])),
    ("statistic", "normalized"): (fields(statistic="class_moments"),),
    ("statistic", "at_layer"): (
        fields(layer="block.1", statistic="class_moments"),
        fields(layer="block.1", statistic="norm_moments", pool="flatten"),
    ),
}


def kinds() -> Iterator[tuple[str, str]]:
    """Slot and kind of everything that oodcore itself brings and the kit can examine."""
    for slot in KIT:
        for kind, cls in registry.all(slot).items():
            owner = registry.owner(cls)
            if owner is not None and owner.distribution == "oodcore":
                yield slot, kind


@dataclass(frozen=True)
class Case:
    """One example: the component and its checks, or why there are none."""

    slot: str
    kind: str
    component: Any = None
    checks: tuple[Check, ...] = ()
    fault: str = ""

    def missing(self) -> None:
        pytest.fail(f"'{self.kind}' has no example that works; add one to EXAMPLES: {self.fault}")


def cases() -> Iterator[Case]:
    for slot, kind in kinds():
        for example in EXAMPLES.get((slot, kind), (Example(),)):
            try:
                component = registry.build(slot, {"kind": kind, **example.fields})
                found = KIT[slot](component, **example.options)
            except ConfigurationError as error:
                yield Case(slot, kind, fault=str(error))
            else:
                yield Case(slot, kind, component, tuple(found))


CASES = list(cases())
CHECKS = [check for case in CASES for check in case.checks] + [
    pytest.param(case.missing, id=f"{case.kind}-example") for case in CASES if case.fault
]


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check):
    check()


@pytest.mark.parametrize(("slot", "kind"), list(EXAMPLES))
def test_every_example_is_of_something_that_is_there(slot, kind):
    assert (slot, kind) in set(kinds())


@pytest.mark.parametrize("slot", list(KIT))
def test_there_is_something_to_examine(slot):
    assert slot in {slot for slot, _ in kinds()}


COMPONENTS = {
    slot: [case.component for case in CASES if case.slot == slot and case.checks] for slot in KIT
}
SIZES = st.builds(
    Sizes,
    classes=st.integers(1, 6),
    width=st.integers(1, 20),
    side=st.integers(1, 3),
    rows=st.integers(6, 60),
    tested=st.just(8),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(part=st.sampled_from(COMPONENTS["scorer"] + COMPONENTS["shaper"]), sizes=SIZES)
def test_rows_batches_and_merges_on_any_shape(part, sizes):
    subject = Subject(part, sizes=sizes)
    for law in (laws.rows_apart, laws.output, learning.streaming, learning.merging):
        with contextlib.suppress(OodcoreError), one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            law(subject)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(part=st.sampled_from(COMPONENTS["statistic"]), sizes=SIZES)
def test_statistics_merge_on_any_shape(part, sizes):
    summary = statistics.Summary(part, sizes=sizes)
    for law in (statistics.batches, statistics.merging, statistics.far):
        with one_thread():
            law(summary)
