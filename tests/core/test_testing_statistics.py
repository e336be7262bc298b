"""The kit lets healthy statistics pass; a planted fault is caught by the law it breaks."""

from __future__ import annotations

import pytest
import torch

from oodcore import Statistic
from oodcore.errors import ConfigurationError
from oodcore.rows import Rows
from oodcore.statistics import AtLayer, Bank, ClassMoments, Normalized, Sample
from oodcore.testing import check_statistic, statistic_checks
from oodcore.testing.statistics import LAWS


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class Mean(Statistic):
    """Count and mean of the embeddings."""

    kind = "mean"

    def needs(self):
        return frozenset({"embeddings"})

    def init(self, shape):
        return {"count": zeros(), "mean": zeros(shape.D)}

    def update(self, state, features):
        rows = features.embeddings
        batch = {"count": zeros() + len(rows), "mean": rows.sum(dim=0) / max(1, len(rows))}
        return Mean.merge(self, state, batch)

    def merge(self, a, b):
        count = a["count"] + b["count"]
        shift = (b["mean"] - a["mean"]) * b["count"] / count.clamp_min(1)
        return {"count": count, "mean": a["mean"] + shift}


HEALTHY = [
    Mean(),
    Normalized(statistic=Mean()),
    AtLayer(layer="stem.conv", statistic=Mean(), pool="max"),
    Bank(fields=("logits",)),
    Sample(fraction=0.3),
    Sample(capacity=9, per_class=True),
]


@pytest.mark.parametrize("check", statistic_checks(*HEALTHY))
def test_healthy_statistics_pass(check):
    check()


class ForgetsMerge(Mean):
    kind = "forgets_merge"

    def merge(self, a, b):
        return a


class AveragesMeans(Mean):
    kind = "averages_means"

    def merge(self, a, b):
        return {"count": a["count"] + b["count"], "mean": (a["mean"] + b["mean"]) / 2}


class AveragesBatches(Mean):
    kind = "averages_batches"

    def update(self, state, features):
        batch = {"count": zeros() + 1, "mean": features.embeddings.mean(dim=0)}
        return self.merge(state, batch)


class Moving(Mean):
    kind = "moving"

    def update(self, state, features):
        mean = state["mean"]
        for row in features.embeddings:
            mean = mean + 0.05 * (row - mean)
        return {**state, "mean": mean}


class OnlyWhenMerged(Mean):
    kind = "only_when_merged"

    def merge(self, a, b):
        merged = super().merge(a, b)
        return {**merged, "mean": merged["mean"] + 1e-3 * (a["mean"] - b["mean"])}


class FirstRows(Statistic):
    """The first ten rows."""

    kind = "first_rows"

    def needs(self):
        return frozenset({"embeddings"})

    def init(self, shape):
        return {"rows": Rows((shape.D,))}

    def update(self, state, features):
        return self.merge(state, {"rows": Rows.of(features.embeddings)})

    def merge(self, a, b):
        return {"rows": Rows.of(a["rows"].joined(b["rows"]).tensor()[:10])}


class Squares(Mean):
    """Mean and variance from sums of squares."""

    kind = "squares"

    def init(self, shape):
        return {"count": zeros(), "sum": zeros(shape.D), "squares": zeros(shape.D)}

    def update(self, state, features):
        rows = features.embeddings
        batch = {"count": zeros() + len(rows), "sum": rows.sum(0), "squares": rows.square().sum(0)}
        return self.merge(state, batch)

    def merge(self, a, b):
        return {name: a[name] + b[name] for name in a}

    def view(self, state):
        mean = state["sum"] / state["count"]
        return {"variance": state["squares"] / state["count"] - mean.square()}


class EmptyNan(Mean):
    kind = "empty_nan"

    def update(self, state, features):
        rows = features.embeddings
        return self.merge(state, {"count": zeros() + len(rows), "mean": rows.mean(dim=0)})


class ClassNan(Mean):
    """Means of the classes."""

    kind = "class_nan"

    def init(self, shape):
        return {"count": zeros(shape.K), "mean": zeros(shape.K, shape.D)}

    def update(self, state, features):
        member = torch.nn.functional.one_hot(features.labels, len(state["count"])).double()
        count = member.sum(dim=0)
        return self.merge(
            state, {"count": count, "mean": member.T @ features.embeddings / count[:, None]}
        )

    def merge(self, a, b):
        count = a["count"] + b["count"]
        share = (b["count"] / count.clamp_min(1))[:, None]
        return {"count": count, "mean": a["mean"] + (b["mean"] - a["mean"]) * share}


