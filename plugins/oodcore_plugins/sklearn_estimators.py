"""Outlier and density estimators of scikit-learn as scorers of embeddings."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from oodcore import Features, FeatureStore, Paper, Scorer, Statistic, hookimpl
from oodcore.component import canonical, suggestion
from oodcore.errors import DataError
from oodcore.factory import Arguments
from oodcore.features import required
from oodcore.hookspecs import Register
from oodcore.rows import Rows
from oodcore.statistics import Sample, State

MODULES = {
    "BayesianGaussianMixture": "sklearn.mixture",
    "EllipticEnvelope": "sklearn.covariance",
    "GaussianMixture": "sklearn.mixture",
    "IsolationForest": "sklearn.ensemble",
    "KernelDensity": "sklearn.neighbors",
    "LocalOutlierFactor": "sklearn.neighbors",
    "OneClassSVM": "sklearn.svm",
    "SGDOneClassSVM": "sklearn.linear_model",
}
"""The estimators, each with the module that has it: a configuration names no other code."""

OWN = ("random_state", "novelty")
"""Arguments that the scorer sets itself."""

PROBED = 16
"""Training rows whose scores are kept, to know an estimator again by."""

_fitted: MutableMapping[Tensor, dict[str, Any]] = WeakTensorKeyDictionary()
_fitting = threading.Lock()


class Sklearn(Scorer):
    """``estimator.score_samples(h)`` of an estimator of scikit-learn fitted on training embeddings.

    In the estimator's own units, higher for what is more like the training rows: minus the anomaly
    score of an isolation forest in [-1, 0], minus the local outlier factor, minus the squared
    Mahalanobis distance of an elliptic envelope, the log-likelihood of densities and mixtures, the
    decision function of the one-class SVMs but for its offset. Labels are not used.

    The estimator learns from a uniform sample of ``rows`` training embeddings, in an order that
    does not depend on that of the data. What is kept is that sample and not the estimator, which
    only pickle could save: a loaded detector fits it again, with the same seed, when it first
    scores. That takes as long as it took the first time. If the scores of some of the sample are
    then not what they were (another version of scikit-learn may do that), it is an error. What
    scikit-learn warns of when it fits is passed on.

    Only estimators of scikit-learn itself are named here, so that a configuration or an artifact
    brings no code of its own. Fitting takes the time and memory that the estimator takes: those of
    ``OneClassSVM`` grow with the square of the rows at least. Scores have no gradient.

    Args:
        estimator: its class, as scikit-learn calls it.
        arguments: its keyword arguments; ``random_state`` and ``novelty`` are set for it.
        rows: how many training rows to keep and to fit on; None for all of them.
        seed: of the sample, and of the estimator where it draws at random.
    """

    kind = "sklearn"
    paper = Paper(
        "Scikit-learn: Machine Learning in Python",
        "Fabian Pedregosa, Gael Varoquaux, Alexandre Gramfort, Vincent Michel, Bertrand Thirion, "
        "Olivier Grisel, Mathieu Blondel, Peter Prettenhofer, Ron Weiss, Vincent Dubourg, Jake "
        "Vanderplas, Alexandre Passos, David Cournapeau, Matthieu Brucher, Matthieu Perrot, "
        "Edouard Duchesnay",
        "JMLR",
        2011,
        "https://jmlr.org/papers/v12/pedregosa11a.html",
    )
    differentiable: ClassVar[bool] = False
    estimator: Literal[
        "BayesianGaussianMixture",
        "EllipticEnvelope",
        "GaussianMixture",
        "IsolationForest",
        "KernelDensity",
        "LocalOutlierFactor",
        "OneClassSVM",
        "SGDOneClassSVM",
    ] = "IsolationForest"
    arguments: Arguments = Arguments()
    rows: PositiveInt | None = 10_000
    seed: int = 0

    @model_validator(mode="after")
    def _known_arguments(self) -> Sklearn:
        known = [name for name in _parameters(self.estimator) if name not in OWN]
        for name in self.arguments:
            if name in OWN:
                raise ValueError(f"'{name}' is set by the scorer; give seed= for chance")
            if name not in known:
                near = suggestion(name, known)
                raise ValueError(
                    f"{self.estimator} has no argument '{name}'{near}; it has {', '.join(known)}"
                )
        return self

    def needs(self) -> frozenset[str]:
        return frozenset({"embeddings"})

    def statistics(self) -> tuple[Statistic, ...]:
        if self.rows is None:
            return (Sample(fraction=1.0, seed=self.seed),)
        return (Sample(capacity=self.rows, seed=self.seed),)

    def fit(self, store: FeatureStore) -> State:
        rows = store[self.statistics()[0]].embeddings
        return {"rows": rows, "scores": self._probed(self._estimator(rows, None), rows)}

    def score(self, features: Features, state: State) -> Tensor:
        rows = required(features.embeddings, "embeddings")
        if not len(rows):
            return rows.new_zeros(0)
        estimator = self._estimator(state["rows"], state["scores"])
        scores = _of_sklearn(estimator.score_samples, rows, f"{self.estimator} cannot score")
        return torch.from_numpy(np.asarray(scores, dtype=np.float64)).to(rows.device)

    def _estimator(self, rows: Rows, scores: Tensor | None) -> Any:
        """The estimator fitted on these rows, once a process.

        Raises:
            DataError: it cannot be, or it gives other scores than those that are known.
        """
        sample, key = rows.tensor(), canonical(self)
        with _fitting:
            known = _fitted.setdefault(sample, {})
            if key not in known:
                given = f"{self.estimator} with {dict(self.arguments)} cannot be fitted"
                with _global_generator_kept():
                    estimator = _of_sklearn(self._fresh().fit, sample, given)
                if scores is not None:
                    self._refuse_others(self._probed(estimator, rows), scores)
                known[key] = estimator
            return known[key]

    def _fresh(self) -> Any:
        """The estimator before it is fitted."""
        novel = {"novelty": True} if "novelty" in _parameters(self.estimator) else {}
        estimator = _class(self.estimator)(**self.arguments, **novel)
        # That of OneClassSVM is no argument, and draws from the global generator unless it is set.
        if hasattr(estimator, "random_state"):
            estimator.random_state = self.seed % 2**32
        return estimator

    def _probed(self, estimator: Any, rows: Rows) -> Tensor:
        """The scores of the first of these rows, ``[min(n, 16)]``."""
        first = rows.between(0, min(PROBED, len(rows)))
        scores = _of_sklearn(estimator.score_samples, first, f"{self.estimator} cannot score")
        return torch.from_numpy(np.array(scores, dtype=np.float64))

    def _refuse_others(self, given: Tensor, known: Tensor) -> None:
        known = known.cpu()
        tolerance = 1e-6 * known.abs().max().clamp_min(1e-300) if len(known) else 0.0
        if given.shape != known.shape or bool(((given - known).abs() > tolerance).any()):
            raise DataError(
                f"sklearn: {self.estimator} fitted again gives other scores than when it was "
                "saved; use the version of scikit-learn that it was fitted with, or fit again"
            )


def _class(name: str) -> Any:
    return getattr(import_module(MODULES[name]), name)


def _parameters(name: str) -> tuple[str, ...]:
    """The names of an estimator's arguments."""
    return tuple(inspect.signature(_class(name)).parameters)


@contextmanager
def _global_generator_kept() -> Iterator[None]:
    """Leave NumPy's global generator as it was: SGDOneClassSVM draws from it, whatever its seed."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def _of_sklearn(work: Any, rows: Tensor, failing: str) -> Any:
    """What an estimator makes of rows; what it refuses is the data's fault or its arguments'."""
    try:
        # Scores that are not finite are refused where they come out; NumPy need not warn of them.
        with np.errstate(all="ignore"):
            return work(rows.detach().cpu().double().numpy())
    except (ValueError, TypeError, np.linalg.LinAlgError) as error:
        told = str(error).splitlines()[0] if str(error) else repr(error)
        raise DataError(f"sklearn: {failing} on {len(rows)} rows: {told}") from error


@hookimpl
def register_scorers(register: Register) -> None:
    register(Sklearn)
