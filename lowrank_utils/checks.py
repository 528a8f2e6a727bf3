"""What the exercises call: each check takes the learner's function and says what is right, or gives a hint.

A check knows the mistakes that are often made and names the one it recognises. It never shows the answer.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lowrank_utils.adapt import replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import MultilayerPerceptron


class ExerciseError(AssertionError):
    """The answer isn't right yet; the message is a hint."""


def _exercise(number: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a check say what came out: right, or not begun. A wrong answer raises its hint."""

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(check)
        def run(function: Any) -> None:
            __tracebackhide__ = True
            try:
                check(function)
            except NotImplementedError as untouched:
                # No error, so that "Run All Cells" and papermill go through an untouched notebook.
                print(f"To do: {untouched}")
            else:
                print(f"Exercise {number}: correct")

        return run

    return decorate


def _compare(name: str, answer: Any, expected: Any, mistakes: dict[str, Any]) -> None:
    """Accept ``answer`` if it equals ``expected``, else raise the hint of the mistake that it equals.

    ``mistakes`` maps a hint to the value that this mistake gives.
    """
    __tracebackhide__ = True  # a traceback would show the line with the expected value
    if isinstance(expected, tuple):
        if not isinstance(answer, tuple) or len(answer) != len(expected):
            raise ExerciseError(f"{name} must be a tuple of {len(expected)}; got {type(answer).__name__}")
        for place, part in enumerate(expected):
            hints = {hint: wrong[place] for hint, wrong in mistakes.items() if wrong[place] is not None}
            _compare(f"{name}[{place}]", answer[place], part, hints)
        return
    for hint, wrong in mistakes.items():
        if _equal(answer, wrong) and not _equal(wrong, expected):
            raise ExerciseError(hint)
    # A single number may come as a tensor without dimensions or as Python's.
    numbers = isinstance(answer, (int, float)) or not isinstance(expected, Tensor)
    if numbers and torch.as_tensor(expected).ndim == 0:
        if isinstance(answer, (list, tuple)) or (isinstance(answer, Tensor) and answer.ndim > 0):
            shape = f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
            raise ExerciseError(f"{name} must be one number; got a {type(answer).__name__.lower()}{shape}")
    elif isinstance(expected, Tensor):
        if not isinstance(answer, Tensor):
            raise ExerciseError(f"{name} must be a tensor; got {type(answer).__name__}")
        if answer.shape != expected.shape:
            raise ExerciseError(
                f"{name} has the wrong shape: {tuple(answer.shape)} instead of {tuple(expected.shape)}"
            )
        if answer.dtype != expected.dtype:
            raise ExerciseError(f"{name} has the wrong dtype: {answer.dtype} instead of {expected.dtype}")
    if not _equal(answer, expected):
        raise ExerciseError(f"{name} isn't right yet; try a small example by hand and compare each step")


def _equal(first: Any, second: Any) -> bool:
    try:
        first, second = torch.as_tensor(first), torch.as_tensor(second)
    except (TypeError, ValueError, RuntimeError):
        return False
    if first.shape != second.shape:
        return False
    return torch.allclose(first.double(), second.double(), rtol=1e-6, atol=1e-9, equal_nan=True)


def _example(seed: int = 0) -> dict[str, Any]:
    """Return a layer's parts with in ≠ out, a bias, a moved m, a batch, and an alpha that isn't 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(5, 7),
        "weight": draw(4, 7),
        "bias": draw(4),
        "A": draw(7, 3),
        "B": draw(3, 4),
        "alpha": 2.5,
        "m": draw(4).abs() + 0.5,
    }


def _copies(example: dict[str, Any], *names: str) -> list[Any]:
    return [example[name].clone() if isinstance(example[name], Tensor) else example[name] for name in names]


@_exercise("1.1")
def check_adapter_parameters(function: Callable[[int, int, int], int]) -> None:
    """Check exercise 1.1, how many numbers A and B hold."""
    __tracebackhide__ = True
    for n_in, n_out, r in [(784, 128, 4), (10, 2, 1), (30, 50, 7)]:
        mistakes = {
            "A and B are stored, not their product: what are their shapes?": n_in * n_out,
            "that is A alone; B has numbers too": n_in * r,
            "that is B alone; A has numbers too": r * n_out,
            "A isn't as tall as B is wide: in and out may differ": 2 * n_in * r,
            "the rank isn't a factor of the product in·out": r * n_in * n_out,
        }
        _compare("adapter_parameters", function(n_in, n_out, r), r * (n_in + n_out), mistakes)


