"""The README's tables say what the results and the notebooks say."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from lowrank_utils.tables import differences, read_table, task_name

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


def test_the_answer_is_what_the_results_say():
    table = read_table(RESULTS / "comparison.csv")
    detached, kept = (differences(table, method, "LoRA") for method in ("DoRA", "DoRA norm kept"))

    def chosen(rows, shifts, condition):
        return rows[rows["shift"].isin(shifts) & condition(rows["rank"])]

    learned = ["rotation", "permutation"]
    low = chosen(detached, learned, lambda rank: rank <= 2)
    assert (low["high_corrected"] < 0).all()
    ends = [percentage_points(-value).lstrip("+") for value in (low["mean"].max(), low["mean"].min())]
    assert (
        f"worse at ranks 1 and 2, by {ends[0]} to {ends[1]} points with every interval below zero" in README
    )
    high = chosen(detached, learned, lambda rank: rank >= 4)
    ends = [percentage_points(value) for value in (high["mean"].min(), high["mean"].max())]
    assert f"between {ends[0]} and {ends[1]} points, with every interval across zero" in README
    assert ((high["low_corrected"] < 0) & (high["high_corrected"] > 0)).all()
    unseen = chosen(detached, ["unseen classes"], lambda rank: rank >= 4)
    ends = [percentage_points(-value).lstrip("+") for value in (unseen["mean"].max(), unseen["mean"].min())]
    assert f"ahead by {ends[0]} to {ends[1]} points from rank 4 on" in README
    assert (unseen["high_corrected"] < 0).all()
    inverted = chosen(detached, ["inversion"], lambda rank: rank >= 1)
    assert {"DoRA is better", "LoRA is better"} <= set(inverted["verdict"]), "they contradict each other"
    # Caught up: nowhere behind; ahead in two cells.
    caught_up = chosen(kept, learned, lambda rank: rank >= 1)
    assert (caught_up["high_corrected"] > 0).all()
    ahead = caught_up[caught_up["low_corrected"] > 0]
    assert set(zip(ahead["shift"], ahead["rank"], strict=True)) == {("permutation", 4), ("permutation", 32)}
    means = [percentage_points(value).lstrip("+") for value in ahead.sort_values("rank")["mean"]]
    assert f"ahead at ranks 4 and 32 of the permuted ones, by {means[0]} and {means[1]} points" in README


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
        p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb"))
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
    listed = set(re.findall(r"\(lowrank_utils/(\w+\.py)\)", README))
    public = {path.name for path in (ROOT / "lowrank_utils").glob("*.py") if not path.name.startswith("_")}
    assert listed == public
