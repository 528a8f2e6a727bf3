"""From a clone to the first executed cell: how long each step takes, and how much it
puts on the disk.

The project is cloned into an empty folder and set up as ``make lab`` does it, from a
bare Python and with nothing in the caches; the time for that is mostly the network's
and the disk's. Then a kernel starts and runs the first code cell of notebook 01. How
long parts of the package take to import is measured with files that are in memory
already, several times in turn. The results are written to
notebooks/results/first_cell.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import write_results
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

# What is imported, and how often.
IMPORTS = {
    "nothing": "pass",
    "torch": "import torch",
    "the layers": "import lowrank_utils.adapt, lowrank_utils.adapters, lowrank_utils.dora, lowrank_utils.lora",
    "data and training": "import lowrank_utils.data, lowrank_utils.training",
    "all that the notebooks import": "import lowrank_utils.adapters, lowrank_utils.checks, lowrank_utils.dora, "
    "lowrank_utils.interactive, lowrank_utils.plots, lowrank_utils.training, lowrank_utils.comparison.plots",
}
ROUNDS = 7

# Runs in the new environment, with the notebook's folder as its own.
FIRST_CELL = """
import json, time
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read("01_low_rank_updates.ipynb", as_version=4)
place = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
client, start = NotebookClient(notebook), time.perf_counter()
with client.setup_kernel():
    ready = time.perf_counter()
    client.execute_cell(notebook.cells[place], place)
    print(json.dumps([ready - start, time.perf_counter() - ready]))
"""


def timed(*command: str | Path, cwd: Path) -> float:
    """Run a command and return how many seconds it took."""
    # Only this file's own commands, and never through a shell.
    start = time.perf_counter()
    subprocess.run(  # noqa: S603
        list(map(str, command)), cwd=cwd, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def bytes_in(folder: Path) -> int:
    """Return the size of all files below a folder; links count as nothing."""
    return sum(
        path.lstat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def import_seconds(python: Path, folder: Path) -> dict[str, float]:
    """Return the median time of each import, in a Python of its own."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(ROUNDS):
        for name, code in IMPORTS.items():
            times[name].append(timed(python, "-c", code, cwd=folder))
    return {name: round(statistics.median(each), 2) for name, each in times.items()}


def main() -> Path:
    """Measure all steps, and return the file with the results."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, tqdm(total=4, unit="step") as bar:
        clone = Path(name) / "clone"
        # As on a machine where nothing was installed yet, and where Python keeps what
        # it compiles.
        os.environ |= {"UV_CACHE_DIR": f"{name}/uv", "PIP_CACHE_DIR": f"{name}/pip"}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        bar.set_postfix_str("clone")
        seconds["clone"] = timed(
            "git", "clone", "-q", "--depth=1", ROOT.as_uri(), clone, cwd=Path(name)
        )
        bar.update()
        bar.set_postfix_str("environment")
        seconds["environment"] = timed(
            sys.executable, "tools/environment.py", "lab", "--version", cwd=clone
        )
        bar.update()
        bar.set_postfix_str("first cell")
        python = (
            clone
            / ".venv"
            / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        )
        first = subprocess.run(  # noqa: S603
            [python, "-c", FIRST_CELL],
            cwd=clone / "notebooks",
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds["kernel"], seconds["first cell"] = json.loads(
            first.stdout.splitlines()[-1]
        )
        bar.update()
        bar.set_postfix_str("imports")
        imports = import_seconds(python, clone)
        bar.update()
        sizes = {
            "clone": bytes_in(clone) - bytes_in(clone / ".venv"),
            "environment": bytes_in(clone / ".venv"),
        }
    return write_results(
        "first_cell",
        {
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.machine(),
                "python": platform.python_version(),
            },
            "seconds": {step: round(value, 1) for step, value in seconds.items()},
            "megabytes": {what: round(size / 1e6, 1) for what, size in sizes.items()},
            "import_seconds": imports,
        },
    )


if __name__ == "__main__":
    print(main())
