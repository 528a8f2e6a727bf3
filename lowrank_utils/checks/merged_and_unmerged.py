"""The checks of notebook 3, merged and unmerged."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.checks._shared import ExerciseError, ask, compare, examples, exercise
from lowrank_utils.lora import LinearWithLoRA


@exercise("3.1")
def check_merged_weight(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> None:
    """Check exercise 3.1, the merged weight in torch's shape."""
    __tracebackhide__ = True
    for e in examples():
        delta = (e.A @ e.B).T
        mistakes = {
            "the update isn't scaled: where is alpha?": e.weight + delta,
            "torch stores (out, in); this is its transpose": (
                e.weight + e.alpha * delta
            ).T,
            "alpha scales the update alone": e.alpha * (e.weight + delta),
            "alpha scales the update, not W": e.alpha * e.weight + delta,
            "that is ΔW alone": e.alpha * delta,
            "the update is added, not subtracted": e.weight - e.alpha * delta,
            "alpha is multiplied once": e.weight + e.alpha**2 * delta,
            "alpha is a factor, it isn't added": e.weight + delta + e.alpha,
            "alpha multiplies, it doesn't divide": e.weight + delta / e.alpha,
            "that is W alone; the update is missing": e.weight,
            "alpha is used as it is here, not divided by the rank": e.weight
            + e.alpha / len(e.B) * delta,
            "a reshape isn't a transpose: it leaves the numbers in their old order": (
                e.weight + e.alpha * (e.A @ e.B).reshape(e.weight.shape)
            ),
        }
        answer = ask(function, **e.take("weight A B alpha"))
        compare("merged_weight", answer, e.weight + e.alpha * delta, mistakes)


@exercise("3.2")
def check_multiplications(function: Callable[[int, int, int, int], int]) -> None:
    """Check exercise 3.2, the multiplications of an unmerged layer's forward pass."""
    __tracebackhide__ = True
    for b, n_in, n_out, r in [(64, 784, 128, 4), (3, 10, 20, 2)]:
        frozen, thin = b * n_in * n_out, b * r * (n_in + n_out)
        mistakes = {
            "the frozen layer's product is missing": thin,
            "that is the frozen layer alone": frozen,
            "A·B isn't built in the unmerged form": frozen + r * n_in * n_out,
            "A·B isn't built in the unmerged form, and x·(A·B) would cost as much as the frozen product": 2
            * frozen
            + r * n_in * n_out,
            "each row of the batch goes through A and B too": frozen
            + r * (n_in + n_out),
            "x·A costs b·in·r; and then the product with B?": frozen + b * r * n_in,
            "(xA)·B costs b·r·out; and before it the product x·A?": frozen
            + b * r * n_out,
            "the last product is x·A, (batch, r), times B": frozen
            + b * n_in * r
            + n_in * r * n_out,
            "every product has the batch as one of its sizes": n_in * n_out
            + r * (n_in + n_out),
            "count multiplications alone, not the additions too": 2 * (frozen + thin),
            "costs add up: x·A first, and then its result times B": frozen
            + b * n_in * r * n_out,
            "that is a whole training step; count the forward pass alone": 2 * frozen
            + 3 * thin,
        }
        for what, width in {"the output": n_out, "x·A": r, "x": n_in}.items():
            hint = f"the scaling of {what} isn't counted here, only the three matrix products"
            mistakes[hint] = frozen + thin + b * width
        answer = ask(function, batch=b, in_dim=n_in, out_dim=n_out, rank=r)
        compare("multiplications_unmerged", answer, frozen + thin, mistakes)


@exercise("3.3")
def check_merge(function: Callable[[LinearWithLoRA], nn.Linear]) -> None:
    """Check exercise 3.3, a plain linear layer from an adapted one."""
    __tracebackhide__ = True
    # One of the two dtypes isn't torch's default.
    cases = [
        (7, 4, True, torch.float64),
        (5, 6, False, torch.float64),
        (3, 8, True, torch.float32),
    ]
    for n_in, n_out, bias, dtype in cases:
        layer = LinearWithLoRA(
            nn.Linear(n_in, n_out, bias=bias, dtype=dtype), rank=2, alpha=2.5
        )
        nn.init.normal_(layer.lora.B)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        try:
            merged = function(layer)
        except ExerciseError as error:
            raise ExerciseError(_explained(str(error), before)) from error
        _check_kind(merged, layer)
        after = layer.state_dict()
        if layer.lora.alpha != 2.5 or before.keys() != after.keys():
            raise ExerciseError("the adapted layer was changed; work on a copy")
        if not all(torch.equal(after[name], value) for name, value in before.items()):
            raise ExerciseError(
                "the adapted layer was changed; work on a copy (adding and subtracting "
                "again doesn't bring every bit back)"
            )
        held = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        for name, parameter in merged.named_parameters():
            if parameter.untyped_storage().data_ptr() in held:
                raise ExerciseError(
                    f"both layers' {name} share memory: training one would change the other; clone it"
                )
        if dtype == torch.float64:  # in float32 the two forms differ by their roundings
            _compare_outputs(merged, layer)


