"""Time of one batch of which every row belongs to one of several customers, beside the
base layer alone.

A bank serves the batch in one pass ("LoRA", "DoRA"). Beside it stand the bank switched
from customer to customer, a merged copy of the layer for each of them, PEFT's mixed
batches (which it has for LoRA alone), and the forms that the bank doesn't use: A and B
gathered for every row, and all A side by side, of which each row keeps its own columns.
In each round all methods take their turn in a new order, and ratios are taken within a
round. The customers' rows come in a fixed random order, and the bank opens a block for
each batch, as a server does. The results are written to
notebooks/results/mixed_batches.json.
"""

import copy
import os
import platform
import random
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from adapter_speed import measure, peft
from results import write_results
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_utils.adapters import AdapterBank
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA, LoRALayer

SIZES = [768, 1024, 4096]
# (customers, rows, positions of a row)
BATCHES = [
    (1, 1, 1),
    (8, 8, 1),
    (1, 64, 1),
    (8, 64, 1),
    (64, 64, 1),
    (8, 64, 16),
    (64, 64, 16),
    (8, 8, 512),
    (64, 64, 128),
]
RANK, SECONDS = 8, 4.0
KINDS = {"LoRA": LinearWithLoRA, "DoRA": LinearWithDoRA}
Pass = Callable[[], Any]


def customers_of(base: nn.Module, kind: str, count: int) -> list[nn.Module]:
    """Return models with an adapter each around the one layer of ``base``, and B moved
    as in training.
    """
    models = []
    for _ in range(count):
        adapted = KINDS[kind](base[0], RANK, 2.0, init="peft")
        nn.init.normal_(adapted.lora.B, std=0.02)
        models.append(nn.Sequential(adapted))
    return models


def served(bank: AdapterBank, x: Tensor, who: list[str]) -> Pass:
    """Return a pass in which every row has its own adapter."""

    def run() -> None:
        with bank.rows(who):
            bank.model(x)

    return run


def one_after_another(
    switch: Callable[[str], nn.Module], x: Tensor, groups: dict[str, Tensor]
) -> Pass:
    """Return a pass in which each customer's rows are computed by themselves."""

    def run() -> None:
        y = torch.empty_like(x)
        for name, rows in groups.items():
            y[rows] = switch(name)(x[rows])

    return run


def switching(bank: AdapterBank) -> Callable[[str], nn.Module]:
    """Return how a bank's model is made one customer's."""

    def switch(name: str) -> nn.Module:
        bank.activate(name)
        return bank.model

    return switch


def gathered(
    linear: nn.Linear, loras: list[LoRALayer], x: Tensor, who: list[int]
) -> Pass:
    """Return a pass that gathers an A and a B for every row."""
    A = torch.stack([lora.A.detach() for lora in loras])
    B = torch.stack([lora.alpha * lora.B.detach() for lora in loras])
    rows = torch.tensor(who)

    def run() -> None:
        between = torch.bmm(x.reshape(len(who), -1, A.shape[1]), A[rows])
        linear(x) + torch.bmm(between, B[rows]).view(x.shape)

    return run


def side_by_side(
    linear: nn.Linear, loras: list[LoRALayer], x: Tensor, who: list[int]
) -> Pass:
    """Return a pass that multiplies with all A and all B, and keeps of every row what
    is its own.
    """
    A = torch.cat([lora.A.detach() for lora in loras], dim=1)
    B = torch.cat([lora.alpha * lora.B.detach() for lora in loras])
    own = torch.eye(len(loras)).repeat_interleave(RANK, dim=1)[torch.tensor(who)]
    own = own.view(len(who), *[1] * (x.dim() - 2), -1)

    def run() -> None:
        linear(x) + (x @ A * own) @ B

    return run


def theirs(base: nn.Module, x: Tensor, who: list[str]) -> Pass:
    """Return the pass of PEFT's mixed batch."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False
    )
    names = list(dict.fromkeys(who))
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    return lambda: model(x, adapter_names=who)


def setting(
    size: int, customers: int, rows: int, positions: int, threads: int
) -> dict[str, Any]:
    """Return the times of all methods, relative to the base layer's."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    base = nn.Sequential(nn.Linear(size, size)).requires_grad_(False).eval()
    shape = (rows, size) if positions == 1 else (rows, positions, size)
    x = torch.randn(shape)
    numbers = [row % customers for row in range(rows)]
    random.Random(0).shuffle(numbers)
    who = [str(number) for number in numbers]
    groups = {
        name: torch.tensor([row for row, other in enumerate(who) if other == name])
        for name in dict.fromkeys(who)
    }
    passes: dict[str, Pass] = {"base": lambda: base(x)}
    for kind in KINDS:
        models = customers_of(base, kind, customers)
        banks = []
        for _ in range(2):
            bank = AdapterBank(copy.deepcopy(base))
            for number, model in enumerate(models):
                bank.add(str(number), model)
            banks.append(bank)
        passes[kind] = served(banks[0], x, who)
        passes[f"{kind}, switching"] = one_after_another(switching(banks[1]), x, groups)
        if kind == "LoRA":
            loras = [model[0].lora for model in models]
            passes["LoRA, gathered"] = gathered(base[0], loras, x, numbers)
            passes["LoRA, side by side"] = side_by_side(base[0], loras, x, numbers)
    copies = {name: copy.deepcopy(base) for name in groups}
    passes["merged copies"] = one_after_another(copies.__getitem__, x, groups)
    if peft is not None:
        passes["PEFT LoRA"] = theirs(base, x, who)
    with torch.no_grad():
        found = measure(passes, random.Random(0), SECONDS)

    def ratio(method: str, to: str) -> dict[str, float]:
        pairs = zip(found[method], found[to], strict=True)
        low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        return {
            "median": round(median, 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }

    return {
        "size": size,
        "customers": customers,
        "rows": rows,
        "positions": positions,
        "threads": threads,
        "rounds": len(found["base"]),
        "milliseconds": {
            method: round(statistics.median(times), 3)
            for method, times in found.items()
        },
        "to_base": {method: ratio(method, "base") for method in found},
        "to_switching": {kind: ratio(kind, f"{kind}, switching") for kind in KINDS},
        "to_peft": {kind: ratio(kind, "PEFT LoRA") for kind in KINDS}
        if peft is not None
        else None,
    }


def main() -> Path:
    """Measure everything, and return the file with the results."""
    warnings.filterwarnings("ignore", module="peft")
    before, rows = torch.get_num_threads(), []
    settings = [
        (size, *batch, threads)
        for threads in sorted({1, os.cpu_count() or 1})
        for size in SIZES
        for batch in BATCHES
        # A minute a round, and nothing new.
        if not (size == 4096 and batch[0] * batch[2] > 64 * 16)
        and not (threads > 1 and batch[2] > 16)
    ]
    for each in tqdm(settings, unit="setting"):
        rows.append(setting(*each))
    torch.set_num_threads(before)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if peft is not None:
        versions["peft"] = peft.__version__
    return write_results(
        "mixed_batches",
        {
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "versions": versions,
            "dtype": "float32",
            "rank": RANK,
            "settings": rows,
        },
    )


if __name__ == "__main__":
    print(main())
