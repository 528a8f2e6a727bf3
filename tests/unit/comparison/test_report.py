"""The report says what the tables say, judges whole sweeps alone, and each of its files
is written in one step."""

import re
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_declared import DECLARED, NETWORKS, both_shifts, scores
from test_tables import DORA, HELD_BACK, LONG, LOSSES, ONE_RATE, SCORES, result

from lowrank_utils.comparison.declared import judge, read_declaration
from lowrank_utils.comparison.intervals import mean_interval
from lowrank_utils.comparison.report import write_report
from lowrank_utils.comparison.tables import (
    differences,
    means,
    read_table,
    results_table,
    under_tuned,
)

DECLARATION = read_declaration(DECLARED)


def named(results):
    return [(str(place), content) for place, content in enumerate(results)]


def written(results, folder, declaration=None):
    path = write_report(named(results), "abc123", folder, "sweep", declaration)
    return path.read_text(encoding="utf-8")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def section(text, title):
    """Return what stands below a title, down to the next one of its kind."""
    (found,) = re.findall(
        rf"^#+ {re.escape(title)}\n\n(.*?)(?=^#|\Z)",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    return found


def cells(line):
    return [
        cell.strip()
        for cell in line.strip().removeprefix("|").removesuffix("|").split("|")
    ]


def signed(value):
    return f"{100 * value:+.1f}".replace("-", "−")


def test_all_files_are_there_and_each_picture_is_shown(tmp_path):
    results = [*both_shifts(), *both_shifts(steps=(LONG, 256))]
    text = written(results, tmp_path / "new folder", DECLARATION)
    pictures = {
        f"sweep_{name}.png"
        for name in ("declared", "rank_1", "rank_4", "differences", "steps")
    }
    assert files(tmp_path / "new folder").keys() == {"sweep.md", "sweep.csv", *pictures}
    shown = re.findall(r"!\[([^]]+)\]\((\S+)\)", text)
    assert {target for _, target in shown} == pictures
    assert len({alt for alt, _ in shown}) == len(shown)
    assert all(len(alt) > 40 for alt, _ in shown)
    for name in pictures:
        assert matplotlib.image.imread(tmp_path / "new folder" / name).std() > 0.05
    assert "240 adaptations above 8 pretrained networks, code abc123" in text
    assert "[sweep.csv](sweep.csv)" in text


def test_what_was_declared_stands_first_with_its_numbers(tmp_path):
    text = written(both_shifts(), tmp_path, DECLARATION)
    answers = judge(results_table(both_shifts()), DECLARATION)
    assert text.index("## What was declared before the runs") < text.index(
        "## Accuracy"
    )
    lines = section(text, "What was declared before the runs").splitlines()[2:4]
    for line, (_, row) in zip(lines, answers.iterrows(), strict=True):
        assert cells(line) == [
            *("64", row["test"], "8", signed(row["mean"])),
            f"{signed(row['low'])} to {signed(row['high'])}",
            f"{row['p_holm']:.3f}",
            row["verdict"],
        ]
    without = section(text, "The same without one of the tasks").splitlines()
    assert cells(without[0])[2:] == ["without permutation", "without inversion"]
    assert cells(without[2])[2].startswith(signed(answers["mean"].iloc[0]))


# tests/unit/comparison/test_sweep.py has a sweep that lacks one of several runs.
@pytest.mark.parametrize("left", [[], NETWORKS[:1]])
def test_nothing_is_judged_where_runs_are_missing(tmp_path, left):
    one, two = both_shifts()
    two["runs"] = [run for run in two["runs"] if run["network"] in left]
    text = written([one, two], tmp_path, DECLARATION)
    assert "declared" not in text
    assert "p (Holm)" not in text
    assert "## Accuracy" in text
    assert not (tmp_path / "sweep_declared.png").exists()


def test_the_accuracies_are_the_means_with_half_their_interval(tmp_path):
    dead = {(DORA, 4): {"dead": True}}
    text = written([result(extra=dead), result(shift="inversion")], tmp_path)
    lines = section(text, "Rotation −45°, 64 steps").splitlines()
    assert cells(lines[0]) == ["method", "r = 1", "r = 4", "without a rank"]
    found = {cells(line)[0]: cells(line)[1:] for line in lines[2:6]}

    def cell(method, rank):
        interval = mean_interval(SCORES[method, rank])
        return (
            f"{100 * interval.mean:.1f} ± {50 * (interval.high - interval.low):.1f} (3)"
        )

    assert found["LoRA"] == [cell("LoRA", 1), cell("LoRA", 4), ""]
    assert found["m alone"] == ["", "", cell("m alone", None)]
    assert found[DORA] == [cell(DORA, 1), cell(DORA, 4) + ", dead 100%", ""]
    assert "dead" not in section(text, "Inversion, 64 steps").splitlines()[5]
    assert len(means(results_table([result()]))) == 6


def test_an_under_tuned_method_is_marked_wherever_it_stands(tmp_path):
    text = written([result(HELD_BACK, losses=LOSSES)], tmp_path)
    accuracy = section(text, "Rotation −45°, 64 steps")
    assert re.search(
        rf"^\| {DORA} \| 71\.0 ± \d\.\d \(4\) † \|", accuracy, flags=re.MULTILINE
    )
    assert "†" not in "".join(
        line for line in accuracy.splitlines() if line.startswith("| m alone")
    )
    (line,) = section(text, "Under-tuned").strip().splitlines()[2:]
    assert cells(line) == [
        "rotation −45°",
        "64",
        f"{DORA}, r = 1",
        "m alone",
        "−9.8",
        "+0.21",
        "4",
    ]
    scores = {("LoRA", 1): [0.6, 0.61, 0.62, 0.6], **HELD_BACK}
    pairs = section(
        written([result(scores, losses={**LOSSES, ("LoRA", 1): 0.5})], tmp_path),
        f"{DORA} − LoRA",
    )
    assert pairs.strip().splitlines()[2].endswith("| under-tuned |")
    fine = written([result(losses=dict.fromkeys(SCORES, 0.5))], tmp_path)
    assert "## Under-tuned" not in fine
    assert " † |" not in fine


def test_signs_rates_and_grown_ranges_are_told(tmp_path):
    extra = {
        (DORA, 1): {
            "negative": {"layers.0": 0.254, "layers.4": 0.0},
            "widened": 2,
            "at_edge": True,
            "learning_rate": 0.0321,
            "factor": 77.7,
        }
    }
    text = written([result(extra=extra)], tmp_path)
    header, _, line = section(text, "Signs").strip().splitlines()[-3:]
    assert cells(header)[4:] == ["layer 0", "layer 4"]
    assert cells(line) == ["rotation −45°", "64", DORA, "1", "25%", "0%"]
    rates = [
        cells(line)
        for line in section(text, "Chosen rates").splitlines()
        if line.startswith("| rotation")
    ]
    assert ["rotation −45°", "64", DORA, "1", "0.0321", "78", "3", "3", "3"] in rates
    assert ["rotation −45°", "64", "m alone", "", "0.0123", "", "0", "0", "3"] in rates
    assert {rate[2] for rate in rates} == {"m alone", "LoRA", DORA}, (
        "the frozen network has no rate"
    )
    assert "## Signs" not in written([result()], tmp_path)


def test_each_difference_stands_there_with_its_interval_and_verdict(tmp_path):
    more = {
        **SCORES,
        (ONE_RATE, 1): [0.70, 0.70, 0.70],
        ("gain", 1): [0.711, 0.761, 0.751],
    }
    results = [result(more), result(more, shift="inversion")]
    text = written(results, tmp_path)
    for second in ("LoRA", ONE_RATE, "gain"):
        rows = differences(results_table(results), DORA, second)
        lines = [
            line
            for line in section(text, f"{DORA} − {second}").splitlines()[2:]
            if line.startswith("|")
        ]
        assert [cells(line)[2:] for line in lines] == [
            [
                *(str(row["rank"]), "3", signed(row["mean"])),
                f"{signed(row['low'])} to {signed(row['high'])}",
                row["verdict"],
            ]
            for _, row in rows.iterrows()
        ]
    assert "random rows" not in text, "nothing is said of what did not run"
    assert "### Robustness to the rank" in text


def test_what_is_read_from_the_file_gives_the_same_verdicts(tmp_path):
    """Accuracies are shares of about 500 images or of 1,000, which six digits don't
    hold."""
    shares = {
        key: [
            [round(v * (489 + 7 * place)) / (489 + 7 * place), v]
            for place, v in enumerate(values)
        ]
        for key, values in scores().items()
    }
    results = both_shifts(
        {**shares, ("m alone", None): [0.95] * 8}, losses={("m alone", None): 0.1}
    )
    written(results, tmp_path, DECLARATION)
    table, read = results_table(results), read_table(tmp_path / "sweep.csv")
    for made in (
        lambda t: judge(t, DECLARATION),
        lambda t: differences(t, DORA, "LoRA"),
        lambda t: differences(t, DORA, "m alone"),
        under_tuned,
        means,
    ):
        before, after = made(table), made(read)
        assert len(before) > 0
        pd.testing.assert_frame_equal(
            before, after, check_dtype=False, rtol=1e-4, atol=1e-6
        )
    # What is tested exactly is exactly the same.
    pd.testing.assert_series_equal(
        judge(table, DECLARATION)["p_holm"],
        judge(read, DECLARATION)["p_holm"],
        rtol=1e-12,
    )


def test_it_is_the_same_each_time(tmp_path):
    for _ in range(2):
        written(both_shifts(), tmp_path / "one", DECLARATION)
    written(both_shifts(), tmp_path / "two", DECLARATION)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "values",
    [
        {("full", None): [0.8, 0.9, 0.85]},
        {("frozen", None): [0.3]},
        {("LoRA", 1): [0.7], (DORA, 1): [0.6]},
        {("random rows", 2): [[0.4, 0.5], 0.7]},
    ],
)
@pytest.mark.parametrize("steps", [(64,), (64, LONG, 256)])
def test_whatever_was_run_has_a_report(tmp_path, values, steps):
    text = written([result(values, steps=steps)], tmp_path)
    assert all(method in text for method, _ in values)
    assert "nan" not in text.lower()


