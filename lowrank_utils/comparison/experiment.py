"""One experiment of the comparison: the protocol that treats all methods alike."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lowrank_utils._arguments import check_one_of
from lowrank_utils.adapt import count_parameters
from lowrank_utils.comparison.methods import (
    METHODS,
    LowRank,
    linear_layers,
    make_trainable,
)
from lowrank_utils.comparison.settings import DTYPES, Settings
from lowrank_utils.comparison.shifts import SHIFTS, shifted_splits
from lowrank_utils.comparison.tuning import Choice, Point, Range, Space, tune
from lowrank_utils.comparison.whole import write_whole
from lowrank_utils.data import Digits, load_mnist, stratified_sample
from lowrank_utils.training import (
    MultilayerPerceptron,
    accuracy,
    train,
    warm_up_and_decay,
)

# Of each data set, how many images are held out to choose by. Of a thousand, half have
# an unseen class.
VALIDATION = {"mnist-5k": 1_000, "mnist": 5_000}


class Task(NamedTuple):
    """What an adaptation may see: the test split isn't among it.

    Attributes:
        network: the seed of the pretrained network, its splits and its tuning.
        pretrained: the network before the adaptation.
        train: new digits to draw samples from.
        validation: new digits to choose by.
        last_layer_rate: where the last layer is trained itself, its learning rate in
            every method that has adapters: the one that suited it best when it was
            trained alone. Tied to that of A and B it would be too small.
    """

    network: int
    pretrained: nn.Module
    train: Digits
    validation: Digits
    last_layer_rate: float | None = None


def prepare(
    settings: Settings, network: int, progress: bool = True
) -> tuple[Task, Digits]:
    """Pretrain a network, shift the digits, and return the task and, apart from it, the
    shifted test split.

    Args:
        settings: of the experiment.
        network: the seed of the splits, the initialisation and the order of the
            pretraining.
        progress: show a bar.

    Raises:
        ValueError: there are fewer digits than ``adaptation_examples``, or not enough
            for each class.
        DataError: the data set can't be used as it is.
    """
    dtype = DTYPES[settings.dtype]
    splits = load_mnist(
        settings.data_set,
        validation=VALIDATION[settings.data_set],
        seed=network,
        device=settings.device,
        dtype=dtype,
    )
    familiar, new = shifted_splits(settings.shift, splits, settings.rotation, network)
    available = len(new.train.labels)
    if settings.adaptation_examples > available - 10:
        raise ValueError(
            f"adaptation_examples must be at most {available - 10:,} for {settings.shift} on "
            f"{settings.data_set}; got {settings.adaptation_examples:,}"
        )
    torch.manual_seed(network)
    pretrained = MultilayerPerceptron(784, 128, 256, 10).to(
        device=settings.device, dtype=dtype
    )
    train(
        pretrained,
        familiar,
        epochs=settings.pretraining_epochs,
        learning_rate=0.001,
        seed=network,
        measure_training=False,
        progress=progress,
    )
    task = Task(network, pretrained, new.train, new.validation)
    if SHIFTS[settings.shift].trains_last_layer:
        shortest = choose(
            task, replace(settings, steps=settings.steps[:1]), "last layer", None
        )[0]
        task = task._replace(last_layer_rate=shortest.chosen.rate)
    return task, new.test


class Run(NamedTuple):
    """One adaptation.

    Attributes:
        network: the seed of the pretrained network.
        method: a name in ``METHODS``.
        rank: of A and B, or None.
        steps: how often the weights were updated.
        seed: of the sample, of A and of the order of the digits.
        trainable: how many parameters it trains.
        learning_rate: of Adam, or None if nothing is trained.
        factor: what the learning rate of the method's part was multiplied by, if it has
            one.
        training_loss: mean cross-entropy over the last epoch, in nats; None if nothing
            was trained or the run ended in numbers that aren't finite.
        dead: the loss isn't finite, or at the end no lower than that of guessing among
            the classes.
        validation: accuracy on the validation split at the end, from 0 to 1.
        test: accuracy on the test split at the end, or None as long as nobody has
            looked.
        negative: layer → the share of its m, or of its gain, that is below zero; empty
            if there is neither.
    """

    network: int
    method: str
    rank: int | None
    steps: int
    seed: int
    trainable: int
    learning_rate: float | None
    factor: float | None
    training_loss: float | None
    dead: bool
    validation: float
    test: float | None
    negative: dict[str, float]


def adapt(
    task: Task,
    settings: Settings,
    method: str,
    rank: int | None,
    steps: int,
    point: Point | None,
    seed: int,
    progress: bool = False,
) -> tuple[nn.Module, Run]:
    """Adapt a copy of the pretrained network, and return it and how it went.

    With the same seed all methods learn from the same digits in the same order, and
    those of one rank that adapt the same layers start from the same A, so that their
    differences can be taken in pairs.

    Args:
        task: what to learn from and to choose by.
        settings: of the experiment.
        method: a name in ``METHODS``.
        rank: of A and B, or None.
        steps: whole epochs.
        point: the learning rate, and the factor for the method's part; None if nothing
            is trained.
        seed: of the sample, of A and of the order of the digits.
        progress: show a bar.

    Raises:
        ValueError: the method is unknown, has a rank and gets none, trains and gets no
            point, or the steps aren't whole epochs.
    """
    check_one_of("method", method, METHODS)
    if METHODS[method].has_rank and rank is None:
        raise ValueError(f"{method!r} needs a rank, a whole number; got None")
    if point is None and method != "frozen":
        raise ValueError(
            f"{method!r} needs a point with a learning rate; got None, which is for 'frozen'"
        )
    if steps % settings.steps_per_epoch:
        raise ValueError(
            f"steps must be a multiple of {settings.steps_per_epoch}, the steps of an epoch; got {steps}"
        )
    model = copy.deepcopy(task.pretrained)
    torch.manual_seed(seed)
    # To the methods that have no rank it means nothing.
    low_rank = LowRank(
        1 if rank is None else rank, settings.alpha, settings.scaling, settings.init
    )
    make_trainable(method, model, low_rank, SHIFTS[settings.shift].trains_last_layer)
    trainable = count_parameters(model).trainable
    loss: float | None = None
    if point is not None:
        sample = stratified_sample(task.train, settings.adaptation_examples, seed)
        try:
            loss = train(
                model,
                sample,
                epochs=steps // settings.steps_per_epoch,
                learning_rate=point.rate,
                factors=_factors(task, method, model, point),
                schedule=warm_up_and_decay,
                batch_size=settings.batch_size,
                seed=seed,
                measure_training=False,
                progress=progress,
            ).loss[-1]
        except FloatingPointError:
            loss = None
        # The last step comes after the last loss.
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            loss = None
    guessing = math.log(len(task.train.labels.unique()))
    run = Run(
        network=task.network,
        method=method,
        rank=rank,
        steps=steps,
        seed=seed,
        trainable=trainable,
        learning_rate=None if point is None else point.rate,
        factor=None if point is None else point.factor,
        training_loss=loss,
        dead=point is not None and (loss is None or loss >= guessing),
        validation=accuracy(model, task.validation),
        test=None,
        negative=_negative_shares(model),
    )
    return model, run


def _factors(
    task: Task, method: str, model: nn.Module, point: Point
) -> dict[str, float]:
    """Return what the learning rates of the method's part and of a trained last layer
    are multiplied by.
    """
    factors = {}
    part = METHODS[method].part
    if part is not None and point.factor is not None:
        factors[part.pattern] = point.factor
    if task.last_layer_rate is not None and METHODS[method].adapts:
        name, _ = linear_layers(model)[-1]
        factors[f"{name}.*"] = task.last_layer_rate / point.rate
    return factors


def _negative_shares(model: nn.Module) -> dict[str, float]:
    shares = {}
    for name, module in model.named_modules():
        factors = getattr(module, "m", getattr(module, "gain", None))
        if isinstance(factors, torch.Tensor):
            shares[name] = (factors < 0).double().mean().item()
    return shares


def space_of(method: str) -> Space:
    """Return where the learning rates of a method are drawn from, and the factors of
    its part.
    """
    check_one_of("method", method, METHODS)
    rates, part = METHODS[method].rates, METHODS[method].part
    return Space(Range(*rates), None if part is None else Range(part.low, part.high))


def choose(
    task: Task, settings: Settings, method: str, rank: int | None
) -> list[Choice]:
    """Choose a learning rate, and a factor where the method has a part, for each length
    on the validation split.
    """

    def score(point: Point, steps: int, seed: int) -> float:
        run = adapt(task, settings, method, rank, steps, point, seed)[1]
        # Numbers that aren't finite have no accuracy, whatever argmax makes of them.
        return 0.0 if run.training_loss is None else run.validation

    return tune(
        space_of(method),
        settings.tuning_points,
        task.network,
        settings.steps,
        settings.tuning_seeds,
        score,
    )


class Tuned(NamedTuple):
    """What a method chose at one length, above one network.

    Attributes:
        network: the seed of the pretrained network.
        method: a name in ``METHODS``.
        rank: of A and B, or None.
        steps: the length.
        choice: what was tried and taken.
    """

    network: int
    method: str
    rank: int | None
    steps: int
    choice: Choice


def run_experiment(
    settings: Settings, progress: bool = True
) -> tuple[list[Tuned], list[Run]]:
    """Pretrain each network, let each method choose its rates, adapt with each seed,
    and test each run once.

    Args:
        settings: of the experiment.
        progress: show a bar.

    Returns:
        What was chosen, and the runs, network by network.
    """
    tuned: list[Tuned] = []
    runs: list[Run] = []
    jobs = [
        (network, *pair)
        for network in settings.networks
        for pair in settings.configurations()
    ]
    silenced = {} if progress else {"disable": True}
    task, test = None, None
    with tqdm(jobs, unit="method", leave=False, file=sys.stdout, **silenced) as bar:
        for network, method, rank in bar:
            bar.set_description_str(f"network {network}, {method}")
            if task is None or test is None or task.network != network:
                task, test = prepare(settings, network, progress=False)
            # "frozen" has nothing to choose.
            choices: list[Choice | None] = [None] * len(settings.steps)
            if method != "frozen":
                choices = [*choose(task, settings, method, rank)]
            for steps, choice in zip(settings.steps, choices, strict=True):
                if choice is not None:
                    tuned.append(Tuned(network, method, rank, steps, choice))
                for seed in settings.seeds:
                    point = None if choice is None else choice.chosen
                    model, run = adapt(task, settings, method, rank, steps, point, seed)
                    runs.append(run._replace(test=accuracy(model, test)))
    return tuned, runs


def write_result(
    settings: Settings, tuned: list[Tuned], runs: list[Run], path: str | Path = ""
) -> dict[str, Any]:
    """Return all of an experiment as JSON holds it and, given a ``path``, write it
    there in one step.
    """
    result = {
        "settings": settings.as_dict(),
        "choices": [
            {
                "network": one.network,
                "method": one.method,
                "rank": one.rank,
                "steps": one.steps,
                "points": [
                    [*point, scores] for point, scores in one.choice.scores.items()
                ],
                "learning_rate": one.choice.chosen.rate,
                "factor": one.choice.chosen.factor,
                "score": one.choice.score(one.choice.chosen),
                "widened": one.choice.widened,
                "at_edge": one.choice.at_edge,
            }
            for one in tuned
        ],
        "runs": [run._asdict() for run in runs],
    }
    if path:
        write_whole(Path(path), json.dumps(result, allow_nan=False) + "\n")
    return result
