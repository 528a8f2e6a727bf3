"""Tuning: every method gets as many tries, good points go on, and ranges grow only
where they have to."""

import math

import pytest

from lowrank_utils.comparison.tuning import Choice, Point, Range, Space, tune

RATES, FACTORS = Range(0.001, 0.1), Range(1.0, 200.0)
LINE, PLANE = Space(RATES), Space(RATES, FACTORS)
# With this seed a point lies in each outer tenth, in what is added as well.
EDGES = 14


def spied(landscape):
    """Return a score function that goes by ``landscape``, and the list of what it is
    asked."""
    asked = []

    def score(point, steps, seed):
        asked.append((point, steps, seed))
        return landscape(point, steps, seed)

    return score, asked


def near(place, height=0.2, span=RATES):
    """Return a landscape with its top at a place of the range of rates."""
    return lambda point, *_: 0.5 + height * (1 - abs(span.place(point.rate) - place))


def test_a_place_is_logarithmic_and_leads_back():
    numbers = [RATES.at(place) for place in (0.0, 0.5, 1.0)]
    assert numbers == pytest.approx([0.001, 0.01, 0.1])
    assert RATES.place(RATES.at(0.3)) == pytest.approx(0.3)


def test_a_range_grows_by_a_third_of_its_width_on_the_side_that_was_asked_for():
    third = 100 ** (1 / 3)
    above, below = RATES.beyond(above=True), RATES.beyond(above=False)
    assert (above.low, above.high) == (0.1, pytest.approx(0.1 * third))
    assert (below.low, below.high) == (pytest.approx(0.001 / third), 0.001)
    assert RATES.including(above) == Range(0.001, above.high)
    assert RATES.including(below) == Range(below.low, 0.1)


@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_points_cover_each_range_evenly_and_depend_on_the_seed_alone(count):
    for space in (LINE, PLANE):
        points = space.points(count, 3)
        assert points == space.points(count, 3)
        assert points != space.points(count, 4)
        places = [[RATES.place(point.rate) for point in points]]
        if space.factor is None:
            assert {point.factor for point in points} == {None}
        else:
            places.append([FACTORS.place(point.factor) for point in points])
        for one in places:
            # One in each of as many equal parts.
            parts = sorted(math.floor(place * count) for place in one)
            assert parts == list(range(count))
    # Rate and factor aren't tied to each other.
    assert count == 1 or places[0] != pytest.approx(places[1])


def test_methods_of_one_dimension_try_the_same_places_of_their_ranges():
    wide, high = Range(0.005, 1.0), Range(1.0, 30.0)
    for one, other in ((LINE, Space(wide)), (PLANE, Space(wide, high))):
        for first, second in zip(one.points(8, 3), other.points(8, 3), strict=True):
            assert RATES.place(first.rate) == pytest.approx(wide.place(second.rate))
            if one is PLANE:
                place = high.place(second.factor)
                assert FACTORS.place(first.factor) == pytest.approx(place)


def test_the_better_half_goes_on_to_the_second_seed_and_to_the_longer_run():
    score, asked = spied(near(0.4))
    choices = tune(LINE, 8, 3, [10, 20, 40], [101, 102], score)
    points = LINE.points(8, 3)
    best = sorted(points, key=lambda p: abs(RATES.place(p.rate) - 0.4))
    expected = [(p, 10, 101) for p in points] + [(p, 10, 102) for p in best[:4]]
    # With one seed fewer, as far as there is one.
    expected += [(p, 20, 101) for p in best[:4]] + [(p, 40, 101) for p in best[:2]]
    assert sorted(asked) == sorted(expected)
    assert asked[:8] == expected[:8]
    assert [len(choice.scores) for choice in choices] == [8, 4, 2]
    for choice in choices:
        found = (choice.chosen, choice.widened, choice.at_edge)
        assert found == (best[0], 0, False)
    assert choices[0].scores[best[0]] == [near(0.4)(best[0])] * 2
    assert len(choices[0].scores[best[4]]) == 1


def test_the_third_seed_is_for_the_better_quarter_by_the_mean_of_what_came_before():
    points = LINE.points(8, 3)
    # The first seed favours one order and the second another, each by too little to
    # make an edge clearly better.
    marks = {101: [8, 7, 6, 5, 4, 3, 2, 1], 102: [1, 2, 9, 8, 9, 9, 9, 9], 103: [1] * 8}
    score, asked = spied(
        lambda point, _, seed: 0.5 + 0.001 * marks[seed][points.index(point)]
    )
    (choice,) = tune(LINE, 8, 3, [10], [101, 102, 103], score)
    tried = {
        seed: [points.index(p) for p, _, s in asked if s == seed] for seed in marks
    }
    assert tried[102] == [0, 1, 2, 3]
    assert sorted(tried[103]) == [2, 3]
    assert choice.chosen == points[2]


