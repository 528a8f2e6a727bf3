"""The checks of notebook 6, fine-tuning on MNIST."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.checks._shared import (
    ExerciseError,
    Remark,
    ask,
    compare,
    equal,
    exercise,
)
from lowrank_utils.dora import LinearWithDoRA

Batches = list[tuple[Tensor, Tensor]]


@exercise("6.1")
def check_standard_error(function: Callable[[float, int], float]) -> None:
    """Check exercise 6.1, the standard error of an accuracy."""
    __tracebackhide__ = True
    for p, n in [(0.85, 1000), (0.5, 25)]:
        mistakes = {
            "that is the variance: take the root": p * (1 - p) / n,
            "that is the spread of one answer: divide by the number of images under the root": (
                p * (1 - p)
            )
            ** 0.5,
            "the root goes over n as well": (p * (1 - p)) ** 0.5 / n,
            "the root goes over p(1 − p) as well": p * (1 - p) / n**0.5,
            "the 1 − p is missing": (p / n) ** 0.5,
            "mind the brackets: √(p·(1 − p)/n)": max(p * 1 - p / n, 0) ** 0.5,
            "a share, and not a percentage: leave out the 100": 100
            * (p * (1 - p) / n) ** 0.5,
            "divide by n, not by n − 1": (p * (1 - p) / (n - 1)) ** 0.5,
        }
        answer = ask(function, accuracy=p, count=n)
        compare("standard_error", answer, (p * (1 - p) / n) ** 0.5, mistakes)


@exercise("6.2")
def check_paired_difference(
    function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Check exercise 6.2, mean and standard error of paired differences."""
    __tracebackhide__ = True
    cases = [
        ([0.81, 0.86, 0.84, 0.90], [0.80, 0.84, 0.83, 0.87]),
        ([0.91, 0.93, 0.90, 0.94, 0.89, 0.92], [0.92, 0.93, 0.92, 0.92, 0.92, 0.92]),
    ]
    for values in cases:
        first, second = (
            torch.tensor(accuracies, dtype=torch.float64) for accuracies in values
        )
        d, root = first - second, len(first) ** 0.5
        mistakes = {
            "the order is first − second": (-d.mean(), None),
            "the mean comes first, and then its standard error": (
                d.std() / root,
                None,
            ),
            "take the differences first, and then one standard error": (
                None,
                (first.std() - second.std()) / root,
            ),
            "the sign tells which method is ahead: don't take absolute values": (
                d.abs().mean(),
                None,
            ),
            "that treats the runs as unrelated; take the differences first": (
                None,
                (first.var() + second.var()).sqrt() / root,
            ),
            "that is the spread of the differences; their mean is steadier, by √n": (
                None,
                d.std(),
            ),
            "divide by √n, not by n": (None, d.std() / len(d)),
            "that is the square of it: take the root": (None, d.var() / len(d)),
            "std() divides by n − 1 already; divide it by √n": (
                None,
                d.std() / (len(d) - 1) ** 0.5,
            ),
            "the mean was estimated from the same numbers: divide by n − 1": (
                None,
                d.std(correction=0) / root,
            ),
        }
        answer = ask(function, first=first, second=second)
        compare("paired_difference", answer, (d.mean(), d.std() / root), mistakes)


