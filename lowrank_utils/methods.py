"""The methods of the comparison: each makes what it trains trainable in a pretrained network, and freezes the rest."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

# What alpha is made into before a layer gets it.
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, _: alpha,
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / rank**0.5,
}


class Adapter(NamedTuple):
    """What the methods that use low-rank adapters need to know.

    Attributes:
        rank: inner dimension of A and B.
        alpha: the numerator of the scaling.
        scaling: a name in ``SCALINGS``.
        init: initialisation of A.
    """

    rank: int
    alpha: float
    scaling: str
    init: str

    def put_in(
        self,
        model: nn.Module,
        layer_class: Callable[..., nn.Module],
        targets: str | None = None,
        **options: Any,
    ) -> None:
        """Replace the linear layers of ``model``, or those whose names match, and freeze them."""
        alpha = SCALINGS[self.scaling](self.alpha, self.rank)
        replace_linear_layers(model, layer_class, self.rank, alpha, targets, init=self.init, **options)
        freeze_linear_layers(model)


class Method(NamedTuple):
    """One way to adapt a network.

    Attributes:
        prepare: changes the network in place, so that what the method trains is trainable and nothing else is.
        has_rank: False if the adapter means nothing to it.
    """

    prepare: Callable[[nn.Module, Adapter], None]
    has_rank: bool


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return name and module of each ``nn.Linear``, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def train_nothing(model: nn.Module, _: Adapter) -> None:
    """Freeze everything."""
    model.requires_grad_(False)


def train_last_layer(model: nn.Module, _: Adapter) -> None:
    """Train weight and bias of the last linear layer."""
    model.requires_grad_(False)
    linear_layers(model)[-1][1].requires_grad_(True)


def train_magnitudes(model: nn.Module, _: Adapter) -> None:
    """Train one length per output neuron: DoRA's m, with A and B frozen at their start, where A·B = 0."""
    replace_linear_layers(model, LinearWithDoRA, rank=1, alpha=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".m"))


def train_lora(model: nn.Module, adapter: Adapter) -> None:
    """Train A and B."""
    adapter.put_in(model, LinearWithLoRA)


def train_matched_lora(model: nn.Module, adapter: Adapter) -> None:
    """Train A and B, with one more rank in one layer: about as many numbers as DoRA's m has.

    It is the layer in which one more rank, in + out numbers, comes nearest to the number of all magnitudes.
    """
    layers = linear_layers(model)
    magnitudes = sum(layer.out_features for _, layer in layers)
    larger, _ = min(layers, key=lambda pair: abs(pair[1].in_features + pair[1].out_features - magnitudes))
    for name, _ in layers:
        adapter._replace(rank=adapter.rank + (name == larger)).put_in(model, LinearWithLoRA, targets=name)


def train_dora(model: nn.Module, adapter: Adapter) -> None:
    """Train A, B and m, with the norm as a constant in the backward pass (arXiv 2402.09353, §4.3)."""
    adapter.put_in(model, LinearWithDoRA, detach_norm=True)


def train_dora_norm_kept(model: nn.Module, adapter: Adapter) -> None:
    """Train A, B and m, with the gradient through the norm."""
    adapter.put_in(model, LinearWithDoRA, detach_norm=False)


def train_everything(model: nn.Module, _: Adapter) -> None:
    """Fine-tune in full."""
    model.requires_grad_(True)


METHODS: dict[str, Method] = {
    "frozen": Method(train_nothing, has_rank=False),
    "last layer": Method(train_last_layer, has_rank=False),
    "magnitude": Method(train_magnitudes, has_rank=False),
    "LoRA": Method(train_lora, has_rank=True),
    "LoRA matched": Method(train_matched_lora, has_rank=True),
    "DoRA": Method(train_dora, has_rank=True),
    "DoRA norm kept": Method(train_dora_norm_kept, has_rank=True),
    "full": Method(train_everything, has_rank=False),
}
