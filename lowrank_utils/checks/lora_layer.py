"""The checks of notebook 2, the LoRA layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils.adapt import replace_linear_layers
from lowrank_utils.checks._shared import (
    ExerciseError,
    ask,
    compare,
    examples,
    exercise,
    told,
)
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import MultilayerPerceptron


def checked_lora_layer(layer_class: type[nn.Module]) -> type[nn.Module]:
    """Check the layer of which notebook 2 leaves a line open.

    Returns:
        The class; while the line isn't written, one that has it.
    """
    __tracebackhide__ = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer: Any = layer_class(6, 4, 2, 3.0).double()
        x = torch.randn(5, 6, dtype=torch.float64)
        A, B = layer.A.normal_(), layer.B.normal_()
        try:
            answer = told(layer.forward)(x)
        except ExerciseError as error:
            raise ExerciseError(_explained(str(error))) from error
        update = x @ A @ B
    if answer is ... or answer is None:
        print("To do: write the line. Until then the notebook goes on with ours")

        def forward(self: Any, x: Tensor) -> Any:
            return self.alpha * (x @ self.A @ self.B)

        return type(layer_class.__name__, (layer_class,), {"forward": forward})
    mistakes = {
        "nearly: where is alpha?": update,
        "alpha is a factor, and not added": update + layer.alpha,
        "alpha multiplies, it doesn't divide": update / layer.alpha,
    }
    compare("the output", answer, layer.alpha * update, mistakes)
    print("Right: this is your layer from now on")
    return layer_class


def _explained(hint: str) -> str:
    """Add what the hint of an error in the reader's line doesn't say."""
    if "NameError" in hint:
        return f"{hint}. Inside the class they are self.A, self.B and self.alpha"
    if "shapes" in hint:
        return hint.replace("The shapes are x", "The shapes are A (6, 2), B (2, 4), x")
    return hint


@exercise("2.1")
def check_scaling(function: Callable[[float, int, bool], float]) -> None:
    """Check exercise 2.1, the alpha to pass for PEFT's scalings."""
    __tracebackhide__ = True
    for alpha, rank, rslora in [(8.0, 4, False), (8.0, 16, True), (3.0, 64, False)]:
        root = rank**0.5
        mistakes = {
            "divide instead of multiplying: a larger rank means a smaller factor": alpha
            * (root if rslora else rank),
            "that is the other rule: √r belongs to rsLoRA": alpha
            / (rank if rslora else root),
            "that is the article's rule, alpha as it is": alpha,
            "`//` cuts off what is behind the point: divide with `/`": alpha
            // (root if rslora else rank),
            "upside down: alpha stands above, the rank below": (
                root if rslora else rank
            )
            / alpha,
        }
        answer = ask(function, lora_alpha=alpha, rank=rank, use_rslora=rslora)
        compare("scaling", answer, alpha / (root if rslora else rank), mistakes)


@exercise("2.2")
def check_lora_output(function: Callable[..., Tensor]) -> None:
    """Check exercise 2.2, the output of a wrapped linear layer."""
    __tracebackhide__ = True
    for e in examples():
        base, update = e.x @ e.weight.T, e.x @ e.A @ e.B
        mistakes = {
            "the update isn't scaled: where is alpha?": base + e.bias + update,
            "alpha is used as it is here, not divided by the rank": base
            + e.bias
            + e.alpha / len(e.B) * update,
            "alpha scales the update alone, not the frozen layer": e.alpha
            * (base + e.bias + update),
            "alpha scales the update alone, not the frozen product": e.alpha
            * (base + update)
            + e.bias,
            "the bias is missing": base + e.alpha * update,
            "the frozen layer is missing": e.alpha * update,
            "the bias is scaled; it belongs to the frozen layer": base
            + e.alpha * (update + e.bias),
        }
        answer = ask(function, **e.take("x weight bias A B alpha"))
        compare("lora_output", answer, base + e.bias + e.alpha * update, mistakes)


def _encoder_layer() -> nn.Module:
    model = nn.TransformerEncoderLayer(
        d_model=8, nhead=2, dim_feedforward=16, batch_first=True
    )
    replace_linear_layers(model, LinearWithLoRA, rank=2, alpha=1, targets="linear*")
    return model


def _perceptron_with_norm() -> nn.Module:
    model = MultilayerPerceptron(6, 5, 4, 3)
    # An A or a B somewhere in a name makes no adapter.
    model.AfterBlock = nn.LayerNorm(3)
    replace_linear_layers(model, LinearWithLoRA, rank=2, alpha=1)
    return model


@exercise("2.3")
def check_freeze_all_but_adapters(function: Callable[[nn.Module], None]) -> None:
    """Check exercise 2.3, that nothing but A and B is trainable in any model."""
    __tracebackhide__ = True
    for model, before in [
        (_encoder_layer(), True),
        (_encoder_layer(), False),
        (_perceptron_with_norm(), True),
    ]:
        model.requires_grad_(before)
        function(model)
        if any("requires_grad" in vars(module) for module in model.modules()):
            raise ExerciseError(
                "a module has no requires_grad, only its parameters have: call requires_grad_(True or False)"
            )
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        adapters = {
            name
            for name, _ in model.named_parameters()
            if name.endswith((".lora.A", ".lora.B"))
        }
        if not before and not trainable:
            raise ExerciseError(
                "make A and B trainable also where they were frozen before"
            )
        if not trainable:
            raise ExerciseError(
                "everything is frozen, the adapters too: a module's requires_grad_ reaches all that is inside it "
                "(and if you use isinstance: the model that is checked has the package's classes, which the cell "
                "above the exercises imports)"
            )
        if missing := sorted(adapters - trainable):
            raise ExerciseError(f"these must be trainable: {', '.join(missing)}")
        extra = sorted(trainable - adapters)
        wrapped = {name for name, _ in model.named_parameters() if ".linear." in name}
        if wrapped and set(extra) == wrapped:
            raise ExerciseError(
                f"still trainable: {', '.join(extra)}; a module's requires_grad_ reaches all that is inside it, "
                "and inside a wrapper that is the pretrained layer as well"
            )
        if extra:
            raise ExerciseError(
                f"still trainable: {', '.join(extra)}; not every layer is an nn.Linear"
            )
