"""Intervals hold as often as they say, and a verdict says no more than its interval."""

import math
import re

import numpy as np
import pytest
from scipy import stats

from lowrank_utils.intervals import Difference, difference_interval, mean_interval


def by_seed(values):
    return dict(enumerate(values))


def test_the_interval_of_a_mean_is_students():
    # By hand: mean 4, standard deviation √(20/3), and t with 3 degrees of freedom 3.182446.
    interval = mean_interval([1.0, 3.0, 5.0, 7.0])
    half = 3.182446305284263 * math.sqrt(20 / 3) / 2
    assert interval.mean == 4
    assert interval.count == 4
    assert interval.low == pytest.approx(4 - half, rel=1e-9)
    assert interval.high == pytest.approx(4 + half, rel=1e-9)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean():
    generator = np.random.default_rng(0)
    samples = generator.normal(0.3, 2.0, size=(4000, 6))
    held = [i.low <= 0.3 <= i.high for i in (mean_interval(list(sample)) for sample in samples)]
    # Two standard errors of a share of 4000 are 0.007.
    assert 0.943 <= np.mean(held) <= 0.957


def test_a_difference_is_taken_in_pairs():
    # What both share cancels: the accuracies wander by 10 points, the difference is steady.
    shared = np.random.default_rng(1).normal(0.8, 0.1, size=10)
    noise = np.random.default_rng(2).normal(0, 0.002, size=10)
    first, second = by_seed(shared + 0.01 + noise), by_seed(shared)
    difference = difference_interval(first, dict(reversed(second.items())))
    reference = stats.ttest_rel(list(first.values()), list(second.values()))
    ends = reference.confidence_interval(0.95)
    assert difference.mean == pytest.approx(0.01 + noise.mean())
    assert (difference.low, difference.high) == pytest.approx((ends.low, ends.high))
    assert difference.effect == pytest.approx(reference.statistic / math.sqrt(10))
    assert difference.high - difference.low < 0.005
    assert difference.count == 10


@pytest.mark.parametrize("comparisons", [1, 6, 24])
def test_the_correction_is_bonferronis(comparisons):
    first, second = by_seed([0.5, 0.7, 0.6, 0.9]), by_seed([0.4, 0.65, 0.6, 0.7])
    difference = difference_interval(first, second, comparisons)
    ends = stats.ttest_rel(list(first.values()), list(second.values())).confidence_interval(
        1 - 0.05 / comparisons
    )
    assert (difference.low_corrected, difference.high_corrected) == pytest.approx((ends.low, ends.high))
    assert difference.comparisons == comparisons
    wider = difference.high_corrected - difference.low_corrected > difference.high - difference.low
    assert wider == (comparisons > 1)


def test_all_corrected_intervals_of_a_family_hold_together():
    generator = np.random.default_rng(3)
    families = generator.normal(0, 1, size=(600, 8, 5))
    held = 0
    for family in families:
        rows = [difference_interval(by_seed(row), by_seed([0.0] * 5), comparisons=8) for row in family]
        held += all(row.low_corrected <= 0 <= row.high_corrected for row in rows)
    assert held / 600 >= 0.93  # at least 0.95, less two standard errors
    assert held / 600 < 1


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.02, "first is better"),
        (-0.02, -0.001, "second is better"),
        (-0.009, 0.009, "no difference"),
        (-0.02, 0.009, "undecided"),
        (-0.009, 0.02, "undecided"),
        (0.0, 0.005, "no difference"),
        (-0.01, 0.0, "undecided"),
    ],
)
def test_the_verdict_goes_by_the_corrected_interval(low, high, said):
    # The uncorrected interval would always say that the first is better.
    difference = Difference(0.01, 0.005, 0.015, 10, 1.0, low, high, 3)
    assert difference.verdict() == said


def test_the_margin_decides_what_counts_as_a_difference():
    difference = Difference(0.0, -0.01, 0.01, 10, 0.0, -0.015, 0.015, 3)
    assert difference.verdict(0.01) == "undecided"
    assert difference.verdict(0.02) == "no difference"
    with pytest.raises(ValueError, match="margin must be a finite number larger than 0"):
        difference.verdict(0)


def test_differences_without_any_spread():
    same = difference_interval(by_seed([0.5, 0.6]), by_seed([0.5, 0.6]))
    assert (same.mean, same.low, same.high, same.effect) == (0, 0, 0, 0)
    assert same.verdict() == "no difference"
    steady = difference_interval(by_seed([0.75, 1.0]), by_seed([0.5, 0.75]), comparisons=5)
    assert (steady.low_corrected, steady.high_corrected, steady.effect) == (0.25, 0.25, math.inf)
    assert difference_interval(by_seed([0.5, 0.75]), by_seed([0.75, 1.0])).effect == -math.inf


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({1: 0.5, 2: 0.6}, {1: 0.5, 3: 0.6}, "both must have the same seeds; got ['1', '2'] and ['1', '3']"),
        ({1: 0.5}, {1: 0.4}, "an interval needs at least two values, one per seed; differences has 1"),
        ({1: 0.5, 2: math.nan}, {1: 0.4, 2: 0.3}, "differences must be finite"),
    ],
)
def test_what_has_no_interval_is_refused(first, second, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        difference_interval(first, second)
    with pytest.raises(ValueError, match="comparisons must be a whole number, 1 or more"):
        difference_interval({1: 0.5, 2: 0.6}, {1: 0.5, 2: 0.6}, comparisons=0)
    with pytest.raises(ValueError, match="values has 0"):
        mean_interval([])
