"""Speed and memory of one adapted layer, forward and backward, beside full fine-tuning,
the frozen layer and PEFT.

The frozen layer, which computes its output and the gradient of its input, is the limit:
every adapter does that and something more. In each round all methods take their turn in
a new order, so that a busy machine slows all of them, and ratios are taken within a
round. "DoRA, frozen_weights" is DoRA with the promise of that name, "evaluation" the
forward pass alone, without gradients and with the promise ``constant_weights`` (in PEFT
with its ``DoraCaching``), and "step" a pass and then a step of Adam.
Memory is the peak of what torch allocates in one pass beyond weights and input:
gradients, too. The results are written to notebooks/results/adapter_speed.json.
"""

import copy
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from results import write_results
from torch import nn
from tqdm import tqdm

from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged
from lowrank_utils.promises import constant_weights, frozen_weights

try:
    import peft
except ImportError:
    peft = None

SIZES = [(784, 128), (1024, 1024), (4096, 4096)]
BATCHES = [64, 512]
RANKS = [4, 8, 64]
# Rounds per setting: as many as fit into the seconds, within limits.
SECONDS, LEAST, MOST = 4.0, 5, 61
OURS = {
    "LoRA": LinearWithLoRA,
    "LoRA, merged": LinearWithLoRAMerged,
    "DoRA": LinearWithDoRA,
    "DoRA, frozen_weights": LinearWithDoRA,
    "DoRA, merged": LinearWithDoRAMerged,
}
KINDS = [", evaluation", ", step"]
STEPS = ["full", "LoRA", "DoRA", "DoRA, frozen_weights", "PEFT LoRA", "PEFT DoRA"]


def peft_layer(linear: nn.Linear, rank: int, dora: bool) -> nn.Module:
    """Return PEFT's adapted layer around ``linear``."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["0"], use_dora=dora
    )
    return peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]


def caching_of_peft() -> AbstractContextManager[object]:
    """Let PEFT's DoRA keep its norms in evaluation."""
    if peft is None:
        return nullcontext()
    from peft.helpers import DoraCaching

    caching: AbstractContextManager[object] = DoraCaching()
    return caching


def layers(in_dim: int, out_dim: int, rank: int) -> dict[str, nn.Module]:
    """Return the layer as each method has it, all with the same frozen weight, and B
    moved as in training.
    """
    frozen = nn.Linear(in_dim, out_dim).requires_grad_(False)
    full = nn.Linear(in_dim, out_dim)
    adapted: dict[str, nn.Module] = {
        "frozen": frozen,
        "full": full,
        **{
            name: layer_class(frozen, rank, 2.0, init="peft")
            for name, layer_class in OURS.items()
        },
    }
    if peft is not None:
        adapted |= {
            f"PEFT {kind}": peft_layer(frozen, rank, kind == "DoRA")
            for kind in ("LoRA", "DoRA")
        }
    for layer in adapted.values():
        for name, parameter in layer.named_parameters():
            if name.endswith((".B", "lora_B.default.weight")):
                nn.init.normal_(parameter, std=0.02)
    return adapted


def drop_gradients(layer: nn.Module, x: torch.Tensor) -> None:
    """Free the gradients of the last pass."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


def training_pass(
    layer: nn.Module, x: torch.Tensor, grad: torch.Tensor
) -> Callable[[], None]:
    """Return a function that runs ``layer`` forward and backward once."""

    def run() -> None:
        drop_gradients(layer, x)
        layer(x).backward(grad)

    return run


def step(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs ``layer`` forward and backward, and lets Adam change
    what is trained.
    """
    trained = [p for p in layer.parameters() if p.requires_grad]
    # So small a rate that the numbers stay what they are.
    adam = torch.optim.Adam(trained, lr=1e-9)
    run = training_pass(layer, x, grad)

    def run_and_step() -> None:
        run()
        adam.step()

    return run_and_step


def evaluation_pass(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return a function that runs ``layer`` forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def measure(
    passes: dict[str, Callable[[], None]], order: random.Random, seconds: float
) -> dict[str, list[float]]:
    """Return the milliseconds of each pass, one per round."""
    for run in passes.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in passes}
    names, start = list(passes), time.perf_counter()
    for done in range(MOST):
        if done >= LEAST and time.perf_counter() - start > seconds:
            break
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            passes[name]()
            times[name].append(round(1e3 * (time.perf_counter() - begin), 4))
    return times


