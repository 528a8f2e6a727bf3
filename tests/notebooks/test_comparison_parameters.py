"""Notebook 07 refuses wrong parameters before it trains anything, and runs with others."""

import json
import os
import subprocess
import sys

import nbformat
import papermill
import pytest

from lowrank_utils._kernels import kernel_environment
from lowrank_utils.settings import Settings

NAME = "07_comparison.ipynb"
# Small enough for seconds.
SMALL = {
    "methods": ["frozen", "magnitude", "LoRA", "DoRA", "full"],
    "ranks": [1],
    "learning_rates": [0.01],
    "epochs": 1,
    "adaptation_examples": 100,
    "seeds": [1, 2],
    "pretraining_epochs": 1,
}


@pytest.fixture
def run(root, tmp_path):
    """Run notebook 07 with papermill's command, as a user does, and return its exit status and the notebook."""

    def run_with(**parameters):
        (tmp_path / "parameters.yaml").write_text(json.dumps(parameters))
        papermill_command = [sys.executable, "-m", "papermill", str(root / "notebooks" / NAME), "out.ipynb"]
        done = subprocess.run(
            [*papermill_command, "-f", "parameters.yaml", "-k", "python3", "--no-progress-bar"],
            cwd=tmp_path,
            env=kernel_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        return done, nbformat.read(tmp_path / "out.ipynb", as_version=4)

    return run_with


def errors(notebook):
    return [
        (cell.source, output.ename, output.evalue)
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 4}, "unknown parameter: rank; the parameters are data_set, "),
        ({"ranks": [0]}, "a rank must be a whole number, 1 or more; got 0"),
    ],
)
def test_a_wrong_parameter_stops_it_before_anything_is_trained(run, wrong, said):
    """A name and a value; what else is refused, tests/unit/test_settings.py goes through."""
    done, notebook = run(**wrong)
    assert done.returncode != 0
    ((source, _, message),) = errors(notebook)
    assert said in message
    assert "settings_of_notebook" in source
    executed = [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count]
    assert not any("prepare(settings)" in source for source in executed)


# Also where there is nothing to compare.
@pytest.mark.parametrize(
    ("shift", "methods"),
    [
        ("unseen classes", SMALL["methods"]),
        ("inversion", ["frozen", "full"]),
        ("permutation", ["LoRA"]),
    ],
)
def test_another_shift_runs_to_the_end_and_writes_its_result(run, tmp_path, shift, methods):
    done, notebook = run(
        **SMALL | {"methods": methods}, shift=shift, result_path=str(tmp_path / "result.json")
    )
    assert done.returncode == 0, done.stderr
    assert not errors(notebook)
    result = json.loads((tmp_path / "result.json").read_text())
    assert Settings.of(result["settings"]).shift == shift
    assert len(result["runs"]) == len(methods) * 2


@pytest.mark.skipif(
    "LOWRANK_DATA_DIR" not in os.environ, reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST"
)
def test_the_whole_mnist_runs_to_the_end(run, tmp_path):
    done, notebook = run(**SMALL, data_set="mnist", result_path=str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert not errors(notebook)
    printed = [
        o.text for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"
    ]
    assert any("digits to report:            10,000" in text for text in printed)


def test_every_parameter_is_typed_and_explained(root):
    parameters = papermill.inspect_notebook(str(root / "notebooks" / NAME))
    assert set(parameters) == {*Settings.names(), "result_path"}
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] in {"str", "int", "float", "list"}
        assert parameter["help"]
