"""sklearn_extractor: a fitted classifier of scikit-learn as a model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from oodcore import Extractor, FeatureModel, Features, Head, hookimpl
from oodcore.component import canonical
from oodcore.data import to_device
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import Edit, RowCount
from oodcore.factory import Arguments, Importable, built
from oodcore.hookspecs import Register
from oodcore.inputs import form, readable
from oodcore.preprocess import Preprocess

Array = np.ndarray[Any, Any]
Logits = Literal["auto", "decision_function", "log_probabilities"]

TINY = 1e-12
"""The smallest probability whose logarithm is taken."""

_TRIED = 8
"""Rows on which a linear classifier shows that its weights make its decision function."""

_AGREEMENT = 1e-6
"""How far they may be off, as a share of the largest."""


class ClassifierModel(FeatureModel):
    """A fitted classifier of scikit-learn as a model; ``SklearnExtractor`` says how.

    Args:
        classifier: fitted, on labels 0..K-1 or on texts; its last step decides.
        logits: "auto", "decision_function" or "log_probabilities".
        preprocess: what images go through before they become rows.

    Raises:
        ConfigurationError: it is no fitted classifier of numbered classes, or cannot give such
            logits.
    """

    def __init__(
        self, classifier: Any, logits: Logits = "auto", preprocess: Preprocess | None = None
    ) -> None:
        super().__init__(type(classifier).__name__)
        self.classifier = classifier
        self.classes = _classes(classifier)
        self.logits = _way(classifier, logits, self.classes)
        self.preprocess = preprocess
        self.head = _head(self._last) if self.logits == "decision_function" else None
        self._memory = RowCount()

    def __repr__(self) -> str:
        return f"ClassifierModel({self.title}, logits={self.logits!r})"

    @property
    def _last(self) -> Any:
        """What decides: the classifier, or the last step of a pipeline."""
        return self.classifier[-1] if isinstance(self.classifier, Pipeline) else self.classifier

    @property
    def _earlier(self) -> Any:
        """The steps of a pipeline before the last, or None."""
        steps = isinstance(self.classifier, Pipeline) and len(self.classifier) > 1
        return self.classifier[:-1] if steps else None

    def _capture(self) -> None:
        if self.layers:
            raise ConfigurationError(
                f"a classifier of scikit-learn has no layers, so there is no '{self.layers[0]}'; "
                "embeddings are what its last step gets"
            )

    def prepared(self, inputs: Any) -> Any:
        inputs = to_device(readable(inputs), self.device)
        return inputs if self.preprocess is None else self.preprocess(inputs)

    def rerun(self, inputs: Any, edit: Edit | None = None) -> Features:
        if edit:
            raise ConfigurationError(
                f"a classifier of scikit-learn has no layer '{next(iter(edit))}' to edit"
            )
        inputs = to_device(readable(inputs), self.device)
        if isinstance(inputs, Tensor) and inputs.requires_grad and torch.is_grad_enabled():
            raise DataError(
                f"{self.title}: scikit-learn gives no gradient with respect to inputs; choose a "
                "scorer without one, or a torch model"
            )
        rows = _rows(inputs)
        try:
            embeddings = rows if self._earlier is None else self._earlier.transform(rows)
            values = self._values(embeddings)
        except (ValueError, TypeError, AttributeError) as error:
            told = (str(error) or repr(error)).strip().splitlines()[0][:300]
            raise DataError(f"{self.title} fails on inputs {form(inputs)}: {told}") from error
        self._memory.add(len(values))
        return Features(
            embeddings=_dense(embeddings),
            logits=torch.from_numpy(values),
            head=self.head,
            inputs=inputs,
            rerun=self.rerun,
        )

    def _values(self, embeddings: Any) -> Array:
        """The logits, ``[N, K]`` float64."""
        if self.logits == "log_probabilities":
            shares = np.asarray(self._last.predict_proba(embeddings), dtype=np.float64)
            return np.log(np.maximum(shares, TINY))
        values = np.asarray(self._last.decision_function(embeddings), dtype=np.float64)
        if values.ndim == 1:
            values = np.stack([-values / 2, values / 2], axis=1)
        if values.shape[1] != self.classes:
            raise ConfigurationError(
                f"the decision function of {self.title} has {values.shape[1]} columns for "
                f"{self.classes} classes; take logits: log_probabilities"
            )
        return values

    def to(self, device: torch.device | str) -> ClassifierModel:
        """This model as it is: scikit-learn computes on the CPU."""
        return self

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"embeddings", "logits"} | ({"head"} if self.head else set()))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return ()

    @property
    def rows_seen(self) -> int:
        return self._memory.rows

    def fingerprint(self) -> str:
        """SHA-256 of the classifier with all that it has learnt, of logits and preprocessing.

        Raises:
            ConfigurationError: the classifier holds something that cannot be told by its bytes.
        """
        settings = None if self.preprocess is None else self.preprocess.model_dump(mode="json")
        try:
            learnt = _Told().of(self.classifier)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.title} cannot be told from another classifier: {error}"
            ) from error
        told = canonical([learnt, self.logits, settings])
        return hashlib.sha256(told.encode()).hexdigest()

    def identity(self) -> tuple[Any, ...]:
        return id(self.classifier), self.logits, self.preprocess


class _Told:
    """What an object holds in plain words, the same for objects that decide alike.

    Neither what pickle writes nor what joblib hashes is: both see where numbers lie in memory,
    search trees count their queries, and a search for parameters keeps how long it took.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []

    def of(self, value: Any) -> Any:
        """A value as lists, texts and numbers.

        Raises:
            TypeError: something that shows nothing of what it holds.
        """
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex | bytes | np.generic | np.dtype | slice | range):
            return repr(value)
        if isinstance(value, type | np.ufunc):
            return f"{getattr(value, '__module__', 'numpy')}.{value.__name__}"
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        if isinstance(value, Mapping):
            return ["mapping", [[self.of(key), self.of(part)] for key, part in value.items()]]
        if isinstance(value, list | tuple):
            return [self.of(part) for part in value]
        if isinstance(value, set | frozenset):
            return ["set", sorted(canonical(self.of(part)) for part in value)]
        return self._array(value) if isinstance(value, np.ndarray) else self._thing(value)

    def _array(self, array: Array) -> Any:
        if array.dtype.names:  # what is between the fields means nothing
            return [[name, self._array(array[name])] for name in array.dtype.names]
        if array.dtype.hasobject:
            return [list(array.shape), self.of(array.ravel().tolist())]
        plain = np.ascontiguousarray(array)
        digest = hashlib.sha256(plain.tobytes()).hexdigest()
        return [str(array.dtype), list(array.shape), digest]

    def _thing(self, value: Any) -> Any:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if hasattr(value, "best_estimator_"):
            return [name, self.of(value.best_estimator_)]
        if hasattr(value, "get_arrays"):  # a search tree
            return [name, [self.of(np.asarray(part)) for part in value.get_arrays()]]
        if isinstance(value, BaseEstimator):
            return [name, [[key, self.of(part)] for key, part in sorted(vars(value).items())]]
        if isinstance(value, FunctionType):
            return [value.__module__, value.__qualname__, value.__code__.co_code.hex()]
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            return [name, reduced]
        make, *rest = reduced
        made = getattr(make, "__qualname__", type(make).__name__)
        return [name, made, [self.of(list(part) if _lazy(part) else part) for part in rest]]


