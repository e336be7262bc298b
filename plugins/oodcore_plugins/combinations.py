"""Combinations: one score from several."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from torch import Tensor

from oodcore import Combination, Paper, hookimpl
from oodcore.hookspecs import Register


class Sum(Combination):
    """``sum_i w_i s_i`` of the normalised scores."""

    kind = "sum"

    def combine(self, scores: Tensor) -> Tensor:
        return scores @ self.weight(scores)


class Product(Combination):
    """``prod_i sign(s_i) |s_i|^w_i`` of the normalised scores.

    Made for scores that are positive (``normalize: ecdf`` makes them so): an even number of
    negative ones has a positive product.
    """

    kind = "product"

    def combine(self, scores: Tensor) -> Tensor:
        if self.weights is None:
            return scores.prod(dim=1)
        return (scores.sign() * scores.abs() ** self.weight(scores)).prod(dim=1)


class Minimum(Combination):
    """``min_i w_i s_i`` of the normalised scores: a row must please all of them."""

    kind = "minimum"

    def combine(self, scores: Tensor) -> Tensor:
        return (scores * self.weight(scores)).amin(dim=1)


class Maximum(Combination):
    """``max_i w_i s_i`` of the normalised scores: a row must please one of them."""

    kind = "maximum"

    def combine(self, scores: Tensor) -> Tensor:
        return (scores * self.weight(scores)).amax(dim=1)


class PValues(Combination):
    """A combination of p-values: the share of held-out rows with a lower score, by ``ecdf``.

    A p-value is small where a score is as low as those of few in-distribution rows.

    Args:
        normalize: ``ecdf``, which makes p-values of scores: strictly between 0 and 1.
    """

    normalize: Literal["ecdf"] = "ecdf"

    @model_validator(mode="after")
    def _positive_weights(self) -> PValues:
        if self.weights is not None and min(self.weights, default=1) <= 0:
            raise ValueError("p-values are combined with weights above 0")
        return self


class Fisher(PValues):
    """``2 sum_i w_i log p_i`` of the scores' p-values, at most 0: Fisher's statistic, negated.

    For independent scores and equal weights its negative has a chi-squared distribution with 2M
    degrees of freedom on in-distribution rows. One very small p-value is enough to lower it.
    """

    kind = "fisher"

    def combine(self, scores: Tensor) -> Tensor:
        statistic: Tensor = 2 * scores.log() @ self.weight(scores)
        return statistic


class Stouffer(PValues):
    """``sum_i w_i Phi^-1(p_i) / sqrt(sum_i w_i^2)`` of the scores' p-values.

    Phi^-1 is the quantile function of the normal distribution. For independent scores it is
    standard normal on in-distribution rows, whose standard deviation is its unit. Large p-values
    make up for small ones.
    """

    kind = "stouffer"

    def combine(self, scores: Tensor) -> Tensor:
        weight = self.weight(scores)
        quantiles: Tensor = scores.new_tensor(2.0).sqrt() * (2 * scores - 1).erfinv()
        normal: Tensor = quantiles @ weight / weight.norm()
        return normal


class Simes(PValues):
    """``min_i p_(i) M / i`` over the M scores' p-values in ascending order, in (0, 1].

    A p-value of its own: valid for independent scores and many dependent ones. With weights, M / i
    is the sum of all weights over that of the i smallest p-values.
    """

    kind = "simes"
    paper = Paper(
        "An improved Bonferroni procedure for multiple tests of significance",
        "R. J. Simes",
        "Biometrika",
        1986,
        "https://doi.org/10.1093/biomet/73.3.751",
    )

    def combine(self, scores: Tensor) -> Tensor:
        ascending, order = scores.sort(dim=1)
        weight = self.weight(scores)
        shares = weight[order].cumsum(dim=1) / weight.sum()
        return (ascending / shares).amin(dim=1)


@hookimpl
def register_scorers(register: Register) -> None:
    register(Sum)
    register(Product)
    register(Minimum)
    register(Maximum)
    register(Fisher)
    register(Stouffer)
    register(Simes)
