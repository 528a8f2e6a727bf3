"""The README's tables say what the results and the notebooks say."""

import json
import re
import statistics
from pathlib import Path

import nbformat
import pytest

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
