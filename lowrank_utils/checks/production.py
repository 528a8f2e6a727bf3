"""The checks of notebook 8, from scratch to production."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils.adapt import replace_linear_layers
from lowrank_utils.checks._shared import (
    ExerciseError,
    Remark,
    Watch,
    ask,
    compare,
    equal,
    examples,
    exercise,
)
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA, is_adapter
from lowrank_utils.training import MultilayerPerceptron

_PREFIX = "base_model.model."
_A, _B, _M = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_OTHER_MODELS = "not every layer has an adapter, and models have other names"


@contextmanager
def _explained(hints: Mapping[str, str]) -> Iterator[None]:
    """Put into an error of the learner's function what it is likely to come from, in
    the place of the general advice about transposes.

    Args:
        hints: a part of the error's own message → what it comes from.
    """
    __tracebackhide__ = True
    try:
        yield
    except ExerciseError as error:
        for part, hint in hints.items():
            if part in str(error.__cause__):
                stopped = str(error).partition(". The shapes are ")[0]
                raise ExerciseError(f"{stopped}: {hint}") from error.__cause__
        raise


@exercise("8.1")
def check_to_peft(function: Callable[[nn.Module], Mapping[str, Tensor]]) -> None:
    """Check exercise 8.1, what an adapter's file holds, by PEFT's names."""
    __tracebackhide__ = True
    transposed: list[str] = []
    for model in _models_with_adapters():
        before = copy.deepcopy(model.state_dict())
        with _explained(
            {
                "no attribute 'lora'": _OTHER_MODELS,
                "no attribute 'layers'": _OTHER_MODELS,
                "no attribute 'm'": "only DoRA layers have an m, as `layer.m`",
            }
        ):
            answer = function(model)
        after = model.state_dict()
        if before.keys() != after.keys() or not all(
            torch.equal(before[name], after[name]) for name in before
        ):
            raise ExerciseError(
                "model was changed in place; others still need it as it was"
            )
        transposed += _check_tensors(answer, model)
    if transposed:
        raise Remark(
            f"{transposed[0]} lies transposed in memory, and safetensors refuses "
            "to save it: add .contiguous()"
        )


def _models_with_adapters() -> list[nn.Module]:
    """Return two models in which some layers are adapted, B and m have moved, and which
    have other names and kinds of adapters.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(8)
        first: nn.Module = MultilayerPerceptron(7, 5, 6, 4).double()
        ends = ["layers.0", "layers.4"]
        replace_linear_layers(first, LinearWithLoRA, 2, 2.5, targets=ends)
        block = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 5))
        parts = {"words": nn.Embedding(3, 6), "block": block, "head": nn.Linear(5, 3)}
        second: nn.Module = nn.ModuleDict(parts).double()
        replace_linear_layers(second, LinearWithDoRA, 3, 0.5, targets="block.1")
        replace_linear_layers(second, LinearWithLoRA, 2, 1.5, targets="head")
        for module in (*first.modules(), *second.modules()):
            if is_adapter(module):
                layer: Any = module
                layer.lora.B.normal_()
                if hasattr(layer, "m"):
                    layer.m.mul_(torch.linspace(0.5, 1.5, len(layer.m)))
    return [first, second]


