"""A notebook with the parameters of comparison.ipynb that computes nothing, so that a
sweep takes seconds."""

import _thread
import json
import sys
import threading
from pathlib import Path

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
    tag = {"tags": ["parameters"]}
    (parameters,) = [c for c in source.cells if tag.items() <= c.metadata.items()]
    cell, copy = nbformat.v4.new_code_cell, nbformat.v4.new_notebook
    cells = [cell(parameters.source, metadata=tag), cell(BODY)]
    path = tmp_path / "stand_in.ipynb"
    nbformat.write(copy(metadata=source.metadata, cells=cells), path)
    return path


@pytest.fixture
def arguments(notebook, tmp_path):
    """The arguments of a sweep of the stand-in, into ``tmp_path / "out"``."""

    def build(*more, out="out", networks=("[7, 8]",)):
        fixed = ["-p", "networks", *networks, "-p", "seeds", "[1, 2, 3]"]
        fixed += ["-p", "methods", "[LoRA, DoRA with m's rate]"]
        fixed += ["--out", tmp_path / out]
        return [str(word) for word in ("--notebook", notebook, *more, *fixed)]

    return build


@pytest.fixture
def command(arguments):
    """The command line of such a sweep, for a process of its own."""
    return lambda *more: [
        *(sys.executable, "-m", "lowrank_utils.comparison"),
        *arguments(*more),
    ]


@pytest.fixture
def sweep(arguments, monkeypatch, capfd):
    """Run a sweep to its end in this process, which has loaded all that the command
    would load first, and return what it printed."""

    def run(*more, status=0, out="out", networks=("[7, 8]",), **environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            capfd.readouterr()
            too_long = threading.Timer(SECONDS, _thread.interrupt_main)
            too_long.start()
            try:
                found = main(arguments(*more, out=out, networks=networks))
            finally:
                too_long.cancel()
        printed = capfd.readouterr()
        assert found == status, printed.err
        assert "Traceback" not in printed.err
        return printed

    return run


@pytest.fixture
def kept(tmp_path):
    """Return what a sweep keeps: the results by the run's name, and the folders of
    those that failed."""

    def read(out="out"):
        folder, results = tmp_path / out, {}
        for path in (folder / "runs").iterdir():
            names = sorted(file.name for file in path.iterdir())
            assert names == ["notebook.ipynb", "result.json"]
            nbformat.validate(nbformat.read(path / "notebook.ipynb", as_version=4))
            results[path.name] = json.loads((path / "result.json").read_text())
        return results, list((folder / "failed").iterdir())

    return read


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.locked():
        yield store
