"""Grids become the right runs, wrong ones are refused before anything runs, and a run
is known by what decides it."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_utils.comparison import grid
from lowrank_utils.comparison.command import declaration_of, main
from lowrank_utils.comparison.grid import (
    EXPERIMENT,
    Plan,
    SweepError,
    code_of,
    code_version,
    expand,
    notebook_defaults,
    read_plan,
    run_id,
)
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
SERIES = ROOT / "notebooks" / "comparison.ipynb"


@pytest.fixture(scope="module")
def defaults():
    return notebook_defaults(SERIES)


def test_each_combination_once_and_the_notebooks_defaults_for_the_rest(defaults):
    runs = expand(
        [
            {
                "shift": ["rotation", "inversion"],
                "ranks": [1, [2, 4]],
                "pretraining_epochs": 3,
            }
        ],
        defaults,
    )
    assert [(run.shift, run.ranks, run.pretraining_epochs) for run in runs] == [
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
        ({"alpha": ["5e-4"]}, "alpha must be a finite number; got '5e-4' (str)"),
        ({"pretraining_epochs": ["many"]}, "pretraining_epochs must be a whole number"),
        ({"steps": [[128, 64]]}, "steps must begin with the shortest"),
        ({"networks": [["a"]]}, "seed must be a whole number"),
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
        ("grids: []", "holds no grid"),
        ("grids: [1]", "must hold parameters and their values"),
        ("grids:", "must hold parameters and their values"),
        (
            "{grids: {ranks: [1]}, declred: {}}",
            "must hold grids and what is declared beside them; got declred",
        ),
        ("ranks: [1", "isn't YAML"),
        ("\x00", "isn't YAML"),
        ("!!python/object/apply:os.system ['true']", "isn't YAML"),
    ],
)
def test_a_wrong_file_is_refused(text, said, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(SweepError, match=re.escape(said)):
        read_plan(path)
    with pytest.raises(SweepError, match="can't be read"):
        read_plan(tmp_path / "missing.yaml")


def test_a_file_is_a_grid_or_several_with_what_is_declared_beside_them(tmp_path):
    path = tmp_path / "grid.yaml"
    for text, plan in {
        "ranks: [1]": Plan([{"ranks": [1]}]),
        "[{ranks: [1]}, {ranks: [2]}]": Plan([{"ranks": [1]}, {"ranks": [2]}]),
        "grids: {ranks: [1]}": Plan([{"ranks": [1]}]),
        "{grids: [{ranks: [1]}], declared: {steps: [64]}}": Plan(
            [{"ranks": [1]}], {"steps": [64]}
        ),
    }.items():
        path.write_text(text, encoding="utf-8")
        assert read_plan(path) == plan


def test_the_default_grid_can_decide_what_it_declares_and_runs_every_method(defaults):
    plan = read_plan(ROOT / "notebooks" / "comparison.yaml")
    runs = expand(plan.grids, defaults)
    declaration = declaration_of(plan, runs)
    assert 1 <= len(declaration.tests) <= 5
    assert {method for run in runs for method in run.methods} == set(METHODS)
    # All methods get the same data, the same tries and the same seeds.
    for name in (
        "adaptation_examples",
        "batch_size",
        "tuning_points",
        "tuning_seeds",
        "seeds",
        "dtype",
    ):
        assert len({str(getattr(run, name)) for run in runs}) == 1, name


# Another value for each setting, also for those that a file might seldom change.
OTHERS = {
    "data_set": "mnist",
    "shift": "blur",
    "rotation": -45.5,
    "networks": [1, 2],
    "methods": ["LoRA", "DoRA with one rate"],
    "ranks": [1, 2],
    "alpha": 8.5,
    "scaling": "alpha",
    "init": "article",
    "adaptation_examples": 511,
    "batch_size": 128,
    "steps": [64, 128],
    "tuning_points": 8,
    "tuning_seeds": [101, 102],
    "seeds": [1, 2],
    "pretraining_epochs": 6,
    "dtype": "float32",
    "device": "cpu:0",
}


def test_runs_that_differ_in_any_one_setting_are_two(defaults):
    (one,) = expand([{}], defaults)
    assert list(OTHERS) == Settings.names()
    runs = [one, *(replace(one, **{name: value}) for name, value in OTHERS.items())]
    assert len({run_id(run, "a") for run in runs}) == len(runs)
    # The order of seeds or networks is another run too, and so is another version of
    # the code.
    two = replace(one, seeds=[1, 2])
    assert run_id(two, "a") != run_id(replace(two, seeds=[2, 1]), "a")
    assert run_id(one, "a") != run_id(one, "b")
    assert re.fullmatch("[0-9a-f]{16}", run_id(one, "a"))


@pytest.mark.parametrize(("name", "value"), [("alpha", 8), ("rotation", -45)])
def test_a_whole_number_is_the_same_run_as_its_decimal_fraction(name, value, defaults):
    runs = [expand([{name: v}], defaults)[0] for v in (value, float(value))]
    assert run_id(runs[0], "a") == run_id(runs[1], "a")
    # And the same as that of a sweep in another process.
    assert run_id(
        Settings.of(json.loads(json.dumps(runs[0].as_dict()))), "a"
    ) == run_id(runs[1], "a")
    assert len(expand([{name: [value, float(value)]}], defaults)) == 1


def test_the_version_covers_all_code_that_an_experiment_runs():
    listing = "import sys, lowrank_utils.comparison.experiment; print(*(m for m in sys.modules if m.startswith('lowrank_utils.')))"
    loaded = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    ).stdout.split()
    found = code_of(EXPERIMENT)
    # The folder's own file holds no code.
    assert set(loaded) - {"lowrank_utils.comparison"} == found.keys()
    assert {
        "lowrank_utils.comparison.tuning",
        "lowrank_utils.lora",
        "lowrank_utils._arguments",
    } <= found.keys()


def test_code_is_found_at_any_depth_and_in_a_circle(tmp_path, monkeypatch):
    package = tmp_path / "lowrank_utils"
    package.mkdir()
    for name, text in {
        "first": "from lowrank_utils.second import x",
        "second": "def f():\n    from lowrank_utils.third import x\nimport json",
        "third": "from lowrank_utils.first import y\nfrom os import path",
        "fourth": "",
    }.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    assert set(code_of("lowrank_utils.first")) == {
        f"lowrank_utils.{n}" for n in ("first", "second", "third")
    }


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package that the version is taken of."""
    shutil.copytree(grid.ROOT / "lowrank_utils", tmp_path / "lowrank_utils")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    return tmp_path


