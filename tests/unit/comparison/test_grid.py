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
    lists = {"shift": ["rotation", "inversion"], "ranks": [1, [2, 4]]}
    runs = expand([lists | {"pretraining_epochs": 3}], defaults)
    assert [(run.shift, run.ranks) for run in runs] == [
        ("rotation", [1]),
        ("rotation", [2, 4]),
        ("inversion", [1]),
        ("inversion", [2, 4]),
    ]
    rest = (3, defaults["seeds"])
    assert all((run.pretraining_epochs, run.seeds) == rest for run in runs)
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


NO_GRID = "must hold parameters and their values"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- [1, 2]", NO_GRID),
        ("", NO_GRID),
        ("grids: []", "holds no grid"),
        ("grids: [1]", NO_GRID),
        ("grids:", NO_GRID),
        (
            "{grids: {ranks: [1]}, declred: {}}",
            "what is declared beside them; got declred",
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
    one, two = {"ranks": [1]}, {"ranks": [2]}
    for text, plan in {
        "ranks: [1]": Plan([one]),
        "[{ranks: [1]}, {ranks: [2]}]": Plan([one, two]),
        "grids: {ranks: [1]}": Plan([one]),
        "{grids: [{ranks: [1]}], declared: {steps: [64]}}": Plan(
            [one], {"steps": [64]}
        ),
    }.items():
        path.write_text(text, encoding="utf-8")
        assert read_plan(path) == plan


def test_the_default_grid_can_decide_what_it_declares_and_runs_every_method(defaults):
    plan = read_plan(ROOT / "notebooks" / "comparison.yaml")
    runs = expand(plan.grids, defaults)
    assert 1 <= len(declaration_of(plan, runs).tests) <= 5
    assert {method for run in runs for method in run.methods} == set(METHODS)
    # All methods get the same data, the same tries and the same seeds.
    same = "adaptation_examples batch_size tuning_points tuning_seeds seeds dtype"
    for name in same.split():
        assert len({str(getattr(run, name)) for run in runs}) == 1, name


# Another value for each setting, also for those that a file might seldom change.
OTHERS = {"data_set": "mnist", "shift": "blur", "rotation": -45.5, "networks": [1, 2]}
OTHERS |= {"methods": ["LoRA", "DoRA with one rate"], "ranks": [1, 2], "alpha": 8.5}
OTHERS |= {"scaling": "alpha", "init": "article", "adaptation_examples": 511}
OTHERS |= {"batch_size": 128, "steps": [64, 128], "tuning_points": 8}
OTHERS |= {"tuning_seeds": [101, 102], "seeds": [1, 2], "pretraining_epochs": 6}
OTHERS |= {"dtype": "float32", "device": "cpu:0"}


def test_runs_that_differ_in_any_one_setting_are_two(defaults):
    (one,) = expand([{}], defaults)
    assert list(OTHERS) == Settings.names()
    runs = [one, *(replace(one, **{name: value}) for name, value in OTHERS.items())]
    # The order of seeds or networks is another run too, and so is another version of
    # the code.
    runs.append(replace(one, seeds=[2, 1]))
    names = {run_id(run, "a") for run in runs} | {run_id(one, "b")}
    assert len(names) == len(runs) + 1
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)


@pytest.mark.slow
def test_the_version_covers_all_code_that_an_experiment_runs():
    listing = f"import sys, {EXPERIMENT}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    loaded = {m for m in run.stdout.split() if m.startswith("lowrank_utils.")}
    # The folder's own file holds no code.
    assert loaded - {"lowrank_utils.comparison"} == code_of(EXPERIMENT).keys()
    for name in ("comparison.tuning", "lora", "_arguments"):
        assert f"lowrank_utils.{name}" in loaded


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
    found = {
        name.removeprefix("lowrank_utils.") for name in code_of("lowrank_utils.first")
    }
    assert found == {"first", "second", "third"}


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the package that the version is taken of."""
    shutil.copytree(grid.ROOT / "lowrank_utils", tmp_path / "lowrank_utils")
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_version_changes_with_the_code_of_each_module_and_not_with_words(copied):
    notebook = SERIES.read_text(encoding="utf-8")
    versions = {code_version(notebook)}
    modules = code_of(EXPERIMENT)
    for name, before in modules.items():
        path = copied / f"{name.replace('.', '/')}.py"
        words = re.sub(r'\A"""', '"""Other words. ', before) + "\n# A comment.\n"
        assert words.startswith('"""Other words. ')
        path.write_text(words, encoding="utf-8")
        assert code_version(notebook) in versions, f"words in {name} change no result"
        # Each change stays, so each version is another than all before.
        path.write_text(before + "\nx = 1\n", encoding="utf-8")
        versions.add(code_version(notebook))
    assert len(versions) == 1 + len(modules)
    # What only shows results changes none.
    for other in ("tables", "report", "declared", "plots"):
        path = copied / "lowrank_utils/comparison" / f"{other}.py"
        path.write_text("x = 1\n", encoding="utf-8")
    assert code_version(notebook) in versions


@pytest.mark.slow
def test_the_version_changes_with_the_notebook_up_to_where_it_writes_its_result():
    def code(notebook):
        return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]

    text = SERIES.read_text(encoding="utf-8")
    sources = ["".join(cell["source"]) for cell in code(json.loads(text))]
    (written,) = [n for n, source in enumerate(sources) if "write_result(" in source]
    for place, source in enumerate(sources):
        for added, changes in (("x = 1", place <= written), ("# A comment.", False)):
            changed = json.loads(text)
            code(changed)[place]["source"] = f"{source}\n{added}"
            found = code_version(json.dumps(changed)) != code_version(text)
            assert found == changes, (place, added)


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
