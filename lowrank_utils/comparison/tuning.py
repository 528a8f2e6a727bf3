"""Learning rates: where to look, and what to keep. Every method gets as many tries as
every other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from scipy.stats import qmc

# Within this share of a range's ends a choice says that a better one may lie outside.
OUTER = 0.1
# A choice there is clearly better than the best of the interior by more than this: one
# percentage point.
CLEARLY = 0.01
# How often the ranges may grow, and by which share of their first width.
WIDENINGS = 2
WIDER = 1 / 3


class Point(NamedTuple):
    """A learning rate to try.

    Attributes:
        rate: of all that is trained.
        factor: what the rate of the method's part is multiplied by, if it has one.
    """

    rate: float
    factor: float | None = None


@dataclass(frozen=True)
class Range:
    """What a number is drawn from, uniformly in its logarithm."""

    low: float
    high: float

    def at(self, place: float) -> float:
        """Return the number at a place from 0, the low end, to 1, the high one."""
        return math.exp(math.log(self.low) + place * math.log(self.high / self.low))

    def place(self, value: float) -> float:
        """Return the place of a number, the inverse of ``at``."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    def beyond(self, above: bool) -> "Range":
        """Return the range of a third of this width that adjoins it, above or below."""
        wider = (self.high / self.low) ** WIDER
        return (
            Range(self.high, self.high * wider)
            if above
            else Range(self.low / wider, self.low)
        )

    def including(self, other: "Range") -> "Range":
        """Return the smallest range with both in it."""
        return Range(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Space:
    """Where the points of a method are drawn from.

    Attributes:
        rate: the range of the learning rate.
        factor: that of the factor, if the method has one.
    """

    rate: Range
    factor: Range | None = None

    def points(self, count: int, seed: int) -> list[Point]:
        """Return the first points of a scrambled Sobol sequence, which covers the space
        evenly.

        Args:
            count: how many; a power of two is covered best.
            seed: of the scrambling.
        """
        sequence = qmc.Sobol(d=1 if self.factor is None else 2, rng=seed)
        # Drawn in powers of two, as the sequence is balanced for those alone.
        places = sequence.random_base2(math.ceil(math.log2(count)))[:count]
        return [
            Point(
                self.rate.at(float(row[0])),
                None if self.factor is None else self.factor.at(float(row[1])),
            )
            for row in places
        ]


@dataclass
class Choice:
    """The points that were tried at one length, and the one that was taken.

    Attributes:
        scores: point → mean validation accuracy for each tuning seed that it was tried
            with.
        widened: how often the ranges grew.
        at_edge: the chosen one lies in the outer tenth of its range, and is clearly
            better than the interior.
    """

    scores: dict[Point, list[float]] = field(default_factory=dict)
    widened: int = 0
    at_edge: bool = False

    def ranked(self) -> list[Point]:
        """Return the points, the best first: those with the most seeds, and among them
        by their mean.
        """
        return sorted(
            self.scores, key=lambda p: (-len(self.scores[p]), -self.score(p), p.rate)
        )

    def score(self, point: Point) -> float:
        """Return the mean score of a point over the seeds that it was tried with."""
        return sum(self.scores[point]) / len(self.scores[point])

    @property
    def chosen(self) -> Point:
        """The best of the points that were tried with the most seeds."""
        return self.ranked()[0]


def tune(
    space: Space,
    count: int,
    seed: int,
    steps: Sequence[int],
    tuning_seeds: Sequence[int],
    score: Callable[[Point, int, int], float],
) -> list[Choice]:
    """Choose a point for each length, by halving: what does well with one seed, or for
    a short time, goes on.

    At the first length all points are tried with the first seed, the better half of
    them with the second, and so on. Each further length begins with half as many
    points, the best of the length before, and with one seed fewer, as long as there is
    one: its runs take longer. Where the best point lies in the outer tenth of a range
    and is clearly better than the interior, the range grows by a third.

    Args:
        space: of the method.
        count: how many points to begin with.
        seed: of the points.
        steps: the lengths, the shortest first.
        tuning_seeds: one or more.
        score: point, steps, seed → validation accuracy.

    Returns:
        A choice for each length.
    """
    choices: list[Choice] = []
    candidates = space.points(count, seed)
    for place, length in enumerate(steps):
        choice, seeds = Choice(), tuning_seeds[: max(1, len(tuning_seeds) - place)]
        _halve(choice, candidates, length, seeds, score)
        for widening in range(WIDENINGS):
            wider = _wider(space, choice)
            if wider is None:
                break
            space, strip = wider
            choice.widened += 1
            added = strip.points(max(1, count // 4), seed + 1 + widening)
            _halve(choice, added, length, seeds, score, at_least=len(added))
        choice.at_edge = _wider(space, choice) is not None
        choices.append(choice)
        # Each by the mean of the seeds that it was tried with.
        candidates = sorted(choice.scores, key=lambda p: (-choice.score(p), p.rate))
        candidates = candidates[: max(1, count // 2 ** len(choices))]
    return choices


def _halve(
    choice: Choice,
    candidates: Sequence[Point],
    length: int,
    tuning_seeds: Sequence[int],
    score: Callable[[Point, int, int], float],
    at_least: int = 1,
) -> None:
    """Try the candidates with one seed after the other, each time with the better half
    of them alone.
    """
    left = list(candidates)
    for seed in tuning_seeds:
        for point in left:
            choice.scores.setdefault(point, []).append(score(point, length, seed))
        left = sorted(left, key=lambda p: (-choice.score(p), p.rate))[
            : max(at_least, -(-len(left) // 2))
        ]


def _wider(space: Space, choice: Choice) -> tuple[Space, Space] | None:
    """Return the space with a range grown, and what was added to it; None if no range
    has to.
    """
    best = choice.chosen
    for name in ("rate", "factor"):
        span: Range | None = getattr(space, name)
        if span is None:
            continue
        place = span.place(getattr(best, name))
        if OUTER <= place <= 1 - OUTER:
            continue
        interior = [
            choice.score(p)
            for p in choice.scores
            if OUTER <= span.place(getattr(p, name)) <= 1 - OUTER
        ]
        if interior and choice.score(best) - max(interior) <= CLEARLY:
            continue
        strip = span.beyond(above=place > 0.5)
        return replace(space, **{name: span.including(strip)}), replace(
            space, **{name: strip}
        )
    return None