def _check_tensors(answer: Any, model: nn.Module) -> list[str]:
    """Refuse what isn't the content of an adapter's file, and return the names of
    tensors that can't be saved as they are.
    """
    __tracebackhide__ = True
    if answer is None:
        raise ExerciseError("to_peft is None: is the `return` missing?")
    if not isinstance(answer, Mapping):
        raise ExerciseError(
            f"to_peft must be a dictionary, name → tensor; got {type(answer).__name__}"
        )
    layers: dict[str, Any] = {
        name: layer for name, layer in model.named_modules() if is_adapter(layer)
    }
    wanted = {
        f"{_PREFIX}{name}.{part}"
        for name, layer in layers.items()
        for part in (_A, _B, *([_M] if hasattr(layer, "m") else []))
    }
    if hint := _wrong_names(answer, wanted):
        raise ExerciseError(hint)
    for name, layer in layers.items():
        A, B, alpha = layer.lora.A.detach(), layer.lora.B.detach(), layer.lora.alpha
        start = f"{_PREFIX}{name}."
        scaled = "the scaling doesn't belong in here: the config has it, as lora_alpha"
        reshaped = "a reshape isn't a transpose: it puts the numbers into other places"
        changed = "A and B have changed places"
        mistakes: dict[str, dict[str, Tensor]] = {
            _A: {
                "PEFT's A is (r, in): ours is its transpose": A,
                changed: B.T,
                scaled: alpha * A.T,
                reshaped: A.reshape(A.T.shape),
            },
            _B: {
                "PEFT's B is (out, r): ours is its transpose": B,
                changed: A.T,
                scaled: alpha * B.T,
                reshaped: B.reshape(B.T.shape),
            },
        }
        right = {_A: A.T, _B: B.T}
        if hasattr(layer, "m"):
            right[_M] = layer.m.detach()
            norms = layer.linear.weight.detach().norm(dim=1)
            mistakes[_M] = {"that is ‖W‖, from where m started: take layer.m": norms}
        for part, expected in right.items():
            compare(start + part, answer[start + part], expected, mistakes[part])
    return [name for name, tensor in answer.items() if not tensor.is_contiguous()]


def _wrong_names(answer: Mapping[Any, Any], wanted: set[str]) -> str | None:
    """Say what is wrong with the names, if anything is."""
    for name in answer:
        if not isinstance(name, str):
            return f"every name must be text; got the {type(name).__name__} {name!r}"
    further = sorted(answer.keys() - wanted)
    for name in further:
        # What a name has that none should have, the most telling first.
        for known, hint in {
            ".linear.": "the pretrained weights don't belong into an adapter's file",
            ".lora.": "PEFT's names end in lora_A.weight and lora_B.weight",
            ".default": "PEFT says `default` in memory alone; the file leaves it out",
            f"{_M}.weight": f"the name of m ends in {_M}, without `.weight`",
        }.items():
            if known in f".{name}":
                return f"{hint}; got {name!r}"
        if not name.startswith(_PREFIX):
            return f"every name begins with `{_PREFIX}`; got {name!r}"
        if name.endswith((".lora_A", ".lora_B")):
            return f"the names of A and B end in `.weight`; got {name!r}"
        if name.endswith(".m"):
            return f"the name of m ends in {_M}; got {name!r}"
        end = name.removeprefix(_PREFIX)
        if any(known.endswith(f".{end}") for known in wanted):
            return (
                "a layer's whole name belongs in, as model.named_modules() gives it; "
                f"got {name!r}"
            )
        if name.endswith(_M):
            return f"{name!r} is there, and this layer has no m: it is LoRA"
        return f"{name!r} isn't part of the adapter"
    if not answer:
        return (
            "the dictionary is empty: named_modules() looks into all depths, and "
            "named_children() doesn't; `return` stands after the loop"
        )
    missing = sorted(wanted - answer.keys())
    if missing and all(name.endswith(_M) for name in missing):
        return f"{missing[0]!r} is missing: with m left out, another layer is loaded"
    if missing and not any(
        _layer_of(name) in map(_layer_of, answer) for name in missing
    ):
        return (
            f"{missing[0]!r} is missing, and so is all of its layer: does `return` "
            "stand inside the loop?"
        )
    return f"{missing[0]!r} is missing" if missing else None


def _layer_of(name: str) -> str:
    """Return the part of a tensor's name that names its layer."""
    return name.partition(".lora_")[0]


