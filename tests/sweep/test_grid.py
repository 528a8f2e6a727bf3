"""Grids become the right runs, wrong ones are refused before anything runs, and a run is known by what decides it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_utils import grid
from lowrank_utils.comparison import main
from lowrank_utils.grid import CODE, SweepError, code_version, expand, notebook_defaults, read_grids, run_id

ROOT = Path(__file__).resolve().parents[2]
SERIES = ROOT / "notebooks" / "07_comparison.ipynb"


@pytest.fixture(scope="module")
def defaults():
    return notebook_defaults(SERIES)


def test_each_combination_once_and_the_notebooks_defaults_for_the_rest(defaults):
    runs = expand([{"shift": ["rotation", "inversion"], "ranks": [1, [2, 4]], "epochs": 3}], defaults)
    assert [(run.shift, run.ranks, run.epochs) for run in runs] == [
        ("rotation", [1], 3),
        ("rotation", [2, 4], 3),
        ("inversion", [1], 3),
        ("inversion", [2, 4], 3),
    ]
    assert all(run.seeds == defaults["seeds"] for run in runs)
    # The same run in two grids is one run.
    assert len(expand([{"ranks": [1, 2]}, {"ranks": [2, 4]}], defaults)) == 3
    assert len(expand([{}], defaults)) == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": [1]}, "unknown: rank; the parameters are data_set, shift"),
        ({"result_path": ["x"]}, "unknown: result_path"),
        ({"ranks": []}, "no values for ranks"),
        ({"ranks": [[]]}, "ranks is empty"),
        ({"ranks": [0]}, "a rank must be a whole number, 1 or more; got 0"),
        ({"methods": ["QLoRA"]}, "a method must be one of"),
        ({"seeds": [[1, 1]]}, "seeds must have each entry once"),
        ({"learning_rates": [["5e-4"]]}, "YAML takes 5e-4 for text; write 5.0e-4"),
        ({"epochs": ["many"]}, "epochs must be a whole number"),
    ],
)
def test_a_wrong_grid_is_refused(values, said, defaults):
    with pytest.raises(SweepError, match=re.escape(said)):
        expand([values], defaults)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- [1, 2]", "must hold parameters and their values"),
        ("", "must hold parameters and their values"),
        ("ranks: [1", "isn't YAML"),
        ("\x00", "isn't YAML"),
        ("!!python/object/apply:os.system ['true']", "isn't YAML"),
    ],
)
def test_a_wrong_file_is_refused(text, said, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(SweepError, match=re.escape(said)):
        read_grids(path)
    with pytest.raises(SweepError, match="can't be read"):
        read_grids(tmp_path / "missing.yaml")


def test_the_default_grid_is_all_ranks_shifts_and_methods(defaults):
    runs = expand(read_grids(ROOT / "notebooks" / "comparison.yaml"), defaults)
    assert len(runs) == 4 + 4 * 6
    assert {run.shift for run in runs} == {"rotation", "permutation", "inversion", "unseen classes"}
    with_rank = [run for run in runs if "DoRA" in run.methods]
    assert sorted({rank for run in with_rank for rank in run.ranks}) == [1, 2, 4, 8, 16, 32]
    assert {method for run in runs for method in run.methods} == set(defaults["methods"])
    for run in runs:
        assert len(run.seeds) >= 10
        assert (run.epochs, run.adaptation_examples, run.learning_rates) == (
            runs[0].epochs,
            runs[0].adaptation_examples,
            runs[0].learning_rates,
        )


def test_a_run_is_known_by_its_parameters_and_the_code(defaults):
    one, two = expand([{"ranks": [1, 2]}], defaults)
    names = {run_id(one, "a"), run_id(two, "a"), run_id(one, "b")}
    assert len(names) == 3
    assert run_id(expand([{"ranks": [1]}], defaults)[0], "a") in names


def test_the_version_covers_all_code_that_an_experiment_runs():
    listing = "import sys, lowrank_utils.experiment; print(*(m for m in sys.modules if m.startswith('lowrank_utils.')))"
    loaded = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.removeprefix("lowrank_utils.") for name in loaded} == set(CODE)


def test_the_version_changes_with_code_and_not_with_words(tmp_path, monkeypatch):
    notebook = SERIES.read_text(encoding="utf-8")
    version = code_version(notebook)
    changed = json.loads(notebook)
    cells = [cell for cell in changed["cells"] if cell["cell_type"] == "code"]
    cells[0]["source"] += "\nx = 1"
    assert code_version(json.dumps(changed)) != version
    # What comes after the result was written can't change it.
    changed = json.loads(notebook)
    changed["cells"][-2 if changed["cells"][-1]["cell_type"] == "markdown" else -1]["source"] += "\nx = 1"
    assert code_version(json.dumps(changed)) == version

    for path in grid.PACKAGE.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(grid, "PACKAGE", tmp_path)
    assert code_version(notebook) == version
    lora = (tmp_path / "lora.py").read_text(encoding="utf-8")
    (tmp_path / "lora.py").write_text(
        "# A comment.\n" + lora.replace('"""LoRA: the', '"""LoRA, the'), encoding="utf-8"
    )
    assert code_version(notebook) == version
    (tmp_path / "lora.py").write_text(
        lora.replace("self.alpha * (x", "2 * self.alpha * (x"), encoding="utf-8"
    )
    assert code_version(notebook) != version


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "ranks"], "-p ranks has no values"),
        (["-p", "ranks", "1", "-p", "ranks", "2"], "-p ranks is given twice"),
        (["-p", "ranks", "[1"], "-p ranks: "),
        (["-p", "rnaks", "1"], "unknown: rnaks"),
        (["-p", "ranks", "0"], "a rank must be a whole number"),
        (["missing.yaml"], "missing.yaml can't be read"),
        (["--notebook", "missing.ipynb"], "missing.ipynb can't be read"),
        (["--jobs", "0"], "--jobs must be 1 or more; got 0"),
        (["--threads", "-2"], "--threads must be 1 or more; got -2"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_runs_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lowrank-compare: ")
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="lowrank-compare")
    assert entry.load() is main
