"""The scikit-learn estimator: any detector on plain arrays."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from oodcore.detector import Detector

Array = np.ndarray[Any, Any]


class OODDetector(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """Outlier detection on arrays of embeddings, as scikit-learn does it.

    Where labels are given, a row's class is its label; where not, there is one class. So
    ``mahalanobis`` without labels measures the distance to the mean of all rows.

    Args:
        scorer: a scorer that works on embeddings, its kind, or a mapping with a kind.
        contamination: the share of the training rows that ``predict`` calls outliers, in (0, 0.5].
        shapers: what reshapes the rows before the scorer, in turn.
        seed: of whatever the detector draws.

    Attributes:
        detector_: the fitted ``oodcore.Detector``.
        offset_: the score below which a row is an outlier: the ``contamination`` quantile of the
            training rows' scores.
        classes_: the labels, where there were any.
        n_features_in_: how many columns a row has.

    This threshold is the usual one of scikit-learn, read off the training rows. For a stated
    false-alarm rate use ``Detector.calibrate`` on rows that were not fitted on.
    """

    def __init__(
        self,
        scorer: Any = "mahalanobis",
        contamination: float = 0.1,
        shapers: Sequence[Any] = (),
        seed: int = 0,
    ) -> None:
        self.scorer = scorer
        self.contamination = contamination
        self.shapers = shapers
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> OODDetector:
        """Learn from rows ``[N, D]`` and, where there are any, their labels ``[N]``.

        Raises:
            ValueError: rows or labels that are not such, or a contamination outside (0, 0.5].
        """
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination must be in (0, 0.5], not {self.contamination!r}")
        if y is None:
            rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
            labels = np.zeros(len(rows), dtype=np.int64)
        else:
            rows, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
            check_classification_targets(y)
            self.classes_, labels = np.unique(y, return_inverse=True)
        detector = Detector(scorer=self.scorer, shapers=self.shapers, seed=self.seed)
        with warnings.catch_warnings():
            # Small samples are everyday here: kNN with fewer rows than neighbours is no surprise.
            warnings.filterwarnings("ignore", message="knn: k is", category=UserWarning)
            self.detector_ = detector.fit((rows, labels))
        self.offset_ = float(np.quantile(self.detector_.score(rows), self.contamination))
        return self

    def score_samples(self, X: Any) -> Array:
        """The score of each row, ``[N]`` float64; higher is more normal."""
        check_is_fitted(self)
        return self.detector_.score(validate_data(self, X, dtype=np.float64, reset=False))

    def decision_function(self, X: Any) -> Array:
        """``score_samples`` less ``offset_``, ``[N]``: negative for outliers."""
        scores: Array = self.score_samples(X) - self.offset_
        return scores

    def predict(self, X: Any) -> Array:
        """1 for normal rows, -1 for outliers, ``[N]`` int64."""
        return np.where(self.decision_function(X) < 0, -1, 1).astype(np.int64)
