"""The article's fine-tuning on the whole MNIST, over several seeds, with a control.

Protocol: batch 64, Adam with learning rate 0.005, 2 epochs of pretraining on all 60,000
digits; then 2 epochs on the same digits again with each method, at rank 4 and alpha 8.
Nothing is chosen, so no validation split is held out. The results are written to
notebooks/results/article_protocol.json, which the README's table is compared with.
"""

import copy
import platform
from pathlib import Path
from typing import Any

import torch
from results import write_results
from tqdm import tqdm

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.data import load_mnist
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged
from lowrank_utils.training import MultilayerPerceptron, accuracy, reproducible, train

SETTINGS = {"epochs": 2, "learning_rate": 0.005, "batch_size": 64}
RANK, ALPHA = 4, 8
SEEDS = range(5)
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "full fine-tuning": (None, {}),
    "LoRA": (LinearWithLoRA, {}),
    "LoRA, merged": (LinearWithLoRAMerged, {}),
    "DoRA, norm detached": (LinearWithDoRA, {"detach_norm": True}),
    "DoRA, norm kept": (LinearWithDoRA, {"detach_norm": False}),
}


def run_seed(seed: int, bar: tqdm) -> list[dict[str, Any]]:
    """Pretrain once and fine-tune with each method; ``seed`` decides weights, A and the
    order of the digits.
    """
    reproducible(seed)
    splits = load_mnist("mnist", validation=0, seed=seed)
    rows = []

    def trained(name: str, model: torch.nn.Module) -> None:
        bar.set_postfix_str(f"seed {seed}, {name}")
        history = train(model, splits.train, seed=seed, progress=False, **SETTINGS)
        test = accuracy(model, splits.test)
        rows.append(
            {
                "seed": seed,
                "method": name,
                "test": test,
                "train": history.train_accuracy,
            }
        )
        bar.update()

    pretrained = MultilayerPerceptron(784, 128, 256, 10)
    trained("pretrained", pretrained)
    for name, (layer_class, options) in METHODS.items():
        model = copy.deepcopy(pretrained)
        if layer_class is not None:
            replace_linear_layers(model, layer_class, RANK, ALPHA, **options)
            freeze_linear_layers(model)
        trained(name, model)
    return rows


def main() -> Path:
    """Run all seeds, and return the file with the results."""
    with tqdm(total=len(SEEDS) * (1 + len(METHODS)), unit="run") as bar:
        rows = [row for seed in SEEDS for row in run_seed(seed, bar)]
    settings = {
        **SETTINGS,
        "rank": RANK,
        "alpha": ALPHA,
        "dtype": "float64",
        "data_set": "mnist",
    }
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return write_results(
        "article_protocol", {"settings": settings, "versions": versions, "runs": rows}
    )


if __name__ == "__main__":
    print(main())