def test_no_point_that_was_tried_with_fewer_seeds_is_chosen_and_of_equals_the_smallest_rate():
    lucky, low, high, worse = (Point(rate) for rate in (0.001, 0.01, 0.02, 0.005))
    scores = {lucky: [0.9], high: [0.5, 0.7], low: [0.8, 0.4], worse: [0.5, 0.5]}
    choice = Choice(scores)
    assert choice.ranked() == [low, high, worse, lucky]
    assert choice.chosen == low
    assert choice.score(low) == pytest.approx(0.6)


def test_each_length_is_chosen_by_its_own_scores():
    # Long runs want a smaller rate.
    score, _ = spied(lambda point, steps, _: near(0.6 if steps == 10 else 0.4)(point))
    short, long = tune(LINE, 8, 3, [10, 20], [101], score)
    for choice, place in ((short, 0.6), (long, 0.4)):
        nearest = min(choice.scores, key=lambda p: abs(RATES.place(p.rate) - place))
        assert choice.chosen == nearest
    assert short.scores.keys() == set(LINE.points(8, 3))
    assert long.chosen != short.chosen


def test_every_method_gets_as_many_tries_where_nothing_is_at_an_edge():
    for space in (LINE, PLANE):
        score, asked = spied(lambda *_: 0.5)
        tune(space, 8, 3, [10, 20], [101, 102], score)
        assert len(asked) == 8 + 4 + 4


@pytest.mark.parametrize("above", [True, False])
def test_a_range_grows_on_the_side_where_the_best_lies_twice_at_most(above):
    landscape = near(5.0 if above else -5.0)
    score, asked = spied(landscape)
    first, second = tune(LINE, 8, EDGES, [10, 20], [101, 102], score)
    points = LINE.points(8, EDGES)
    strip = RATES.beyond(above)
    strips = [strip, RATES.including(strip).beyond(above)]
    tried = dict.fromkeys(point for point, steps, _ in asked if steps == 10)
    added = [point for point in tried if point not in points]
    assert len(added) == 2 * (8 // 4)
    for place, point in enumerate(added):
        assert 0 <= strips[place // 2].place(point.rate) <= 1
        # What is added gets all tuning seeds, like those that went on before.
        assert first.scores[point] == [landscape(point)] * 2
    assert first.chosen == (max if above else min)(added)
    # Two times are enough; what is then still at an edge says so.
    assert (first.widened, first.at_edge) == (2, True)
    # The next length goes on with the best, those that were added among them.
    best = sorted(first.scores, key=landscape, reverse=True)[:4]
    assert {*best, first.chosen} <= second.scores.keys()


@pytest.mark.parametrize(("better_by", "widened"), [(0.0101, True), (0.0099, False)])
def test_an_edge_has_to_be_better_by_more_than_one_point(better_by, widened):
    edge = max(LINE.points(8, EDGES))
    assert RATES.place(edge.rate) > 0.9
    score, asked = spied(lambda point, *_: 0.5 + better_by * (point.rate >= edge.rate))
    (choice,) = tune(LINE, 8, EDGES, [10], [101], score)
    assert choice.chosen.rate >= edge.rate
    assert (choice.widened > 0) == (len(asked) > 8) == widened


def test_a_point_in_the_interior_widens_nothing_however_good_it_is():
    score, asked = spied(near(0.75, height=5.0))
    (choice,) = tune(LINE, 8, EDGES, [10], [101], score)
    assert (choice.widened, choice.at_edge, len(asked)) == (0, False, 8)


def test_the_factor_grows_by_itself_and_the_rate_keeps_its_range():
    def landscape(point, *_):
        # The rate doesn't matter much, the factor ever more.
        off = abs(RATES.place(point.rate) - 0.5)
        return 0.2 + 0.2 * FACTORS.place(point.factor) - 0.01 * off

    score, asked = spied(landscape)
    (choice,) = tune(PLANE, 16, 3, [10], [101], score)
    assert choice.widened >= 1
    points, strip = PLANE.points(16, 3), FACTORS.beyond(above=True)
    added = [p for p, *_ in asked if p not in points][:4]
    assert all(strip.low <= point.factor <= strip.high for point in added)
    # All over the range of rates, not in a corner.
    assert sorted(math.floor(4 * RATES.place(p.rate)) for p in added) == [0, 1, 2, 3]


def test_tuning_asks_for_nothing_but_its_own_lengths_and_seeds():
    score, asked = spied(near(5.0))
    tune(PLANE, 4, 3, [10, 30], [101, 102], score)
    runs = {(steps, seed) for _, steps, seed in asked}
    assert runs == {(10, 101), (10, 102), (30, 101)}
    # No point is tried twice with the same seed at the same length.
    assert len(set(asked)) == len(asked)
