"""Time of one batch of which every row belongs to one of several customers, beside the
base model alone: four square linear layers in a row, in float32 and on one thread.

A bank serves the batch in one pass ("LoRA", "DoRA"). Beside it stand the bank switched
from customer to customer, a merged copy of the model for each of them, PEFT's mixed
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
from functools import partial
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

SIZES, LAYERS = [768, 1024, 4096], 4
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
Pass = Callable[[], Any]
KINDS = {"LoRA": LinearWithLoRA, "DoRA": LinearWithDoRA}


def customers_of(base: nn.Module, kind: str, count: int) -> list[nn.Module]:
    """Return models with adapters around the layers of ``base``, and B moved as in
    training.
    """
    models = []
    for _ in range(count):
        adapted = [KINDS[kind](linear, RANK, 2.0, init="peft") for linear in base]
        for layer in adapted:
            nn.init.normal_(layer.lora.B, std=0.02)
        models.append(nn.Sequential(*adapted))
    return models


def served(bank: AdapterBank, x: Tensor, who: list[str]) -> Pass:
    """Return a pass in which every row has its own adapter."""

    def run() -> None:
        with bank.rows(who):
            bank.model(x)

    return run


def one_after_another(
    model_of: Callable[[str], nn.Module], x: Tensor, groups: dict[str, Tensor]
) -> Pass:
    """Return a pass in which each customer's rows are computed by themselves."""

    def run() -> None:
        y = torch.empty_like(x)
        for name, rows in groups.items():
            y[rows] = model_of(name)(x[rows])

    return run


def switching(bank: AdapterBank) -> Callable[[str], nn.Module]:
    """Return how a bank's model is made one customer's."""

    def switch(name: str) -> nn.Module:
        bank.activate(name)
        return bank.model

    return switch


class Gathered(nn.Module):
    """A layer for which A and B are gathered for every row."""

    def __init__(
        self, linear: nn.Linear, loras: list[LoRALayer], who: list[int]
    ) -> None:
        super().__init__()
        self.linear, self.rows = linear, torch.tensor(who)
        self.A = torch.stack([lora.A.detach() for lora in loras])
        self.B = torch.stack([lora.alpha * lora.B.detach() for lora in loras])

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with each row's update."""
        rows = x.reshape(len(self.rows), -1, x.shape[-1])
        update = torch.bmm(torch.bmm(rows, self.A[self.rows]), self.B[self.rows])
        return self.linear(x) + update.view(x.shape)


class SideBySide(nn.Module):
    """A layer that multiplies with all A and all B, and keeps of every row its own."""

    def __init__(
        self, linear: nn.Linear, loras: list[LoRALayer], who: list[int]
    ) -> None:
        super().__init__()
        self.linear = linear
        self.A = torch.cat([lora.A.detach() for lora in loras], dim=1)
        self.B = torch.cat([lora.alpha * lora.B.detach() for lora in loras])
        own = torch.eye(len(loras)).repeat_interleave(RANK, dim=1)
        self.own = own[torch.tensor(who)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with each row's update."""
        own = self.own.view(len(self.own), *[1] * (x.dim() - 2), -1)
        return self.linear(x) + (x @ self.A * own) @ self.B


def theirs(base: nn.Module, x: Tensor, who: list[str]) -> Pass:
    """Return the pass of PEFT's mixed batch."""
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=[str(number) for number in range(LAYERS)],
        init_lora_weights=False,
    )
    names = list(dict.fromkeys(who))
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    return lambda: model(x, adapter_names=who)


FORMS = {"gathered": Gathered, "side by side": SideBySide}


def setting(size: int, customers: int, rows: int, positions: int) -> dict[str, Any]:
    """Return the times of all methods, relative to the base model's."""
    torch.manual_seed(0)
    linears = [nn.Linear(size, size) for _ in range(LAYERS)]
    base = nn.Sequential(*linears).requires_grad_(False).eval()
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
        bank = AdapterBank(copy.deepcopy(base))
        for number, model in enumerate(models):
            bank.add(str(number), model)
        passes[kind] = served(bank, x, who)
        passes[f"{kind}, switching"] = one_after_another(switching(bank), x, groups)
        if kind == "LoRA":
            for name, form in FORMS.items():
                layers = [
                    form(linear, [model[place].lora for model in models], numbers)
                    for place, linear in enumerate(base)
                ]
                passes[f"LoRA, {name}"] = partial(nn.Sequential(*layers), x)
    if customers * size**2 <= 16 * 4096**2:
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
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = [
        (size, *batch)
        for size in SIZES
        for batch in BATCHES
        # A minute a round, and nothing new.
        if not (size == 4096 and batch[0] * batch[2] > 64 * 16)
    ]
    rows = [setting(*each) for each in tqdm(settings, unit="setting")]
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
            "layers": LAYERS,
            "rank": RANK,
            "threads": 1,
            "settings": rows,
        },
    )


if __name__ == "__main__":
    print(main())