@pytest.mark.parametrize("lora", [[11, 12, 13], [21, 22, 23]])
def test_ranks_that_are_not_there_for_both_methods_or_networks_are_left_out(
    tmp_path, lora
):
    both = {key: values for key, values in SCORES.items() if key[1]}
    only = {key: values for key, values in both.items() if key[0] == "LoRA"}
    rest = {key: values for key, values in both.items() if key[0] != "LoRA"}
    results = [
        result(only, networks=lora),
        result(rest),
        result(only, shift="inversion"),
    ]
    results.append(result({(DORA, 1): SCORES[DORA, 1]}, shift="inversion"))
    assert "## Accuracy" in written(results, tmp_path)


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.md", "sweep_rank_4.png"])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_file_that_cannot_be_written_leaves_the_older_one_and_no_half(
    tmp_path, monkeypatch, name, step
):
    """At whichever file and step it stops, each file is the whole older one or the
    whole new one."""
    older, newer = (
        [result()],
        [result({key: [v / 2 for v in vs] for key, vs in SCORES.items()})],
    )
    written(newer, tmp_path / "new")
    written(older, tmp_path / "out")
    before, after = files(tmp_path / "out"), files(tmp_path / "new")

    def stops(function):
        def wrapped(self, *arguments, **options):
            target = Path(self if isinstance(self, Path) else arguments[0])
            if target.name == f".{Path(name).stem}.tmp{Path(name).suffix}":
                if step == "write":
                    target.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return function(self, *arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        if step == "replace":
            patch.setattr(Path, "replace", stops(Path.replace))
        else:
            patch.setattr(Path, "write_text", stops(Path.write_text))
            patch.setattr(Figure, "savefig", stops(Figure.savefig))
        with pytest.raises(OSError, match="No space left on device"):
            written(newer, tmp_path / "out")
    left = files(tmp_path / "out")
    assert left.keys() == before.keys()
    for file, content in left.items():
        assert content in (before[file], after[file])
        assert content == before[file] or name != file
    assert before["sweep.csv"] != after["sweep.csv"]
