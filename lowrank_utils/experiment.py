"""One experiment of the comparison: the protocol that treats all methods alike."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lowrank_utils.adapt import count_parameters
from lowrank_utils.data import Digits, Splits, invert, load_mnist, permute_pixels, rotate, stratified_sample
from lowrank_utils.decompose import direction_change, magnitude_change
from lowrank_utils.methods import METHODS, Adapter, linear_layers
from lowrank_utils.settings import DTYPES, Settings
from lowrank_utils.training import MultilayerPerceptron, accuracy, train


class Task(NamedTuple):
    """What an adaptation may see: the test split isn't among it.

    Attributes:
        pretrained: the network before the adaptation.
        train: shifted digits to draw samples from.
        validation: shifted digits to choose by.
    """

    pretrained: nn.Module
    train: Digits
    validation: Digits


def prepare(settings: Settings, progress: bool = True) -> tuple[Task, Digits]:
    """Pretrain once, shift the digits, and return the task and, apart from it, the shifted test split.

    Args:
        settings: of the experiment.
        progress: show a bar.

    Raises:
        ValueError: there are fewer digits than ``adaptation_examples``, or not enough for each class.
        DataError: the data set can't be used as it is.
    """
    dtype = DTYPES[settings.dtype]
    splits = load_mnist(
        settings.data_set, seed=settings.pretraining_seed, device=settings.device, dtype=dtype
    )
    shifted = Splits(*(shift(digits, settings) for digits in splits))
    available = len(shifted.train.labels)
    if settings.adaptation_examples > available - 10:
        raise ValueError(
            f"adaptation_examples must be at most {available - 10:,} for {settings.shift} on "
            f"{settings.data_set}; got {settings.adaptation_examples:,}"
        )
    familiar = splits.train
    if settings.shift == "unseen classes":
        familiar = _with_labels(familiar, familiar.labels < 5)
    torch.manual_seed(settings.pretraining_seed)
    pretrained = MultilayerPerceptron(784, 128, 256, 10).to(device=settings.device, dtype=dtype)
    train(
        pretrained,
        familiar,
        epochs=settings.pretraining_epochs,
        learning_rate=0.001,
        seed=settings.pretraining_seed,
        measure_training=False,
        progress=progress,
    )
    return Task(pretrained, shifted.train, shifted.validation), shifted.test


def shift(digits: Digits, settings: Settings) -> Digits:
    """Return the digits that the network is to adapt to."""
    if settings.shift == "rotation":
        return rotate(digits, settings.rotation)
    if settings.shift == "inversion":
        return invert(digits)
    if settings.shift == "permutation":
        return permute_pixels(digits, seed=settings.pretraining_seed)
    return _with_labels(digits, digits.labels >= 5)


def _with_labels(digits: Digits, chosen: torch.Tensor) -> Digits:
    return Digits(digits.images[chosen], digits.labels[chosen])


class Run(NamedTuple):
    """One adaptation, by a method with a rank, a learning rate and a seed.

    Attributes:
        method: a name in ``METHODS``.
        rank: of A and B, or None.
        trainable: how many numbers it trains.
        learning_rate: of Adam, or None if nothing is trained.
        seed: of the sample, of A and of the order of the digits.
        validation: accuracy on the validation split, from 0 to 1, after each epoch that was followed.
        test: accuracy on the test split at the end, or None as long as nobody has looked.
        changes: after each epoch and for each linear layer ΔM, the change of its rows' lengths, and ΔD,
            that of their directions (arXiv 2402.09353, Eqs. 3 and 4).
    """

    method: str
    rank: int | None
    trainable: int
    learning_rate: float | None
    seed: int
    validation: list[float]
    test: float | None
    changes: list[list[tuple[float, float]]]


def adapt(
    task: Task,
    settings: Settings,
    method: str,
    rank: int | None,
    learning_rate: float | None,
    seed: int,
    follow: bool = True,
) -> tuple[nn.Module, Run]:
    """Adapt a copy of the pretrained network, and return it and how it went.

    With the same seed all methods learn from the same digits in the same order, and those of one
    rank start from the same A, so that their differences can be taken in pairs.

    Args:
        task: what to learn from and to choose by.
        settings: of the experiment.
        method: a name in ``METHODS``.
        rank: of A and B, or None.
        learning_rate: of Adam, or None if nothing is trained.
        seed: of the sample, of A and of the order of the digits.
        follow: measure the run after each epoch, and not only its accuracy at the end. On the whole MNIST
            an adaptation then takes two to three times as long.

    Raises:
        FloatingPointError: the loss became infinite.
    """
    model = copy.deepcopy(task.pretrained)
    torch.manual_seed(seed)
    METHODS[method].prepare(model, Adapter(rank or 1, settings.alpha, settings.scaling, settings.init))
    trainable = count_parameters(model).trainable
    if trainable == 0:
        before = accuracy(model, task.validation)
        return model, Run(method, rank, 0, None, seed, [before], None, [])
    sample = stratified_sample(task.train, settings.adaptation_examples, seed)
    changes: list[list[tuple[float, float]]] = []
    history = train(
        model,
        sample,
        epochs=settings.epochs,
        learning_rate=learning_rate or 0.0,
        batch_size=settings.batch_size,
        seed=seed,
        validation=task.validation if follow else None,
        measure_training=False,
        after_epoch=(lambda model: changes.append(weight_changes(model, task.pretrained)))
        if follow
        else None,
        progress=False,
    )
    validation = history.validation_accuracy if follow else [accuracy(model, task.validation)]
    return model, Run(method, rank, trainable, learning_rate, seed, validation, None, changes)


@torch.no_grad()
def weight_changes(model: nn.Module, pretrained: nn.Module) -> list[tuple[float, float]]:
    """Return (ΔM, ΔD) of each linear layer's weight against that of the pretrained network."""
    return [
        (magnitude_change(weight, linear.weight).item(), direction_change(weight, linear.weight).item())
        for name, linear in linear_layers(pretrained)
        if isinstance(weight := model.get_submodule(name).weight, torch.Tensor)
    ]


