"""The README and the page of the results say what the results and the notebooks say."""

import json
import re
import shutil
import statistics
from pathlib import Path

import contents
import pandas as pd
import pytest
import yaml

from lowrank_utils.comparison.declared import (
    judge,
    network_differences,
    read_declaration,
)
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.tables import (
    differences,
    means,
    read_table,
    spread_over_ranks,
    under_tuned,
)

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
RESULTS = ROOT / "notebooks" / "results"
TASKS = ["rotation", "permutation", "inversion", "unseen classes"]


@pytest.fixture(scope="module")
def protocol():
    """The runs of the article's protocol."""
    return json.loads((RESULTS / "article_protocol.json").read_text(encoding="utf-8"))


def test_accuracies_are_those_of_the_results(protocol):
    scores = {}
    for run in protocol["runs"]:
        scores.setdefault(run["method"], []).append(100 * run["test"])
    rows = re.findall(
        r"^\| ([^|]+?) \| [^|]* \| ([\d.]+) ± ([\d.]+) \|$", PAGE, flags=re.MULTILINE
    )
    assert [name for name, _, _ in rows] == list(scores)
    for name, mean, spread in rows:
        assert float(mean) == round(statistics.mean(scores[name]), 2)
        assert float(spread) == round(statistics.stdev(scores[name]), 2)
        assert len(scores[name]) >= 5
    means = [statistics.mean(values) for values in scores.values()]
    assert "closer together than the best and the worst seed of LoRA alone" in PAGE
    assert max(means) - min(means) < max(scores["LoRA"]) - min(scores["LoRA"])
    assert min(means) < statistics.mean(scores["full fine-tuning"]) < max(means)


def test_the_protocol_is_the_one_that_the_page_names(protocol):
    assert protocol["settings"] == {
        "epochs": 2,
        "learning_rate": 0.005,
        "batch_size": 64,
        "rank": 4,
        "alpha": 8,
        "dtype": "float64",
        "data_set": "mnist",
    }
    assert "batch 64, 2 epochs, Adam with learning rate 0.005, rank 4, alpha 8" in PAGE


def test_the_training_loop_is_as_much_faster_as_the_page_says():
    results = json.loads((RESULTS / "training_loop.json").read_text(encoding="utf-8"))
    said = re.search(
        r"\*\*([\d.]+) times\*\* as fast \(([\d.]+) to ([\d.]+) in (\d+) rounds\)",
        PAGE.replace("\n", " "),
    )
    ratio = results["ratio"]
    assert [float(said[i]) for i in (1, 2, 3)] == [
        round(ratio[k], 1) for k in ("median", "lowest", "highest")
    ]
    assert 2 * int(said[4]) == len(results["rounds"])
    shares = re.search(
        r"(\d+)% forward passes, losses and batches, (\d+)% backward passes, (\d+)% the optimizer, "
        r"(\d+)% measuring accuracy and (\d+)% loading",
        PAGE.replace("\n", " "),
    )
    parts = ("forward, loss, batches", "backward", "optimizer", "accuracy", "loading")
    assert [int(share) for share in shares.groups()] == [
        round(100 * results["shares"][part]) for part in parts
    ]


@pytest.fixture(scope="module")
def comparison():
    """The runs of the comparison."""
    return read_table(RESULTS / "comparison.csv")


OWN = "DoRA with m's rate"


def test_the_pictures_and_the_report_are_there_and_the_report_names_its_commit():
    for text, folder in ((README, ROOT), (PAGE, ROOT / "docs")):
        pictures = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
        assert text is PAGE or len(pictures) == 2
        for words, target in pictures:
            assert len(words) > 40
            assert (folder / target).is_file(), target
    for target in (
        "../notebooks/results/comparison.md",
        "../notebooks/results/comparison.csv",
    ):
        assert f"]({target})" in PAGE
    assert "`make compare`" in PAGE
    assert re.search(
        r", commit [0-9a-f]{10}",
        (RESULTS / "comparison.md").read_text(encoding="utf-8"),
    )


