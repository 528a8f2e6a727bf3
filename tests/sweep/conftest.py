"""A notebook with the parameters of notebook 07 that computes nothing, so that a sweep takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]

# It fails where a test has planted it, waits where a test wants to interrupt it, and else makes up a result
# that depends on all parameters.
BODY = """
import hashlib, json, os, time
from pathlib import Path

if str(ranks) in os.environ.get("PLANTED_FAILURE", "").split(";"):
    raise RuntimeError(f"planted failure at {ranks}")
time.sleep(float(os.environ.get("PLANTED_SECONDS", 0)))


def made_up(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 16**8


def run(method, rank, seed):
    ends = {"validation": [made_up(shift, method, rank, seed)], "test": made_up(shift, method, rank, seed, 1)}
    return {"method": method, "rank": rank, "trainable": 100, "learning_rate": 0.01, "seed": seed, **ends, "changes": []}


names = "data_set shift rotation adaptation_examples epochs alpha scaling init".split()
result = {
    "settings": {name: globals()[name] for name in names} | {"threads": os.environ.get("OMP_NUM_THREADS")},
    "learning_rates": [{"method": m, "rank": r, "at_edge": False} for m in methods for r in ranks],
    "runs": [run(method, rank, seed) for method in methods for rank in ranks for seed in seeds],
}
Path(result_path).write_text(json.dumps(result))
"""


@pytest.fixture
def notebook(tmp_path):
    """The stand-in's path."""
    source = nbformat.read(ROOT / "notebooks" / "07_comparison.ipynb", as_version=4)
    (parameters,) = [cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])]
    copy = nbformat.v4.new_notebook(metadata=source.metadata)
    copy.cells = [
        nbformat.v4.new_code_cell(parameters.source, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BODY),
    ]
    path = tmp_path / "stand_in.ipynb"
    nbformat.write(copy, path)
    return path


@pytest.fixture
def command(notebook, tmp_path):
    """The command line of a sweep of the stand-in, into ``tmp_path / "out"``."""

    def build(*arguments, out="out"):
        start = [sys.executable, "-m", "lowrank_utils.comparison", "--notebook", str(notebook)]
        fixed = ["-p", "methods", "[LoRA, DoRA]", "-p", "seeds", "[1, 2, 3]", "--out", str(tmp_path / out)]
        return [*start, *fixed, *map(str, arguments)]

    return build


@pytest.fixture
def sweep(command):
    """Run a sweep to its end, and return its exit status and what it printed."""

    def run(*arguments, out="out", **environment):
        return subprocess.run(
            command(*arguments, out=out),
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture
def kept(tmp_path):
    """Return what a sweep keeps: the results by the run's name, those that failed, and all other names."""

    def read(out="out"):
        folder = tmp_path / out
        results = {
            path.name: json.loads((path / "result.json").read_text()) for path in (folder / "runs").iterdir()
        }
        for path in (folder / "runs").iterdir():
            assert {file.name for file in path.iterdir()} == {"notebook.ipynb", "result.json"}
            nbformat.validate(nbformat.read(path / "notebook.ipynb", as_version=4))
        failed = {path.name: path for path in (folder / "failed").iterdir()}
        return results, failed

    return read
