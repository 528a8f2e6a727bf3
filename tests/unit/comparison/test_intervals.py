"""Intervals hold as often as they say, tests are exact, and a verdict says no more than
its interval."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lowrank_utils.comparison.intervals import (
    Interval,
    holm,
    mean_interval,
    networks_needed,
    sign_flip_test,
)


def p_by_hand(differences):
    """Return the share of all choices of signs whose mean is as far from zero, by going
    through them."""
    observed = abs(sum(differences))
    every_sign = itertools.product(*((d, -d) for d in differences))
    return np.mean([abs(sum(choice)) >= observed - 1e-12 for choice in every_sign])


def equal(value):
    return pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_the_interval_of_a_mean_is_students(confidence):
    values = [0.02, -0.01, 0.03, 0.05, 0.011, 0.02]
    interval = mean_interval(values, confidence)
    ends = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    found = (interval.low, interval.high)
    assert found == pytest.approx((ends.low, ends.high), rel=1e-12)
    assert (interval.mean, interval.count) == (pytest.approx(sum(values) / 6), 6)
    # By hand: mean 4, standard deviation √(20/3), and t with 3 degrees of freedom
    # 3.182446.
    by_hand = 4 + 3.182446305284263 * math.sqrt(20 / 3) / 2
    assert mean_interval([1, 3, 5, 7]).high == pytest.approx(by_hand)


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean():
    samples = np.random.default_rng(0).normal(0.3, 2.0, size=(2000, 6))
    held = [i.low <= 0.3 <= i.high for i in map(mean_interval, samples.tolist())]
    # Two standard errors of a share of 2000 are 0.01.
    assert 0.94 <= np.mean(held) <= 0.96


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_one_value_has_no_interval_and_decides_nothing(value):
    interval = mean_interval([value])
    expected = Interval(value, math.nan, math.nan, 1)
    assert vars(interval) == pytest.approx(vars(expected), abs=0, nan_ok=True)
    assert interval.verdict() == "undecided"


EQUAL = "no difference worth having"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.02, "better"),
        (-0.02, -0.001, "worse"),
        (0.011, 0.02, "better"),
        # Within a point it isn't worth having, even where it certainly isn't zero.
        (0.001, 0.009, EQUAL),
        (-0.009, -0.001, EQUAL),
        (-0.009, 0.009, EQUAL),
        (-0.02, 0.009, "undecided"),
        (-0.009, 0.02, "undecided"),
        (0.0, 0.02, "undecided"),
        (-0.02, 0.0, "undecided"),
        (-0.01, 0.005, "undecided"),
    ],
)
def test_a_verdict_goes_by_the_ends_alone(low, high, said):
    for mean in (low, high):
        assert Interval(mean, low, high, 10).verdict() == said
    # Seen from the other method it is the opposite.
    opposite = {"better": "worse", "worse": "better"}
    assert Interval(0.0, -high, -low, 10).verdict() == opposite.get(said, said)


def test_the_margin_is_a_point_and_another_can_be_named():
    interval = Interval(0.0, -0.015, 0.015, 10)
    assert interval.verdict() == "undecided"
    assert interval.verdict(0.02) == EQUAL
    with pytest.raises(ValueError, match=r"margin must be a .* number larger than 0"):
        interval.verdict(0)


@pytest.mark.parametrize("count", [2, 3, 8, 12])
def test_p_is_the_share_of_all_choices_of_signs_on_both_sides(count):
    generator = np.random.default_rng(count)
    samples = [generator.normal(0.3, 1, count).round(3).tolist() for _ in range(3)]
    # Where all signs are equal it is two of all choices.
    samples.append([0.01 + 0.001 * place for place in range(count)])
    assert p_by_hand(samples[-1]) == 2 / 2**count
    for differences in samples:
        p = p_by_hand(differences)
        assert sign_flip_test(differences) == equal(p)
        # Neither the order nor which of the two methods comes first matters.
        assert sign_flip_test([-value for value in differences]) == equal(p)
        assert sign_flip_test(differences[::-1]) == equal(p)
    assert sign_flip_test([0.0] * count) == 1


@pytest.mark.parametrize("count", [7, 12])
def test_ties_between_choices_of_signs_are_ties_whatever_the_rounding(count):
    """Accuracies are thousandths, so sums are often equal; 0.71 − 0.70 isn't 0.01 to a
    computer, but counts as it."""
    for seed in range(6):
        generator = np.random.default_rng(seed)
        thousandths = generator.integers(-6, 12, count)
        seconds = generator.integers(600, 900, count)
        differences = (seconds + thousandths) / 1000 - seconds / 1000
        expected = p_by_hand(thousandths.tolist())
        assert sign_flip_test(differences.tolist()) == equal(expected)


def test_five_of_a_hundred_sweeps_without_a_difference_are_called_one_at_most():
    sizes = [0.01, 0.013, 0.02, 0.029, 0.033, 0.041]
    every_sign = itertools.product(*((size, -size) for size in sizes))
    found = np.array([sign_flip_test(differences) for differences in every_sign])
    for level in (0.04, 0.05, 0.1, 0.5):
        assert level - 2 / 64 - 1e-9 <= np.mean(found <= level) <= level


def test_many_networks_have_a_p_that_is_the_same_each_time():
    differences = np.random.default_rng(4).normal(0.1, 1, 30).tolist()
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    p = sign_flip_test(differences)
    assert p == sign_flip_test(differences)
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.03)
    # A random test can't be surer than its draws.
    assert 1e-4 <= sign_flip_test([1.0] * 30) <= 1e-3


def test_holms_correction_against_values_by_hand():
    # 0.005 · 4, 0.01 · 3, 0.03 · 2, and 0.04 · 1, which isn't surer than the one before
    # it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.02, 0.7]) == pytest.approx([1, 0.06, 1])
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6), st.randoms(use_true_random=False)
)
def test_holms_correction_keeps_the_order_below_bonferronis(p_values, random):
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1, len(p_values) * p)
    for one, two in itertools.permutations(range(len(p_values)), 2):
        if p_values[one] <= p_values[two]:
            assert corrected[one] <= corrected[two]
    places = random.sample(range(len(p_values)), len(p_values))
    assert holm([p_values[i] for i in places]) == [corrected[i] for i in places]


def test_how_many_networks_it_takes():
    assert (networks_needed(5), networks_needed(1)) == (8, 6)
    for tests in range(1, 6):
        needed = networks_needed(tests)
        # With so many the surest outcome is significant after the correction, with one
        # fewer it can't be.
        for count, significant in ((needed, True), (needed - 1, False)):
            p_values = [sign_flip_test([1.0] * count)] + [1.0] * (tests - 1)
            assert (holm(p_values)[0] <= 0.05) == significant


@pytest.mark.parametrize("function", [mean_interval, sign_flip_test])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "a mean needs at least one value; there is none"),
        ([0.1, math.nan], "values must be finite; got [0.1, nan]"),
        ([0.1, math.inf], "values must be finite"),
    ],
)
def test_what_has_no_mean_is_refused(function, values, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        function(values)


def test_one_difference_has_no_test():
    with pytest.raises(ValueError, match="at least two differences; got one"):
        sign_flip_test([0.1])
