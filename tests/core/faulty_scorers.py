"""Scorers for the conformance kit: healthy ones, and ones with a single fault each."""

from __future__ import annotations

import random
from typing import ClassVar

import numpy as np
import torch
from pydantic import PositiveFloat, PrivateAttr, model_validator

from oodcore import Paper, Scorer, Statistic
from oodcore.statistics import AtLayer as StatisticAtLayer
from oodcore.statistics import Bank, ClassMoments

SOURCE = Paper("A title", "An Author", "A venue", 2024, "https://example.org/paper")


class Careless(Statistic):
    """Count and sum of the embeddings; it writes to the features and shows its own storage."""

    kind = "careless"

    def needs(self):
        return frozenset({"embeddings"})

    def init(self, shape):
        zeros = torch.zeros(shape.D, dtype=torch.float64, device=shape.device)
        return {"count": zeros.new_zeros(()), "total": zeros}

    def update(self, state, features):
        state["count"].add_(len(features))
        state["total"].add_(features.embeddings.abs_().clamp_(max=3.0).sum(dim=0))
        return state

    def merge(self, a, b):
        return {name: a[name] + b[name] for name in a}

    def view(self, state):
        return state["count"], state["total"]


class Nearest(Scorer):
    """``-min_k |h - mu_k| / scale``, in the embedding's units; needs rows to fit on.

    Args:
        scale: of the distance.
    """

    kind = "nearest"
    paper = SOURCE
    scale: PositiveFloat = 1.0

    def needs(self):
        return frozenset({"embeddings"})

    def statistics(self):
        return (ClassMoments(),)

    def fit(self, store):
        moments = store[ClassMoments()]
        return {"means": moments.mean[moments.present]}

    def score(self, features, state):
        means = state["means"].to(features.embeddings)
        return -(features.embeddings[:, None] - means).norm(dim=2).amin(dim=1) / self.scale


class Peak(Scorer):
    """``max_k z_k``; nothing to fit."""

    kind = "peak"

    def needs(self):
        return frozenset({"logits"})

    def score(self, features, state):
        return features.logits.amax(dim=1)


class Ascent(Scorer):
    """``max_k z_k(x + 0.01 sign(dz/dx))``: it passes through the model again."""

    kind = "ascent"
    differentiable: ClassVar[bool] = False

    def needs(self):
        return frozenset({"inputs", "logits"})

    def score(self, features, state):
        with torch.enable_grad():
            leaf = features.inputs.detach().clone().requires_grad_()
            total = features.rerun(leaf).logits.amax(dim=1).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return features.rerun(features.inputs + 0.01 * gradient.sign()).logits.amax(dim=1)


class AtLayer(Nearest):
    """``-min_k |h - mu_k|`` where h is the mean activation of a layer.

    Args:
        layer: the module's name.
    """

    kind = "nearest_at_layer"
    layer: str = "block.2"

    def needs(self):
        return frozenset({f"layers.{self.layer}"})

    def statistics(self):
        return (StatisticAtLayer(layer=self.layer, statistic=ClassMoments()),)

    def fit(self, store):
        moments = store.at(self.layer)[ClassMoments()]
        return {"means": moments.mean[moments.present]}

    def score(self, features, state):
        return super().score(features.at(self.layer), state)


class Margin(Peak):
    """``z_(1) - z_(2)``; it takes two classes."""

    kind = "lead"

    def score(self, features, state):
        best = features.logits.topk(2, dim=1).values
        return best[:, 0] - best[:, 1]


HEALTHY_SCORERS = [Nearest(scale=2.0), Peak(), Margin(), Ascent(), AtLayer(), AtLayer(layer="head")]


class WrongSign(Nearest):
    kind = "wrong_sign"

    def score(self, features, state):
        return -super().score(features, state)


class Chance(Peak):
    kind = "chance"

    def score(self, features, state):
        return (features.logits * 1e3).sin().sum(dim=1)


class BatchSoftmax(Peak):
    kind = "batch_softmax"

    def score(self, features, state):
        return features.logits.softmax(dim=0).amax(dim=1)


class BatchCentred(Peak):
    kind = "batch_centred"

    def score(self, features, state):
        return (features.logits - features.logits.mean(dim=0)).amax(dim=1)