def _lazy(value: Any) -> bool:
    return hasattr(value, "__next__")


class SklearnExtractor(Extractor):
    """The decision function, or ``log max(p, 1e-12)``, of a fitted classifier of scikit-learn.

    Rows are arrays: an image becomes one row of its numbers, texts stay texts. Embeddings are what
    the last step of a pipeline gets, dense, or the rows where there is no pipeline. The head is
    that of a linear classifier, where the logits are its decision function. Of two classes a
    decision function d becomes the logits (-d/2, d/2), whose softmax is the logistic function of d.

    scikit-learn cannot save a classifier without pickle, so a configuration names a function that
    gives it, fitted: that is code, which loading imports and calls. It has to give the same
    classifier each time, to the last bit, or an artifact takes it for another: let it read one
    that you trust, or fit with a ``random_state``. A classifier in memory is a model too:
    ``Detector(ClassifierModel(classifier), ...)``, from this module.

    There is no gradient, so that scorers that move inputs are refused when they score.

    Args:
        factory: ``package.module:function``, which gives the classifier. Its classes are 0..K-1, or
            texts, of which the first in the alphabet is class 0.
        arguments: its keyword arguments; lists arrive as tuples.
        logits: ``decision_function``, ``log_probabilities``, or ``auto``, which is the decision
            function where there is one with a number for each class.
        preprocess: what becomes of images before they are rows.

    ``load`` raises a ConfigurationError if the factory cannot be imported or called, or gives no
    fitted classifier that has such logits. Rows that it does not take are a DataError.
    """

    kind = "sklearn"

    factory: Importable
    arguments: Arguments = Arguments()
    logits: Logits = "auto"

    def load(self) -> ClassifierModel:
        classifier = built(self.factory, self.arguments)
        return ClassifierModel(classifier, self.logits, self.preprocess)

    def code(self) -> tuple[str, ...]:
        return (self.factory,)


