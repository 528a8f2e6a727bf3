"""How much faster a sweep of 12 runs is with two workers than with one.

Both take turns, so that a busy machine slows both. Each run is comparison.ipynb with
two methods above one network, in a new folder. The results are written to
notebooks/results/sweep_speed.json.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import write_results
from tqdm import tqdm

ROUNDS = 2
RUNS = 12
PARAMETERS = {
    # A single value stands for a list of one, and so each network is a run.
    "networks": [str(seed) for seed in range(RUNS)],
    "methods": ["[LoRA, DoRA with m's rate]"],
    "adaptation_examples": ["1000"],
}


def seconds(workers: int) -> float:
    """Run the sweep with ``workers`` and one thread each, and return how long it
    took.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "lowrank_utils.comparison",
            "--out",
            folder,
            "--jobs",
            str(workers),
        ]
        for name, values in PARAMETERS.items():
            command += ["-p", name, *values]
        start = time.perf_counter()
        subprocess.run(  # noqa: S603
            [*command, "--threads", "1"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - start


def main() -> Path:
    """Let one and two workers take turns, and return the file with the results."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with tqdm(total=ROUNDS * len(times), unit="sweep") as bar:
        for _ in range(ROUNDS):
            for workers, measured in times.items():
                bar.set_postfix_str(f"{workers} at a time")
                measured.append(seconds(workers))
                bar.update()
    ratios = [one / two for one, two in zip(times[1], times[2], strict=True)]
    return write_results(
        "sweep_speed",
        {
            "machine": {
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "runs": RUNS,
            "ratio": {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
            "seconds": {str(workers): measured for workers, measured in times.items()},
        },
    )


if __name__ == "__main__":
    print(main())
