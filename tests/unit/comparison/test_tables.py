"""Tables hold each adaptation once, pair what belongs together, and count networks, not
seeds."""

import copy
import json

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from test_settings import GOOD

from lowrank_utils.comparison.intervals import mean_interval
from lowrank_utils.comparison.tables import (
    TASK,
    differences,
    means,
    network_means,
    read_table,
    results_table,
    spread_over_ranks,
    task_name,
    under_tuned,
)

DORA, ONE_RATE = "DoRA with m's rate", "DoRA with one rate"
SETTINGS = GOOD | {"networks": [11, 12, 13], "methods": ["LoRA"], "ranks": [1]}
SETTINGS |= {"adaptation_examples": 512, "steps": [64], "pretraining_epochs": 5}
SETTINGS |= {"tuning_points": 4, "tuning_seeds": [901], "seeds": [1]}
# (method, rank) → test accuracy above networks 11, 12 and 13; a list stands for the
# seeds 1, 2, ….
SCORES = {
    ("frozen", None): [0.30, 0.31, 0.32],
    ("m alone", None): [0.60, 0.62, 0.61],
    ("LoRA", 1): [0.70, 0.74, 0.72],
    ("LoRA", 4): [0.80, 0.81, 0.79],
    (DORA, 1): [0.71, 0.76, 0.75],
    (DORA, 4): [0.78, 0.82, 0.81],
}
SLOW, LONG = 64, 128


def each_network(given):
    return given if isinstance(given, list) else [given] * 100


def changed(values, others):
    return values | {name: others[name] for name in others if name in values}


def result(scores=SCORES, steps=(SLOW,), networks=(), **more):
    """Return a result as ``write_result`` gives it.

    Args:
        scores: (method, rank) → test accuracy above each network.
        steps: lengths; all have the same numbers.
        networks: their seeds; 11, 12, … by default.
        losses: (method, rank) → training loss, above each network or above all.
        tuned: the same for the score in the tuning; by default a hundredth below the
            accuracy.
        extra: (method, rank) → further values of its runs and choices.
        more: settings other than ``SETTINGS``.
    """
    losses, tuned, extra = (more.pop(n, {}) for n in ("losses", "tuned", "extra"))
    choices, runs = [], []
    for cell, values in scores.items():
        method, rank = cell
        trained, others = method != "frozen", extra.get(cell, {})
        rates = {"learning_rate": 0.0123456 if trained else None}
        rates["factor"] = 50.0 if method in (DORA, "gain") else None
        fixed = {"trainable": (rank or 0) * 100, "dead": False, "negative": {}}
        seeds = networks or range(11, 11 + len(values))
        for place, (network, accuracies) in enumerate(zip(seeds, values, strict=True)):
            several = accuracies if isinstance(accuracies, list) else [accuracies]
            loss = each_network(losses.get(cell, 0.5))[place] if trained else None
            score = sum(several) / len(several) - 0.01
            score = each_network(tuned.get(cell, score))[place]
            tries = {"points": [], "score": score, "widened": 0, "at_edge": False}
            for length in steps:
                run = {"network": network, "method": method, "rank": rank}
                run |= {"steps": length} | rates
                choice = run | tries
                if trained:
                    choices.append(changed(choice, others))
                for seed, accuracy in enumerate(several, start=1):
                    whole = run | fixed | {"seed": seed, "training_loss": loss}
                    whole |= {"validation": accuracy - 0.02, "test": accuracy}
                    runs.append(changed(whole, others))
    return {"settings": SETTINGS | more, "choices": choices, "runs": runs}


@pytest.fixture
def table():
    return results_table([result()])


def rows_of(table, method, rank=None):
    of_rank = table["rank"].isna() if rank is None else table["rank"] == rank
    return table[(table["method"] == method) & of_rank]


def only(rows):
    (row,) = rows.to_dict("records")
    return row