@_exercise("1.2")
def check_smallest_rank(function: Callable[[Tensor, float], int]) -> None:
    """Check exercise 1.2, the smallest rank that keeps a share of the squared norm."""
    __tracebackhide__ = True

    def first_above(kept: Tensor, share: float) -> int:
        return int((kept >= share).nonzero()[0, 0]) + 1

    # In the first case all mistakes give different ranks.
    cases = [([6, 3, 2, 2, 2, 2, 1], 0.75), ([1] * 16, 0.5), ([9, 1, 1, 1, 1], 0.95), ([4, 2, 2, 1], 1.0)]
    for values, share in cases:
        sigma = torch.tensor(values, dtype=torch.float64)
        kept = sigma.square().cumsum(0) / sigma.square().sum()
        expected = first_above(kept, share)
        mistakes = {
            "the squared norm adds up squares of the singular values": first_above(
                sigma.cumsum(0) / sigma.sum(), share
            ),
            "kept and share are both of the squared norm: don't take the root": first_above(
                kept.sqrt(), share
            ),
            "that compares the relative error; kept share = 1 − relative error²": first_above(
                kept, 1 - (1 - share) ** 2
            ),
            "one too few: an index counts from 0, a rank from 1": expected - 1,
            "one too many: the first rank that reaches the share is enough": expected + 1,
        }
        _compare("smallest_rank", function(sigma.clone(), share), expected, mistakes)
    # Adding these squares one by one rounds each time, which torch.sum largely avoids.
    sigma = torch.tensor([1.0, *[1.75e-8] * 200], dtype=torch.float64)
    if function(sigma.clone(), 1.0) > len(sigma):
        raise ExerciseError(
            f"with share = 1 and {len(sigma)} singular values the rank is more than there are: cumsum and sum round "
            "differently, so divide by the last entry of cumsum"
        )


@_exercise("1.3")
def check_apply_update(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Check exercise 1.3, x(W + AB) without the product A·B."""
    __tracebackhide__ = True
    e = _example()
    x, weight, A, B = _copies(e, "x", "weight", "A", "B")
    base = e["x"] @ e["weight"].T
    mistakes = {
        "that is x·W alone; the update is missing": base,
        "that is the update alone": e["x"] @ e["A"] @ e["B"],
    }
    _compare("apply_update", function(x, weight, A, B), base + e["x"] @ e["A"] @ e["B"], mistakes)
    if not torch.equal(weight, e["weight"]):
        raise ExerciseError("weight was changed in place; the base must stay as it is")
    with FlopCounterMode(display=False) as counter:
        function(torch.randn(2, 300), torch.randn(200, 300), torch.randn(300, 1), torch.randn(1, 200))
    if counter.get_total_flops() > 2 * (2 * 300 * 200 + 2 * (300 + 200)):
        raise ExerciseError("right, but A·B was built in full: multiply x by A first")


@_exercise("2.1")
def check_scaling(function: Callable[[float, int, bool], float]) -> None:
    """Check exercise 2.1, the alpha to pass for PEFT's scalings."""
    __tracebackhide__ = True
    for alpha, rank, rslora in [(8.0, 4, False), (8.0, 16, True), (3.0, 64, False)]:
        root = rank**0.5
        mistakes = {
            "divide instead of multiplying: a larger rank means a smaller factor": alpha
            * (root if rslora else rank),
            "that is the other rule: √r belongs to rsLoRA": alpha / (rank if rslora else root),
            "that is the article's rule, alpha as it is": alpha,
        }
        _compare("scaling", function(alpha, rank, rslora), alpha / (root if rslora else rank), mistakes)


@_exercise("2.2")
def check_lora_output(function: Callable[..., Tensor]) -> None:
    """Check exercise 2.2, the output of a wrapped linear layer."""
    __tracebackhide__ = True
    e = _example()
    base, update = e["x"] @ e["weight"].T, e["x"] @ e["A"] @ e["B"]
    mistakes = {
        "the update isn't scaled: where is alpha?": base + e["bias"] + update,
        "alpha is used as it is here, not divided by the rank": base + e["bias"] + e["alpha"] / 3 * update,
        "alpha scales the update alone, not the frozen layer": e["alpha"] * (base + e["bias"] + update),
        "the bias is missing": base + e["alpha"] * update,
        "the frozen layer is missing": e["alpha"] * update,
        "the bias is scaled; it belongs to the frozen layer": base + e["alpha"] * (update + e["bias"]),
    }
    answer = function(*_copies(e, "x", "weight", "bias", "A", "B", "alpha"))
    _compare("lora_output", answer, base + e["bias"] + e["alpha"] * update, mistakes)


@_exercise("2.3")
def check_freeze_all_but_adapters(function: Callable[[nn.Module], None]) -> None:
    """Check exercise 2.3, that nothing but A and B is trainable in any model."""
    __tracebackhide__ = True
    for before in (True, False):
        model = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, batch_first=True)
        replace_linear_layers(model, LinearWithLoRA, rank=2, alpha=1, targets="linear*")
        model.requires_grad_(before)
        function(model)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = {name for name, _ in model.named_parameters() if name.endswith((".lora.A", ".lora.B"))}
        if not before and not trainable:
            raise ExerciseError("make A and B trainable also where they were frozen before")
        if not trainable:
            raise ExerciseError(
                "everything is frozen, the adapters too (if you use isinstance: the model that is checked has "
                "the package's classes, which the cell above the exercises imports)"
            )
        if missing := sorted(adapters - trainable):
            raise ExerciseError(f"these must be trainable: {', '.join(missing)}")
        if extra := sorted(trainable - adapters):
            raise ExerciseError(f"still trainable: {', '.join(extra)}; not every layer is an nn.Linear")


