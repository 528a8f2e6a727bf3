"""The methods of the comparison: each makes what it trains trainable in a pretrained
network, and freezes the rest.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank_utils._arguments import check_one_of, check_whole_number
from lowrank_utils.adapt import replace_linear_layers
from lowrank_utils.comparison.controls import (
    LinearWithGain,
    LinearWithPositiveGain,
    LinearWithRandomRows,
)
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

# What alpha is made into before a layer gets it.
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha": lambda alpha, _: alpha,
    "alpha/rank": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(rank)": lambda alpha, rank: alpha / rank**0.5,
}


class LowRank(NamedTuple):
    """What the methods that use low-rank adapters need to know.

    Attributes:
        rank: inner dimension of A and B.
        alpha: the numerator of the scaling.
        scaling: a name in ``SCALINGS``.
        init: initialisation of A.
        targets: the names of the linear layers that get an adapter; None stands for
            all.
    """

    rank: int
    alpha: float
    scaling: str
    init: str
    targets: tuple[str, ...] | None = None

    def put_in(
        self, model: nn.Module, layer_class: Callable[..., nn.Module], **options: Any
    ) -> None:
        """Replace the linear layers of ``model`` that are meant, and freeze everything
        but the adapters.
        """
        check_whole_number("rank", self.rank, minimum=1)
        check_one_of("scaling", self.scaling, SCALINGS)
        model.requires_grad_(False)
        alpha = SCALINGS[self.scaling](self.alpha, self.rank)
        replace_linear_layers(
            model,
            layer_class,
            self.rank,
            alpha,
            self.targets,
            init=self.init,
            **options,
        )

    def layers(self, model: nn.Module) -> list[tuple[str, nn.Linear]]:
        """Return name and module of the linear layers that are meant, in the model's
        order; a target that the model doesn't have is an error.
        """
        names = [name for name, _ in linear_layers(model)]
        for target in self.targets or ():
            check_one_of("a target", target, names)
        return [
            (n, layer)
            for n, layer in linear_layers(model)
            if self.targets is None or n in self.targets
        ]


class Part(NamedTuple):
    """A part of what a method trains that gets a learning rate of its own.

    Attributes:
        pattern: of the parameters' names, as in ``adapt.parameter_groups``.
        low: the smallest factor of the learning rate to try.
        high: the largest.
    """

    pattern: str
    low: float = 1.0
    high: float = 200.0


class Method(NamedTuple):
    """One way to adapt a network.

    Attributes:
        prepare: changes the network in place, so that what the method trains is
            trainable and nothing else is.
        has_rank: False if the adapter means nothing to it.
        rates: the smallest and the largest learning rate to try.
        part: what gets its own rate, if anything does.
        adapts: it puts something into the layers, and doesn't train them as they are.
        contains: methods that are this one with some of its parameters left where they
            start, or with a factor of 1. One that does clearly worse than what it
            contains is under-tuned.
    """

    prepare: Callable[[nn.Module, LowRank], None]
    has_rank: bool = True
    rates: tuple[float, float] = (0.0005, 0.05)
    part: Part | None = None
    adapts: bool = True
    contains: tuple[str, ...] = ()


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return name and module of each ``nn.Linear``, in the model's order."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def train_nothing(model: nn.Module, _: LowRank) -> None:
    """Freeze everything."""
    model.requires_grad_(False)


def train_last_layer(model: nn.Module, _: LowRank) -> None:
    """Train weight and bias of the last linear layer."""
    model.requires_grad_(False)
    linear_layers(model)[-1][1].requires_grad_(True)


def train_magnitudes(model: nn.Module, low_rank: LowRank) -> None:
    """Train one number per output neuron: DoRA's m, with A and B frozen at their start,
    where A·B = 0.
    """
    low_rank._replace(rank=1).put_in(model, LinearWithDoRA)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".m"))


def train_lora(model: nn.Module, low_rank: LowRank) -> None:
    """Train A and B."""
    low_rank.put_in(model, LinearWithLoRA)


def train_lora_and_biases(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and the biases of the adapted layers (BitFit, arXiv 2106.10199, trains
    those alone).
    """
    biases = [
        layer.bias for _, layer in low_rank.layers(model) if layer.bias is not None
    ]
    low_rank.put_in(model, LinearWithLoRA)
    for bias in biases:
        bias.requires_grad_(True)


def train_smaller_lora(model: nn.Module, low_rank: LowRank) -> None:
    """Train A and B, with one more rank in some layers: as many numbers as DoRA's m
    has, or just fewer.
    """
    _train_matched_lora(model, low_rank, below=True)


def train_larger_lora(model: nn.Module, low_rank: LowRank) -> None:
    """Train A and B, with one more rank in some layers: as many numbers as DoRA's m
    has, or just more.
    """
    _train_matched_lora(model, low_rank, below=False)