class BatchRank(Peak):
    kind = "batch_rank"
    differentiable: ClassVar[bool] = False

    def score(self, features, state):
        return features.logits.amax(dim=1).argsort().argsort().double()


class FirstRow(Peak):
    kind = "first_row"

    def score(self, features, state):
        peaks = features.logits.amax(dim=1)
        return peaks + 1e-4 * peaks[:1]


class InPlace(Peak):
    kind = "in_place"

    def score(self, features, state):
        return features.logits.clamp_(min=0.5).amax(dim=1)


class WritesHead(Peak):
    kind = "writes_head"

    def needs(self):
        return frozenset({"logits", "head"})

    def score(self, features, state):
        features.head.weight[features.head.weight < 0.01] = 0.0
        return features.logits.amax(dim=1)


class WritesState(Nearest):
    kind = "writes_state"

    def score(self, features, state):
        scores = super().score(features, state)
        state["means"].mul_(1.01)
        return scores


class WritesInFit(Nearest):
    kind = "writes_in_fit"

    def statistics(self):
        return (Careless(),)

    def fit(self, store):
        count, total = store[Careless()]
        return {"means": (total / count)[None]}


class LeavesGradients(Ascent):
    kind = "leaves_gradients"

    def score(self, features, state):
        with torch.enable_grad():
            leaf = features.inputs.detach().clone().requires_grad_()
            features.rerun(leaf).logits.amax(dim=1).sum().backward()
        return features.rerun(features.inputs + 0.01 * leaf.grad.sign()).logits.amax(dim=1)


class LeavesTraining(Ascent):
    kind = "leaves_training"

    def score(self, features, state):
        features.rerun.__self__.module.train()
        return super().score(features, state)


class LeavesHook(Ascent):
    kind = "leaves_hook"

    def score(self, features, state):
        features.rerun.__self__.module.head.register_forward_hook(lambda *_: None)
        return super().score(features, state)


class Rounded(Peak):
    kind = "rounded"

    def score(self, features, state):
        return features.logits.float().amax(dim=1).double()


class Narrow(Peak):
    kind = "narrow"

    def score(self, features, state):
        return features.logits.float().amax(dim=1)


class Column(Peak):
    kind = "column"

    def score(self, features, state):
        return features.logits.amax(dim=1, keepdim=True)


class Array(Peak):
    kind = "array"

    def score(self, features, state):
        return features.logits.detach().numpy().max(axis=1)


class Infinite(Peak):
    kind = "infinite"

    def score(self, features, state):
        return features.logits.amax(dim=1) / (features.logits[:, 0] < -1e9).double()


class ZeroDivided(Nearest):
    kind = "zero_divided"

    def score(self, features, state):
        rows = features.embeddings / features.embeddings.norm(dim=1, keepdim=True)
        return rows.amax(dim=1)


class Overflows(Peak):
    kind = "overflows"

    def score(self, features, state):
        return features.logits.exp().sum(dim=1).log()


class Singular(Nearest):
    kind = "singular"

    def fit(self, store):
        moments = store[ClassMoments()]
        root = torch.linalg.cholesky(torch.linalg.inv(moments.covariance))
        return {"means": moments.mean[moments.present], "root": root}

    def score(self, features, state):
        apart = (features.embeddings[:, None] - state["means"]) @ state["root"]
        return -apart.norm(dim=2).amin(dim=1)


class Third(Peak):
    kind = "third"

    def score(self, features, state):
        best = features.logits.topk(3, dim=1).values
        return best[:, 0] - best[:, 2]


class OneClass(Nearest):
    kind = "one_class"

    def fit(self, store):
        means = store[ClassMoments()].mean
        return {"means": means[:2] + 0.0 * means[1]}


class AbsentClass(Nearest):
    kind = "absent_class"

    def fit(self, store):
        moments = store[ClassMoments()]
        return {"means": moments.mean * moments.count[:, None] / moments.count[:, None]}


class NeedsTooLittle(Nearest):
    kind = "needs_too_little"

    def needs(self):
        return frozenset({"logits"})


class NeedsNonsense(Nearest):
    kind = "needs_nonsense"

    def needs(self):
        return frozenset({"embeddings", "activations"})


