"""How long each notebook runs, from the start of its kernel to its last cell.

The notebooks take turns over several rounds; the median of each is what the teaching
guide plans with. The results are written to notebooks/results/running_times.json.
"""

import os
import platform
import statistics
import sys
import time
from pathlib import Path

import nbformat
import torch
from results import write_results
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

from execute_notebooks import NOTEBOOKS, execute  # noqa: E402 (found by the line above)

ROUNDS = 3


def seconds(path: Path) -> float:
    """Run the notebook in a fresh kernel, and return how long it took to its last cell;
    the file stays as it is.
    """
    notebook = nbformat.read(path, as_version=4)
    start, ends = time.perf_counter(), []
    # How long the kernel then takes to end, nobody waits for.
    execute(
        notebook,
        path.parent,
        on_cell_executed=lambda **_: ends.append(time.perf_counter()),
    )
    return ends[-1] - start


def main() -> Path:
    """Let the notebooks take turns, and return the file with the results."""
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    times: dict[str, list[float]] = {path.stem: [] for path in paths}
    with tqdm(total=ROUNDS * len(paths), unit="notebook") as bar:
        for _ in range(ROUNDS):
            for path in paths:
                bar.set_postfix_str(path.stem)
                times[path.stem].append(round(seconds(path), 2))
                bar.update()
    return write_results(
        "running_times",
        {
            "machine": {
                "cores": os.cpu_count(),
                "processor": platform.machine(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "seconds": times,
            "median": {
                name: round(statistics.median(each), 1) for name, each in times.items()
            },
        },
    )


if __name__ == "__main__":
    print(main())
