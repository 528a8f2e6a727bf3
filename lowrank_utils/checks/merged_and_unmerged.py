"""The checks of notebook 3, merged and unmerged."""

from collections.abc import Callable

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
            "that is ΔW alone": e.alpha * delta,
            "the update is added, not subtracted": e.weight - e.alpha * delta,
            "alpha is multiplied once": e.weight + e.alpha**2 * delta,
            "that is W alone; the update is missing": e.weight,
            "alpha is used as it is here, not divided by the rank": e.weight
            + e.alpha / len(e.B) * delta,
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
            "each row of the batch goes through A and B too": frozen
            + r * (n_in + n_out),
            "x·A costs b·in·r; and then the product with B?": frozen + b * r * n_in,
            "(xA)·B costs b·r·out; and before it the product x·A?": frozen
            + b * r * n_out,
            "every product has the batch as one of its sizes": n_in * n_out
            + r * (n_in + n_out),
            "count multiplications alone, not the additions too": 2 * (frozen + thin),
            "costs add up: x·A first, and then its result times B": frozen
            + b * n_in * r * n_out,
        }
        for what, width in {"the output": n_out, "x·A": r, "x": n_in}.items():
            hint = f"the scaling of {what} isn't counted here, only the three matrix products"
            mistakes[hint] = frozen + thin + b * width
        answer = ask(function, batch=b, in_dim=n_in, out_dim=n_out, rank=r)
        compare("multiplications", answer, frozen + thin, mistakes)


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
        merged = function(layer)
        if type(merged) is not nn.Linear:
            raise ExerciseError(
                f"return a plain nn.Linear; got {type(merged).__name__}"
            )
        if (merged.bias is not None) != bias:
            raise ExerciseError(
                "the merged layer must have a bias exactly if the linear layer has one"
            )
        if merged.weight.shape != (n_out, n_in):
            raise ExerciseError(
                f"the merged layer's weight has the wrong shape: {tuple(merged.weight.shape)} instead of {n_out, n_in}"
            )
        if any(
            not torch.equal(value, before[name])
            for name, value in layer.state_dict().items()
        ):
            raise ExerciseError("the adapted layer was changed; work on a copy")
        for name, parameter in merged.named_parameters():
            if parameter.dtype != dtype:
                raise ExerciseError(
                    f"{name} has the wrong dtype: {parameter.dtype} instead of {dtype}"
                )
            if parameter.data_ptr() in {p.data_ptr() for p in layer.parameters()}:
                raise ExerciseError(
                    f"both layers' {name} share memory: training one would change the other; clone it"
                )
        if dtype == torch.float64:  # in float32 the two forms differ by their roundings
            _compare_outputs(merged, layer)


def _compare_outputs(merged: nn.Linear, layer: LinearWithLoRA) -> None:
    __tracebackhide__ = True
    W, delta = layer.linear.weight, layer.lora.delta_weight()
    x = torch.randn(5, layer.in_features, dtype=W.dtype)
    mistakes = {
        "the update is missing": layer.linear(x).detach(),
        "the update isn't scaled: where is alpha?": F.linear(
            x, W + delta / layer.lora.alpha, layer.bias
        ).detach(),
        "that is ΔW alone, without W": F.linear(x, delta, layer.bias).detach(),
    }
    if merged.bias is not None and layer.bias is not None:
        mistakes["the weight is right, but the bias isn't the layer's"] = F.linear(
            x, layer.weight, merged.bias
        ).detach()
    compare(
        "the merged layer's output", merged(x).detach(), layer(x).detach(), mistakes
    )