def _train_matched_lora(model: nn.Module, low_rank: LowRank, below: bool) -> None:
    layers = low_rank.layers(model)
    magnitudes = sum(layer.out_features for _, layer in layers)
    # One more rank adds a column to A and a row to B.
    added = {name: layer.in_features + layer.out_features for name, layer in layers}
    choices = [
        set(some)
        for n in range(len(added) + 1)
        for some in itertools.combinations(added, n)
    ]
    sums = [(sum(added[name] for name in some), some) for some in choices]
    if below:
        _, larger = max(
            ((n, some) for n, some in sums if n <= magnitudes), key=lambda pair: pair[0]
        )
    else:
        _, larger = min(
            ((n, some) for n, some in sums if n >= magnitudes), key=lambda pair: pair[0]
        )
    for name in added:
        of_one = low_rank._replace(
            rank=low_rank.rank + (name in larger), targets=(name,)
        )
        of_one.put_in(model, LinearWithLoRA)
    freeze_all_but(model, ("A", "B"))


def train_dora(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and m, with the norm as a constant in the backward pass (arXiv
    2402.09353, §4.3).
    """
    low_rank.put_in(model, LinearWithDoRA, detach_norm=True)


def train_dora_norm_kept(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and m, with the gradient through the norm."""
    low_rank.put_in(model, LinearWithDoRA, detach_norm=False)


def train_gain(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and a factor for each neuron, without a norm."""
    low_rank.put_in(model, LinearWithGain)


def train_positive_gain(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and a factor for each neuron that stays positive."""
    low_rank.put_in(model, LinearWithPositiveGain)


def train_random_rows(model: nn.Module, low_rank: LowRank) -> None:
    """Train A, B and how much each neuron takes of a random row that is frozen."""
    # The rows come from a generator of their own, so that A is drawn as in the other
    # methods.
    rows = torch.Generator().manual_seed(torch.initial_seed() + 1_000_000)
    low_rank.put_in(model, LinearWithRandomRows, generator=rows)


def train_everything(model: nn.Module, _: LowRank) -> None:
    """Fine-tune in full."""
    model.requires_grad_(True)


def freeze_all_but(model: nn.Module, endings: tuple[str, ...]) -> None:
    """Make the parameters with these last names trainable, and all others not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rsplit(".", 1)[-1] in endings)


OF_B = Part("*.lora.B", high=30.0)
OF_M = Part("*.m")

METHODS: dict[str, Method] = {
    "frozen": Method(train_nothing, has_rank=False, adapts=False),
    "last layer": Method(
        train_last_layer, has_rank=False, rates=(0.001, 0.3), adapts=False
    ),
    "m alone": Method(train_magnitudes, has_rank=False, rates=(0.005, 1.0)),
    "LoRA with one rate": Method(train_lora),
    # With a rate of its own for B this is LoRA+ (arXiv 2402.12354).
    "LoRA": Method(train_lora, part=OF_B, contains=("LoRA with one rate",)),
    "LoRA matched below": Method(train_smaller_lora, part=OF_B, contains=("LoRA",)),
    "LoRA matched above": Method(train_larger_lora, part=OF_B, contains=("LoRA",)),
    "LoRA with biases": Method(
        train_lora_and_biases,
        part=Part("*.linear.bias"),
        contains=("LoRA with one rate",),
    ),
    # LoRA isn't among what DoRA contains: for W + ΔW its m would have to move with
    # every step of A and B.
    "DoRA with one rate": Method(train_dora, contains=("m alone",)),
    "DoRA with m's rate": Method(
        train_dora, part=OF_M, contains=("m alone", "DoRA with one rate")
    ),
    "DoRA norm kept with one rate": Method(train_dora_norm_kept, contains=("m alone",)),
    "DoRA norm kept with m's rate": Method(
        train_dora_norm_kept,
        part=OF_M,
        contains=("m alone", "DoRA norm kept with one rate"),
    ),
    "gain": Method(
        train_gain, part=Part("*.g"), contains=("m alone", "LoRA with one rate", "LoRA")
    ),
    "positive gain": Method(
        train_positive_gain,
        part=Part("*.theta"),
        contains=("LoRA with one rate", "LoRA"),
    ),
    "random rows": Method(
        train_random_rows, part=Part("*.v"), contains=("LoRA with one rate", "LoRA")
    ),
    "full": Method(
        train_everything, has_rank=False, rates=(0.0001, 0.01), adapts=False
    ),
}


def make_trainable(
    method: str, model: nn.Module, low_rank: LowRank, trains_last_layer: bool = False
) -> None:
    """Change ``model`` in place, so that what the method trains is trainable and
    nothing else is.

    Args:
        method: a name in ``METHODS``.
        model: a network of plain linear layers.
        low_rank: for the methods that use one.
        trains_last_layer: the last linear layer gets no adapter and is trained itself,
            in every method but ``"frozen"``.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}; there are {', '.join(map(repr, METHODS))}"
        )
    *others, (_, last) = linear_layers(model)
    if trains_last_layer:
        low_rank = low_rank._replace(targets=tuple(name for name, _ in others))
    METHODS[method].prepare(model, low_rank)
    if trains_last_layer and method != "frozen":
        last.requires_grad_(True)