@dataclass(frozen=True)
class Choice:
    """A learning rate, and what it was chosen from.

    Attributes:
        method: what it is for.
        rank: of the method, if it has one.
        scores: learning rate → mean accuracy on the validation split over the tuning seeds. A run
            whose loss became infinite counts as 0.
        learning_rate: the one with the highest score; of equal ones, the smallest.
        at_edge: it is the smallest or the largest of its grid, so a better one may lie outside.
    """

    method: str
    rank: int | None
    scores: dict[float, float]

    @property
    def learning_rate(self) -> float:
        """The learning rate with the highest score."""
        return max(sorted(self.scores), key=self.scores.__getitem__)

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie outside the grid."""
        return self.learning_rate in (min(self.scores), max(self.scores))


def choose_learning_rates(task: Task, settings: Settings, progress: bool = True) -> list[Choice]:
    """Choose a learning rate for each method and rank on the validation split."""
    configurations = [pair for pair in settings.configurations() if pair[0] != "frozen"]
    jobs = [(*pair, rate) for pair in configurations for rate in settings.learning_rates]
    scores: dict[tuple[str, int | None], dict[float, float]] = {pair: {} for pair in configurations}
    for method, rank, rate in _with_bar(jobs, "learning rates", progress):
        runs = [_validation_score(task, settings, method, rank, rate, seed) for seed in settings.tuning_seeds]
        scores[method, rank][rate] = sum(runs) / len(runs)
    return [Choice(*pair, found) for pair, found in scores.items()]


def _validation_score(
    task: Task, settings: Settings, method: str, rank: int | None, rate: float, seed: int
) -> float:
    try:
        return adapt(task, settings, method, rank, rate, seed, follow=False)[1].validation[-1]
    except FloatingPointError:
        return 0.0


def run_seeds(
    task: Task, test: Digits, settings: Settings, choices: list[Choice], progress: bool = True
) -> list[Run]:
    """Adapt with each method, rank and seed at the chosen rate, and look at the test split once for each.

    Raises:
        FloatingPointError: a loss became infinite.
    """
    rates = {(choice.method, choice.rank): choice.learning_rate for choice in choices}
    jobs = [(*pair, seed) for pair in settings.configurations() for seed in settings.seeds]
    runs = []
    for method, rank, seed in _with_bar(jobs, "seeds", progress):
        model, run = adapt(task, settings, method, rank, rates.get((method, rank)), seed)
        runs.append(run._replace(test=accuracy(model, test)))
    return runs


def _with_bar(jobs: list[Any], name: str, progress: bool) -> Iterable[Any]:
    # Given only to switch the bar off, so that TQDM_DISABLE decides otherwise.
    return tqdm(jobs, desc=name, unit="run", leave=False, **({} if progress else {"disable": True}))


def write_result(
    settings: Settings, choices: list[Choice], runs: list[Run], path: str | Path = ""
) -> dict[str, Any]:
    """Return all of an experiment as JSON holds it and, given a ``path``, write it there in one step."""
    result = {
        "settings": settings.as_dict(),
        "learning_rates": [
            {
                "method": choice.method,
                "rank": choice.rank,
                "scores": [[rate, score] for rate, score in choice.scores.items()],
                "chosen": choice.learning_rate,
                "at_edge": choice.at_edge,
            }
            for choice in choices
        ],
        "runs": [run._asdict() for run in runs],
    }
    if path:
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(result, allow_nan=False) + "\n", encoding="utf-8", newline="\n")
        temporary.replace(path)
    return result
