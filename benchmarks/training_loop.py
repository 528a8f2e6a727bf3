"""How much faster digits in memory are than a ``DataLoader`` of pictures, at the same
accuracy.

Both loops run the article's protocol on the whole MNIST in float32: pretraining, LoRA
and DoRA, two epochs each, with the accuracy on the training digits after each epoch and
on the test digits at the end. They take turns, so that a busy machine slows both. The
results are written to notebooks/results/training_loop.json.
"""

import copy
import cProfile
import os
import platform
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from article_protocol import ALPHA, RANK, SETTINGS
from results import write_results
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.data import load_mnist, mnist_folder
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import MultilayerPerceptron, accuracy, train

ROUNDS = 5
Stage = Callable[[nn.Module, int], float]


def protocol(stage: Stage, seed: int) -> dict[str, float]:
    """Pretrain, then fine-tune with LoRA and with DoRA; ``stage`` trains a model and
    returns its test accuracy.
    """
    torch.manual_seed(seed)
    pretrained = MultilayerPerceptron(784, 128, 256, 10)
    scores = {"pretrained": stage(pretrained, seed)}
    for name, layer_class in {"LoRA": LinearWithLoRA, "DoRA": LinearWithDoRA}.items():
        model = copy.deepcopy(pretrained)
        replace_linear_layers(model, layer_class, RANK, ALPHA)
        freeze_linear_layers(model)
        scores[name] = stage(model, seed)
    return scores


def run_in_memory(seed: int) -> dict[str, float]:
    """Run the protocol with the package's loop; loading the data counts."""
    splits = load_mnist("mnist", validation=0, seed=seed)

    def stage(model: nn.Module, seed: int) -> float:
        train(model, splits.train, seed=seed, progress=False, **SETTINGS)
        return accuracy(model, splits.test)

    return protocol(stage, seed)


def run_data_loader(seed: int) -> dict[str, float]:
    """Run the protocol with the loop that most tutorials show: pictures, ``ToTensor``,
    ``DataLoader``.
    """
    batch_size, epochs, learning_rate = (
        SETTINGS["batch_size"],
        SETTINGS["epochs"],
        SETTINGS["learning_rate"],
    )
    parts = [
        MNIST(mnist_folder(), train=part, transform=transforms.ToTensor())
        for part in (True, False)
    ]
    train_loader = DataLoader(parts[0], batch_size=batch_size, shuffle=True)
    test_loader = DataLoader(parts[1], batch_size=batch_size)

    @torch.no_grad()
    def measured(model: nn.Module, loader: DataLoader) -> float:
        model.eval()
        correct = sum(
            (model(x.flatten(1)).argmax(dim=1) == y).sum().item() for x, y in loader
        )
        model.train()
        return correct / len(loader.dataset)

    def stage(model: nn.Module, seed: int) -> float:
        torch.manual_seed(seed)
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=learning_rate
        )
        for _ in range(int(epochs)):
            for images, labels in train_loader:
                loss = F.cross_entropy(model(images.flatten(1)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            measured(model, train_loader)
        return measured(model, test_loader)

    return protocol(stage, seed)


def where_the_time_goes() -> dict[str, float]:
    """Return the shares of the in-memory run that its parts take, by cProfile."""
    functions = {
        "backward": ("_tensor.py", "backward"),
        "optimizer": ("adam.py", "step"),
        "accuracy": ("training.py", "accuracy"),
        "loading": ("data.py", "load_mnist"),
    }
    profile = cProfile.Profile()
    profile.runcall(run_in_memory, 0)
    rows = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = sum(own for _, _, own, _, _ in rows.values())
    cumulative = {
        (Path(file).name, function): row[3] for (file, _, function), row in rows.items()
    }
    shares = {part: cumulative[key] / total for part, key in functions.items()}
    return shares | {"forward, loss, batches": 1 - sum(shares.values())}


def main() -> Path:
    """Let both loops take turns, and return the file with the results."""
    loops = {"in memory": run_in_memory, "DataLoader": run_data_loader}
    rounds: list[dict[str, Any]] = []
    with tqdm(total=ROUNDS * len(loops), unit="run") as bar:
        for seed in range(ROUNDS):
            for name, run in loops.items():
                bar.set_postfix_str(f"round {seed + 1}, {name}")
                start = time.perf_counter()
                scores = run(seed)
                seconds = time.perf_counter() - start
                rounds.append(
                    {"loop": name, "seed": seed, "seconds": seconds, "test": scores}
                )
                bar.update()
    times = {
        name: [r["seconds"] for r in rounds if r["loop"] == name] for name in loops
    }
    ratios = [
        slow / fast
        for slow, fast in zip(times["DataLoader"], times["in memory"], strict=True)
    ]
    return write_results(
        "training_loop",
        {
            "machine": {
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "ratio": {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            },
            "seconds": {
                name: statistics.median(values) for name, values in times.items()
            },
            "shares": where_the_time_goes(),
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    print(main())