class WritesFeatures(Mean):
    kind = "writes_features"

    def update(self, state, features):
        features.embeddings.clamp_min_(0.0)
        return super().update(state, features)


class ShowsStorage(Mean):
    kind = "shows_storage"

    def update(self, state, features):
        for name, value in super().update(state, features).items():
            state[name].copy_(value)
        return state


class Narrow(Mean):
    kind = "narrow_statistic"

    def init(self, shape):
        return {name: value.float() for name, value in super().init(shape).items()}

    def update(self, state, features):
        updated = super().update(state, features)
        return {name: value.float() for name, value in updated.items()}


class Named(Mean):
    kind = "named_statistic"

    def init(self, shape):
        return {**super().init(shape), "Sum.1": zeros()}

    def update(self, state, features):
        return {**state, **super().update(state, features)}

    def merge(self, a, b):
        return {**a, **super().merge(a, b)}


class Reservoir(FirstRows):
    kind = "reservoir"

    def merge(self, a, b):
        rows = a["rows"].joined(b["rows"]).tensor()
        return {"rows": Rows.of(rows[torch.randperm(len(rows))[:10]])}


class NeedsTooLittle(Mean):
    kind = "needs_too_little_statistic"

    def needs(self):
        return frozenset({"logits"})


class Remembers(Mean):
    kind = "remembers"

    def update(self, state, features):
        object.__setattr__(self, "rows", getattr(self, "rows", 0) + len(features))
        return super().update(state, features)

    def view(self, state):
        return {**state, "rows": self.rows}


class Endless(Mean):
    kind = "endless"

    def init(self, shape):
        return {**super().init(shape), "least": zeros() + torch.inf}

    def update(self, state, features):
        return {**state, **super().update(state, features)}

    def merge(self, a, b):
        return {**a, **super().merge(a, b)}


FAULTS = [
    (ForgetsMerge, "merging", "merged in three parts"),
    (AveragesMeans, "merging", "it shows something else: mean at"),
    (AveragesBatches, "batches", "updated one row at a time"),
    (Moving, "batches", "in another order of rows"),
    (OnlyWhenMerged, "merging", "something else: mean"),
    (FirstRows, "batches", "in another order of rows"),
    (FirstRows, "merging", "from the last to the first"),
    (Squares, "far from the origin", "variance at"),
    (EmptyNan, "empty batches", "nan"),
    (ClassNan, "merging", "nan"),
    (WritesFeatures, "unchanged input", "in place: embeddings"),
    (ShowsStorage, "unchanged input", "view must not hand it out"),
    (Narrow, "saving", "float64"),
    (Named, "saving", "not made of a-z"),
    (Endless, "saving", "what is saved is finite"),
    (Endless, "odd rows", "what is saved is finite"),
    (Reservoir, "purity", "random generator of torch"),
    (NeedsTooLittle, "needs", "'NoneType'"),
    (Remembers, "purity", "another summary"),
]


@pytest.mark.parametrize(
    ("fault", "law", "message"), FAULTS, ids=lambda v: getattr(v, "kind", None) or ""
)
def test_faulty_statistics_are_caught(fault, law, message):
    [check] = [check for check in statistic_checks(fault) if check.name == law]
    with pytest.raises(AssertionError, match=message):
        check()


def test_every_law_has_a_fault_that_breaks_it():
    shared = {"documentation", "configuration"}
    assert {law for _, law, _ in FAULTS} | shared == set(LAWS)


def test_everything_at_once():
    check_statistic(ClassMoments)
    with pytest.raises(AssertionError, match="checks failed:\n- statistic 'forgets_merge', "):
        check_statistic(ForgetsMerge())


def test_a_sketch_may_ask_for_a_tolerance():
    [rough] = [c for c in statistic_checks(OnlyWhenMerged(), tolerance=0.1) if c.name == "merging"]
    rough()


def test_a_statistic_with_required_fields_is_given_as_an_instance():
    with pytest.raises(ConfigurationError, match="Normalized cannot be made without arguments"):
        statistic_checks(Normalized)