def test_a_row_for_each_adaptation_with_what_was_tuned_and_what_came_out():
    extra = {"at_edge": True, "widened": 2, "dead": True}
    extra["negative"] = {"layers.0": 0.25, "layers.2": 0.0}
    scores = SCORES | {("LoRA", 4): [[0.80, 0.82], 0.81, 0.79]}
    table = results_table([result(scores, extra={(DORA, 1): extra})])
    assert len(table) == 6 * 3 + 1
    expected = {name: SETTINGS[name] for name in TASK} | extra
    expected |= {"network": 12, "method": DORA, "rank": 1, "steps": 64, "seed": 1}
    expected |= {"trainable": 100, "learning_rate": 0.0123456, "factor": 50.0}
    expected |= {"score": 0.75, "training_loss": 0.5, "validation": 0.74, "test": 0.76}
    del expected["negative"]
    expected |= {"negative_0": 0.25, "negative_2": 0.0}
    assert rows_of(table, DORA, 1).to_dict("records")[1] == expected
    lora = rows_of(table, "LoRA", 4)
    assert lora["seed"].tolist() == [1, 2, 1, 1]
    assert lora["negative_0"].isna().all()
    untuned = ["rank", "learning_rate", "factor", "score", "training_loss"]
    assert rows_of(table, "frozen")[untuned].isna().all(axis=None)


def test_an_adaptation_in_two_results_counts_once(table):
    scores = {("LoRA", 8): [0.8] * 3, ("m alone", None): SCORES["m alone", None]}
    both = results_table([result(), result(scores), result()])
    assert len(both) == 6 * 3 + 3
    without = both[~both["rank"].eq(8).fillna(value=False)]
    assert_frame_equal(means(without), means(table))
    assert differences(both, "LoRA", "m alone")["count"].tolist() == [3, 3, 3]


OTHER = {"rotation": 90.0, "alpha": 4.0, "batch_size": 32, "dtype": "float32"}
OTHER |= {"pretraining_epochs": 6, "tuning_points": 8, "tuning_seeds": [902]}


@pytest.mark.parametrize(("name", "value"), OTHER.items())
def test_runs_of_other_settings_are_kept_apart_or_refused(name, value):
    """A row that vanishes without a word would be the worst."""
    better = {key: [value + 0.1 for value in values] for key, values in SCORES.items()}
    results = [result(), result(better, **{name: value})]
    if name in ("rotation", "alpha"):
        assert len(results_table(results)) == 2 * 6 * 3
    else:
        with pytest.raises(ValueError, match=name):
            results_table(results)


def test_a_table_is_read_as_it_was_written(tmp_path):
    thirds = {key: [1 / 3 + v / 7 for v in values] for key, values in SCORES.items()}
    extra = {(DORA, 1): {"negative": {"layers.0": 1 / 3}}}
    table = results_table([result(thirds, extra=extra)])
    table.to_csv(tmp_path / "table.csv", index=False)
    read = read_table(tmp_path / "table.csv")
    assert read["rank"].dtype == table["rank"].dtype
    # What is missing has no kind in a file.
    both = (frame.astype(object).where(frame.notna(), None) for frame in (read, table))
    assert_frame_equal(*both, check_exact=True)


def test_means_are_over_networks_with_students_interval(table):
    summary = means(table)
    assert len(summary) == 6
    for cell, values in SCORES.items():
        expected = vars(mean_interval(values))
        found = only(rows_of(summary, *cell)[list(expected)])
        assert found == pytest.approx(expected)
    assert len(means(table.head(0))) == 0


def test_more_seeds_above_a_network_make_nothing_surer_and_move_no_weight(table):
    """The unit is the network: three of them with twenty seeds are three, and each
    counts as much as another."""
    many = {key: [[a] * 20, b, [c] * 5] for key, (a, b, c) in SCORES.items()}
    more = results_table([result(many)])
    assert len(more) > 4 * len(table)
    assert_frame_equal(means(table), means(more))
    for second in ("LoRA", "m alone"):
        assert_frame_equal(*(differences(t, DORA, second) for t in (table, more)))


def test_a_dead_run_counts_in_every_mean():
    scores = {("LoRA", 1): [[0.1, 0.8], 0.7, 0.1], (DORA, 1): [0.5, 0.5, 0.5]}
    table = results_table([result(scores)])
    table = table.assign(dead=table["test"] == 0.1)
    assert network_means(table)["test"].tolist()[:3] == pytest.approx([0.45, 0.7, 0.1])
    found = means(table)[["count", "mean", "dead"]].iloc[0]
    assert found.tolist() == pytest.approx([3, 1.25 / 3, 0.5])
    row = only(differences(table, DORA, "LoRA"))
    assert (row["count"], row["mean"]) == (3, pytest.approx(0.25 / 3))


