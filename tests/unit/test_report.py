"""The report says what the table says, and is written whole."""

import re

import matplotlib.image
import pandas as pd
import pytest
from test_tables import SCORES, result

from lowrank_utils.report import write_report
from lowrank_utils.tables import differences, read_table, results_table

WITH_MATCHED = {**SCORES, ("LoRA matched", 2): [0.71, 0.74, 0.73], ("LoRA matched", 4): [0.80, 0.82, 0.79]}


@pytest.fixture
def report(tmp_path):
    results = [
        ("a", result(WITH_MATCHED, at_edge=[("DoRA", 2)])),
        ("b", result(WITH_MATCHED, shift="inversion")),
    ]
    path = write_report(results, "abc123", tmp_path / "new folder", "sweep")
    return path, results_table(content for _, content in results)


def test_all_files_are_there_and_nothing_else(report):
    path, table = report
    names = {file.name for file in path.parent.iterdir()}
    pictures = {f"sweep_{name}.png" for name in ("by_rank", "by_parameters", "differences")}
    assert names == {"sweep.md", "sweep.csv", *pictures}
    pd.testing.assert_frame_equal(read_table(path.parent / "sweep.csv"), table)
    text = path.read_text(encoding="utf-8")
    shown = re.findall(r"!\[([^]]+)\]\((\S+)\)", text)
    assert {target for _, target in shown} == pictures
    assert all(len(alt) > 40 for alt, _ in shown)
    for name in pictures:
        assert matplotlib.image.imread(path.parent / name).std() > 0.05


def test_its_numbers_are_the_tables(report):
    path, table = report
    text = path.read_text(encoding="utf-8")
    assert "2 runs of notebook 07" in text
    assert "code abc123" in text
    assert "3 seeds" in text
    rows = differences(table, "DoRA", "LoRA")
    for _, row in rows.iterrows():
        line = f"| {row['rank']} | {100 * row['mean']:+.2f} | {100 * row['low']:+.2f} to {100 * row['high']:+.2f} |"
        assert line in text
        assert row["verdict"] in text
    # The mean of 71, 76 and 75, and t · s / √n.
    assert "| DoRA | 74.0 ± 6.6* | 80.3 ± 5.2 |" in text
    assert "* The chosen learning rate is the first or last of its grid" in text
    for question in ("The same rank", "The same number of trainable parameters", "DoRA at half the rank"):
        assert f"## {question}: DoRA − LoRA" in text
    assert "DoRA norm kept" not in text, "nothing is said of what did not run"
    assert "## Robustness to the rank" in text


def test_it_is_the_same_each_time(report, tmp_path):
    path, _ = report
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    results = [
        ("a", result(WITH_MATCHED, at_edge=[("DoRA", 2)])),
        ("b", result(WITH_MATCHED, shift="inversion")),
    ]
    again = write_report(results, "abc123", tmp_path / "new folder", "sweep")
    assert {file.name: file.read_bytes() for file in again.parent.iterdir()} == before


def test_without_ranks_and_pairs_it_is_the_accuracies_alone(tmp_path):
    path = write_report([("a", result({("full", None): [0.8, 0.9, 0.85]}))], "abc123", tmp_path, "sweep")
    text = path.read_text(encoding="utf-8")
    assert "| full | 85.0 ± 12.4 |" in text
    assert "difference" not in text
    assert {file.name for file in tmp_path.iterdir()} == {"sweep.md", "sweep.csv", "sweep_by_parameters.png"}
