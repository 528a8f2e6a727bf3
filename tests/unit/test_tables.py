"""Tables hold each adaptation once, and pair what belongs together."""

import math

import pandas as pd
import pytest

from lowrank_utils.intervals import difference_interval, mean_interval
from lowrank_utils.tables import (
    TASK,
    differences,
    means,
    read_table,
    results_table,
    spread_over_ranks,
    task_name,
)

TASK_VALUES = {
    "data_set": "mnist-5k",
    "shift": "rotation",
    "rotation": 45.0,
    "adaptation_examples": 500,
    "epochs": 10,
    "alpha": 8.0,
    "scaling": "alpha/rank",
    "init": "peft",
}
# method, rank → test accuracy with seeds 1, 2 and 3
SCORES = {
    ("frozen", None): [0.3, 0.3, 0.3],
    ("LoRA", 2): [0.70, 0.74, 0.72],
    ("LoRA", 4): [0.80, 0.81, 0.79],
    ("DoRA", 2): [0.71, 0.76, 0.75],
    ("DoRA", 4): [0.78, 0.82, 0.81],
}


def result(scores=SCORES, at_edge=(), **task):
    return {
        "settings": TASK_VALUES | task | {"seeds": [1, 2, 3]},
        "learning_rates": [
            {"method": method, "rank": rank, "at_edge": (method, rank) in at_edge}
            for method, rank in scores
            if method != "frozen"
        ],
        "runs": [
            {
                "method": method,
                "rank": rank,
                "trainable": (rank or 0) * 100,
                "learning_rate": 0.01 if rank else None,
                "seed": seed,
                "validation": [0.1, value - 0.01],
                "test": value,
                "changes": [],
            }
            for (method, rank), values in scores.items()
            for seed, value in enumerate(values, start=1)
        ],
    }


def test_a_row_for_each_adaptation():
    table = results_table([result(at_edge=[("LoRA", 2)])])
    assert len(table) == 15
    assert list(table.columns) == [
        *TASK,
        *("method", "rank", "trainable", "learning_rate", "at_edge", "seed", "validation", "test"),
    ]
    row = table[(table["method"] == "LoRA") & (table["rank"] == 2) & (table["seed"] == 2)].iloc[0]
    assert (row["test"], row["validation"], row["trainable"], row["learning_rate"]) == (0.74, 0.73, 200, 0.01)
    assert row["at_edge"]
    assert table["at_edge"].sum() == 3
    frozen = table[table["method"] == "frozen"]
    assert frozen["rank"].isna().all()
    assert frozen["learning_rate"].isna().all()


def test_an_adaptation_in_two_results_counts_once():
    both = results_table([result(), result({("frozen", None): [0.3] * 3, ("LoRA", 8): [0.8] * 3})])
    assert len(both) == 15 + 3
    # Another task isn't the same adaptation.
    assert len(results_table([result(), result(rotation=90.0)])) == 30


def test_a_table_is_read_as_it_was_written(tmp_path):
    third = {("LoRA", 2): [1 / 3, 0.1 + 0.2, 2 / 3]}
    table = results_table([result(third), result()])
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table)


def test_means_have_the_interval_over_the_seeds():
    summary = means(results_table([result()]))
    assert len(summary) == 5
    for (method, rank), values in SCORES.items():
        rows = summary[summary["method"] == method]
        (row,) = [r for _, r in rows.iterrows() if r["rank"] == rank or (rank is None and pd.isna(r["rank"]))]
        interval = mean_interval(values)
        assert (row["mean"], row["low"], row["high"], row["count"]) == (
            interval.mean,
            interval.low,
            interval.high,
            3,
        )


def test_no_rows_have_no_means():
    table = results_table([result()])
    assert len(means(table[table["method"] == "full"])) == 0


def test_differences_pair_seed_and_rank():
    # The seeds stand in another order in the second result.
    shuffled = result({key: values for key, values in SCORES.items() if key[0] == "DoRA"})
    shuffled["runs"].reverse()
    table = results_table([result({k: v for k, v in SCORES.items() if k[0] != "DoRA"}), shuffled])
    rows = differences(table, "DoRA", "LoRA").sort_values("rank")
    assert rows["rank"].tolist() == [2, 4]
    for _, row in rows.iterrows():
        one, two = (dict(enumerate(SCORES[method, row["rank"]])) for method in ("DoRA", "LoRA"))
        expected = difference_interval(one, two, comparisons=2)
        for name in ("mean", "low", "high", "low_corrected", "high_corrected", "effect"):
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-12)
    assert rows["mean"].tolist() == pytest.approx([0.02, 0.01 / 3])


