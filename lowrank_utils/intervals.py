"""Differences between methods, taken seed by seed, with intervals that say how sure they are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from lowrank_utils._arguments import check_finite_number, check_whole_number

CONFIDENCE = 0.95
# A difference of accuracies that is smaller than this is of no practical interest: one percentage point.
MARGIN = 0.01


@dataclass(frozen=True)
class Interval:
    """A mean and where its true value may lie.

    Attributes:
        mean: of the values.
        low: the lower end of the interval.
        high: the upper end.
        count: how many values there were.
    """

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Difference(Interval):
    """The mean of paired differences first − second, with Student's t interval.

    Attributes:
        effect: Cohen's d for paired values, the mean difference over its standard deviation; infinite
            if all differences are the same, and 0 if they are all 0.
        low_corrected: the lower end of the interval that holds with its confidence together with all the other
            ``comparisons`` of the family (Bonferroni: each may err with 0.05 over their number).
        high_corrected: the upper end of that interval.
        comparisons: how many comparisons the family has.
    """

    effect: float
    low_corrected: float
    high_corrected: float
    comparisons: int

    def verdict(self, margin: float = MARGIN) -> str:
        """Say what the corrected interval allows.

        Args:
            margin: a difference smaller than this is of no practical interest, in the unit of the values.

        Returns:
            ``"first is better"`` or ``"second is better"`` if the interval excludes zero;
            ``"no difference"`` if it lies within ± margin; ``"undecided"`` if it is too wide to tell.
        """
        check_finite_number("margin", margin, above=0)
        if self.low_corrected > 0:
            return "first is better"
        if self.high_corrected < 0:
            return "second is better"
        if max(-self.low_corrected, self.high_corrected) < margin:
            return "no difference"
        return "undecided"


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of ``values`` and Student's t interval for it.

    Args:
        values: one per seed, at least two.
        confidence: how often such an interval holds the true mean, between 0 and 1.
    """
    low, high = _t_interval(_checked("values", values), confidence)
    return Interval(float(np.mean(values)), low, high, len(values))


def difference_interval(
    first: Mapping[Any, float], second: Mapping[Any, float], comparisons: int = 1
) -> Difference:
    """Return by how much ``first`` exceeds ``second``, taking the difference for each seed.

    What both runs with one seed have in common (the sample, its order, A) cancels in their difference,
    which makes the interval narrower than that of two unrelated means.

    Args:
        first: seed → value.
        second: the same seeds, at least two.
        comparisons: how many such differences are looked at together.

    Raises:
        ValueError: the seeds differ or are fewer than two, or a value isn't finite.
    """
    check_whole_number("comparisons", comparisons, minimum=1)
    if first.keys() != second.keys():
        raise ValueError(
            f"both must have the same seeds; got {sorted(map(str, first))} and {sorted(map(str, second))}"
        )
    differences = _checked("differences", [first[seed] - second[seed] for seed in first])
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    low, high = _t_interval(differences, CONFIDENCE)
    low_corrected, high_corrected = _t_interval(differences, 1 - (1 - CONFIDENCE) / comparisons)
    effect = mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0
    return Difference(mean, low, high, len(differences), effect, low_corrected, high_corrected, comparisons)


def _checked(name: str, values: Sequence[float]) -> np.ndarray:
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, one per seed; {name} has {len(values)}")
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; got {array.tolist()}")
    return array


def _t_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    error = stats.sem(values)
    if error == 0:  # scipy would return NaN
        return float(values.mean()), float(values.mean())
    low, high = stats.t.interval(confidence, df=len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)