def test_the_version_changes_with_the_code_of_each_module_and_not_with_words(copied):
    notebook = SERIES.read_text(encoding="utf-8")
    version = code_version(notebook)
    versions = set()
    for name in code_of(EXPERIMENT):
        path = copied / f"{name.replace('.', '/')}.py"
        before = path.read_text(encoding="utf-8")
        words = re.sub(r'\A"""', '"""Other words. ', before) + "\n# A comment.\n"
        assert words.startswith('"""Other words. ')
        path.write_text(words, encoding="utf-8")
        assert code_version(notebook) == version, f"words in {name} change no result"
        path.write_text(before + "\nx = 1\n", encoding="utf-8")
        versions.add(code_version(notebook))
        path.write_text(before, encoding="utf-8")
    assert version not in versions
    assert len(versions) == len(code_of(EXPERIMENT))
    # What only shows results changes none.
    for other in ("tables", "report", "declared", "plots"):
        path = copied / "lowrank_utils/comparison" / f"{other}.py"
        path.write_text(
            path.read_text(encoding="utf-8") + "\nx = 1\n", encoding="utf-8"
        )
    assert code_version(notebook) == version


def test_the_version_changes_with_the_notebook_up_to_where_it_writes_its_result():
    notebook = SERIES.read_text(encoding="utf-8")
    version = code_version(notebook)
    cells = [
        cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"
    ]
    (written,) = [
        place
        for place, cell in enumerate(cells)
        if "write_result(" in "".join(cell["source"])
    ]
    for place in range(len(cells)):
        for added, changes in (
            ("\nx = 1", place <= written),
            ("\n# A comment.", False),
        ):
            changed = json.loads(notebook)
            code = [cell for cell in changed["cells"] if cell["cell_type"] == "code"]
            code[place]["source"] = ["".join(code[place]["source"]), added]
            assert (code_version(json.dumps(changed)) != version) == changes, (
                place,
                added,
            )


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
def test_a_wrong_command_line_is_one_line_and_runs_nothing(
    arguments, said, tmp_path, monkeypatch, capsys
):
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
