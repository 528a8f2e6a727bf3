"""Tables hold each adaptation once, pair what belongs together, and count networks, not
seeds."""

import copy
import json

import pandas as pd
import pytest

from lowrank_utils.comparison.intervals import mean_interval
from lowrank_utils.comparison.tables import (
    CELL,
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
SETTINGS = {
    "data_set": "mnist-5k",
    "shift": "rotation",
    "rotation": -45.0,
    "networks": [11, 12, 13],
    "methods": ["LoRA"],
    "ranks": [1],
    "alpha": 8.0,
    "scaling": "alpha/rank",
    "init": "peft",
    "adaptation_examples": 512,
    "batch_size": 64,
    "steps": [64],
    "tuning_points": 4,
    "tuning_seeds": [901],
    "seeds": [1],
    "pretraining_epochs": 5,
    "dtype": "float64",
    "device": "cpu",
}
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


def each_network(values, method, rank, default):
    given = values.get((method, rank), default)
    return given if isinstance(given, list) else [given] * 100


def result(
    scores=SCORES,
    steps=(SLOW,),
    networks=(),
    losses=None,
    tuned=None,
    extra=None,
    **settings,
):
    """Return a result as ``write_result`` gives it.

    Args:
        scores: (method, rank) → test accuracy above each network.
        steps: lengths; all have the same numbers.
        networks: their seeds; 11, 12, … by default.
        losses: (method, rank) → training loss, above each network or above all.
        tuned: the same for the score in the tuning; by default a hundredth below the
            accuracy.
        extra: (method, rank) → further values of its runs and choices.
        settings: others than ``SETTINGS``.
    """
    choices, runs = [], []
    for (method, rank), values in scores.items():
        seeds = networks or range(11, 11 + len(values))
        loss = each_network(losses or {}, method, rank, 0.5)
        for place, (network, accuracies) in enumerate(zip(seeds, values, strict=True)):
            several = accuracies if isinstance(accuracies, list) else [accuracies]
            score = each_network(
                tuned or {}, method, rank, sum(several) / len(several) - 0.01
            )
            for length in steps:
                run = {
                    "network": network,
                    "method": method,
                    "rank": rank,
                    "steps": length,
                }
                rates = {
                    "learning_rate": None if method == "frozen" else 0.0123456,
                    "factor": 50.0 if method in (DORA, "gain") else None,
                }
                more = (extra or {}).get((method, rank), {})
                if method != "frozen":
                    choice = run | rates | {"points": [], "score": score[place]}
                    choice |= {"widened": 0, "at_edge": False}
                    choices.append(
                        choice | {name: more[name] for name in more if name in choice}
                    )
                for seed, accuracy in enumerate(several, start=1):
                    whole = run | {"seed": seed, "trainable": (rank or 0) * 100} | rates
                    whole |= {
                        "training_loss": None if method == "frozen" else loss[place],
                        "dead": False,
                    }
                    whole |= {
                        "validation": accuracy - 0.02,
                        "test": accuracy,
                        "negative": {},
                    }
                    runs.append(
                        whole | {name: more[name] for name in more if name in whole}
                    )
    return {"settings": SETTINGS | settings, "choices": choices, "runs": runs}


def rows_of(table, method, rank=None):
    return table[
        (table["method"] == method)
        & (table["rank"].isna() if rank is None else table["rank"] == rank)
    ]


def test_a_row_for_each_adaptation_with_what_was_tuned_and_what_came_out():
    extra = {
        (DORA, 1): {
            "at_edge": True,
            "widened": 2,
            "dead": True,
            "negative": {"layers.0": 0.25, "layers.2": 0.0},
        }
    }
    table = results_table(
        [result({**SCORES, ("LoRA", 4): [[0.80, 0.82], 0.81, 0.79]}, extra=extra)]
    )
    assert len(table) == 6 * 3 + 1
    named = [
        "network",
        "method",
        "rank",
        "steps",
        "seed",
        "trainable",
        "learning_rate",
        "factor",
        "score",
        "widened",
        "at_edge",
    ]
    named += ["training_loss", "dead", "validation", "test", "negative_0", "negative_2"]
    assert {*TASK, *named} == set(table.columns)
    row = rows_of(table, DORA, 1).iloc[1]
    values = (
        row["network"],
        row["seed"],
        row["trainable"],
        row["learning_rate"],
        row["factor"],
    )
    assert values == (12, 1, 100, 0.0123456, 50)
    assert (row["score"], row["widened"], row["at_edge"], row["dead"]) == (
        0.75,
        2,
        True,
        True,
    )
    assert (
        row["negative_0"],
        row["validation"],
        row["test"],
        row["training_loss"],
    ) == (
        0.25,
        0.74,
        0.76,
        0.5,
    )
    assert rows_of(table, "LoRA", 4)["seed"].tolist() == [1, 2, 1, 1]
    assert rows_of(table, "LoRA", 4)["negative_0"].isna().all()
    frozen = rows_of(table, "frozen")
    for name in ("rank", "learning_rate", "factor", "score", "training_loss"):
        assert frozen[name].isna().all()


def test_an_adaptation_in_two_results_counts_once():
    m_alone = {("m alone", None): SCORES["m alone", None]}
    both = results_table(
        [result(), result({**m_alone, ("LoRA", 8): [0.8, 0.8, 0.8]}), result()]
    )
    assert len(both) == 6 * 3 + 3
    without = both[~both["rank"].eq(8).fillna(value=False)]
    pd.testing.assert_frame_equal(means(without), means(results_table([result()])))
    rows = differences(both, "LoRA", "m alone")
    assert rows["count"].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "other",
    [
        {"rotation": 90.0},
        {"alpha": 4.0},
        {"batch_size": 32},
        {"pretraining_epochs": 6},
        {"dtype": "float32"},
        {"tuning_points": 8},
        {"tuning_seeds": [902]},
    ],
)
def test_runs_of_other_settings_are_other_adaptations(other):
    """They are kept apart, or refused; a row that vanishes without a word would be the
    worst."""
    better = {key: [value + 0.1 for value in values] for key, values in SCORES.items()}
    try:
        table = results_table([result(), result(better, **other)])
    except ValueError as error:
        assert next(iter(other)) in str(error)  # noqa: PT017
    else:
        assert len(table) == 2 * 6 * 3


