"""Time of a linear layer with LoRA in its two forms, beside the layer alone: what the
formulas of notebook 3 count as multiplications, by the clock.

"forward" is a pass without gradients, "training" forward and backward as in
adapter_speed.py. In each round all methods take their turn in a new order, and ratios
are taken within a round. One thread, float32. The results are written to
notebooks/results/merged_forms.json.
"""

import os
import platform
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from adapter_speed import evaluation_pass, layers, measure, training_pass
from results import write_results
from tqdm import tqdm

SIZES = [(784, 128), (1024, 1024), (4096, 4096)]
BATCHES = [1, 16, 64, 256, 1024, 4096]
RANK, SECONDS = 4, 4.0
METHODS = {"frozen": "frozen", "LoRA": "unmerged", "LoRA, merged": "merged"}


def setting(in_dim: int, out_dim: int, batch: int) -> dict[str, Any]:
    """Return how many times as long as the frozen layer each form takes."""
    torch.manual_seed(0)
    adapted = layers(in_dim, out_dim, RANK)
    x, grad = torch.randn(batch, in_dim), torch.randn(batch, out_dim)
    forward = {name: evaluation_pass(adapted[key], x) for key, name in METHODS.items()}
    x = x.clone().requires_grad_()
    training = {
        name: training_pass(adapted[key], x, grad) for key, name in METHODS.items()
    }
    row: dict[str, Any] = {"in": in_dim, "out": out_dim, "batch": batch}
    for kind, passes in {"forward": forward, "training": training}.items():
        found = measure(passes, random.Random(0), SECONDS)
        row[kind] = {
            name: round(
                statistics.median(
                    a / b for a, b in zip(times, found["frozen"], strict=True)
                ),
                3,
            )
            for name, times in found.items()
        }
        row[f"{kind}_milliseconds"] = round(statistics.median(found["frozen"]), 3)
    return row


def main() -> Path:
    """Measure everything, and return the file with the results."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = [(*size, batch) for size in SIZES for batch in BATCHES]
    rows = [setting(*each) for each in tqdm(settings, unit="setting")]
    torch.set_num_threads(before)
    return write_results(
        "merged_forms",
        {
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "versions": {
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "dtype": "float32",
            "threads": 1,
            "rank": RANK,
            "settings": rows,
        },
    )


if __name__ == "__main__":
    print(main())