def test_differences_are_paired_by_network_whatever_the_order_of_the_rows(table):
    rows = differences(table, DORA, "LoRA")
    assert rows["rank"].tolist() == [1, 4]
    for row in rows.to_dict("records"):
        pairs = zip(*(SCORES[m, row["rank"]] for m in (DORA, "LoRA")), strict=True)
        expected = vars(mean_interval([one - two for one, two in pairs]))
        expected |= {"first": DORA, "second": "LoRA"}
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    for seed in range(3):
        mixed = table.sample(frac=1, random_state=seed).reset_index(drop=True)
        again = differences(mixed, DORA, "LoRA").sort_values("rank", ignore_index=True)
        assert_frame_equal(again, rows)
    # Seen from the other side, all is the opposite.
    opposite = differences(table, "LoRA", DORA)[["mean", "low", "high"]]
    expected = -rows[["mean", "high", "low"]].to_numpy()
    assert opposite.to_numpy() == pytest.approx(expected)


def test_only_networks_that_have_both_count():
    ours = result({(DORA, 1): [0.71, 0.76, 0.75]}, networks=[11, 12, 13])
    theirs = result({("LoRA", 1): [0.74, 0.72, 0.9]}, networks=[12, 13, 14])
    row = only(differences(results_table([ours, theirs]), DORA, "LoRA"))
    assert (row["count"], row["mean"]) == (2, pytest.approx(0.025))
    apart = result({("LoRA", 1): [0.7, 0.7]}, networks=[21, 22])
    assert len(differences(results_table([ours, apart]), DORA, "LoRA")) == 0


def test_a_method_without_a_rank_is_paired_with_each_rank_of_the_other(table):
    for pair, sign in (((DORA, "m alone"), 1), (("m alone", DORA), -1)):
        rows = differences(table, *pair)
        assert rows["rank"].tolist() == [1, 4]
        expected = [sign * 0.13, sign * (0.80333333 - 0.61)]
        assert rows["mean"].tolist() == pytest.approx(expected)
    assert pd.isna(only(differences(table, "m alone", "frozen"))["rank"])


def test_tasks_and_lengths_are_not_mixed():
    other = {key: [value - 0.1 for value in values] for key, values in SCORES.items()}
    other["LoRA", 1] = [0.9, 0.9, 0.9]
    tasks = [result(other, rotation=90.0), result(other, shift="inversion")]
    rows = differences(results_table([result(), *tasks]), DORA, "LoRA")
    assert rows["count"].tolist() == [3] * 6
    turned = rows[(rows["rotation"] == 90) & (rows["rank"] == 1)]
    assert turned["mean"].tolist() == pytest.approx([0.64 - 0.9])
    long = results_table([result(), result(other, steps=(LONG,))])
    found = differences(long, DORA, "LoRA").groupby("steps")["mean"].first()
    assert found.tolist() == pytest.approx([0.02, 0.64 - 0.9])


def test_nothing_to_pair_is_an_empty_table(table):
    assert len(differences(table, DORA, "full")) == 0
    with pytest.raises(ValueError, match=r"second must be one of .*; got 'lora'"):
        differences(table, DORA, "lora")


def test_one_network_has_a_mean_and_no_verdict():
    table = results_table([result({("LoRA", 1): [0.5], (DORA, 1): [0.9]})])
    assert means(table)["low"].isna().all()
    row = only(differences(table, DORA, "LoRA"))
    assert (row["count"], row["verdict"]) == (1, "undecided")
    assert row["mean"] == pytest.approx(0.4)


# DoRA is below m alone, which it contains, in training loss and in score, above each of
# four networks.
HELD_BACK = {(DORA, 1): [0.70, 0.71, 0.72, 0.71]}
HELD_BACK["m alone", None] = [0.80, 0.81, 0.80, 0.82]
LOSSES = {
    (DORA, 1): [0.60, 0.62, 0.61, 0.60],
    ("m alone", None): [0.40, 0.41, 0.4, 0.39],
}


def held_back(losses, tuned, pair=HELD_BACK):
    """Return a table where the first (method, rank) of a pair is less accurate."""
    given = (HELD_BACK.values(), losses, tuned)
    scores, *ends = (dict(zip(pair, values, strict=True)) for values in given)
    return results_table([result(scores, losses=ends[0], tuned=ends[1])])


def below(*pair):
    """Return a table where the first (method, rank) is worse in training, too."""
    return held_back(LOSSES.values(), HELD_BACK.values(), pair)