def test_a_verdict_names_the_methods():
    steady = {("LoRA", 2): [0.700, 0.740, 0.720], ("DoRA", 2): [0.751, 0.790, 0.771]}
    table = results_table([result(steady)])
    assert differences(table, "DoRA", "LoRA")["verdict"].tolist() == ["DoRA is better"]
    assert differences(table, "LoRA", "DoRA")["verdict"].tolist() == ["DoRA is better"]
    assert differences(table, "LoRA", "DoRA")["mean"].iloc[0] < 0


def test_half_the_rank():
    rows = differences(results_table([result()]), "DoRA", "LoRA", rank_factor=2)
    assert rows["rank"].tolist() == [2]  # against LoRA at rank 4
    assert rows["mean"].iloc[0] == pytest.approx(0.74 - 0.80)
    assert rows["comparisons"].iloc[0] == 1


def test_a_method_without_a_rank_is_compared_with_each():
    rows = differences(results_table([result()]), "DoRA", "frozen")
    assert rows["rank"].tolist() == [2, 4]
    assert rows["mean"].tolist() == pytest.approx([0.44, 0.80333333 - 0.3])


def test_it_does_not_matter_which_of_the_two_has_no_rank():
    rows = differences(results_table([result()]), "frozen", "DoRA")
    assert rows["rank"].tolist() == [2, 4]
    assert rows["mean"].tolist() == pytest.approx([-0.44, 0.3 - 0.80333333])


def test_what_exceeds_is_named_as_asked():
    rows = differences(results_table([result()]), "DoRA", "frozen", exceeds="varies more")
    assert rows["verdict"].tolist() == ["DoRA varies more"] * 2


def test_tasks_are_not_mixed():
    other = {key: [value - 0.1 for value in values] for key, values in SCORES.items()}
    other[("LoRA", 2)] = [0.9, 0.9, 0.9]
    rows = differences(results_table([result(), result(other, rotation=90.0)]), "DoRA", "LoRA")
    assert len(rows) == 4
    assert rows["comparisons"].tolist() == [4] * 4
    at_90 = rows[(rows["rotation"] == 90) & (rows["rank"] == 2)]
    assert at_90["mean"].iloc[0] == pytest.approx(0.64 - 0.9)


def test_nothing_to_pair_is_an_empty_table():
    rows = differences(results_table([result()]), "DoRA", "full")
    assert len(rows) == 0
    with pytest.raises(ValueError, match=r"methods are frozen, .*; got 'dora'"):
        differences(results_table([result()]), "dora", "LoRA")


def test_the_spread_over_ranks_is_taken_for_each_seed():
    spread = spread_over_ranks(results_table([result()]), ["LoRA", "DoRA"])
    by_method = {m: rows.set_index("seed")["test"].to_dict() for m, rows in spread.groupby("method")}
    assert by_method["LoRA"] == pytest.approx({1: 0.10, 2: 0.07, 3: 0.07})
    assert by_method["DoRA"] == pytest.approx({1: 0.07, 2: 0.06, 3: 0.06})
    (row,) = [row for _, row in differences(spread, "DoRA", "LoRA").iterrows()]
    assert row["mean"] == pytest.approx(-0.05 / 3)
    assert pd.isna(row["rank"])


def test_names_of_tasks():
    assert task_name(TASK_VALUES) == "rotation 45°"
    assert task_name(TASK_VALUES | {"rotation": 22.5}) == "rotation 22.5°"
    assert task_name(TASK_VALUES | {"shift": "unseen classes"}) == "unseen classes"


def test_one_seed_has_no_interval():
    one = result({("LoRA", 2): [0.5]})
    with pytest.raises(ValueError, match="an interval needs at least two values, one per seed"):
        means(results_table([one]))
    assert math.isclose(results_table([one])["test"].iloc[0], 0.5)