class NeedsHead(Peak):
    kind = "needs_head"

    def score(self, features, state):
        scores = features.logits.amax(dim=1)
        return scores if features.head is None else scores + features.head.weight.sum()


class ReadsLabels(Peak):
    kind = "reads_labels"

    def score(self, features, state):
        scores = features.logits.amax(dim=1)
        return scores if features.labels is None else scores + features.labels


class Appends(Nearest):
    """``-min |h - mu|`` to every mean it ever met.

    Args:
        scale: of the distance.
    """

    kind = "appends"
    met: ClassVar[list] = []

    def fit(self, store):
        self.met.append(store[ClassMoments()].mean)
        return {"means": torch.cat(self.met)}


class OnInstance(Nearest):
    kind = "on_instance"

    def fit(self, store):
        object.__setattr__(self, "learnt", super().fit(store))
        return {}

    def score(self, features, state):
        return super().score(features, self.learnt)


class OnClass(Nearest):
    kind = "on_class"
    learnt: ClassVar[dict] = {}

    def fit(self, store):
        self.learnt.update(super().fit(store))
        return {"rows": store[ClassMoments()].count}

    def score(self, features, state):
        return super().score(features, self.learnt)


class Cached(Nearest):
    kind = "cached"
    cache: ClassVar[dict] = {}

    def score(self, features, state):
        means = self.cache.setdefault("means", state["means"])
        return super().score(features, {"means": means})


class GlobalTorch(Nearest):
    kind = "global_torch"

    def fit(self, store):
        means = super().fit(store)["means"]
        return {"means": means + 0.01 * torch.randn(means.shape, dtype=means.dtype)}


class GlobalNumpy(Nearest):
    kind = "global_numpy"

    def fit(self, store):
        return {"means": super().fit(store)["means"] + 0.01 * np.random.rand()}


class GlobalPython(Nearest):
    kind = "global_python"

    def fit(self, store):
        return {"means": super().fit(store)["means"] + 0.01 * random.random()}


class Seeds(Nearest):
    kind = "seeds"

    def fit(self, store):
        torch.manual_seed(0)
        return super().fit(store)


class OwnChance(Nearest):
    kind = "own_chance"

    def fit(self, store):
        return {"means": super().fit(store)["means"] + 0.01 * random.Random().random()}


class Detached(Peak):
    kind = "detached"

    def score(self, features, state):
        return features.logits.detach().amax(dim=1)


class HalfDetached(Nearest):
    kind = "half_detached"

    def score(self, features, state):
        norm = features.embeddings.detach().norm(dim=1)
        return super().score(features, state) + 0.5 * norm


class Steps(Peak):
    kind = "steps"

    def score(self, features, state):
        return (features.logits.amax(dim=1) * 1e4).floor() / 1e4 + 0 * features.logits.sum(dim=1)


class NarrowState(Nearest):
    kind = "narrow_state"

    def fit(self, store):
        return {"means": super().fit(store)["means"].float()}


class NamedState(Nearest):
    kind = "named_state"

    def fit(self, store):
        return {**super().fit(store), "Class Means": torch.zeros(1, dtype=torch.float64)}


class ListState(Nearest):
    kind = "list_state"

    def fit(self, store):
        return {**super().fit(store), "classes": [1, 2, 3]}


class NanState(Nearest):
    kind = "nan_state"

    def fit(self, store):
        return {**super().fit(store), "spare": torch.full((2,), torch.nan, dtype=torch.float64)}


class Counts(Nearest):
    kind = "counts"
    fits: ClassVar[list] = []

    def fit(self, store):
        self.fits.append(1)
        return {"means": super().fit(store)["means"] * (1 + 0.01 * len(self.fits))}


class ReadsRows(Nearest):
    """``-min_k |h - mu_k|`` less a number from what the store was handed first.

    Args:
        scale: of the distance.
    """

    kind = "reads_rows"

    def statistics(self):
        return (Bank(),)

    def fit(self, store):
        return {"means": store[Bank()].embeddings.tensor()[:5].double()}


class Impatient(Peak):
    kind = "impatient"
    met: ClassVar[list] = []

    def score(self, features, state):
        self.met.append(len(features))
        return features.logits.amax(dim=1) * len(self.met)


