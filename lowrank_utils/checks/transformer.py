"""The checks of notebook 9, a pretrained transformer."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.adapt import mark_only_adapters_as_trainable, replace_linear_layers
from lowrank_utils.checks._shared import (
    ExerciseError,
    Remark,
    Watch,
    ask,
    compare,
    equal,
    exercise,
)
from lowrank_utils.dora import LinearWithDoRA

Batches = list[tuple[Tensor, Tensor]]


@exercise("9.1")
def check_training_bytes(function: Callable[[int, int, int], int]) -> None:
    """Check exercise 9.1, the bytes that training holds beside the activations."""
    __tracebackhide__ = True
    # In the last example everything is trained.
    for weights, trained, size in [(5_000, 300, 2), (70_000, 900, 1), (800, 800, 4)]:
        held, expected = weights * size, weights * size + 12 * trained
        mistakes = {
            "that is the weights alone: what is trained has a gradient and two averages, too": held,
            "the weights are missing: they lie in memory, trained or not": 12 * trained,
            "two of the three are counted: the gradient, and both averages of Adam": held
            + 8 * trained,
            "one of the three is counted: the gradient, and both averages of Adam": held
            + 4 * trained,
            "one number too many for each that is trained: the adapters are among the weights already": held
            + 16 * trained,
            "the adapters are counted twice: they are among the weights already": (
                weights + trained
            )
            * size
            + 12 * trained,
            "what is trained is a weight, too: all weights take weight_bytes": (
                weights - trained
            )
            * size
            + 12 * trained,
            "weight_bytes is for the weights alone: gradient and averages are in float32": held
            + 3 * size * trained,
            "gradients and averages are kept for what is trained alone": held
            + 12 * weights,
            "the frozen weights lie in memory as well": (size + 12) * trained,
            "the three numbers take 4 bytes each": held + 3 * trained,
            "the weights are counted by number: each takes weight_bytes": weights
            + 12 * trained,
            "the weights take weight_bytes each, not 4": 4 * weights + 12 * trained,
            "that is in bits; 4 bytes are 32 bits": 8 * expected,
            "divide nothing by 8: weight_bytes is in bytes already": held / 8
            + 12 * trained,
        }
        for unit, power in {"kB": 1e3, "MB": 1e6, "GB": 1e9}.items():
            mistakes[f"that is in {unit}: the bytes were asked for"] = expected / power
        for unit, power in {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}.items():
            mistakes[f"that is in {unit}: the bytes were asked for"] = expected / power
        answer = ask(function, weights=weights, trained=trained, weight_bytes=size)
        compare("training_bytes", answer, expected, mistakes)


def _sentences(lengths: list[int], filled: str) -> dict[str, Tensor]:
    """Return numbers for the tokens of sentences, and the mask; what fills up isn't
    zero.
    """
    generator = torch.Generator().manual_seed(len(lengths))
    longest = max(lengths)
    hidden = torch.randn(
        len(lengths), longest, 3, generator=generator, dtype=torch.float64
    )
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return {"hidden": hidden, "mask": mask if filled == "behind" else mask.flip(1)}


@exercise("9.2")
def check_mean_of_tokens(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Check exercise 9.2, the mean over each sentence's tokens."""
    __tracebackhide__ = True
    # In the second example it is filled up in front, as models that write want it.
    for lengths, filled in [([4, 6, 1, 3], "behind"), ([2, 7, 5, 3, 7], "in front")]:
        given = _sentences(lengths, filled)
        hidden, mask = given["hidden"], given["mask"]
        kept = hidden * mask.unsqueeze(-1)
        counts = mask.sum(dim=1, keepdim=True)
        expected = kept.sum(dim=1) / counts
        first = [row[:length] for row, length in zip(hidden, lengths, strict=True)]
        last = [row[-length:] for row, length in zip(hidden, lengths, strict=True)]
        mistakes = {
            "that is the mean over all places: what fills up is averaged, too": hidden.mean(
                dim=1
            ),
            "what fills up is 0 now, but it is counted still: divide by each sentence's number of tokens, not by the length": kept.mean(
                dim=1
            ),
            "what fills up is in the sum still: the mask belongs above the line, too": hidden.sum(
                dim=1
            )
            / counts,
            "that is the sum: divide it by each sentence's number of tokens": kept.sum(
                dim=1
            ),
            "that is the sum over all places, and no mean": hidden.sum(dim=1),
            "that is the first place alone ([CLS] in BERT)": hidden[:, 0],
            "that is the last place alone": hidden[:, -1],
            "that is each sentence's first token alone": torch.stack(
                [row[m][0] for row, m in zip(hidden, mask, strict=True)]
            ),
            "that is each sentence's last token alone": torch.stack(
                [row[m][-1] for row, m in zip(hidden, mask, strict=True)]
            ),
            "what fills up stands in front here, as models that write want it: go by the mask, not by the lengths": torch.stack(
                [row.mean(dim=0) for row in first]
            ),
            "what fills up stands behind the tokens here: go by the mask, not by the lengths": torch.stack(
                [row.mean(dim=0) for row in last]
            ),
            "the mask is the wrong way round: it is True where a token is": (
                hidden - kept
            ).sum(dim=1)
            / (~mask).sum(dim=1, keepdim=True),
            "one mean for each sentence; yours goes over the tokens of all sentences": hidden[
                mask
            ].mean(dim=0),
            "each sentence has a number of tokens of its own; you divide by that of all": kept.sum(
                dim=1
            )
            / mask.sum(),
            "one token too many in the number: is there a + 1?": kept.sum(dim=1)
            / (counts + 1),
            "that is the largest value of each column; the mean was asked for": hidden.masked_fill(
                ~mask.unsqueeze(-1), -torch.inf
            ).amax(dim=1),
        }
        for name, dim in {"sentences": 0, "columns": 2}.items():
            hint = f"the mean goes over the tokens, dim=1; yours goes over the {name}"
            mistakes[hint] = hidden.mean(dim=dim)
            masked = kept.sum(dim=dim)
            mistakes[f"{hint}, dim={dim}"] = (
                masked / mask.sum(dim=0).unsqueeze(-1) if dim == 0 else masked / 3
            )
        compare("mean_of_tokens", ask(function, **given), expected, mistakes)
    operations = []
    for count in (4, 40):
        given = _sentences([*range(1, 5)] * (count // 4), "behind")
        with Watch(10**9, list(given.values())) as watch:
            function(*given.values())
        operations.append(watch.operations)
    if operations[1] > operations[0] + 10:
        raise Remark(
            f"with a loop: {operations[0]} operations for 4 sentences became "
            f"{operations[1]} for 40. Multiply by the mask, and sum over dim=1"
        )


class _Case:
    """A model with an adapter, its optimizer, and batches, of which the last is
    smaller. Gradients of an earlier step are there, as after somebody else's step.

    Attributes:
        steps: how often ``optimizer.step()`` was called.
        passes: ``"forward 8"`` and ``"backward"``, in the order in which they ran, with
            the number of examples.
    """

    def __init__(self, seed: int, sizes: list[int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = OrderedDict(
                norm=nn.LayerNorm(6),
                hidden=nn.Linear(6, 5),
                relu=nn.ReLU(),
                head=nn.Linear(5, 3),
            )
            self.model: nn.Module = nn.Sequential(layers).double()
            replace_linear_layers(self.model, LinearWithDoRA, 2, 1.5, targets="hidden")
            mark_only_adapters_as_trainable(self.model, also="head.*")
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name.endswith((".B", ".m")):
                        parameter.add_(torch.rand_like(parameter))
        self.batches: Batches = [
            (
                torch.randn(rows, 6, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (rows,), generator=generator),
            )
            for rows in sizes
        ]
        for parameter in self.trainable().values():
            parameter.grad = torch.rand(
                parameter.shape, generator=generator, dtype=torch.float64
            )
        # It has all parameters, so that only their flags keep the frozen ones in place.
        # Under Adam a gradient that is twice as long would make the same step.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.steps = 0
        self.passes: list[str] = []

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trainable now, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def watch(self) -> None:
        """Count from now on what is done with the model and the optimizer."""

        def count(*_: Any) -> None:
            self.steps += 1

        def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                self.passes.append(f"forward {len(inputs[0])}")

        def backward(_: Tensor) -> None:
            self.passes.append("backward")

        self.optimizer.register_step_post_hook(count)
        self.model.register_forward_pre_hook(forward)
        self.trainable()["head.bias"].register_hook(backward)

    def losses(self) -> list[float]:
        """Return the mean cross-entropy of each batch as the model is now."""
        with torch.no_grad():
            return [F.cross_entropy(self.model(x), y).item() for x, y in self.batches]

    def moved(self) -> dict[str, Tensor]:
        """Return by name what the parameters are now, of those that have moved."""
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if not torch.equal(parameter, self.start[name])
        }

    def step(
        self,
        weights: list[float],
        *,
        old: bool = False,
        cleared: bool = False,
        scores: Callable[[Tensor], Tensor] = lambda scores: scores,
    ) -> dict[str, Tensor]:
        """Take one step, and return what has moved.

        Args:
            weights: what the mean loss of each batch is multiplied by.
            old: leave the gradients of before in.
            cleared: clear the gradients before each batch.
            scores: done with the model's outputs.
        """
        if not old:
            self.optimizer.zero_grad()
        for (x, y), weight in zip(self.batches, weights, strict=True):
            if cleared:
                self.optimizer.zero_grad()
            (weight * F.cross_entropy(scores(self.model(x)), y)).backward()
        self.optimizer.step()
        return self.moved()


@exercise("9.3")
def check_accumulated_step(
    function: Callable[[nn.Module, torch.optim.Optimizer, Batches], float],
) -> None:
    """Check exercise 9.3, one step from the gradients of several batches."""
    __tracebackhide__ = True
    remark = None
    for seed, sizes in [(0, [8, 8, 3]), (1, [6, 6, 6, 1])]:
        make = partial(_Case, seed, sizes)
        case, shares = make(), [size / sum(sizes) for size in sizes]
        case.watch()
        given = [(x.clone(), y.clone()) for x, y in case.batches]
        answer = function(case.model, case.optimizer, given)
        if len(given) != len(sizes) or not all(
            torch.equal(one, other)
            for mine, theirs in zip(case.batches, given, strict=True)
            for one, other in zip(mine, theirs, strict=True)
        ):
            raise ExerciseError(
                "batches was changed in place; others still need it as it was"
            )
        _check_steps(case, make)
        _check_gradient(case, make, shares)
        losses = make().losses()
        _check_mean_loss(answer, case, losses, shares)
        remark = remark or _what_it_costs(answer, case, max(sizes))
    if remark:
        raise Remark(remark)


def _check_steps(case: _Case, make: Callable[[], _Case]) -> None:
    """Refuse anything else than one step, of what is trainable."""
    __tracebackhide__ = True
    trainable = make().trainable().keys()
    moved, count = case.moved().keys(), len(case.batches)
    if frozen := sorted(moved - trainable):
        raise ExerciseError(f"these are frozen, and have moved: {', '.join(frozen)}")
    if unfrozen := sorted(case.trainable().keys() - trainable):
        raise ExerciseError(f"these were frozen, and aren't: {', '.join(unfrozen)}")
    if not case.steps:
        raise ExerciseError(
            "the parameters moved without the optimizer that you were given: call its step()"
            if moved
            else "nothing has moved: backward() for each batch, and then "
            "optimizer.step() once"
        )
    if case.steps == count:
        raise ExerciseError(
            f"{count} batches, and {count} steps: optimizer.step() comes once, after "
            "the loop"
        )
    if case.steps > 1:
        raise ExerciseError(
            f"one step for all batches; yours are {case.steps}: does step() stand in "
            "the loop, or twice?"
        )
    if still := sorted(trainable - moved):
        raise ExerciseError(
            f"these are trainable, and haven't moved: {', '.join(still)}; is there a "
            "backward() between zero_grad() and step()?"
        )


def _check_gradient(
    case: _Case, make: Callable[[], _Case], shares: list[float]
) -> None:
    """Refuse a step along another gradient than that of the mean over all examples."""
    __tracebackhide__ = True
    moved = case.moved()

    def is_step(weights: list[float], **options: Any) -> bool:
        other = make().step(weights, **options)
        return moved.keys() == other.keys() and all(
            equal(moved[name], other[name]) for name in moved
        )

    if is_step(shares):
        return
    sizes = [len(y) for _, y in case.batches]
    count, examples = len(sizes), sum(sizes)
    only = [[float(k == place) for k in range(count)] for place in (0, count - 1)]
    weighted = {
        "": shares,
        "that is the mean of the batches' means, in which an example of the smaller last batch counts more: weigh each batch by its number of examples": [
            1 / count
        ]
        * count,
        "the batches' means were added up: their gradient is too long": [1.0] * count,
        "that is the sum over all examples: divide by their number": [
            float(size) for size in sizes
        ],
        "the sum is divided by the number of batches: divide by that of the examples": [
            size / count for size in sizes
        ],
        "the last batch is smaller: count its examples, don't take the first batch's number for all": [
            size / (count * sizes[0]) for size in sizes
        ],
        "all batches are weighed as if they had as many examples as the first": [
            sizes[0] / examples
        ]
        * count,
        "each mean was divided by the number of examples, as if it were a sum": [
            1 / examples
        ]
        * count,
        "the weights of the batches are divided by their number once more": [
            share / count for share in shares
        ],
        "only the first batch was used: is the step or the `return` inside the loop?": only[
            0
        ],
        "only the last batch was used: does backward() stand behind the loop, or zero_grad() in it?": only[
            1
        ],
    }
    loops: dict[str, dict[str, Any]] = {
        "": {},
        "zero_grad() in the loop throws away the gradients of the batches before: it comes once, before the loop": {
            "cleared": True
        },
        "gradients of an earlier step were there still: zero_grad() comes before the first backward()": {
            "old": True
        },
        "cross_entropy takes the scores as they are, without softmax": {
            "scores": lambda scores: scores.softmax(dim=1)
        },
    }
    for (of_loop, options), (of_weights, weights) in product(
        loops.items(), weighted.items()
    ):
        hint = of_loop or of_weights
        if hint and is_step(weights, **options):
            raise ExerciseError(hint)
    raise ExerciseError(
        "there was one step, but not along the gradient of the mean cross-entropy over "
        "all examples; print the loss of each batch and what it is multiplied by"
    )


def _check_mean_loss(
    answer: Any, case: _Case, losses: list[float], shares: list[float]
) -> None:
    """Refuse another number than the mean loss over all examples before the step."""
    __tracebackhide__ = True

    def mean(values: list[float]) -> float:
        return sum(value * s for value, s in zip(values, shares, strict=True))

    examples = sum(len(y) for _, y in case.batches)
    mistakes = {
        "return the mean over all examples; that is the loss of the last batch": losses[
            -1
        ],
        "return the mean over all examples; that is the last batch's part of it": losses[
            -1
        ]
        * shares[-1],
        "return the mean over all examples; that is the loss of the first batch": losses[
            0
        ],
        "you return the mean of the batches' means: weigh them, as for the gradient": sum(
            losses
        )
        / len(losses),
        "you return the sum of the batches' means: weigh them, as for the gradient": sum(
            losses
        ),
        "you return the sum over all examples: divide by their number": mean(losses)
        * examples,
        "return the loss before the step; yours is the one after it": mean(
            case.losses()
        ),
    }
    if isinstance(answer, Tensor):
        answer = answer.detach()
    compare("accumulated_step", answer, mean(losses), mistakes)


def _what_it_costs(answer: Any, case: _Case, largest: int) -> str | None:
    """Say what a right step costs that it needn't, if anything."""
    forwards = [int(p.split()[1]) for p in case.passes if p.startswith("forward")]
    if any(rows > largest for rows in forwards):
        return (
            f"all {max(forwards)} examples went through the model at once, and "
            "their activations don't fit into memory: that is why there are batches"
        )
    waiting = 0
    for each in case.passes:
        waiting = waiting + 1 if each.startswith("forward") else 0
        if waiting > 1:
            return (
                "the activations of all batches are kept until one backward(): call "
                "backward() for each batch, and they go"
            )
    if isinstance(answer, Tensor) and answer.requires_grad:
        return "return a float: a tensor keeps all that its gradient would need"
    return None
