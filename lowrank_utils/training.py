"""The multilayer perceptron, the training loop, accuracy, and the reproducible
setting.
"""

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lowrank_utils._arguments import (
    check_finite_number,
    check_floating_dtype,
    check_seed,
    check_whole_number,
    some_of,
)
from lowrank_utils._eager import EagerAdam
from lowrank_utils.adapt import parameter_groups, parameters_of_adapters
from lowrank_utils.data import Digits


def reproducible(seed: int, dtype: torch.dtype = torch.float64) -> None:
    """Make what follows come out the same on every processor and with any number of
    threads.

    Seeds Python, NumPy and torch, lets torch use deterministic algorithms and one
    thread only, and makes ``dtype`` torch's default. In float32 a training run ends
    differently on processors with other vector units, because sums are taken in another
    order and each rounding is amplified by all steps after it. In float64 the
    differences start at the sixteenth digit, and the printed ones stay the same.

    Args:
        seed: 0 or more.
        dtype: torch's default dtype from now on.
    """
    check_seed(seed)
    check_floating_dtype("dtype", dtype)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (some libraries draw from this state)
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    # The same as use_deterministic_algorithms(True), which loads torch's compiler to
    # tell it as well.
    torch.set_deterministic_debug_mode("error")
    # Sums then don't depend on how many cores there are. For layers as small as these a
    # second thread gains nothing, and on a busy machine threads that wait for each
    # other cost tenfold.
    torch.set_num_threads(1)
    # CUDA's matrix products are deterministic only with this setting; the CPU ignores
    # it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class MultilayerPerceptron(nn.Module):
    """Three linear layers with a ReLU after the first two, as in the article.

    Args:
        num_features: number of inputs, 784 for MNIST.
        num_hidden_1: neurons of the first hidden layer.
        num_hidden_2: neurons of the second.
        num_classes: number of outputs, 10 for MNIST.
    """

    def __init__(
        self, num_features: int, num_hidden_1: int, num_hidden_2: int, num_classes: int
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_hidden_1),
            nn.ReLU(),
            nn.Linear(num_hidden_1, num_hidden_2),
            nn.ReLU(),
            nn.Linear(num_hidden_2, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (…, num_features) to one score per class, (…, num_classes)."""
        return self.layers(x)


def adam(parameters: Iterable[Any], learning_rate: float) -> torch.optim.Adam:
    """Return Adam with all its steps in one kernel, which for small layers saves much
    of a training step.

    Args:
        parameters: parameters, or groups of them as ``adapt.parameter_groups`` gives
            them.
        learning_rate: of those that have none of their own.
    """
    return EagerAdam(parameters, learning_rate, fused=True)


def warm_up_and_decay(step: int, steps: int) -> float:
    """Return what the learning rate of a step is multiplied by: it rises for a tenth of
    the steps, then falls in a line.

    Adam's first steps are its least informed ones, since its averages hold a few
    gradients only; the warm-up keeps them small. The decay lets a run come to rest: of
    n steps after the warm-up the last one has 1/n of the rate.

    Args:
        step: which, from 0.
        steps: how many there are in all.
    """
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


@dataclass
class History:
    """What a training run went through, one entry per epoch, for
    ``plots.plot_history``.

    Attributes:
        loss: mean cross-entropy over the epoch's examples, in nats.
        train_accuracy: fraction of the training digits classified correctly after the
            epoch; empty if it wasn't to be measured.
        validation_accuracy: the same for the validation digits; empty if there were
            none.
        steps: how many times the weights were updated, in all.
    """

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    steps: int = 0


def train(
    model: nn.Module,
    digits: Digits | tuple[Tensor, Tensor],
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int = 64,
    seed: int = 0,
    validation: Digits | tuple[Tensor, Tensor] | None = None,
    factors: Mapping[str, float] | None = None,
    schedule: Callable[[int, int], float] | None = None,
    optimizer: Callable[[Iterable[Any], float], torch.optim.Optimizer] = adam,
    after_epoch: Callable[[nn.Module], None] | None = None,
    measure_training: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> History:
    """Train the trainable parameters of ``model`` to classify ``digits``, and return
    how it went.

    The digits are whole tensors in memory and each batch is an index into them: no
    process, no file and no conversion stands between two steps.

    Args:
        model: changed in place.
        digits: what to learn from; any pair of inputs and labels will do.
        epochs: passes over ``digits``.
        learning_rate: for the optimizer.
        batch_size: examples per step; the last batch of an epoch may be smaller.
        seed: of the generator that shuffles, which nothing else draws from.
        validation: digits to measure after each epoch, never to learn from.
        factors: pattern of parameter names → factor of the learning rate, as in
            ``adapt.parameter_groups``.
        schedule: called with a step, from 0, and the number of all steps, for what all
            rates are multiplied by in that step; ``warm_up_and_decay`` is one. By
            default the rates stay.
        optimizer: called with the trainable parameters, in groups if there are
            ``factors``, and the rate.
        after_epoch: called with the model after each epoch, to look at it.
        measure_training: measure the accuracy on ``digits`` after each epoch, which
            takes a pass over them.
        device: where to train; by default, where the model is.
        dtype: in which precision to train; by default, the model's.
        progress: show a bar (``TQDM_DISABLE=1`` silences all bars).

    Raises:
        TypeError, ValueError: an argument isn't what is allowed, nothing is trainable,
            or what is to be trained is in float16 or has eight bits.
        FloatingPointError: the loss is no longer finite.

    Warns:
        UserWarning: what is to be trained is in bfloat16, where small steps are lost.
    """
    check_whole_number("epochs", epochs, minimum=1)
    check_whole_number("batch_size", batch_size, minimum=1)
    check_seed(seed)
    check_finite_number("learning_rate", learning_rate, above=0)
    if dtype is not None:
        check_floating_dtype("dtype", dtype)
    for name, function, known in (
        ("schedule", schedule, "warm_up_and_decay"),
        ("optimizer", optimizer, "adam or torch.optim.SGD"),
        ("after_epoch", after_epoch, "print"),
    ):
        if not callable(function) and not (function is None and name != "optimizer"):
            raise TypeError(
                f"{name} must be a function such as {known}; got {function!r} "
                f"({type(function).__name__})"
            )
    for name, part in {"digits": digits, "validation": validation}.items():
        if part is not None and len(part[1]) == 0:
            raise ValueError(
                f"{name} is empty; training needs at least one digit in it"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameters: everything is frozen")
    if factors is not None:
        # Refused before the model is converted, so that it stays as it was.
        parameter_groups(model, learning_rate, factors)
    _check_precision(model, dtype)
    model.to(device=device, dtype=dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    digits = _beside(model, digits)
    validation = None if validation is None else _beside(model, validation)
    images, labels = digits

    # Frozen weights aren't even given to the optimizer: it keeps no state for them and
    # can't decay them.
    groups = (
        parameters
        if factors is None
        else parameter_groups(model, learning_rate, factors)
    )
    update = optimizer(groups, learning_rate)
    rates = [group["lr"] for group in update.param_groups]
    shuffle = torch.Generator().manual_seed(seed)
    history = History()
    # Given only to switch the bar off, so that TQDM_DISABLE decides otherwise.
    silenced = {} if progress else {"disable": True}
    steps = epochs * -(-len(labels) // batch_size)
    model.train()
    with tqdm(
        total=steps, unit="step", leave=False, file=sys.stdout, **silenced
    ) as bar:
        for epoch in range(epochs):
            losses = []
            batches = (
                torch.randperm(len(labels), generator=shuffle)
                .to(labels.device)
                .split(batch_size)
            )
            for batch in batches:
                loss = F.cross_entropy(
                    model(images.index_select(0, batch)), labels.index_select(0, batch)
                )
                # What zero_grad() does, without its bookkeeping: for small layers that
                # is a part of each step.
                for parameter in parameters:
                    parameter.grad = None
                loss.backward()
                if schedule is not None:
                    share = schedule(history.steps, steps)
                    for group, rate in zip(update.param_groups, rates, strict=True):
                        group["lr"] = rate * share
                update.step()
                losses.append(loss.detach())
                history.steps += 1
                bar.update()
            # Weighted, since the last batch may be smaller.
            sizes = torch.tensor([len(batch) for batch in batches], dtype=torch.float64)
            history.loss.append(
                (torch.stack(losses).cpu().double() @ sizes).item() / len(labels)
            )
            if not np.isfinite(history.loss[-1]):
                raise FloatingPointError(
                    f"the loss is {history.loss[-1]} in epoch {epoch + 1}; "
                    f"try a learning rate smaller than {learning_rate:g}, and look for NaN in the images"
                )
            if measure_training:
                history.train_accuracy.append(accuracy(model, digits))
            if validation is not None:
                history.validation_accuracy.append(accuracy(model, validation))
            if after_epoch is not None:
                after_epoch(model)
    return history


def _check_precision(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse what can't be trained in its precision, and warn of what trains badly.

    Args:
        model: is looked at, and stays as it is.
        dtype: that its parameters are about to be converted to; None leaves theirs.
    """
    trained: dict[torch.dtype, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        kind = dtype or parameter.dtype
        if kind.itemsize < 2:
            raise ValueError(
                f"{name} is in {kind}, in which torch neither adds nor multiplies; "
                "convert the model, as train(…, dtype=torch.float32) does"
            )
        if parameter.requires_grad:
            trained.setdefault(kind, []).append(name)
    if half := trained.get(torch.float16):
        raise ValueError(
            f"{some_of(half)} can't be trained in float16: there the squares that Adam "
            "divides by are 0 for gradients below 0.0002, its epsilon of 1e-8 is 0 too, "
            "and gradients below 3e-8 vanish. Train in float32, dtype=torch.float32; to "
            "save time, do so under torch.autocast(device, torch.bfloat16)"
        )
    if rounded := trained.get(torch.bfloat16):
        warnings.warn(
            f"{some_of(rounded)} are trained in bfloat16, where a step below 0.2 % of a "
            "number leaves it as it was: at Adam's usual rates, 0.001 and below, DoRA's "
            "m and most of LoRA's A never move. Train in float32, dtype=torch.float32; "
            "to save time, do so under torch.autocast(device, torch.bfloat16)",
            stacklevel=3,
        )


def _beside(model: nn.Module, digits: tuple[Tensor, Tensor]) -> Digits:
    """Return the digits on the device and in the precision of the model."""
    images, labels = digits
    # Beside a weight in half precision an adapter's own numbers are wider.
    own = parameters_of_adapters(model)
    reference = next(p for p in model.parameters() if p not in own)
    return Digits(images.to(reference), labels.to(reference.device))


@torch.no_grad()
def accuracy(
    model: nn.Module, digits: Digits | tuple[Tensor, Tensor], batch_size: int = 2048
) -> float:
    """Return the fraction of ``digits`` that ``model`` classifies correctly, from 0 to
    1.

    Args:
        model: maps images (n, 784) to scores (n, classes); its training mode is left as
            it is.
        digits: at least one.
        batch_size: examples per forward pass; it bounds the memory and doesn't change
            the result.
    """
    check_whole_number("batch_size", batch_size, minimum=1)
    if len(digits[1]) == 0:
        raise ValueError("digits is empty; accuracy needs at least one")
    digits = _beside(model, digits)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        correct = sum(
            torch.sum(model(images).argmax(dim=1) == labels).item()
            for images, labels in zip(
                digits.images.split(batch_size),
                digits.labels.split(batch_size),
                strict=True,
            )
        )
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return correct / len(digits.labels)