def _example(seed: int, count: int) -> tuple[nn.Module, Batches]:
    """Return a DoRA model whose A, B and m have moved and whose normalisation layer is
    trainable, and batches for it, the last of them smaller.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = OrderedDict(
            norm=nn.LayerNorm(6),
            hidden=nn.Linear(6, 5),
            relu=nn.ReLU(),
            output=nn.Linear(5, 3),
        )
        model = nn.Sequential(layers).double()
        replace_linear_layers(model, LinearWithDoRA, rank=2, alpha=1.5)
        freeze_linear_layers(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith((".B", ".m")):
                    parameter.add_(torch.rand_like(parameter))
        return model, [
            (
                torch.randn(rows, 6, dtype=torch.float64),
                torch.randint(0, 3, (rows,)),
            )
            for rows in [8] * (count - 1) + [5]
        ]


def _trained(
    model: nn.Module,
    batches: Batches,
    rate_of: Callable[[str], float],
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    forget: bool = True,
    renew: bool = False,
    loss_of: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> tuple[nn.Module, list[float]]:
    """Return a trained copy of the model, and the loss of each step.

    Args:
        model: stays as it is.
        batches: one step is taken for each.
        rate_of: name of a parameter → its learning rate.
        optimizer: makes one from groups.
        forget: whether gradients are cleared before each step.
        renew: whether there is a new optimizer in each step.
        loss_of: scores and labels → loss.
    """
    model = copy.deepcopy(model)
    groups = [
        {"params": [parameter], "lr": rate_of(name)}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    update = optimizer(groups)
    losses = []
    for images, labels in batches:
        if renew:
            update = optimizer(groups)
        loss = loss_of(model(images), labels)
        if forget:
            update.zero_grad()
        loss.backward()
        update.step()
        losses.append(loss.item())
    return model, losses


def _same(first: nn.Module, second: nn.Module, names: Iterable[str]) -> bool:
    one, other = dict(first.named_parameters()), dict(second.named_parameters())
    return all(equal(one[name].detach(), other[name].detach()) for name in names)


@exercise("6.3")
def check_fine_tune(
    function: Callable[[nn.Module, Batches, float, float], float],
) -> None:
    """Check exercise 6.3, a training loop in which m has its own learning rate."""
    __tracebackhide__ = True
    answer: Any = None
    for seed, count, rate, factor in [(0, 4, 0.01, 30.0), (1, 3, 0.004, 8.0)]:
        start, batches = _example(seed, count)
        model, given = copy.deepcopy(start), copy.deepcopy(batches)
        answer = function(model, given, rate, factor)
        if len(given) != len(batches) or not all(
            torch.equal(one, other)
            for mine, theirs in zip(batches, given, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        ):
            raise ExerciseError(
                "batches was changed in place; others still need it as it was"
            )
        _check_what_moved(start, model)
        _check_rates(start, model, batches, rate, factor)
        right, losses = _trained(start, batches, _rates(rate, rate * factor))
        _check_loss(answer, right, batches, losses)
    if isinstance(answer, Tensor) and answer.requires_grad:
        raise Remark(
            "return loss.item(): a tensor keeps all that its gradient would need"
        )


def _rates(others: float, m: float) -> Callable[[str], float]:
    return lambda name: m if name.endswith(".m") else others


def _check_what_moved(start: nn.Module, model: nn.Module) -> None:
    """Refuse a model in which something moved that is frozen, or what is trainable
    didn't.
    """
    __tracebackhide__ = True
    before = dict(start.named_parameters())
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    trainable = {name for name, p in before.items() if p.requires_grad}
    if not moved:
        raise ExerciseError(
            "nothing has moved: each batch needs loss.backward(), and then "
            "optimizer.step()"
        )
    if frozen := sorted(moved - trainable):
        raise ExerciseError(f"these are frozen, and have moved: {', '.join(frozen)}")
    if still := sorted(trainable - moved):
        raise ExerciseError(
            f"these are trainable, and haven't moved: {', '.join(still)}; are they in "
            "a group of the optimizer?"
        )


def _check_rates(
    start: nn.Module, model: nn.Module, batches: Batches, rate: float, factor: float
) -> None:
    """Refuse a model that didn't become what the loop makes of it."""
    __tracebackhide__ = True
    right = _rates(rate, rate * factor)
    names = [name for name, p in start.named_parameters() if p.requires_grad]
    if _same(model, _trained(start, batches, right)[0], names):
        return
    other_rates = {
        "m has the same rate as all others: where is factor?": _rates(rate, rate),
        "everything has the rate of m: factor is for m alone": _rates(
            rate * factor, rate * factor
        ),
        "the wrong way round: m has the larger rate": _rates(rate * factor, rate),
        "factor is multiplied by learning_rate; it isn't a rate itself": _rates(
            rate, factor
        ),
        "multiply by factor, don't divide": _rates(rate, rate / factor),
        "multiply by factor, don't add it": _rates(rate, rate + factor),
        "norm.weight is no m, though there is an m in its name: look at the end": (
            lambda name: rate * factor if "m" in name else rate
        ),
        "the rate isn't learning_rate: a group that has no \"lr\" takes Adam's 0.001": (
            _rates(0.001, rate * factor)
        ),
        "these are Adam's default rates: where is learning_rate?": _rates(0.001, 0.001),
    }
    for hint, rate_of in other_rates.items():
        if _same(model, _trained(start, batches, rate_of)[0], names):
            raise ExerciseError(hint)

    def of_softmax(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.softmax(dim=1), labels)

    def summed(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, reduction="sum")

    other_loops: dict[str, tuple[Batches, dict[str, Any]]] = {
        "the gradients of earlier batches are still there: zero_grad() belongs into each step": (
            batches,
            {"forget": False},
        ),
        "make the optimizer once, before the loop: Adam remembers its gradients": (
            batches,
            {"renew": True},
        ),
        "only the first batch was used: is the `return` inside the loop?": (
            batches[:1],
            {},
        ),
        "one step for each batch: you took two": (
            [batch for batch in batches for _ in (1, 2)],
            {},
        ),
        "go through the batches once": (batches * 2, {}),
        "take the batches in their order": (batches[::-1], {}),
        "that is plain gradient descent: use torch.optim.Adam": (
            batches,
            {"optimizer": torch.optim.SGD},
        ),
        "that is AdamW, which also decays the weights: use torch.optim.Adam": (
            batches,
            {"optimizer": torch.optim.AdamW},
        ),
        "cross_entropy takes the scores as they are, without softmax": (
            batches,
            {"loss_of": of_softmax},
        ),
        "the cross-entropy is the mean over a batch, not the sum": (
            batches,
            {"loss_of": summed},
        ),
    }
    for hint, (steps, options) in other_loops.items():
        if _same(model, _trained(start, steps, right, **options)[0], names):
            raise ExerciseError(hint)
    raise ExerciseError(
        "the parameters have moved, but not to where two rates take them; is it one "
        "step of Adam for each batch?"
    )


def _check_loss(
    answer: Any, right: nn.Module, batches: Batches, losses: list[float]
) -> None:
    """Refuse another number than the loss of the last batch before its step."""
    __tracebackhide__ = True
    images, labels = batches[-1]
    with torch.no_grad():
        after = F.cross_entropy(right(images), labels).item()
    mistakes = {
        "that is the loss after the last step: return the one before it": after,
        "that is the loss of the first batch: return the last": losses[0],
        "that is the mean of all losses: return the last": sum(losses) / len(losses),
        "that is the sum of all losses: return the last": sum(losses),
    }
    if isinstance(answer, Tensor):
        answer = answer.detach()
    compare("fine_tune", answer, losses[-1], mistakes)