class Doubles(Nearest):
    kind = "doubles"

    @model_validator(mode="before")
    @classmethod
    def _double(cls, data):
        return {**data, "scale": 2 * data.get("scale", 1.0)}


class Private(Nearest):
    kind = "private"
    _token: object = PrivateAttr(default_factory=object)


class Thawed(Nearest):
    kind = "thawed"
    model_config: ClassVar[dict] = {"frozen": False}


class Undocumented(Nearest):
    kind = "undocumented"
    shrinkage: float = 0.1


Undocumented.__doc__ = "``-min_k |h - mu_k|``."


class NoFormula(Peak):
    """The largest logit, in short."""

    kind = "no_formula"


class BadPaper(Peak):
    """``max_k z_k``."""

    kind = "bad_paper"
    paper = Paper("A title", " ", "A venue", 2024, "https://example.org")


SCORER_FAULTS = [
    (WrongSign, "sign", "turn the sign"),
    (Chance, "sign", "floor=None"),
    (BatchSoftmax, "independence of the batch", "alone than among"),
    (BatchCentred, "independence of the batch", "dimension 0"),
    (BatchRank, "independence of the batch", "alone than among"),
    (FirstRow, "independence of the batch", "alone than among"),
    (InPlace, "unchanged input", "in place: logits"),
    (WritesHead, "unchanged input", "in place: head.weight"),
    (WritesState, "unchanged input", "what was learnt when it is used"),
    (LeavesGradients, "unchanged input", "torch.autograd.grad"),
    (LeavesTraining, "unchanged input", "another mode"),
    (LeavesHook, "unchanged input", "leaves a hook"),
    (Rounded, "gradient", "jumps or has a kink|is not that of"),
    (Narrow, "output", "float32; features come as float64"),
    (Column, "output", r"is \[80, 1\]; give \[N\]"),
    (Array, "output", "not a ndarray"),
    (Infinite, "output", "not finite: score at .* is inf"),
    (ZeroDivided, "odd rows", "a row of zeros.* is nan"),
    (Overflows, "large and small", "is inf"),
    (Singular, "odd rows", "LinAlgError"),
    (Singular, "few of everything", "one training row"),
    (Third, "few of everything", "two classes: RuntimeError"),
    (OneClass, "few of everything", "one class: IndexError"),
    (AbsentClass, "odd rows", "a class without training rows"),
    (NeedsTooLittle, "needs", r"\['embeddings', 'logits'\]|do not suffice"),
    (NeedsNonsense, "needs", "activations"),
    (NeedsHead, "needs", "something else of features with"),
    (ReadsLabels, "needs", "reads the labels"),
    (Appends, "refit", "begin each fit with nothing"),
    (Appends, "purity", "second time"),
    (Counts, "refit", "fitted for the second time"),
    (OnInstance, "saving", "learnt"),
    (OnInstance, "state", "on the component"),
    (OnClass, "saving", "all that it learns must be in the state"),
    (OnClass, "state", "on the component"),
    (Cached, "state", "fitted on first"),
    (GlobalTorch, "purity", "random generator of torch"),
    (GlobalNumpy, "purity", "random generator of NumPy"),
    (GlobalPython, "purity", "random generator of Python"),
    (Seeds, "purity", "random generator of torch"),
    (OwnChance, "purity", "something else the second time"),
    (Detached, "gradient", "no gradient; leave detach"),
    (HalfDetached, "gradient", "autograd says"),
    (Steps, "gradient", "zero everywhere"),
    (NarrowState, "state", "floating numbers in a state are float64"),
    (NamedState, "state", "names are made of a-z|not made of a-z"),
    (ListState, "state", "a state holds tensors, Rows, Index and mappings"),
    (NanState, "state", "not finite|is finite"),
    (ReadsRows, "streaming", "in another order"),
    (ReadsRows, "merging", "merged from the last to the first"),
    (WritesInFit, "unchanged input", "fitting changes the features"),
    (Impatient, "before fitting", "before it is fitted"),
    (Doubles, "configuration", "change no field"),
    (Private, "configuration", "no private attributes"),
    (Thawed, "configuration", "model_config"),
    (Undocumented, "documentation", "explain shrinkage"),
    (NoFormula, "documentation", "no formula"),
    (BadPaper, "documentation", "authors"),
]
