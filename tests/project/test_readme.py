"""The README's tables say what the results and the notebooks say."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from lowrank_utils.tables import differences, means, read_table, spread_over_ranks, task_name

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "notebooks" / "results"


@pytest.fixture(scope="module")
def protocol():
    """The runs of the article's protocol."""
    return json.loads((RESULTS / "article_protocol.json").read_text(encoding="utf-8"))


def test_accuracies_are_those_of_the_results(protocol):
    scores = {}
    for run in protocol["runs"]:
        scores.setdefault(run["method"], []).append(100 * run["test"])
    rows = re.findall(r"^\| ([^|]+?) \| [^|]* \| ([\d.]+) ± ([\d.]+) \|$", README, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == list(scores)
    for name, mean, spread in rows:
        assert float(mean) == round(statistics.mean(scores[name]), 2)
        assert float(spread) == round(statistics.stdev(scores[name]), 2)
        assert len(scores[name]) >= 5
    means = [statistics.mean(values) for values in scores.values()]
    assert "closer together than the best and the worst seed of LoRA alone" in README
    assert max(means) - min(means) < max(scores["LoRA"]) - min(scores["LoRA"])
    assert min(means) < statistics.mean(scores["full fine-tuning"]) < max(means)


def test_the_protocol_is_the_one_that_the_readme_names(protocol):
    assert protocol["settings"] == {
        "epochs": 2,
        "learning_rate": 0.005,
        "batch_size": 64,
        "rank": 4,
        "alpha": 8,
        "dtype": "float64",
        "data_set": "mnist",
    }
    assert "batch 64, 2 epochs, Adam with learning rate 0.005, rank 4, alpha 8" in README


def test_the_training_loop_is_as_much_faster_as_the_readme_says():
    results = json.loads((RESULTS / "training_loop.json").read_text(encoding="utf-8"))
    said = re.search(
        r"\*\*([\d.]+) times\*\* as fast \(([\d.]+) to ([\d.]+) in (\d+) rounds\)", README.replace("\n", " ")
    )
    ratio = results["ratio"]
    assert [float(said[i]) for i in (1, 2, 3)] == [
        round(ratio[k], 1) for k in ("median", "lowest", "highest")
    ]
    assert 2 * int(said[4]) == len(results["rounds"])
    shares = re.search(
        r"(\d+)% forward passes, losses and batches, (\d+)% backward passes, (\d+)% the optimizer, "
        r"(\d+)% measuring accuracy and (\d+)% loading",
        README.replace("\n", " "),
    )
    parts = ("forward, loss, batches", "backward", "optimizer", "accuracy", "loading")
    assert [int(share) for share in shares.groups()] == [
        round(100 * results["shares"][part]) for part in parts
    ]


def percentage_points(value):
    return f"{100 * value:+.1f}".replace("-", "−")


@pytest.mark.parametrize(("name", "place"), [("comparison", 0), ("comparison_mnist", 1)])
def test_the_tables_of_dora_against_lora_are_those_of_the_results(name, place):
    blocks = re.findall(r"^\| DoRA − LoRA, points \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    rows = differences(read_table(RESULTS / f"{name}.csv"), "DoRA", "LoRA")
    ranks = sorted(rows["rank"].unique())
    expected = []
    for _, group in rows.groupby("shift", sort=False):
        cells = [task_name(group.iloc[0])]
        for rank in ranks:
            (row,) = [row for _, row in group.iterrows() if row["rank"] == rank]
            excluded = row["low_corrected"] > 0 or row["high_corrected"] < 0
            mean = percentage_points(row["mean"])
            ends = " to ".join(percentage_points(row[end]) for end in ("low_corrected", "high_corrected"))
            cells.append(f"{'**' * excluded}{mean}{'**' * excluded} ({ends})")
        expected.append("| " + " | ".join(cells) + " |")
    assert blocks[place].splitlines() == expected


def ends_of(values):
    """Return the smallest and the largest of some differences, as the README writes them."""
    return [percentage_points(value) for value in (min(values), max(values))]


def excluding_zero(rows):
    """Return shift and rank of the differences whose corrected interval excludes zero, by its side."""
    sides = {"above": rows[rows["low_corrected"] > 0], "below": rows[rows["high_corrected"] < 0]}
    return {side: set(zip(part["shift"], part["rank"], strict=True)) for side, part in sides.items()}


def test_the_answer_above_the_small_network_is_what_the_results_say():
    rows = differences(read_table(RESULTS / "comparison.csv"), "DoRA", "LoRA")
    learned = rows[rows["shift"].isin(["rotation", "permutation"])]
    low, high = learned[learned["rank"] <= 2], learned[learned["rank"] >= 4]
    unseen = rows[(rows["shift"] == "unseen classes") & (rows["rank"] >= 4)]
    for behind, words in (
        (low, "rotation and permutation, by {} to {} points with every interval below zero"),
        (unseen, "it was behind by {} to {} points from rank 4 on"),
    ):
        assert (behind["high_corrected"] < 0).all()
        assert words.format(*(end.lstrip("+") for end in ends_of(-behind["mean"]))) in README
    assert (
        "between {} and {} points from it, with every interval across zero".format(*ends_of(high["mean"]))
        in README
    )
    assert ((high["low_corrected"] < 0) & (high["high_corrected"] > 0)).all()
    inverted = rows[rows["shift"] == "inversion"]
    assert {"DoRA is better", "LoRA is better"} <= set(inverted["verdict"]), "they contradict each other"
    adapters = means(read_table(RESULTS / "comparison.csv"))
    assert adapters[(adapters["shift"] == "inversion") & adapters["rank"].notna()]["mean"].max() < 0.5


def test_the_answer_above_the_better_network_is_what_the_results_say():
    table = read_table(RESULTS / "comparison_mnist.csv")
    rows = differences(table, "DoRA", "LoRA")
    above = {("rotation", 2), ("rotation", 8), ("rotation", 32), ("permutation", 4), ("permutation", 32)}
    assert excluding_zero(rows) == {
        "above": above,
        "below": {("permutation", 1), ("unseen classes", 8), ("unseen classes", 32)},
    }
    ahead = rows[rows["low_corrected"] > 0]
    low, high = (end.lstrip("+") for end in ends_of(ahead["mean"]))
    behind = [percentage_points(-value).lstrip("+") for value in rows[rows["high_corrected"] < 0]["mean"]]
    assert (
        f"at ranks 2, 8 and 32 of rotation and at ranks 4 and 32 of permutation, by {low} to {high} points; "
        f"it was behind at rank 1 of permutation by {behind[0]} points, and on unseen classes at ranks 8 and 32 "
        f"by {behind[1]} and {behind[2]} points; and everywhere else the intervals include zero" in README
    )
    rates = table.groupby(["shift", "method", "rank"])["learning_rate"].first()
    differing = {
        (shift, rank) for shift, rank in above if rates[shift, "LoRA", rank] != rates[shift, "DoRA", rank]
    }
    assert differing == {("rotation", 8), ("rotation", 32), ("permutation", 32)}
    by_size = sorted(zip(ahead["mean"], ahead["shift"], ahead["rank"], strict=True))
    assert {(shift, rank) for _, shift, rank in by_size[-3:]} == differing, "the three larger ones"
    assert table["seed"].nunique() == 15
    assert "whole MNIST, also with 15 seeds" in README


def test_where_the_rates_differ_is_what_the_readme_says():
    """The rates differ at all of LoRA's leads on unseen classes, and at rank 1 of permutation above the first network."""
    for name, others in {"comparison": {("permutation", 1)}, "comparison_mnist": set()}.items():
        table = read_table(RESULTS / f"{name}.csv")
        rates = table.groupby(["shift", "method", "rank"])["learning_rate"].first()
        behind = excluding_zero(differences(table, "DoRA", "LoRA"))["below"] - {("inversion", 4)}
        differing = {
            (shift, rank)
            for shift, rank in behind
            if rates[shift, "LoRA", rank] != rates[shift, "DoRA", rank]
        }
        assert differing == {place for place in behind if place[0] == "unseen classes"} | others


def test_the_answer_on_the_two_claims_is_what_the_results_say():
    varies = []
    for name in ("comparison", "comparison_mnist"):
        table = read_table(RESULTS / f"{name}.csv")
        matched = differences(table, "DoRA", "LoRA matched")
        assert not (matched["low_corrected"] > 0).any(), "nowhere ahead"
        spread = spread_over_ranks(table, ["DoRA", "LoRA"])
        varies.append(
            differences(spread, "DoRA", "LoRA", exceeds="varies more")["verdict"].value_counts().to_dict()
        )
    # More on two tasks above the first network, on one above the second, and less on none.
    assert varies == [{"DoRA varies more": 2, "undecided": 2}, {"DoRA varies more": 1, "undecided": 3}]


def test_two_workers_are_as_much_faster_as_the_readme_says():
    results = json.loads((RESULTS / "sweep_speed.json").read_text(encoding="utf-8"))
    said = re.search(r"(\d+) runs with two workers take \*\*1/([\d.]+)\*\* of the time", README)
    assert int(said[1]) == results["runs"]
    assert float(said[2]) == round(results["ratio"]["median"], 2)


def test_the_map_of_the_series_is_that_of_the_notebooks():
    rows = re.findall(
        r"^\| \[(\d+\. [^]]+)\]\((notebooks/[^)]+)\) \| ([^|]+) \| (\d+) \| (\d+) \|$",
        README,
        flags=re.MULTILINE,
    )
    assert [Path(path).name for _, path, *_ in rows] == [
        p.name for p in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    ]
    for title, path, question, reading, exercises in rows:
        opening = nbformat.read(ROOT / path, as_version=4).cells[0].source
        assert opening.startswith(f"# {title}")
        assert f"*{question}*" in opening
        assert f"About {reading} minutes to read and run, {exercises} for the exercises" in opening


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_all_files_of_the_package_stand_in_the_table():
    package = ROOT / "lowrank_utils"
    listed = set(re.findall(r"\(lowrank_utils/([\w.]+)\)", README))
    files = {path.name for path in package.glob("*.py")}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert listed == {name for name in files | folders if not name.startswith("_")}


def test_the_time_to_the_first_cell_is_the_measured_one():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "notebooks" / "results" / "first_cell.json").read_text(encoding="utf-8"))
    seconds, size = measured["seconds"], measured["megabytes"]["environment"] / 1000
    assert f"took {seconds['environment']:.0f} seconds and {size:.1f} GB" in readme
    assert f"first executed cell it is {seconds['kernel'] + seconds['first cell']:.1f} seconds" in readme