def test_the_three_sentences_are_what_the_results_say(comparison):
    for words in (
        "DoRA of rank 1 does worse than m alone on three of four tasks",
        "ahead of LoRA at rank 1 on the same three",
        "at rank 4, or with the last layer trained as well, little is left of it, apart from "
        "inverted images",
        "a gain without a norm does as well",
        "on shuffled pixels random rows do clearly better",
    ):
        assert words in PAGE
    three, easy = ["rotation", "permutation", "inversion"], "unseen classes"

    def rows(first, second, rank):
        found = differences(comparison[comparison["steps"] == 1280], first, second)
        found = found[
            (found["rank"] == rank) & found["shift"].isin([*three, easy])
        ].set_index("shift")
        assert (found["count"] == 12).all()
        return found

    suspects = under_tuned(comparison[comparison["steps"] == 1280])
    suspects = suspects[(suspects["rank"] == 1) & (suspects["submodel"] == "m alone")]
    assert (
        suspects[suspects["method"] == "DoRA with one rate"]["shift"].tolist() == three
    )
    assert (rows("gain", "random rows", 1).loc["permutation", "high"]) < -0.05
    assert (rows(OWN, "DoRA with one rate", 1).loc[three, "low"] > 0.05).all()
    assert (rows(OWN, "LoRA", 1).loc[three, "low"] > 0.05).all()
    assert (rows(OWN, "LoRA", 4).drop("inversion")["mean"] < 0.01).all()
    matched = rows(OWN, "LoRA matched above", 1)
    assert matched.drop(["inversion", easy])["mean"].between(0.01, 0.025).all()
    assert (rows(OWN, "LoRA matched above", 4).drop("inversion")["mean"] < 0.01).all()
    assert (rows(OWN, "gain", 1)["mean"] < 0.015).all()
    for second in (
        "DoRA with one rate",
        "LoRA",
        "LoRA matched above",
        "gain",
        "random rows",
    ):
        assert abs(rows(OWN, second, 1).loc[easy, "mean"]) < 0.015
    assert (rows("gain", "random rows", 1).drop("inversion")["high"] < 0).all()
    assert rows("gain", "random rows", 1).loc["inversion", "low"] > 0


def test_what_the_page_says_beside_the_declared_tests(comparison):
    declared = yaml.safe_load(
        (ROOT / "notebooks" / "comparison.yaml").read_text(encoding="utf-8")
    )["declared"]
    declaration = read_declaration(declared)
    others = [shift for shift in declaration.shifts if shift != "inversion"]
    assert "Without that task half a point or less is left" in PAGE
    assert "Without inversion the random rows are two points ahead" in PAGE
    at_rank_4, random_rows = declaration.tests[2], declaration.tests[4]
    assert (at_rank_4.second, at_rank_4.ranks, random_rows.second) == (
        "LoRA",
        (4,),
        "random rows",
    )
    for steps in declaration.steps:
        assert network_differences(at_rank_4, comparison, others, steps).mean() < 0.0055
        assert (
            -0.025
            < network_differences(random_rows, comparison, others, steps).mean()
            < -0.015
        )


def test_what_ms_own_rate_is_worth_is_what_the_results_say(comparison):
    rows = means(comparison)
    rows = rows[
        (rows["shift"] == "permutation") & (rows["rank"] == 1) & (rows["steps"] == 320)
    ]
    shared, own = (
        f"{100 * rows[rows['method'] == m]['mean'].item():.1f} %"
        for m in ("DoRA with one rate", OWN)
    )
    assert (
        f"DoRA reads {shared} of the images with one rate and {own} with m's own"
        in PAGE
    )


def test_the_claim_on_the_rank_is_what_the_results_say(comparison):
    spread = spread_over_ranks(
        comparison[comparison["rank"].isin([1, 4])], ["LoRA", OWN]
    )
    wide = spread[spread["ranks"] == 2].pivot_table(
        index=["shift", "steps"], columns="method", values="spread"
    )
    for method, words in {
        "LoRA": "LoRA loses {:.1f}, {:.1f}, {:.1f} and {:.1f} points at 1,280 steps",
        OWN: "DoRA {:.1f}, {:.1f}, {:.1f} and {:.1f}",
    }.items():
        lost = [100 * wide.loc[(shift, 1280), method] for shift in TASKS]
        assert words.format(*lost) in PAGE
    three = wide.loc[["rotation", "permutation", "inversion"]]
    assert (three["LoRA"] > three[OWN]).all()
    assert ((wide["LoRA"] - wide[OWN]).loc["unseen classes"].abs() < 0.005).all()