def test_a_method_that_is_clearly_below_what_it_contains_is_under_tuned():
    table = below(*HELD_BACK)
    row = only(under_tuned(table))
    assert pd.isna(row.pop("submodel_rank"))
    expected = {name: SETTINGS[name] for name in TASK} | {"steps": SLOW, "count": 4}
    expected |= {"method": DORA, "rank": 1, "submodel": "m alone"}
    expected |= {"score": -0.0975, "training_loss": 0.2075}
    assert row == pytest.approx(expected)
    for pair in ((DORA, "m alone"), ("m alone", DORA)):
        assert only(differences(table, *pair))["verdict"] == "under-tuned"


@pytest.mark.parametrize(
    ("method", "submodel"),
    [
        ("LoRA", ("LoRA with one rate", 1)),
        ("gain", ("m alone", None)),
        ("LoRA matched above", ("LoRA", 1)),
        (DORA, (ONE_RATE, 1)),
    ],
)
def test_every_method_is_held_against_each_that_it_contains(method, submodel):
    row = only(under_tuned(below((method, 1), submodel)))
    assert row["submodel"] == submodel[0]
    # The submodel below the method is what one expects.
    assert len(under_tuned(below(submodel, (method, 1)))) == 0


@pytest.mark.parametrize(
    ("losses", "tuned"),
    [
        # Only the score is worse: it learned what it should, and that generalised less.
        ((0.40, 0.40), HELD_BACK.values()),
        # Only the loss is.
        (LOSSES.values(), (0.8, 0.8)),
        # By less than 0.01 nats, or by less than a point.
        ((0.409, 0.40), HELD_BACK.values()),
        (LOSSES.values(), (0.791, 0.80)),
        # By much in the mean, but not steadily: the interval includes zero.
        (([0.9, 0.41, 0.38, 0.40], 0.40), HELD_BACK.values()),
        (LOSSES.values(), ([0.5, 0.81, 0.79, 0.80], 0.80)),
    ],
)
def test_what_is_not_clearly_worse_in_both_is_not_called_under_tuned(losses, tuned):
    table = held_back(losses, tuned)
    assert len(under_tuned(table)) == 0
    assert only(differences(table, DORA, "m alone"))["verdict"] == "worse"


def test_what_is_just_above_both_margins_is_under_tuned():
    assert len(under_tuned(held_back((0.411, 0.40), (0.789, 0.80)))) == 1


def test_a_method_is_held_against_itself_at_a_smaller_rank_alone():
    row = only(under_tuned(below(("LoRA", 4), ("LoRA", 1))))
    assert (row["rank"], row["submodel"], row["submodel_rank"]) == (4, "LoRA", 1)
    assert len(under_tuned(below(("LoRA", 1), ("LoRA", 4)))) == 0


def test_under_tuned_at_one_length_task_and_rank_says_nothing_of_another():
    good = HELD_BACK | {(DORA, 1): [0.9, 0.91, 0.9, 0.92]}
    fine = LOSSES | {(DORA, 1): 0.2}
    results = [
        result(HELD_BACK, losses=LOSSES),
        result(good, losses=fine, steps=(LONG,)),
        result(good, losses=fine, shift="inversion"),
        result({(DORA, 4): good[DORA, 1]}, losses={(DORA, 4): 0.2}),
    ]
    table = results_table(results)
    assert len(under_tuned(table)) == 1
    rows = differences(table, DORA, "m alone")
    bad = (rows["shift"] == "rotation") & (rows["steps"] == SLOW) & (rows["rank"] == 1)
    assert rows["verdict"][bad].tolist() == ["under-tuned"]
    assert set(rows["verdict"][~bad]) == {"better"}


def test_the_spread_over_ranks_is_taken_for_each_network(table):
    spread = spread_over_ranks(table, ["LoRA", DORA, "m alone"])
    found = spread.set_index(["method", "network"])["spread"].to_dict()
    expected = {"LoRA": (0.10, 0.07, 0.07), DORA: (0.07, 0.06, 0.06)}
    assert found == pytest.approx(
        {(m, 11 + n): v for m, values in expected.items() for n, v in enumerate(values)}
    )
    assert set(spread["ranks"]) == {2}


def test_names_of_tasks():
    assert task_name(SETTINGS) == "rotation −45°"
    assert task_name(SETTINGS | {"rotation": 22.5}) == "rotation 22.5°"
    assert task_name(SETTINGS | {"shift": "unseen classes"}) == "unseen classes"


def test_a_result_is_left_as_it_was_and_may_have_gone_through_json():
    given = result()
    before = copy.deepcopy(given)
    table = results_table([given])
    assert given == before
    assert_frame_equal(results_table([json.loads(json.dumps(given))]), table)
