"""The report says what the tables say, judges whole sweeps alone, and each of its files
is written in one step."""

import re
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from pandas.testing import assert_frame_equal, assert_series_equal
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

pytestmark = pytest.mark.slow

DECLARATION = read_declaration(DECLARED)


def written(results, folder, declaration=None):
    named = [(str(place), content) for place, content in enumerate(results)]
    path = write_report(named, "abc123", folder, "sweep", declaration)
    return path.read_text(encoding="utf-8")


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def table_of(text, title):
    """Return the cells of the first line and of all rows of the table below a title."""
    parts = re.split(r"^#+ (.*)\n\n", text, flags=re.MULTILINE)
    (below,) = [parts[n + 1] for n in range(1, len(parts), 2) if parts[n] == title]
    lines = [line[1:-1] for line in below.splitlines() if line.startswith("|")]
    first, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return first, rows


def signed(value):
    return f"{100 * value:+.1f}".replace("-", "−")


def with_ends(row):
    """Return a difference and its interval as the report shows them."""
    low, mean, high = (signed(row[name]) for name in ("low", "mean", "high"))
    return mean, f"{low} to {high}"


def test_all_files_are_there_and_each_picture_is_shown(tmp_path):
    results, folder = (
        [*both_shifts(), *both_shifts(steps=(LONG, 256))],
        tmp_path / "new",
    )
    text = written(results, folder, DECLARATION)
    names = ("declared", "rank_1", "rank_4", "differences", "steps")
    pictures = {f"sweep_{name}.png" for name in names}
    assert files(folder).keys() == {"sweep.md", "sweep.csv", *pictures}
    shown = dict(re.findall(r"!\[([^]]{41,})\]\((\S+)\)", text))
    assert len(shown) == text.count("![") == len(pictures)
    assert {*shown.values()} == pictures
    for name in pictures:
        assert matplotlib.image.imread(folder / name).std() > 0.05
    assert "240 adaptations above 8 pretrained networks, code abc123" in text
    assert "[sweep.csv](sweep.csv)" in text


def test_what_was_declared_stands_first_with_its_numbers(tmp_path):
    text, title = written(both_shifts(), tmp_path, DECLARATION), "What was declared"
    assert text.index(f"## {title}") < text.index("## Accuracy")
    answers = judge(results_table(both_shifts()), DECLARATION).to_dict("records")
    assert table_of(text, f"{title} before the runs")[1] == [
        [
            "64",
            row["test"],
            "8",
            *with_ends(row),
            f"{row['p_holm']:.3f}",
            row["verdict"],
        ]
        for row in answers
    ]
    first, rows = table_of(text, "The same without one of the tasks")
    assert first[2:] == ["without permutation", "without inversion"]
    assert rows[0][2].startswith(signed(answers[0]["mean"]))


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

    def cell(*cell):
        interval = mean_interval(SCORES[cell])
        half = 50 * (interval.high - interval.low)
        return f"{100 * interval.mean:.1f} ± {half:.1f} (3)"

    first, rows = table_of(text, "Rotation −45°, 64 steps")
    assert first == ["method", "r = 1", "r = 4", "without a rank"]
    frozen, *others = rows
    assert frozen == ["frozen", "", "", cell("frozen", None)]
    assert others == [
        ["m alone", "", "", cell("m alone", None)],
        ["LoRA", cell("LoRA", 1), cell("LoRA", 4), ""],
        [DORA, cell(DORA, 1), cell(DORA, 4) + ", dead 100%", ""],
    ]
    _, rows = table_of(text, "Inversion, 64 steps")
    assert rows[3] == [DORA, cell(DORA, 1), cell(DORA, 4), ""]


def test_an_under_tuned_method_is_marked_wherever_it_stands(tmp_path):
    text = written([result(HELD_BACK, losses=LOSSES)], tmp_path)
    (_, dora, _), (_, *alone) = table_of(text, "Rotation −45°, 64 steps")[1]
    assert re.fullmatch(r"71\.0 ± \d\.\d \(4\) †", dora)
    assert "†" not in "".join(alone)
    _, (row,) = table_of(text, "Under-tuned")
    found = f"rotation −45°/64/{DORA}, r = 1/m alone/−9.8/+0.21/4"
    assert row == found.split("/")
    more = {("LoRA", 1): [0.6, 0.61, 0.62, 0.6], **HELD_BACK}
    pairs = written([result(more, losses={**LOSSES, ("LoRA", 1): 0.5})], tmp_path)
    _, (row,) = table_of(pairs, f"{DORA} − LoRA")
    assert row[-1] == "under-tuned"
    fine = written([result(losses=dict.fromkeys(SCORES, 0.5))], tmp_path)
    assert "## Under-tuned" not in fine
    assert " † |" not in fine


