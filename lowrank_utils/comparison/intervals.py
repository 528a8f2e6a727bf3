"""Differences between methods, network by network, with intervals and tests that say
how sure they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lowrank_utils._arguments import check_finite_number

CONFIDENCE = 0.95
# A difference of accuracies that is smaller than this is of no practical interest: one
# percentage point.
MARGIN = 0.01

BETTER, WORSE, EQUAL, UNDECIDED = (
    "better",
    "worse",
    "no difference worth having",
    "undecided",
)


@dataclass(frozen=True)
class Interval:
    """A mean and where its true value may lie.

    Attributes:
        mean: of the values.
        low: the lower end of the interval; NaN if there is one value alone.
        high: the upper end; NaN if there is one value alone.
        count: how many values there were.
    """

    mean: float
    low: float
    high: float
    count: int

    def verdict(self, margin: float = MARGIN) -> str:
        """Say what the interval of a difference, first − second, allows to say of the
        first.

        Args:
            margin: a difference smaller than this is of no practical interest, in the
                unit of the values.

        Returns:
            ``"no difference worth having"`` if the interval lies within ± margin,
            ``"better"`` or ``"worse"`` if it lies on one side of zero otherwise, and
            ``"undecided"`` if it is too wide to tell.
        """
        check_finite_number("margin", margin, above=0)
        if max(-self.low, self.high) < margin:
            return EQUAL
        if self.low > 0:
            return BETTER
        return WORSE if self.high < 0 else UNDECIDED


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of ``values`` and Student's t interval for it.

    Args:
        values: one per network, at least one.
        confidence: how often such an interval holds the true mean, between 0 and 1.

    Raises:
        ValueError: there are no values, or one isn't finite.
    """
    array = _checked(values)
    mean, error = (
        float(array.mean()),
        float(stats.sem(array)) if len(array) > 1 else float("nan"),
    )
    half = (
        float(stats.t.ppf((1 + confidence) / 2, df=len(array) - 1)) * error
        if len(array) > 1
        else error
    )
    return Interval(mean, mean - half, mean + half, len(array))


def sign_flip_test(differences: Sequence[float]) -> float:
    """Return how often chance alone gives a mean as far from zero as that of
    ``differences``.

    If neither method is better, each difference could as well have had the other sign.
    All 2ⁿ choices of signs are gone through where there are up to 9,999 of them, and as
    many random ones otherwise.

    Args:
        differences: one per network, at least two.

    Returns:
        The two-sided p-value; with n differences it can't be below 2/2ⁿ.

    Raises:
        ValueError: there are fewer than two differences, or one isn't finite.
    """
    array = _checked(differences)
    if len(array) < 2:
        raise ValueError("a sign-flip test needs at least two differences; got one")
    result = stats.permutation_test(
        (array,),
        _rounded_mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,
        rng=0,
    )
    return float(result.pvalue)


def _rounded_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    # Means that are equal but for the order of their sum are ties.
    return np.asarray(np.round(np.mean(values, axis=axis), 12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method: the smallest times
    n, the next times n − 1, ….

    Args:
        p_values: of all tests that were declared together.
    """
    order = np.argsort(p_values)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(order):
        # A test is never surer than one with a smaller p-value.
        scaled = (len(p_values) - place) * float(p_values[index])
        largest = max(largest, min(1.0, scaled))
        corrected[index] = largest
    return corrected


def networks_needed(tests: int, level: float = 1 - CONFIDENCE) -> int:
    """Return how many networks it takes until the smallest p-value of as many tests can
    be below ``level``.
    """
    count = 2
    while tests * 2 / 2**count > level:
        count += 1
    return count


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if len(array) == 0:
        raise ValueError("a mean needs at least one value; there is none")
    if not np.isfinite(array).all():
        raise ValueError(f"values must be finite; got {array.tolist()}")
    return array