def _rows(inputs: Any) -> Any:
    """Readable inputs as scikit-learn takes them: an array ``[N, D]``, or texts."""
    if isinstance(inputs, Mapping) or (isinstance(inputs, Tensor) and inputs.ndim < 2):
        raise DataError(
            f"a classifier of scikit-learn takes rows [N, ...] or texts, not {form(inputs)}"
        )
    return inputs.detach().flatten(1).numpy() if isinstance(inputs, Tensor) else inputs


def _classes(classifier: Any) -> int:
    """How many classes a fitted classifier has."""
    name = type(classifier).__name__
    if isinstance(classifier, type) or not hasattr(classifier, "fit"):
        raise ConfigurationError(f"a fitted classifier of scikit-learn is needed, not a {name}")
    if not is_classifier(classifier):
        raise ConfigurationError(f"{name} is no classifier of scikit-learn")
    try:
        check_is_fitted(classifier)
    except NotFittedError:
        raise ConfigurationError(f"{name} is not fitted; call its fit first") from None
    classes = classifier.classes_
    if not isinstance(classes, np.ndarray) or classes.ndim != 1 or len(classes) < 2:
        raise ConfigurationError(f"{name} decides between no two classes of one label")
    if classes.dtype.kind in "biuf" and not np.array_equal(classes, np.arange(len(classes))):
        raise ConfigurationError(
            f"the classes of {name} are {classes[:10].tolist()}; fit it on labels 0..K-1, which is "
            "what rows are labelled with"
        )
    return len(classes)


def _way(classifier: Any, logits: Logits, classes: int) -> Logits:
    """Which of its functions gives a classifier's logits."""
    name = type(classifier).__name__
    decides, guesses = (hasattr(classifier, f) for f in ("decision_function", "predict_proba"))
    # One number for each pair of classes is no number for each class, even where as many.
    settings = classifier.get_params() if decides else {}
    pairs = classes > 2 and any(
        key.endswith("decision_function_shape") and value == "ovo"
        for key, value in settings.items()
    )
    if logits == "auto":
        logits = "decision_function" if decides and not pairs else "log_probabilities"
    if logits == "decision_function" and (not decides or pairs):
        raise ConfigurationError(
            f"{name} has no decision function with a number for each class; take logits: "
            "log_probabilities" + (", or fit with decision_function_shape='ovr'" if pairs else "")
        )
    if logits == "log_probabilities" and not guesses:
        raise ConfigurationError(f"{name} gives no probabilities (predict_proba)")
    return logits


def _head(last: Any) -> Head | None:
    """The head that a linear classifier is; None if its weights do not make its decisions."""
    weight = np.asarray(_plain(getattr(last, "coef_", 0.0)), dtype=np.float64)
    bias = np.asarray(_plain(getattr(last, "intercept_", 0.0)), dtype=np.float64)
    weight = weight[None] if weight.ndim == 1 else weight
    if weight.ndim != 2:
        return None
    bias = np.broadcast_to(bias, len(weight)) if bias.ndim < 2 and bias.size == 1 else bias
    if bias.shape != weight.shape[:1]:
        return None
    rows = np.random.default_rng(0).standard_normal((_TRIED, weight.shape[1]))
    decided = np.asarray(last.decision_function(rows), dtype=np.float64)
    made = rows @ weight.T + bias
    made = made[:, 0] if len(weight) == 1 else made
    size = float(np.abs(made).max())
    if decided.shape != made.shape or not np.allclose(made, decided, 0, _AGREEMENT * size):
        return None
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return Head(torch.tensor(weight), torch.tensor(bias))


def _plain(values: Any) -> Any:
    """An array of what may be a sparse matrix."""
    return values.toarray() if hasattr(values, "toarray") else values


def _dense(rows: Any) -> Tensor | None:
    """Rows of numbers as embeddings; None of texts and of what is no ``[N, D]``."""
    array = np.asarray(_plain(rows))
    if array.dtype.kind not in "biuf" or array.ndim != 2:
        return None
    return torch.tensor(array, dtype=torch.float64)


@hookimpl
def register_extractors(register: Register) -> None:
    register(SklearnExtractor)
