"""A notebook with the parameters of comparison.ipynb that computes nothing, so that a
sweep takes seconds."""

import _thread
import json
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from lowrank_utils.comparison.command import main
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.store import Store

ROOT = Path(__file__).resolve().parents[3]
# A sweep that takes longer is interrupted, so that it can't hold up all tests.
SECONDS = 240

# It fails where a test has planted it, waits where a test wants to interrupt it, and
# else makes up a result that depends on all parameters.
BODY = """
import hashlib, json, os, time
from pathlib import Path

if str(ranks) in os.environ.get("PLANTED_FAILURE", "").split(";"):
    raise RuntimeError(f"planted failure at {ranks}")
if os.environ.get("PLANTED_NETWORK") in map(str, networks):
    raise RuntimeError(f"planted failure above {networks}")
time.sleep(float(os.environ.get("PLANTED_SECONDS", 0)))


def made_up(*parts):
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 16**8


def choice(*cell):
    tried = {"points": [[0.01, None, [0.5]]], "score": made_up(shift, *cell), "widened": 0, "at_edge": False}
    return dict(zip(("network", "method", "rank", "steps"), cell)) | RATES | tried


def run(*cell):
    ends = {"training_loss": 0.5, "dead": False, "validation": made_up(shift, *cell), "test": made_up(shift, *cell, 1)}
    name = dict(zip(("network", "method", "rank", "steps", "seed"), cell))
    return name | {"trainable": 100, **RATES, **ends, "negative": {}}


RATES = {"learning_rate": 0.01, "factor": None}
cells = [(n, m, r, s) for n in networks for m in methods for r in ranks for s in steps]
result = {
    "settings": {name: globals()[name] for name in NAMES} | {"threads": os.environ.get("OMP_NUM_THREADS")},
    "choices": [choice(*cell) for cell in cells],
    "runs": [run(*cell, seed) for cell in cells for seed in seeds],
}
Path(result_path).write_text(json.dumps(result))
""".replace("NAMES", repr(Settings.names()))


@pytest.fixture
def notebook(tmp_path):
    """The stand-in's path."""
    source = nbformat.read(ROOT / "notebooks" / "comparison.ipynb", as_version=4)
    (parameters,) = [
        cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])
    ]
    copy = nbformat.v4.new_notebook(metadata=source.metadata)
    copy.cells = [
        nbformat.v4.new_code_cell(parameters.source, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(BODY),
    ]
    path = tmp_path / "stand_in.ipynb"
    nbformat.write(copy, path)
    return path


@pytest.fixture
def arguments(notebook, tmp_path):
    """The arguments of a sweep of the stand-in, into ``tmp_path / "out"``."""

    def build(*more, out="out"):
        fixed = [
            "-p",
            "networks",
            "[7, 8]",
            "-p",
            "methods",
            "[LoRA, DoRA with m's rate]",
        ]
        fixed += ["-p", "seeds", "[1, 2, 3]", "--out", str(tmp_path / out)]
        return ["--notebook", str(notebook), *map(str, more), *fixed]

    return build


@pytest.fixture
def command(arguments):
    """The command line of such a sweep, for a process of its own."""

    def build(*more, out="out"):
        return [
            sys.executable,
            "-m",
            "lowrank_utils.comparison",
            *arguments(*more, out=out),
        ]

    return build


class Ended(NamedTuple):
    """What a sweep left: its exit status and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def sweep(arguments, monkeypatch, capfd):
    """Run a sweep to its end in this process, which has loaded all that the command
    would load first."""

    def run(*more, out="out", **environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            capfd.readouterr()
            too_long = threading.Timer(SECONDS, _thread.interrupt_main)
            too_long.start()
            try:
                status = main(arguments(*more, out=out))
            finally:
                too_long.cancel()
        return Ended(status, *capfd.readouterr())

    return run


@pytest.fixture
def kept(tmp_path):
    """Return what a sweep keeps: the results by the run's name, those that failed, and
    all other names."""

    def read(out="out"):
        folder = tmp_path / out
        results = {
            path.name: json.loads((path / "result.json").read_text())
            for path in (folder / "runs").iterdir()
        }
        for path in (folder / "runs").iterdir():
            assert {file.name for file in path.iterdir()} == {
                "notebook.ipynb",
                "result.json",
            }
            nbformat.validate(nbformat.read(path / "notebook.ipynb", as_version=4))
        failed = {path.name: path for path in (folder / "failed").iterdir()}
        return results, failed

    return read


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.locked():
        yield store