@_exercise("3.1")
def check_merged_weight(function: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check exercise 3.1, the merged weight in torch's shape."""
    __tracebackhide__ = True
    e = _example()
    weight, A, B, alpha = _copies(e, "weight", "A", "B", "alpha")
    delta = (e["A"] @ e["B"]).T
    mistakes = {
        "the update isn't scaled: where is alpha?": e["weight"] + delta,
        "torch stores (out, in); this is its transpose": (e["weight"] + e["alpha"] * delta).T,
        "alpha scales the update alone": e["alpha"] * (e["weight"] + delta),
        "that is ΔW alone": e["alpha"] * delta,
    }
    _compare("merged_weight", function(weight, A, B, alpha), e["weight"] + e["alpha"] * delta, mistakes)
    if not torch.equal(weight, e["weight"]):
        raise ExerciseError("weight was changed in place; then there is no way back")


@_exercise("3.2")
def check_multiplications(function: Callable[[int, int, int, int], int]) -> None:
    """Check exercise 3.2, the multiplications of an unmerged layer's forward pass."""
    __tracebackhide__ = True
    for b, n_in, n_out, r in [(64, 784, 128, 4), (3, 10, 20, 2)]:
        frozen, thin = b * n_in * n_out, b * r * (n_in + n_out)
        mistakes = {
            "the frozen layer's product is missing": thin,
            "that is the frozen layer alone": frozen,
            "A·B isn't built in the unmerged form": frozen + r * n_in * n_out,
            "each row of the batch goes through A and B too": frozen + r * (n_in + n_out),
            "x·A costs b·in·r; and then the product with B?": frozen + b * r * n_in,
        }
        for what, width in {"the output": n_out, "x·A": r, "x": n_in}.items():
            hint = f"the scaling of {what} isn't counted here, only the three matrix products"
            mistakes[hint] = frozen + thin + b * width
        _compare("multiplications", function(b, n_in, n_out, r), frozen + thin, mistakes)


@_exercise("3.3")
def check_merge(function: Callable[[LinearWithLoRA], nn.Linear]) -> None:
    """Check exercise 3.3, a plain linear layer from an adapted one."""
    __tracebackhide__ = True
    # One of the two dtypes isn't torch's default.
    for bias, dtype in [(True, torch.float64), (False, torch.float64), (True, torch.float32)]:
        layer = LinearWithLoRA(nn.Linear(7, 4, bias=bias, dtype=dtype), rank=2, alpha=2.5)
        nn.init.normal_(layer.lora.B)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        x = torch.randn(5, 7, dtype=dtype)
        expected = layer(x).detach()
        merged = function(layer)
        if type(merged) is not nn.Linear:
            raise ExerciseError(f"return a plain nn.Linear; got {type(merged).__name__}")
        if (merged.bias is not None) != bias:
            raise ExerciseError("the merged layer must have a bias exactly if the linear layer has one")
        if any(not torch.equal(value, before[name]) for name, value in layer.state_dict().items()):
            raise ExerciseError("the adapted layer was changed; work on a copy")
        for name, parameter in merged.named_parameters():
            if parameter.dtype != dtype:
                raise ExerciseError(f"{name} has the wrong dtype: {parameter.dtype} instead of {dtype}")
            if parameter.data_ptr() in {p.data_ptr() for p in layer.parameters()}:
                raise ExerciseError(
                    f"both layers' {name} share memory: training one would change the other; clone it"
                )
        if dtype == torch.float64:  # in float32 the two forms differ by their roundings
            mistakes = {"the update is missing": layer.linear(x).detach()}
            _compare("the merged layer's output", merged(x).detach(), expected, mistakes)


@_exercise("4.1")
def check_unit_vector(function: Callable[[Tensor], Tensor]) -> None:
    """Check exercise 4.1, the direction of a vector, also of a zero one."""
    __tracebackhide__ = True
    v = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
    mistakes = {
        "that is divided by the sum of the entries; the length is √(v·v)": v / v.sum(),
        "that is divided by the sum of absolute values; the length is √(v·v)": v / v.abs().sum(),
        "that is divided by the squared length: take the root": v / v.square().sum(),
        "that is the vector itself": v,
    }
    _compare("unit_vector", function(v.clone()), v / 13, mistakes)
    for entries, recognised in [
        ((0.0, 2.0), "this vector has a zero in it, but isn't a zero vector: decide by the length"),
        ((1.0, -1.0), "these entries have a sum of 0, but a length: decide by the length"),
        ((3e-5, 4e-5), "a vector shorter than 1 must become longer: divide by its length, however short"),
    ]:
        v = torch.tensor(entries, dtype=torch.float64)
        if not _equal(answer := function(v.clone()), v / v.norm()):
            _compare("unit_vector", answer, v / v.norm(), {recognised: answer})
    zero = torch.zeros(3, dtype=torch.float64)
    hint = {"a zero vector gives NaN: 0/0 must be caught": zero / zero}
    _compare("unit_vector of zero", function(zero.clone()), zero, hint)


@_exercise("4.2")
def check_split_rows(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check exercise 4.2, magnitudes and directions per output neuron."""
    __tracebackhide__ = True
    weight = _example()["weight"]
    rows, columns = weight.norm(dim=1), weight.norm(dim=0)
    mistakes = {
        "that is one norm per input: a row of torch's weight belongs to an output": (columns, None),
        "m must have the shape (out,): drop the dimension that keepdim leaves": (rows.unsqueeze(1), None),
        "these are squared lengths": (rows.square(), None),
        "the directions are divided along the wrong axis": (None, weight / columns),
        "the second part must be the directions, not the weight": (None, weight),
    }
    _compare("split_rows", function(weight.clone()), (rows, weight / rows.unsqueeze(1)), mistakes)


@_exercise("4.3")
def check_weight_norm_gradients(function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check exercise 4.3, the gradients of g and v in weight normalisation."""
    __tracebackhide__ = True
    e = _example(1)
    grad_w, g, v = e["bias"], e["m"][0], e["m"].flip(0)
    unit, length = v / v.norm(), v.norm()
    grad_g = grad_w @ unit
    mistakes = {
        "g's gradient is the part of ∇w along v: divide v by its length": (grad_w @ v, None),
        "v's gradient still has a part along v: subtract it": (None, g / length * grad_w),
        "v's gradient is scaled by g/‖v‖": (None, grad_w - grad_g * unit),
        "v's gradient is divided by ‖v‖ too": (None, g * (grad_w - grad_g * unit)),
    }
    answer = function(grad_w.clone(), g.clone(), v.clone())
    _compare("weight_norm_gradients", answer, (grad_g, g / length * (grad_w - grad_g * unit)), mistakes)


def _dora_parts(e: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return V and c of an example."""
    V = e["weight"] + e["alpha"] * (e["A"] @ e["B"]).T
    return V, e["m"] / V.norm(dim=1)


@_exercise("5.1")
def check_dora_scale(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.1, c = m/‖V‖."""
    __tracebackhide__ = True
    e = _example()
    V, c = _dora_parts(e)
    unscaled = e["weight"] + (e["A"] @ e["B"]).T
    mistakes = {
        "that divides by the norms of W; V is W + ΔW": e["m"] / e["weight"].norm(dim=1),
        "upside down: c makes the rows as long as m": 1 / c,
        "alpha is missing in ΔW": e["m"] / unscaled.norm(dim=1),
        "c must have the shape (out,)": c.unsqueeze(1),
        "that is 1/‖V‖; where is m?": 1 / V.norm(dim=1),
    }
    _compare("dora_scale", function(*_copies(e, "weight", "A", "B", "alpha", "m")), c, mistakes)


@_exercise("5.2")
def check_dora_output(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.2, the exact unmerged output of DoRA."""
    __tracebackhide__ = True
    e = _example()
    V, c = _dora_parts(e)
    x, bias, m = e["x"], e["bias"], e["m"]
    base, update = x @ e["weight"].T, e["alpha"] * (x @ e["A"] @ e["B"])
    mistakes = {
        "the bias is scaled; it isn't part of W": c * (base + update + bias),
        "that is LoRA: nothing is scaled by c": base + update + bias,
        "c scales the frozen product too, not the update alone": base + c * update + bias,
        "the norm is taken per example; it belongs to the weight": base
        + m * F.normalize(update, dim=1)
        + bias,
        "that divides by the norms of W; V is W + ΔW": m / e["weight"].norm(dim=1) * (base + update) + bias,
        "multiplied by m, but not divided by ‖V‖": m * (base + update) + bias,
        "the bias is missing": c * (base + update),
        "alpha is missing": c * (base + update / e["alpha"]) + bias,
    }
    answer = function(*_copies(e, "x", "weight", "bias", "A", "B", "alpha", "m"))
    _compare("dora_output", answer, F.linear(x, c.unsqueeze(1) * V, bias), mistakes)
    with FlopCounterMode(display=False) as counter:
        function(
            *(torch.randn(size) for size in [(50, 30), (20, 30), (20,), (30, 2), (2, 20)]),
            2.5,
            torch.rand(20),
        )
    if counter.get_total_flops() < 2 * 50 * (30 * 20 + 2 * (30 + 20)):
        raise ExerciseError(
            "right, but that is the merged form: x must meet W and A·B apart, as in LoRA's unmerged form"
        )


@_exercise("5.3")
def check_magnitude_gradient(function: Callable[..., Tensor]) -> None:
    """Check exercise 5.3, the gradient of the loss with respect to m."""
    __tracebackhide__ = True
    e = _example()
    V, c = _dora_parts(e)
    grad_y = _example(2)["x"][:, :4]
    per_example = grad_y * (e["x"] @ V.T)
    expected = (per_example / V.norm(dim=1)).sum(dim=0)
    mistakes = {
        "every example of the batch adds its part: sum, don't average": expected / 5,
        "divide by ‖V‖: y contains m only as m/‖V‖": per_example.sum(dim=0),
        "m itself drops out of its own derivative": (per_example * c).sum(dim=0),
        "m has one entry per output: sum over the batch": per_example / V.norm(dim=1),
    }
    answer = function(grad_y.clone(), e["x"].clone(), V.clone())
    _compare("magnitude_gradient", answer, expected, mistakes)


@_exercise("6.1")
def check_standard_error(function: Callable[[float, int], float]) -> None:
    """Check exercise 6.1, the standard error of an accuracy."""
    __tracebackhide__ = True
    for p, n in [(0.85, 1000), (0.5, 25)]:
        mistakes = {
            "that is the variance: take the root": p * (1 - p) / n,
            "that is the spread of one answer: divide by the number of digits under the root": (p * (1 - p))
            ** 0.5,
            "the root goes over n as well": (p * (1 - p)) ** 0.5 / n,
            "the 1 − p is missing": (p / n) ** 0.5,
        }
        _compare("standard_error", function(p, n), (p * (1 - p) / n) ** 0.5, mistakes)


@_exercise("6.2")
def check_paired_difference(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Check exercise 6.2, mean and standard error of paired differences."""
    __tracebackhide__ = True
    first = torch.tensor([0.81, 0.86, 0.84, 0.90], dtype=torch.float64)
    second = torch.tensor([0.80, 0.84, 0.83, 0.87], dtype=torch.float64)
    d = first - second
    unpaired = ((first.var() + second.var()) / 4).sqrt()
    mistakes = {
        "the order is first − second": (-d.mean(), None),
        "that treats the runs as unrelated; take the differences first": (None, unpaired),
        "that is the spread of the differences; their mean is steadier, by √n": (None, d.std()),
        "the mean was estimated from the same numbers: divide by n − 1": (None, d.std(correction=0) / 2),
    }
    _compare("paired_difference", function(first.clone(), second.clone()), (d.mean(), d.std() / 2), mistakes)


@_exercise("6.3")
def check_magnitude_only(function: Callable[[nn.Module], int]) -> None:
    """Check exercise 6.3, a DoRA model of which only the magnitudes are trained."""
    __tracebackhide__ = True
    model = MultilayerPerceptron(20, 8, 6, 3)
    model.norm = nn.LayerNorm(3)
    replace_linear_layers(model, LinearWithDoRA, rank=2, alpha=1)
    # The other way round: what must learn is frozen, and the rest is not.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(".m"))
    count = function(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if any(".lora." in name for name in trainable):
        raise ExerciseError("A and B are still trainable")
    if trainable != {f"layers.{index}.m" for index in (0, 2, 4)}:
        raise ExerciseError(f"trainable must be the three m and nothing else; got {sorted(trainable)}")
    mistakes = {"count the numbers, not the tensors": 3}
    _compare("magnitude_only", count, 8 + 6 + 3, mistakes)


@_exercise("7.1")
def check_chosen_rate(function: Callable[[dict[float, list[float]]], float]) -> None:
    """Check exercise 7.1, the learning rate with the highest mean validation accuracy."""
    __tracebackhide__ = True
    # One lucky seed, the largest rate, the worst mean and the first entry each lead to another rate.
    scores = {
        0.1: [0.20, 0.30],
        0.001: [0.70, 0.71],
        0.01: [0.80, 0.82],
        0.003: [0.60, 0.95],
        0.03: [0.50, 0.60],
    }
    expected = 0.01
    mistakes = {
        "that rate has the best single run; go by the mean over the seeds": 0.003,
        "return the learning rate, not its score": 0.81,
        "that is the largest rate; the scores decide": 0.1,
        "that is the smallest rate; the scores decide": 0.001,
    }
    given = {rate: list(values) for rate, values in scores.items()}
    _compare("chosen_rate", function(given), expected, mistakes)
    if given != scores:
        raise ExerciseError("scores was changed; leave it as it is")


@_exercise("7.2")
def check_interval(function: Callable[[Tensor, float], tuple[Any, Any]]) -> None:
    """Check exercise 7.2, the t interval of a mean of paired differences."""
    __tracebackhide__ = True
    d, t = torch.tensor([0.010, 0.022, -0.004, 0.016, 0.011], dtype=torch.float64), 2.776
    mean, spread, root = d.mean(), d.std(), 5**0.5
    biased = d.std(correction=0)
    mistakes = {
        "that is the spread of the differences; their mean is steadier, by √n": (
            mean - t * spread,
            mean + t * spread,
        ),
        "divide by √n, not by n": (mean - t * spread / 5, mean + t * spread / 5),
        "the mean was estimated from the same numbers: take the standard deviation with n − 1": (
            mean - t * biased / root,
            mean + t * biased / root,
        ),
        "that is one standard error; t times as many belong to 95%": (
            mean - spread / root,
            mean + spread / root,
        ),
        "the lower end comes first": (mean + t * spread / root, mean - t * spread / root),
    }
    answer = function(d.clone(), t)
    if isinstance(answer, tuple) and len(answer) == 2:
        # Numbers are as good as tensors.
        answer = torch.as_tensor(answer[0]).double(), torch.as_tensor(answer[1]).double()
    _compare("interval", answer, (mean - t * spread / root, mean + t * spread / root), mistakes)


@_exercise("7.3")
def check_matched_ranks(function: Callable[[list[tuple[int, int]], int], list[int]]) -> None:
    """Check exercise 7.3, ranks that give LoRA as many numbers as DoRA."""
    __tracebackhide__ = True
    cases = [
        ([(784, 128), (128, 256), (256, 10)], 4, [4, 5, 4]),
        ([(20, 30), (10, 100), (5, 7)], 1, [1, 2, 1]),
        ([(5, 40), (200, 20), (60, 30)], 2, [2, 2, 3]),
        ([(50, 10), (10, 40)], 2, [2, 3]),
    ]
    for layers, rank, expected in cases:
        answer = function(list(layers), rank)
        if not isinstance(answer, list) or len(answer) != len(layers):
            raise ExerciseError(
                f"matched_ranks must be a list with a rank for each of {len(layers)} layers; got {answer!r}"
            )
        magnitudes = sum(n_out for _, n_out in layers)
        most = max(range(len(layers)), key=lambda i: sum(layers[i]))
        widest = max(range(len(layers)), key=lambda i: layers[i][1])
        mistakes = {
            "no layer has got one more rank": [rank] * len(layers),
            "one more rank in every layer is too much: m has one number per output, a rank has in + out": [
                rank + 1
            ]
            * len(layers),
            "that is the layer in which one more rank costs most; which comes nearest to the number of magnitudes?": [
                rank + (i == most) for i in range(len(layers))
            ],
            "that is the layer with the most outputs; what does one more rank cost there?": [
                rank + (i == widest) for i in range(len(layers))
            ],
        }
        for hint, wrong in mistakes.items():
            if answer == wrong != expected:
                raise ExerciseError(hint)
        if answer != expected:
            raise ExerciseError(
                f"matched_ranks isn't right yet for the layers {layers}: together their m have {magnitudes} numbers"
            )


@_exercise("8.1")
def check_to_peft(function: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]) -> None:
    """Check exercise 8.1, A, B and the scaling as PEFT stores them."""
    __tracebackhide__ = True
    e = _example()
    A, B, alpha = e["A"], e["B"], e["alpha"]
    mistakes = {
        "PEFT's A is (r, in): ours is its transpose": (A, None, None),
        "PEFT's B is (out, r): ours is its transpose": (None, B, None),
        "A and B have changed places": (B.T, A.T, None),
        "PEFT divides lora_alpha by the rank; multiply by it": (None, None, alpha / 3),
        "that is the scaling itself; PEFT will divide it by the rank": (None, None, alpha),
        "√r belongs to rsLoRA": (None, None, alpha * 3**0.5),
    }
    _compare("to_peft", function(*_copies(e, "A", "B", "alpha")), (A.T, B.T, 3 * alpha), mistakes)


class _Watch(TorchDispatchMode):
    """Note how many operations run, and which results need ``limit`` numbers or more that no input holds."""

    def __init__(self, limit: int, inputs: list[Tensor]) -> None:
        super().__init__()
        self.limit, self.inputs = limit, inputs
        self.operations = 0
        self.large: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        taken = {tensor.untyped_storage().data_ptr() for tensor in self.inputs}
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(part, Tensor) or part.untyped_storage().data_ptr() in taken:
                continue
            # The storage counts: what is expanded to a large shape holds few numbers.
            if part.untyped_storage().nbytes() >= self.limit * part.element_size():
                self.large.append(part)
        return result


@_exercise("8.2")
def check_factored_squares(function: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    """Check exercise 8.2, the squared row norms of W + ΔW from thin matrices alone."""
    __tracebackhide__ = True
    e = _example()
    W, A, B, alpha = e["weight"], e["A"], e["B"], e["alpha"]
    base, cross = W.square().sum(dim=1), ((W @ A) * B.T).sum(dim=1)
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
        "that is the norm; the square was asked for": expected.sqrt(),
        "one number per output: sum over the inputs, not over the outputs": (W + alpha * (A @ B).T)
        .square()
        .sum(dim=0),
        "that is W alone; the update is missing": base,
    }
    answer = function(*_copies(e, "weight", "A", "B", "alpha"))
    _compare("factored_squares", answer, expected, mistakes)
    generator = torch.Generator().manual_seed(1)
    W, A, B = (torch.randn(*shape, generator=generator) for shape in [(200, 300), (300, 2), (2, 200)])
    # W·A and its like have 400 numbers, W and A·B 60,000, and W·A·B, of which only the diagonal counts, 40,000.
    with _Watch(200 * 200, [W, A, B]) as watch:
        function(W, A, B, 2.0)
    if W._version or A._version or B._version:
        raise ExerciseError("right, but weight, A or B was changed in place, and others still need it")
    for large in watch.large:
        if large.shape == W.shape and torch.equal(large, W.square()):
            raise ExerciseError(
                "right, but the squares of W were stored, a matrix as large as W: "
                "torch.linalg.vector_norm(weight, dim=1) stores none"
            )
        if large.squeeze().shape in {(200, 300), (300, 200)}:
            raise ExerciseError("right, but A·B was built in full: regroup the last term as B · (AᵀA · B)")
        raise ExerciseError(
            f"right, but on the way a result of shape {tuple(large.shape)} was stored, from which one number per "
            "output is used: multiply thin matrices element by element and sum over r"
        )


@_exercise("8.3")
def check_mixed_batch(function: Callable[..., Tensor]) -> None:
    """Check exercise 8.3, DoRA with another adapter for each row of the batch."""
    __tracebackhide__ = True
    e, generator = _example(), torch.Generator().manual_seed(3)
    x, weight, bias = e["x"], e["weight"], e["bias"]
    A, B, c = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in [(3, 7, 2), (3, 2, 4), (3, 4)]
    )
    choice = torch.tensor([2, 0, 2, 1, 0])
    base = x @ weight.T
    update = torch.stack([row @ A[k] @ B[k] for row, k in zip(x, choice.tolist(), strict=True)])
    norms = (weight + (A @ B).mT).norm(dim=2)
    expected = c[choice] * (base + update) + bias
    mistakes = {
        "every row got the first row's adapter": c[2] * (base + x @ A[2] @ B[2]) + bias,
        "the bias is scaled; it isn't part of W": c[choice] * (base + update + bias),
        "that is LoRA per row: where is c?": base + update + bias,
        "c should scale the frozen product too; yours scales the update alone": base
        + c[choice] * update
        + bias,
        "c should scale the update too; yours scales the frozen product alone": c[choice] * base
        + update
        + bias,
        "c is m/‖V‖ already; you divide by the norm once more": (c / norms)[choice] * (base + update) + bias,
        "the bias is missing": c[choice] * (base + update),
        "the updates of all adapters were added up": c[choice]
        * (base + sum(x @ A[k] @ B[k] for k in range(3)))
        + bias,
    }
    answer = function(
        x.clone(), weight.clone(), bias.clone(), A.clone(), B.clone(), c.clone(), choice.clone()
    )
    _compare("mixed_batch", answer, expected, mistakes)
    operations = []
    for rows, customers in [(4, 3), (40, 30)]:
        shapes = [(rows, 50), (60, 50), (60,), (customers, 50, 2), (customers, 2, 60), (customers, 60)]
        inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
        inputs.append(torch.arange(rows) % customers)
        with _Watch(customers * 50 * 60, inputs) as watch:
            function(*inputs)
        if watch.large:
            raise ExerciseError(
                "right, but a weight was built for every row or customer: multiply x by A first, and that by B"
            )
        operations.append(watch.operations)
    if operations[1] > operations[0] + 10:
        raise ExerciseError(
            f"right, but with a loop: {operations[0]} operations for 4 rows became {operations[1]} for 40. "
            "Gather A, B and c with choice"
        )