@exercise("8.2")
def check_factored_squares(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> None:
    """Check exercise 8.2, the squared row norms of W + ΔW from thin matrices alone."""
    __tracebackhide__ = True
    for e in examples():
        W, A, B, alpha = e.weight, e.A, e.B, e.alpha
        base, cross = W.square().sum(dim=1), ((W @ A) * B.T).sum(dim=1)
        root = base.sqrt()
        update = (alpha * (A @ B)).square().sum(dim=0)
        expected = base + 2 * alpha * cross + update
        mistakes = {
            "the mixed term is missing: (a + b)² isn't a² + b²": base + update,
            "the mixed term should come twice, as 2ab in (a + b)²; yours comes once": base
            + alpha * cross
            + update,
            "the scaling should be squared in the last term; yours isn't": base
            + 2 * alpha * cross
            + update / alpha,
            "the last term lacks the scaling: u is s·A·b, so what is ‖u‖²?": base
            + 2 * alpha * cross
            + update / alpha**2,
            "the mixed term lacks the scaling: u is s·A·b": base + 2 * cross + update,
            "the scaling is squared in your mixed term, and should come once: only u has it": base
            + 2 * alpha**2 * cross
            + update,
            "alpha is missing": base + 2 * cross + update / alpha**2,
            "(a + b)² has + 2ab; yours has the minus of (a − b)²": base
            - 2 * alpha * cross
            + update,
            "the first term, ‖w‖², is missing": 2 * alpha * cross + update,
            "that is the norm; the square was asked for": expected.sqrt(),
            "one number per output: sum over the inputs, not over the outputs": e.V.square().sum(
                dim=0
            ),
            "that is W alone; the update is missing": base,
            "the first term is ‖w‖², and yours isn't squared": root
            + 2 * alpha * cross
            + update,
            "the first term is one number for all of W: each row has its own, dim=1": W.square().sum()
            + 2 * alpha * cross
            + update,
            "the first term is one number for all of W: each row has its own, dim=1, "
            "and it is squared": W.norm() + 2 * alpha * cross + update,
            "the mixed term is one number for all rows: sum over r alone": base
            + 2 * alpha * cross.sum()
            + update,
            "the last term is one number for all rows: sum over r alone": base
            + 2 * alpha * cross
            + update.sum(),
            "the last term lacks its second B: ‖A·b‖² is bᵀ(AᵀA)b": base
            + 2 * alpha * cross
            + alpha**2 * (A.T @ A @ B).sum(dim=0),
            "the last term lacks AᵀA: ‖A·b‖² is bᵀ(AᵀA)b, and not ‖b‖²": base
            + 2 * alpha * cross
            + alpha**2 * B.square().sum(dim=0),
        }
        answer = ask(function, **e.take("weight A B alpha"))
        compare("factored_squares", answer, expected, mistakes)
    _check_that_nothing_large_is_stored(function)


def _check_that_nothing_large_is_stored(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> None:
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(1)
    W, A, B = (
        torch.randn(*shape, generator=generator)
        for shape in [(200, 300), (300, 2), (2, 200)]
    )
    # W·A and its like have 400 numbers, W and A·B 60,000, and W·A·B, of which only the
    # diagonal counts, 40,000.
    with Watch(200 * 200, [W, A, B]) as watch:
        function(W, A, B, 2.0)
    for large in watch.large:
        if large.layout == torch.strided and equal(large, W.square()):
            raise Remark(
                "the squares of W were stored, a matrix as large as W: "
                "torch.linalg.vector_norm(weight, dim=1) stores none"
            )
        if sorted(n for n in large.shape if n != 1) == [200, 300]:
            raise Remark(
                "A·B was built in full: regroup the last term as B · (AᵀA · B)"
            )
        raise Remark(
            f"on the way a result of shape {tuple(large.shape)} was stored, from which one number per "
            "output is used: multiply thin matrices element by element and sum over r"
        )
    # The thin way writes a few matrices like W·A, 400 numbers each.
    if watch.written >= W.numel():
        raise Remark(
            f"piece by piece {watch.written:,} numbers were computed, and W has "
            f"{W.numel():,}: that is all of ΔW. Multiply thin matrices for all rows at once"
        )


@exercise("8.3")
def check_mixed_batch(function: Callable[..., Tensor]) -> None:
    """Check exercise 8.3, DoRA with another adapter for each row of the batch."""
    __tracebackhide__ = True
    generator = torch.Generator().manual_seed(3)
    unequal = {
        "is invalid for input of size": "the customers have unequal numbers of rows, so "
        "the batch can't be cut into blocks of one size"
    }
    for e, customers, chosen in zip(
        examples(), [3, 2], [[2, 0, 2, 1, 0], [1, 0, 0, 1, 1, 0]], strict=True
    ):
        x, weight, bias = e.x, e.weight, e.bias
        (n_out, n_in), r = weight.shape, len(e.B)
        shapes = [(customers, n_in, r), (customers, r, n_out), (customers, n_out)]
        A, B, c = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in shapes
        )
        choice = torch.tensor(chosen)
        base = x @ weight.T
        update = torch.stack(
            [row @ A[k] @ B[k] for row, k in zip(x, chosen, strict=True)]
        )
        norms = (weight + (A @ B).mT).norm(dim=2)
        first, order = chosen[0], choice.argsort(stable=True)
        picked = x[choice]
        its_update = (picked.unsqueeze(1) @ A[choice] @ B[choice]).squeeze(1)
        expected = c[choice] * (base + update) + bias
        mistakes = {
            "every row got the first row's adapter": c[first]
            * (base + x @ A[first] @ B[first])
            + bias,
            "the bias is scaled; it isn't part of W": c[choice]
            * (base + update + bias),
            "that is LoRA per row: where is c?": base + update + bias,
            "c should scale the frozen product too; yours scales the update alone": base
            + c[choice] * update
            + bias,
            "c should scale the update too; yours scales the frozen product alone": c[
                choice
            ]
            * base
            + update
            + bias,
            "c is m/‖V‖ already; you divide by the norm once more": (c / norms)[choice]
            * (base + update)
            + bias,
            "the bias is missing": c[choice] * (base + update),
            "the frozen product, xWᵀ, is missing": c[choice] * update + bias,
            "a row as a matrix has a dimension more: squeeze it out before you add": c[
                choice
            ]
            * (base + update.unsqueeze(1))
            + bias,
            "the updates of all adapters were added up": c[choice]
            * (base + sum(x @ A[k] @ B[k] for k in range(customers)))
            + bias,
            "x[choice] takes other rows: x has the batch's rows already, so choose "
            "among A, B and c alone": c[choice] * (picked @ weight.T + its_update)
            + bias,
            "the update comes of x[choice], which are other rows: x has the batch's rows "
            "already, so choose among A, B and c alone": c[choice] * (base + its_update)
            + bias,
            "the updates stand in the order of the customers: sort them back": c[choice]
            * (base + update[order])
            + bias,
        }
        with _explained(unequal):
            answer = ask(
                function, x=x, weight=weight, bias=bias, A=A, B=B, c=c, choice=choice
            )
        if (moved := _in_other_order(answer, expected)) is not None:
            mistakes["the rows are right, and in another order: sort them back"] = moved
        compare("mixed_batch", answer, expected, mistakes)
    _check_that_rows_go_together(function, generator)


def _in_other_order(answer: Any, expected: Tensor) -> Tensor | None:
    """Return the rows of ``expected`` in the order in which ``answer`` has them, if it
    has each of them once and in another order.
    """
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        return None
    distances = (answer.double().unsqueeze(1) - expected).abs().sum(dim=2)
    order = distances.argmin(dim=1)
    return expected[order] if len(order.unique()) == len(expected) else None


def _check_that_rows_go_together(
    function: Callable[..., Tensor], generator: torch.Generator
) -> None:
    __tracebackhide__ = True
    operations = []
    for rows, customers in [(4, 3), (40, 30)]:
        shapes = [
            (rows, 50),
            (60, 50),
            (60,),
            (customers, 50, 2),
            (customers, 2, 60),
            (customers, 60),
        ]
        inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
        inputs.append(torch.arange(rows) % customers)
        # All rows times all customers, and no weight has fewer numbers for each. (Of few
        # rows even W would have as many.)
        with Watch(customers * rows * 60, inputs) as watch:
            function(*inputs)
        operations.append(watch.operations)
    for large in watch.large:
        if {50, 60} <= set(large.shape):
            raise Remark(
                "a weight was built for every row or customer: multiply x by A first, and that by B"
            )
        raise Remark(
            "every row went through the adapter of every customer or row, for a result of shape "
            f"{tuple(large.shape)}: gather A and B with choice, and multiply each row by its own alone"
        )
    if operations[1] > operations[0] + 10:
        raise Remark(
            f"with a loop: {operations[0]} operations for 4 rows became {operations[1]} for 40. "
            "Gather A, B and c with choice"
        )
