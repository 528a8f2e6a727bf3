"""comparison.ipynb refuses wrong parameters before it trains anything, and runs with
others."""

import json
import os
import subprocess
import sys

import nbformat
import papermill
import pytest

from lowrank_utils.comparison.grid import notebook_defaults
from lowrank_utils.comparison.kernels import kernel_environment
from lowrank_utils.comparison.settings import Settings, settings_of_notebook

NAME = "comparison.ipynb"
# Small enough for seconds.
SMALL = {
    "networks": [1, 2],
    "methods": ["frozen", "m alone", "LoRA", "DoRA with m's rate", "full"],
    "ranks": [1],
    "adaptation_examples": 100,
    "steps": [2],
    "tuning_points": 1,
    "tuning_seeds": [901],
    "seeds": [1],
    "pretraining_epochs": 1,
}


@pytest.fixture
def run(root, tmp_path):
    """Run it with papermill's command, as a user does, and return its exit status and
    the notebook."""

    def run_with(**parameters):
        (tmp_path / "parameters.yaml").write_text(json.dumps(parameters))
        papermill_command = [
            sys.executable,
            "-m",
            "papermill",
            str(root / "notebooks" / NAME),
            "out.ipynb",
        ]
        done = subprocess.run(
            [
                *papermill_command,
                "-f",
                "parameters.yaml",
                "-k",
                "python3",
                "--no-progress-bar",
            ],
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
    """A name and a value; what else is refused, tests/unit/comparison/test_settings.py
    goes through."""
    done, notebook = run(**wrong)
    assert done.returncode != 0
    ((source, _, message),) = errors(notebook)
    assert said in message
    assert "settings_of_notebook" in source
    executed = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.execution_count
    ]
    assert not any("run_experiment(settings)" in source for source in executed)


# Also where there is nothing to compare.
@pytest.mark.parametrize(
    ("shift", "methods"),
    [
        ("unseen classes", SMALL["methods"]),
        ("inversion", ["frozen", "full"]),
        ("permutation", ["LoRA"]),
    ],
)
def test_another_shift_runs_to_the_end_and_writes_its_result(
    run, tmp_path, shift, methods
):
    done, notebook = run(
        **SMALL | {"methods": methods},
        shift=shift,
        result_path=str(tmp_path / "result.json"),
    )
    assert done.returncode == 0, done.stderr
    assert not errors(notebook)
    result = json.loads((tmp_path / "result.json").read_text())
    assert Settings.of(result["settings"]).shift == shift
    assert len(result["runs"]) == len(methods) * 2
    assert len(result["choices"]) == (len(methods) - ("frozen" in methods)) * 2
    # What a user sees of it is a line for each method, and the plot.
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(
        output.text for output in outputs if output.output_type == "stream"
    )
    assert all(method in printed for method in methods)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.skipif(
    "LOWRANK_DATA_DIR" not in os.environ,
    reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST",
)
def test_the_whole_mnist_runs_to_the_end(run, tmp_path):
    done, notebook = run(
        **SMALL, data_set="mnist", result_path=str(tmp_path / "result.json")
    )
    assert done.returncode == 0, done.stderr
    assert not errors(notebook)
    result = json.loads((tmp_path / "result.json").read_text())
    assert Settings.of(result["settings"]).data_set == "mnist"
    assert len(result["runs"]) == len(SMALL["methods"]) * 2


def test_every_parameter_is_typed_and_explained(root):
    parameters = papermill.inspect_notebook(str(root / "notebooks" / NAME))
    assert set(parameters) == {*Settings.names(), "result_path"}
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] in {"str", "int", "float", "list"}
        assert parameter["help"]
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            "--help-notebook",
            str(root / "notebooks" / NAME),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name, parameter in parameters.items():
        assert f"{name}: {parameter['inferred_type_name']} (default " in shown


def test_its_variables_are_the_settings_and_its_defaults_are_allowed(root):
    defaults = notebook_defaults(root / "notebooks" / NAME)
    assert settings_of_notebook(defaults) == Settings.of(
        {name: value for name, value in defaults.items() if name != "result_path"}
    )
    # papermill itself only logs a parameter that the notebook doesn't have, and runs
    # with the defaults.
    for given in ("rank = 4", "learning_rates = [0.1]", "epochs = 3"):
        history = ["", f"# Parameters\n{given}\nseeds = [5]\n"]
        with pytest.raises(
            ValueError,
            match=f"unknown parameter: {given.split()[0]}; the parameters are",
        ):
            settings_of_notebook(defaults | {"In": history})
