"""Memory and time of training the whole of MiniLM, for notebook 9: in full, and with
adapters in query and value or in all linear layers, each with and without gradient
checkpointing.

A step takes 32 sentences of 32 tokens, in float32 on one thread. Weights, gradients
and what Adam keeps are counted; activations are the peak of what torch allocates in a
forward and a backward pass where the gradients have their place already. For the times
all methods take turns in each round, and ratios are taken within a round. The results
are written to notebooks/results/transformer_memory.json.
"""

import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from adapter_speed import most_allocated
from results import write_results
from torch import nn
from tqdm import trange
from transformer_runs import ALPHA, FEED_FORWARD, KEY, OUTPUT, QUERY, VALUE

from lowrank_utils.adapt import count_parameters, replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.text import SentenceClassifier, load_minilm
from lowrank_utils.training import adam

SENTENCES, TOKENS, RANK, ROUNDS = 32, 32, 4, 7
ALL = [QUERY, KEY, VALUE, OUTPUT, *FEED_FORWARD]
METHODS: dict[str, tuple[type[nn.Module] | None, list[str]]] = {
    "full": (None, []),
    "LoRA, query and value": (LinearWithLoRA, [QUERY, VALUE]),
    "DoRA, query and value": (LinearWithDoRA, [QUERY, VALUE]),
    "LoRA, all linear layers": (LinearWithLoRA, ALL),
    "DoRA, all linear layers": (LinearWithDoRA, ALL),
}


def made(name: str, checkpointing: bool) -> SentenceClassifier:
    """Return MiniLM with a head and what the method trains, in training mode without
    dropout.
    """
    torch.manual_seed(0)
    layer, names = METHODS[name]
    model = SentenceClassifier(load_minilm()[1])
    if layer is None:
        model.requires_grad_(True)
    else:
        targets = [f"encoder.encoder.layer.*.{name}" for name in names]
        replace_linear_layers(model, layer, RANK, ALPHA / RANK, targets, init="peft")
    # The classifier doesn't use it, so it would get no gradient.
    model.encoder.pooler = None  # type: ignore[assignment]
    if checkpointing:
        model.encoder.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def step_of(model: SentenceClassifier) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a function for a forward and a backward pass, and one for a whole step."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 2000, (SENTENCES, TOKENS), generator=generator)
    labels = torch.randint(0, 2, (SENTENCES,), generator=generator)
    # So small a rate that the numbers stay what they are.
    update = adam((p for p in model.parameters() if p.requires_grad), 1e-9)

    def there_and_back() -> None:
        F.cross_entropy(model(tokens), labels).backward()

    def step() -> None:
        there_and_back()
        update.step()
        # The gradients keep their place.
        update.zero_grad(set_to_none=False)

    return there_and_back, step


def main() -> Path:
    """Measure everything, and return the file with the results."""
    torch.set_num_threads(1)
    steps, rows = {}, []
    for name in METHODS:
        for checkpointing in (False, True):
            model = made(name, checkpointing)
            there_and_back, step = step_of(model)
            step()
            trained = count_parameters(model).trainable
            weights = sum(p.nbytes for p in model.parameters())
            rows.append(
                {
                    "method": name,
                    "checkpointing": checkpointing,
                    "trained": trained,
                    "weights": weights,
                    "gradients": 4 * trained,
                    "Adam": 8 * trained,
                    "activations": most_allocated(there_and_back),
                }
            )
            steps[name, checkpointing] = step
    times = measured(steps)
    of_full = times["full", False]
    for row in rows:
        found = times[row["method"], row["checkpointing"]]
        row["milliseconds"] = round(statistics.median(found), 1)
        ratios = [time / full for time, full in zip(found, of_full, strict=True)]
        row["to_full"] = round(statistics.median(ratios), 3)
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "threads": 1,
    }
    content: dict[str, Any] = {"machine": machine, "rank": RANK, "rows": rows}
    return write_results("transformer_memory", content)


def measured(steps: dict[Any, Callable[[], None]]) -> dict[Any, list[float]]:
    """Return the milliseconds of each step, one per round."""
    times: dict[Any, list[float]] = {name: [] for name in steps}
    order, names = random.Random(0), list(steps)
    for _ in trange(ROUNDS, unit="round"):
        order.shuffle(names)
        for name in names:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


if __name__ == "__main__":
    print(main())