def test_signs_rates_and_grown_ranges_are_told(tmp_path):
    extra = {"negative": {"layers.0": 0.254, "layers.4": 0.0}, "widened": 2}
    extra |= {"at_edge": True, "learning_rate": 0.0321, "factor": 77.7}
    text = written([result(extra={(DORA, 1): extra})], tmp_path)
    first, (row,) = table_of(text, "Signs")
    assert first[4:] == ["layer 0", "layer 4"]
    assert row == ["rotation −45°", "64", DORA, "1", "25%", "0%"]
    rates = table_of(text, "Chosen rates")[1]
    assert ["rotation −45°", "64", DORA, "1", "0.0321", "78", "3", "3", "3"] in rates
    assert ["rotation −45°", "64", "m alone", "", "0.0123", "", "0", "0", "3"] in rates
    # The frozen network has no rate.
    assert {rate[2] for rate in rates} == {"m alone", "LoRA", DORA}
    assert "## Signs" not in written([result()], tmp_path)


def test_each_difference_stands_there_with_its_interval_and_verdict(tmp_path):
    more = {(ONE_RATE, 1): [0.70] * 3, ("gain", 1): [0.711, 0.761, 0.751]}
    results = [result(SCORES | more), result(SCORES | more, shift="inversion")]
    text = written(results, tmp_path)
    for second in ("LoRA", ONE_RATE, "gain"):
        found = differences(results_table(results), DORA, second).to_dict("records")
        _, rows = table_of(text, f"{DORA} − {second}")
        assert [row[2:] for row in rows] == [
            [str(row["rank"]), "3", *with_ends(row), row["verdict"]] for row in found
        ]
    assert "random rows" not in text, "nothing is said of what did not run"
    assert "### Robustness to the rank" in text


def test_what_is_read_from_the_file_gives_the_same_verdicts(tmp_path):
    """Accuracies are shares of about 500 images or of 1,000, which six digits don't
    hold."""

    def share(value, place):
        count = 489 + 7 * place
        return round(value * count) / count

    shares = {
        key: [[share(value, place), value] for place, value in enumerate(values)]
        for key, values in scores().items()
    }
    shares["m alone", None] = [0.95] * 8
    results = both_shifts(shares, losses={("m alone", None): 0.1})
    written(results, tmp_path, DECLARATION)
    table, read = results_table(results), read_table(tmp_path / "sweep.csv")
    for made in (
        lambda t: judge(t, DECLARATION),
        lambda t: differences(t, DORA, "LoRA"),
        lambda t: differences(t, DORA, "m alone"),
        under_tuned,
        means,
    ):
        both = made(table), made(read)
        assert len(both[0]) > 0
        assert_frame_equal(*both, check_dtype=False, rtol=1e-4, atol=1e-6)
    # What is tested exactly is exactly the same.
    exact = (judge(rows, DECLARATION)["p_holm"] for rows in (table, read))
    assert_series_equal(*exact, rtol=1e-12)


def test_it_is_the_same_each_time(tmp_path):
    for name in ("one", "one", "two"):
        written(both_shifts(), tmp_path / name, DECLARATION)
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
def test_ranks_that_only_one_method_has_are_left_out(tmp_path, lora):
    only = {key: SCORES[key] for key in (("LoRA", 1), ("LoRA", 4))}
    rest = {key: SCORES[key] for key in ((DORA, 1), (DORA, 4))}
    one = {(DORA, 1): SCORES[DORA, 1]}
    results = [result(only, networks=lora), result(rest)]
    results += [result(only, shift="inversion"), result(one, shift="inversion")]
    assert "## Accuracy" in written(results, tmp_path)


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.md", "sweep_rank_4.png"])
@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_file_that_cannot_be_written_stays_whole(tmp_path, monkeypatch, name, step):
    """At whichever file and step it stops, each file is the whole older one or the
    whole new one."""
    newer = [result({key: [v / 2 for v in values] for key, values in SCORES.items()})]
    written(newer, tmp_path / "new")
    written([result()], tmp_path / "out")
    before, after = files(tmp_path / "out"), files(tmp_path / "new")
    assert before["sweep.csv"] != after["sweep.csv"]

    def stops(function):
        def wrapped(self, *arguments, **options):
            target = Path(self if isinstance(self, Path) else arguments[0])
            if target.name == f".{Path(name).stem}.tmp{Path(name).suffix}":
                if step == "write":
                    target.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return function(self, *arguments, **options)

        return wrapped

    writers = [(Path, "write_text"), (Figure, "savefig")]
    with monkeypatch.context() as patch:
        for owner, method in writers if step == "write" else [(Path, "replace")]:
            patch.setattr(owner, method, stops(getattr(owner, method)))
        with pytest.raises(OSError, match="No space left on device"):
            written(newer, tmp_path / "out")
    left = files(tmp_path / "out")
    assert left.keys() == before.keys()
    for file, content in left.items():
        allowed = (before[file],) if file == name else (before[file], after[file])
        assert content in allowed