def test_two_workers_are_as_much_faster_as_the_page_says():
    results = json.loads((RESULTS / "sweep_speed.json").read_text(encoding="utf-8"))
    said = re.search(
        r"(\d+) runs with two workers takes \*\*1/([\d.]+)\*\* of the time", PAGE
    )
    assert int(said[1]) == results["runs"]
    assert float(said[2]) == round(results["ratio"]["median"], 2)


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The pages, and all that their tables come from, in a folder of their own."""
    shutil.copytree(RESULTS, tmp_path / "notebooks" / "results")
    settings = "notebooks/comparison.yaml", "docs/plans.yaml"
    lessons = [str(one.path.relative_to(ROOT)) for one in contents.lessons()]
    for name in (*contents.PAGES, *lessons, *settings):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(contents, "ROOT", tmp_path)
    return tmp_path


def changed(path, pattern, replacement):
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(pattern, replacement, text, count=1), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text


CHANGES = {
    "README.md": (
        "notebooks/01_low_rank_updates.ipynb",
        r"About \d+ min",
        "About 54 min",
    ),
    "docs/teaching.md": (
        "notebooks/results/running_times.json",
        r'("median": \{\s*"\w+": )[\d.]+',
        r"\g<1>999.8",
    ),
    "docs/results.md": (
        "notebooks/comparison.yaml",
        "second: gain",
        "second: random rows",
    ),
}


def test_all_tables_are_those_of_the_notebooks_and_of_the_results():
    assert set(CHANGES) == set(contents.PAGES)
    assert contents.main(["--check"]) == 0


@pytest.mark.parametrize("page", CHANGES)
def test_a_table_that_is_out_of_date_is_noticed_and_renewed(
    page, copied, capsys, monkeypatch
):
    monkeypatch.setattr(contents, "PAGES", {page: contents.PAGES[page]})
    changed(copied / CHANGES[page][0], *CHANGES[page][1:])
    assert contents.main(["--check"]) == 1
    assert f"{page} is out of date" in capsys.readouterr().out
    assert contents.main([]) == 0
    assert contents.main(["--check"]) == 0
    # What stands outside the marks stays.
    new, old = (
        (folder / page).read_text(encoding="utf-8") for folder in (copied, ROOT)
    )
    outside = re.compile(r"<!-- (\S.*): written.*?<!-- /\1 -->", re.DOTALL)
    assert new != old
    assert outside.sub("", new) == outside.sub("", old)


def test_a_changed_result_changes_the_page(copied):
    runs = pd.read_csv(copied / "notebooks" / "results" / "comparison.csv")
    runs.loc[runs["method"] == "gain", "test"] -= 0.1
    runs.to_csv(copied / "notebooks" / "results" / "comparison.csv", index=False)
    assert contents.main(["--check"]) == 1


def test_links_to_files_lead_somewhere():
    for text, folder in ((README, ROOT), (PAGE, ROOT / "docs")):
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            if "://" not in target:
                assert (folder / target).exists(), target


def test_the_start_page_is_one_screen():
    assert len(README.split()) <= 700
    assert README.index("TORCH=cpu") < README.index("## The series")


def test_the_three_findings_are_what_the_results_say(comparison):
    file = yaml.safe_load((ROOT / "notebooks" / "comparison.yaml").read_text("utf-8"))
    answers = judge(comparison, read_declaration(file["declared"]))
    answers = answers[answers["steps"] == 1280].set_index("test")

    def declared(test, verdict):
        assert answers.loc[test, "verdict"] == verdict
        return answers.loc[test, "mean"]

    expected = [
        declared(f"{OWN} − DoRA with one rate, rank 1 and 4", "better"),
        declared(f"{OWN} − LoRA, rank 1", "better"),
        declared(f"{OWN} − gain, rank 1 and 4", "no difference worth having"),
    ]
    found = re.findall(r"^\d\. (.+): \*\*(.+)\*\*$", README, flags=re.MULTILINE)
    assert [number for _, number in found] == [signed(value) for value in expected]
    assert all(len(words.split()) <= 9 for words, _ in found)
    for text in (README, PAGE):
        assert "notebooks/results/comparison_declared.png" in text


def signed(value):
    return f"{100 * value:+.1f}".replace("-", "−")


def test_what_is_said_of_the_whole_mnist():
    whole = read_table(RESULTS / "comparison_mnist.csv")
    long = whole[whole["steps"] == 1280]
    assert whole["network"].nunique() == 5
    means_of = means(long).set_index(["shift", "method"])["mean"]
    assert means_of["permutation"].idxmax() == "random rows"
    gain = differences(long, OWN, "gain").set_index("shift").loc["permutation"]
    assert gain["low"] < 0 < gain["high"]


def test_what_is_said_of_the_last_layer(comparison):
    long = comparison[comparison["steps"] == 1280]
    rows = means(long[long["rank"].isna() | (long["rank"] == 1)])
    trained = rows["shift"].str.endswith(", trained last layer")
    assert (rows[trained | (rows["method"] == "last layer")]["count"] == 12).all()
    mean = rows.set_index(["shift", "method"])["mean"]
    for shift in ("rotation", "permutation"):
        assert mean[shift, "last layer"] > max(mean[shift, "LoRA"], mean[shift, OWN])
        trained = f"{shift}, trained last layer"
        for other in ("LoRA", "DoRA with one rate"):
            pair = differences(long[long["shift"] == trained], OWN, other)
            assert pair["low"].min() > -0.01
            assert pair["high"].max() < 0.01
        ahead = differences(long[long["shift"] == trained], "random rows", OWN)
        assert ahead["low"].min() > 0
    inverted = long[long["shift"] == "inversion, trained last layer"]
    assert differences(inverted, OWN, "LoRA")["low"].min() > 0.01


def test_the_time_to_the_first_cell_is_the_measured_one():
    page = (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")
    measured = json.loads(
        (ROOT / "notebooks" / "results" / "first_cell.json").read_text(encoding="utf-8")
    )
    seconds, size = measured["seconds"], measured["megabytes"]["environment"] / 1000
    assert f"took {seconds['environment']:.0f} seconds and {size:.1f} GB" in page
    assert (
        f"first executed cell it is {seconds['kernel'] + seconds['first cell']:.1f} seconds"
        in page
    )


def test_what_notebook_7_and_the_pages_say_in_words(comparison):
    numbers = comparison[comparison["rank"].isna() | (comparison["rank"] == 1)]
    numbers = numbers[numbers["shift"] == "permutation"]
    numbers = numbers.groupby("method")["trainable"].unique().map(list)
    lesson = (ROOT / "notebooks" / "07_comparison.ipynb").read_text(encoding="utf-8")
    package = (ROOT / "docs" / "package.md").read_text(encoding="utf-8")
    matched, own, last = (
        f"{numbers[method][0]:,}"
        for method in ("LoRA matched above", OWN, "last layer")
    )
    assert f"{matched} instead of {own}" in lesson
    assert f"{matched} instead of {own}" in PAGE
    assert f"That is {last} parameters; DoRA of rank 1 has {own}" in lesson
    assert numbers["m alone"] == [394]
    assert "rates twenty times as large as DoRA with one rate" in lesson
    assert METHODS["m alone"].rates[1] == 20 * METHODS["DoRA with one rate"].rates[1]
    # Of the networks, at rank 1 and 1,280 steps.
    long = comparison[(comparison["steps"] == 1280) & comparison["shift"].isin(TASKS)]
    factors = long[(long["method"] == OWN) & (long["rank"] == 1)]["factor"]
    assert "the best factor was about 70 at rank 1, in the median" in package
    assert 65 < factors.median() < 75
    assert "all twelve networks say the same of DoRA and LoRA" in lesson
    for shift in TASKS[:3]:
        rows = long[(long["shift"] == shift) & (long["rank"] == 1)]
        each = rows.pivot_table(index="network", columns="method", values="test")
        assert (each[OWN] > each["LoRA"]).all()
    # Above two of them, after 5,120 steps.
    longest = comparison[comparison["steps"] == 5120]
    mean = longest.groupby(["shift", "method"])["test"].mean().unstack()
    assert longest["network"].nunique() == 2
    assert "LoRA doesn't catch up there either" in lesson
    assert "LoRA doesn't catch up there either" in PAGE
    assert (mean["LoRA"] < mean[OWN] - 0.05).all()