def peak_bytes(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> int:
    """Return the most that torch's allocator held in a training pass, beyond what it
    held before.
    """
    run = training_pass(layer, x, grad)
    run()
    drop_gradients(layer, x)
    return most_allocated(run)


def most_allocated(run: Callable[[], None]) -> int:
    """Return the most bytes that torch's allocator held while ``run`` ran, beyond what
    it held before.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    # The profiler's own list of events keeps only what no operation claimed; this one
    # has every allocation.
    found = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [
        (event.start_ns(), event.nbytes())
        for event in found
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events):
        held += size
        peak = max(peak, held)
    return peak


def setting(
    in_dim: int, out_dim: int, batch: int, rank: int, threads: list[int], bar: tqdm
) -> list[dict[str, Any]]:
    """Return one row per number of threads and method."""
    order, rows = random.Random(0), []
    torch.manual_seed(0)
    adapted = layers(in_dim, out_dim, rank)
    x = torch.randn(batch, in_dim, requires_grad=True)
    grad = torch.randn(batch, out_dim)
    training = {name: training_pass(layer, x, grad) for name, layer in adapted.items()}
    peaks = {}
    for name, layer in adapted.items():
        peaks[name] = peak_bytes(layer, x, grad)
        drop_gradients(layer, x)
    steps = {
        f"{name}, step": step(layer, x, grad)
        for name, layer in adapted.items()
        if name in STEPS
    }
    steps["frozen, step"] = training["frozen"]
    in_evaluation = {
        name: copy.deepcopy(layer).eval()
        for name, layer in adapted.items()
        if name == "frozen" or name.endswith(("LoRA", "DoRA"))
    }
    evaluation = {
        f"{name}, evaluation": evaluation_pass(layer, x)
        for name, layer in in_evaluation.items()
    }
    for count in threads:
        bar.set_postfix_str(
            f"{in_dim} → {out_dim}, batch {batch}, rank {rank}, {count} threads"
        )
        torch.set_num_threads(count)
        with frozen_weights(adapted["DoRA, frozen_weights"]):
            found = measure(training, order, SECONDS)
        found |= measure(steps, order, SECONDS / 2)
        with (
            constant_weights(nn.ModuleList(in_evaluation.values())),
            caching_of_peft(),
        ):
            found |= measure(evaluation, order, SECONDS / 2)
        for name, times in found.items():
            rows.append(
                {
                    "in": in_dim,
                    "out": out_dim,
                    "batch": batch,
                    "rank": rank,
                    "threads": count,
                    "method": name,
                    "milliseconds": times,
                    "peak_bytes": peaks.get(name),
                }
            )
        bar.update()
    return rows


def ratio(
    rows: list[dict[str, Any]], method: str, to: str, **where: int
) -> dict[str, float]:
    """Return how many times as long ``method`` takes as ``to``: the median over the
    rounds, and the quartiles.
    """
    chosen = {
        row["method"]: row["milliseconds"]
        for row in rows
        if all(row[key] == where[key] for key in where)
    }
    ratios = [
        first / second for first, second in zip(chosen[method], chosen[to], strict=True)
    ]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


def main() -> Path:
    """Measure everything, and return the file with the results."""
    threads = sorted({1, os.cpu_count() or 1})
    before, rows = torch.get_num_threads(), []
    with tqdm(
        total=len(SIZES) * len(BATCHES) * len(RANKS) * len(threads), unit="setting"
    ) as bar:
        for in_dim, out_dim in SIZES:
            for batch in BATCHES:
                for rank in RANKS:
                    rows += setting(in_dim, out_dim, batch, rank, threads, bar)
    torch.set_num_threads(before)
    summary = []
    for row in rows:
        where = {key: row[key] for key in ("in", "out", "batch", "rank", "threads")}
        method = row["method"]
        kind = next((end for end in KINDS if method.endswith(end)), "")
        summary.append(
            {
                **where,
                "method": method,
                "milliseconds": round(statistics.median(row["milliseconds"]), 3),
                "rounds": len(row["milliseconds"]),
                "to_frozen": ratio(rows, method, f"frozen{kind}", **where),
                "to_lora": ratio(rows, method, f"LoRA{kind}", **where),
                "peak_bytes": row["peak_bytes"],
            }
        )
        if kind == ", step":
            summary[-1]["to_full"] = ratio(rows, method, "full, step", **where)
        if peft is not None and method.removesuffix(kind) in ("LoRA", "DoRA"):
            summary[-1]["peft_to_this"] = ratio(rows, f"PEFT {method}", method, **where)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if peft is not None:
        versions["peft"] = peft.__version__
    machine = {"cores": os.cpu_count(), "processor": platform.machine()}
    return write_results(
        "adapter_speed",
        {
            "machine": machine,
            "versions": versions,
            "dtype": "float32",
            "settings": summary,
        },
    )


if __name__ == "__main__":
    print(main())