def test_a_table_is_read_as_it_was_written(tmp_path):
    thirds = {
        key: [1 / 3 + value / 7 for value in values] for key, values in SCORES.items()
    }
    table = results_table(
        [result(thirds, extra={(DORA, 1): {"negative": {"layers.0": 1 / 3}}})]
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    read = read_table(tmp_path / "table.csv")
    assert read["rank"].dtype == table["rank"].dtype
    # What is missing has no kind in a file.
    both = (frame.astype(object).where(frame.notna(), None) for frame in (read, table))
    pd.testing.assert_frame_equal(*both, check_exact=True)


def test_means_are_over_networks_with_students_interval():
    summary = means(results_table([result()]))
    assert len(summary) == 6
    for (method, rank), values in SCORES.items():
        (row,) = [row for _, row in rows_of(summary, method, rank).iterrows()]
        interval = mean_interval(values)
        assert (row["low"], row["high"], row["count"]) == pytest.approx(
            (interval.low, interval.high, 3)
        )
        assert row["mean"] == pytest.approx(interval.mean)
    assert len(means(results_table([result()]).head(0))) == 0


def test_more_seeds_above_a_network_make_nothing_surer_and_move_no_weight():
    """The unit is the network: three of them with twenty seeds are three, and each
    counts as much as another."""
    few = results_table([result()])
    many = {
        key: [[values[0]] * 20, values[1], [values[2]] * 5]
        for key, values in SCORES.items()
    }
    more = results_table([result(many)])
    assert len(more) > 4 * len(few)
    columns = ["count", "mean", "low", "high"]
    pd.testing.assert_frame_equal(means(few)[columns], means(more)[columns])
    for pair in ((DORA, "LoRA"), (DORA, "m alone")):
        pd.testing.assert_frame_equal(
            differences(few, *pair)[[*columns, "verdict"]],
            differences(more, *pair)[[*columns, "verdict"]],
        )


def test_seeds_are_averaged_within_their_network():
    table = results_table([result({("LoRA", 1): [[0.6, 0.8], 0.5]})])
    assert network_means(table)["test"].tolist() == pytest.approx([0.7, 0.5])
    assert means(table)["mean"].tolist() == pytest.approx([0.6])


def test_a_dead_run_counts_in_every_mean():
    table = results_table(
        [result({("LoRA", 1): [[0.1, 0.8], 0.7, 0.1], (DORA, 1): [0.5, 0.5, 0.5]})]
    )
    table = table.assign(dead=table["test"] == 0.1)
    assert network_means(table)["test"].tolist()[:3] == pytest.approx([0.45, 0.7, 0.1])
    row = means(table).iloc[0]
    assert (row["count"], row["mean"], row["dead"]) == (
        3,
        pytest.approx(1.25 / 3),
        pytest.approx(0.5),
    )
    (row,) = [row for _, row in differences(table, DORA, "LoRA").iterrows()]
    assert (row["count"], row["mean"]) == (3, pytest.approx(0.25 / 3))


def test_differences_are_paired_by_network_whatever_the_order_of_the_rows():
    table = results_table([result()])
    rows = differences(table, DORA, "LoRA")
    assert rows["rank"].tolist() == [1, 4]
    for _, row in rows.iterrows():
        pairs = zip(SCORES[DORA, row["rank"]], SCORES["LoRA", row["rank"]], strict=True)
        expected = mean_interval([one - two for one, two in pairs])
        assert (row["mean"], row["low"], row["high"]) == pytest.approx(
            (expected.mean, expected.low, expected.high)
        )
        assert (row["count"], row["first"], row["second"]) == (3, DORA, "LoRA")
    for seed in range(3):
        mixed = table.sample(frac=1, random_state=seed).reset_index(drop=True)
        again = differences(mixed, DORA, "LoRA").sort_values("rank", ignore_index=True)
        pd.testing.assert_frame_equal(again, rows)
    # Seen from the other side, all is the opposite.
    opposite = differences(table, "LoRA", DORA)
    assert opposite["mean"].tolist() == pytest.approx(
        [-value for value in rows["mean"]]
    )
    assert opposite["low"].tolist() == pytest.approx([-value for value in rows["high"]])


def test_only_networks_that_have_both_count():
    ours = result({(DORA, 1): [0.71, 0.76, 0.75]}, networks=[11, 12, 13])
    theirs = result({("LoRA", 1): [0.74, 0.72, 0.9]}, networks=[12, 13, 14])
    (row,) = [
        row
        for _, row in differences(
            results_table([ours, theirs]), DORA, "LoRA"
        ).iterrows()
    ]
    assert (row["count"], row["mean"]) == (2, pytest.approx(0.025))
    apart = result({("LoRA", 1): [0.7, 0.7]}, networks=[21, 22])
    assert len(differences(results_table([ours, apart]), DORA, "LoRA")) == 0


def test_a_method_without_a_rank_is_paired_with_each_rank_of_the_other():
    table = results_table([result()])
    for pair, sign in (((DORA, "m alone"), 1), (("m alone", DORA), -1)):
        rows = differences(table, *pair)
        assert rows["rank"].tolist() == [1, 4]
        assert rows["mean"].tolist() == pytest.approx(
            [sign * 0.13, sign * (0.80333333 - 0.61)]
        )
    (row,) = [row for _, row in differences(table, "m alone", "frozen").iterrows()]
    assert pd.isna(row["rank"])


def test_tasks_and_lengths_are_not_mixed():
    other = {key: [value - 0.1 for value in values] for key, values in SCORES.items()}
    other["LoRA", 1] = [0.9, 0.9, 0.9]
    table = results_table(
        [result(), result(other, rotation=90.0), result(other, shift="inversion")]
    )
    rows = differences(table, DORA, "LoRA")
    assert len(rows) == 6
    assert rows["count"].tolist() == [3] * 6
    turned = rows[(rows["rotation"] == 90) & (rows["rank"] == 1)]
    assert turned["mean"].tolist() == pytest.approx([0.64 - 0.9])
    long = results_table([result(), result(other, steps=(LONG,))])
    rows = differences(long, DORA, "LoRA")
    assert rows.groupby("steps")["mean"].first().tolist() == pytest.approx(
        [0.02, 0.64 - 0.9]
    )


def test_nothing_to_pair_is_an_empty_table():
    table = results_table([result()])
    assert len(differences(table, DORA, "full")) == 0
    with pytest.raises(ValueError, match=r"second must be one of .*; got 'lora'"):
        differences(table, DORA, "lora")


def test_one_network_has_a_mean_and_no_verdict():
    table = results_table([result({("LoRA", 1): [0.5], (DORA, 1): [0.9]})])
    assert means(table)["low"].isna().all()
    (row,) = [row for _, row in differences(table, DORA, "LoRA").iterrows()]
    assert (row["mean"], row["count"], row["verdict"]) == (
        pytest.approx(0.4),
        1,
        "undecided",
    )


# DoRA is below m alone, which it contains, in training loss and in score, above each of
# four networks.
HELD_BACK = {
    (DORA, 1): [0.70, 0.71, 0.72, 0.71],
    ("m alone", None): [0.80, 0.81, 0.80, 0.82],
}
LOSSES = {
    (DORA, 1): [0.60, 0.62, 0.61, 0.60],
    ("m alone", None): [0.40, 0.41, 0.40, 0.39],
}


def held_back(scores=HELD_BACK, losses=LOSSES, **more):
    return results_table([result(scores, losses=losses, **more)])


def test_a_method_that_is_clearly_below_what_it_contains_is_under_tuned():
    table = held_back()
    (row,) = [row for _, row in under_tuned(table).iterrows()]
    assert (row["method"], row["rank"], row["submodel"], row["count"]) == (
        DORA,
        1,
        "m alone",
        4,
    )
    assert pd.isna(row["submodel_rank"])
    assert (row["score"], row["training_loss"]) == (
        pytest.approx(-0.0975),
        pytest.approx(0.2075),
    )
    assert {name: row[name] for name in ("shift", "steps")} == {
        "shift": "rotation",
        "steps": SLOW,
    }
    for pair in ((DORA, "m alone"), ("m alone", DORA)):
        assert differences(table, *pair)["verdict"].tolist() == ["under-tuned"]


@pytest.mark.parametrize(
    ("method", "submodel"),
    [
        ("LoRA", "LoRA with one rate"),
        ("gain", "m alone"),
        ("LoRA matched above", "LoRA"),
        (DORA, ONE_RATE),
    ],
)
def test_every_method_is_held_against_each_that_it_contains(method, submodel):
    sub = (submodel, None if submodel == "m alone" else 1)
    scores = {(method, 1): HELD_BACK[DORA, 1], sub: HELD_BACK["m alone", None]}
    losses = {(method, 1): LOSSES[DORA, 1], sub: LOSSES["m alone", None]}
    assert under_tuned(held_back(scores, losses))["submodel"].tolist() == [submodel]
    # The submodel below the method is what one expects.
    swapped = dict(zip(scores, reversed(scores.values()), strict=True))
    losses = dict(zip(losses, reversed(losses.values()), strict=True))
    assert len(under_tuned(held_back(swapped, losses))) == 0


@pytest.mark.parametrize(
    ("losses", "tuned"),
    [
        # Only the score is worse: it learned what it should, and that generalised less.
        ({(DORA, 1): 0.40, ("m alone", None): 0.40}, None),
        # Only the loss is.
        (LOSSES, {(DORA, 1): 0.8, ("m alone", None): 0.8}),
        # By less than 0.01 nats, or by less than a point.
        ({(DORA, 1): 0.409, ("m alone", None): 0.40}, None),
        (LOSSES, {(DORA, 1): 0.791, ("m alone", None): 0.80}),
        # By much in the mean, but not steadily: the interval includes zero.
        ({(DORA, 1): [0.9, 0.41, 0.38, 0.40], ("m alone", None): 0.40}, None),
        (LOSSES, {(DORA, 1): [0.5, 0.81, 0.79, 0.80], ("m alone", None): 0.80}),
    ],
)
def test_what_is_not_clearly_worse_in_both_is_not_called_under_tuned(losses, tuned):
    table = held_back(losses=losses, tuned=tuned)
    assert len(under_tuned(table)) == 0
    assert differences(table, DORA, "m alone")["verdict"].tolist() == ["worse"]


def test_what_is_just_above_both_margins_is_under_tuned():
    losses = {(DORA, 1): 0.411, ("m alone", None): 0.40}
    tuned = {(DORA, 1): 0.789, ("m alone", None): 0.80}
    assert len(under_tuned(held_back(losses=losses, tuned=tuned))) == 1


def test_a_method_is_held_against_itself_at_a_smaller_rank_alone():
    scores = {("LoRA", 4): HELD_BACK[DORA, 1], ("LoRA", 1): HELD_BACK["m alone", None]}
    losses = {("LoRA", 4): LOSSES[DORA, 1], ("LoRA", 1): LOSSES["m alone", None]}
    table = held_back(scores, losses)
    (row,) = [row for _, row in under_tuned(table).iterrows()]
    assert (row["rank"], row["submodel"], row["submodel_rank"]) == (4, "LoRA", 1)
    better = {("LoRA", 1): scores["LoRA", 4], ("LoRA", 4): scores["LoRA", 1]}
    assert (
        len(under_tuned(held_back(better, {("LoRA", 1): 0.6, ("LoRA", 4): 0.4}))) == 0
    )


def test_under_tuned_at_one_length_task_and_rank_says_nothing_of_another():
    good = {**HELD_BACK, (DORA, 1): [0.9, 0.91, 0.9, 0.92]}
    fine = {**LOSSES, (DORA, 1): 0.2}
    table = results_table(
        [
            result(HELD_BACK, losses=LOSSES),
            result(good, losses=fine, steps=(LONG,)),
            result(good, losses=fine, shift="inversion"),
            result({(DORA, 4): good[DORA, 1]}, losses={(DORA, 4): 0.2}),
        ]
    )
    assert len(under_tuned(table)) == 1
    rows = differences(table, DORA, "m alone")
    bad = (rows["shift"] == "rotation") & (rows["steps"] == SLOW) & (rows["rank"] == 1)
    assert rows["verdict"].where(bad).dropna().tolist() == ["under-tuned"]
    assert set(rows["verdict"][~bad]) == {"better"}


def test_the_spread_over_ranks_is_taken_for_each_network():
    spread = spread_over_ranks(results_table([result()]), ["LoRA", DORA, "m alone"])
    found = {
        m: rows.set_index("network")["spread"].to_dict()
        for m, rows in spread.groupby("method")
    }
    assert found.keys() == {"LoRA", DORA}
    assert found["LoRA"] == pytest.approx({11: 0.10, 12: 0.07, 13: 0.07})
    assert found[DORA] == pytest.approx({11: 0.07, 12: 0.06, 13: 0.06})
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
    pd.testing.assert_frame_equal(results_table([json.loads(json.dumps(given))]), table)
    assert not table.duplicated([*CELL, "network", "seed"]).any()