def _explained(hint: str, parts: dict[str, Tensor]) -> str:
    """Return the hint for an error in the learner's function, with what it means for
    this exercise.
    """
    shapes = ", ".join(
        f"{name} {tuple(value.shape)}"
        for name, value in parts.items()
        if name != "linear.bias"
    )
    meanings = {
        "leaf Variable": "change a parameter under torch.no_grad()",
        "as parameter": "wrap the new tensor in nn.Parameter(…)",
        "NoneType": "one of the layers that you are given has no bias: its layer.bias is None",
        "must match": f"the shapes are {shapes}: is a transpose missing, or one too many?",
        "multipl": f"the shapes are {shapes}: is a transpose missing, or one too many?",
    }
    for words, meaning in meanings.items():
        if words in hint:
            return f"{hint.rstrip('.')}. {meaning[0].upper()}{meaning[1:]}"
    return hint


def _check_kind(merged: Any, layer: LinearWithLoRA) -> None:
    """Refuse what isn't a plain linear layer of the sizes and the dtype of ``layer``."""
    __tracebackhide__ = True
    if merged is None:
        raise ExerciseError("merge returned None: is the `return` missing?")
    if type(merged) is not nn.Linear:
        raise ExerciseError(f"return a plain nn.Linear; got {type(merged).__name__}")
    parameters = dict(merged.named_parameters())
    for name in ("weight", "bias"):
        value = getattr(merged, name, None)
        if not isinstance(value, nn.Parameter) and (
            name == "weight" or value is not None
        ):
            raise ExerciseError(f"the merged layer's {name} must be an nn.Parameter")
    if (parameters.get("bias") is not None) != (layer.bias is not None):
        raise ExerciseError(
            "the merged layer must have a bias exactly if the linear layer has one"
        )
    n_in, n_out = layer.in_features, layer.out_features
    for name, shape in {"weight": (n_out, n_in), "bias": (n_out,)}.items():
        if name in parameters and parameters[name].shape != shape:
            raise ExerciseError(
                f"the merged layer's {name} has the wrong shape: {tuple(parameters[name].shape)} instead of {shape}. "
                "nn.Linear takes the inputs first, and stores a weight as (out, in)"
            )
    if (merged.in_features, merged.out_features) != (n_in, n_out):
        raise ExerciseError(
            f"the merged layer says in_features={merged.in_features} and out_features={merged.out_features} "
            f"instead of {n_in} and {n_out}. nn.Linear takes the inputs first"
        )
    for name, parameter in parameters.items():
        if parameter.device != layer.linear.weight.device:
            raise ExerciseError(
                f"the merged layer's {name} is on the device {parameter.device.type}; "
                f"the adapted layer is on {layer.linear.weight.device.type}"
            )
        if parameter.dtype != layer.linear.weight.dtype:
            raise ExerciseError(
                f"{name} has the wrong dtype: {parameter.dtype} instead of {layer.linear.weight.dtype}"
            )


def _compare_outputs(merged: nn.Linear, layer: LinearWithLoRA) -> None:
    __tracebackhide__ = True
    W, delta, alpha = layer.linear.weight, layer.lora.delta_weight(), layer.lora.alpha
    x = torch.randn(5, layer.in_features, dtype=W.dtype)
    weights = {
        "the update is missing": W,
        "the update isn't scaled: where is alpha?": W + delta / alpha,
        "delta_weight() holds alpha already; you scale it once more": W + alpha * delta,
        "alpha scales the update alone": alpha * W + delta,
        "the update is added, not subtracted": W - delta,
        "that is ΔW alone, without W": delta,
        "a reshape isn't a transpose: it leaves the numbers in their old order": W
        + alpha * (layer.lora.A @ layer.lora.B).reshape(W.shape),
    }
    mistakes = {
        hint: F.linear(x, weight, layer.bias).detach()
        for hint, weight in weights.items()
    }
    if merged.bias is not None and layer.bias is not None:
        mistakes["the weight is right, but the bias isn't the layer's"] = F.linear(
            x, layer.weight, merged.bias
        ).detach()
    compare(
        "the merged layer's output", merged(x).detach(), layer(x).detach(), mistakes
    )
