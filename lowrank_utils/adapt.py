"""Quantise any model's layers, put adapters into it, freeze the rest, give parts their
own learning rate, count, and merge back.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lowrank_utils._arguments import (
    check_finite_number,
    check_module,
    check_pattern,
)
from lowrank_utils._weight_checks import check_weight_is_all
from lowrank_utils.lora import is_adapter, is_linear
from lowrank_utils.quantized import KeepsCodes, QuantizedLinear, is_quantized


def replace_linear_layers(
    model: nn.Module,
    layer_class: Callable[..., nn.Module],
    rank: int,
    alpha: float,
    targets: str | Iterable[str] | None = None,
    **layer_options: Any,
) -> list[str]:
    """Replace linear layers of ``model`` by ``layer_class(linear, rank, alpha)``, in
    place.

    A layer that the model uses in two places gets one adapter, used in both, also if
    ``targets`` matches only one of its names. Either all layers are replaced or, if
    anything is refused, none.

    Args:
        model: any module. A bare ``nn.Linear`` can't be replaced in place: wrap it
            yourself.
        layer_class: one of the four wrappers, or a class of your own with the same
            first arguments.
        rank: inner dimension of the LoRA factors, for every layer.
        alpha: their scaling s.
        targets: glob patterns for names as ``named_modules`` gives them, such as
            ``"layers.*.attention.query"`` or ``["*.query", "*.value"]``. None takes all
            linear layers.
        layer_options: further keyword arguments of ``layer_class``, such as ``init`` or
            ``detach_norm``.

    Returns:
        The names of the replaced layers, in the model's order.

    Raises:
        TypeError: ``model`` isn't a module or ``targets`` holds something else than
            patterns.
        ValueError: there is nothing to replace, a pattern matches no layer, or a
            matched layer is already adapted. The message lists the names.
    """
    layers = _layers_to_replace(model, targets, "layer_class(linear, rank, alpha)")
    if adapted := [name for name, layer in layers.items() if is_adapter(layer)]:
        raise ValueError(
            f"already adapted: {', '.join(adapted)}. Call merge_adapters(model) first, or choose other targets"
        )
    _refuse_tied_weights(model, layers)
    _put_in(
        model,
        layers,
        lambda linear: layer_class(linear, rank, alpha, **layer_options).train(
            linear.training
        ),
    )
    return list(layers)


def quantize_linear_layers(
    model: nn.Module,
    levels: str = "nf4",
    block_size: int = 64,
    targets: str | Iterable[str] | None = None,
) -> list[str]:
    """Replace linear layers of ``model`` by ``QuantizedLinear``, in place, before
    adapters are put in.

    Either all layers are replaced or, if anything is refused, none.

    Args:
        model: any module with plain linear layers.
        levels: ``"nf4"``, or evenly spaced ``"int4"`` or ``"int8"``.
        block_size: how many weights of a row share a scale.
        targets: glob patterns as for ``replace_linear_layers``. None takes all linear
            layers, a head that is to be trained too.

    Returns:
        The names of the replaced layers, in the model's order.

    Raises:
        TypeError: ``model`` isn't a module, or a layer computes more than its weight
            says.
        ValueError: there is nothing to replace, a pattern matches no layer, a matched
            layer is adapted or quantised already, or it holds NaN or infinity.
    """
    layers = _layers_to_replace(model, targets, "QuantizedLinear(linear)")
    if adapted := [name for name, layer in layers.items() if is_adapter(layer)]:
        raise ValueError(
            f"already adapted: {', '.join(adapted)}. Quantise the plain model, and put the adapters in then"
        )
    if quantized := [name for name, layer in layers.items() if is_quantized(layer)]:
        raise ValueError(f"already quantised: {', '.join(quantized)}")
    _refuse_tied_weights(model, layers)
    _put_in(model, layers, lambda linear: QuantizedLinear(linear, levels, block_size))
    return list(layers)


@torch.no_grad()
def dequantize_linear_layers(model: nn.Module) -> list[str]:
    """Replace the quantised linear layers of ``model``, those inside adapters too, by
    ``nn.Linear`` with the weights that their codes stand for, in place.

    The outputs stay the same up to rounding, and the layers are frozen, as they were.
    ``merge_adapters`` then has a weight to merge into::

        dequantize_linear_layers(model)
        plain = merge_adapters(model)

    Returns:
        The names of the layers, in the model's order.

    Raises:
        TypeError: ``model`` isn't a module, or a layer computes more than its weight
            says.
        ValueError: it has no quantised layers, is itself one, or is in a bank.
    """
    check_module("model", model)
    layers = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if is_quantized(layer)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layers")
    if "" in layers:
        raise ValueError(
            f"model is itself a {type(model).__name__}, which can't be replaced in place"
        )
    if banked := [
        name
        for name, module in model.named_modules()
        if is_adapter(module) and not hasattr(module.lora, "A")
    ]:
        raise ValueError(
            f"in a bank, which reads their weights: {', '.join(banked)}. Remove its "
            "adapters first"
        )
    _put_in(model, layers, _dequantized)
    return list(layers)


def _dequantized(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, KeepsCodes)
    check_weight_is_all(layer)
    return _linear_of(layer.weight, layer.bias, layer.training).requires_grad_(False)


def _put_in(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    made_of: Callable[[Any], nn.Module],
) -> None:
    """Put what is made of each layer into its places, when all are made, so that a
    refusal leaves the model as it was.
    """
    new: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        if layer not in new:
            new[layer] = made_of(layer)
    for name, layer in layers.items():
        model.set_submodule(name, new[layer])


def named_modules_outside_adapters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module depth first as ``named_modules`` does, but nothing from
    inside an adapter.
    """
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if inside is not None and name.startswith(inside):
            continue
        inside = (f"{name}." if name else "") if is_adapter(module) else None
        yield name, module


def refuse_foreign_adapters(model: nn.Module) -> None:
    """Refuse a model that another library has adapted: its wrappers keep the pretrained
    layer as ``base_layer``, and read its weight.

    Raises:
        ValueError: with the names of the adapted layers.
    """
    if adapted := [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
    ]:
        raise ValueError(
            f"already adapted by another library: {', '.join(adapted)}. Take the plain "
            "model (in PEFT unload or merge_and_unload gives it back)"
        )


def _refuse_tied_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight another module has too, in a model that ties them
    again by itself, as a language model of transformers ties its head to the embedding:
    that fails while the layer is adapted, and undoes its merging.
    """
    if not any(
        hasattr(module, "tie_weights")
        and getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        for module in model.modules()
    ):
        return
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, []).append(name)
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None and len(holders[weight]) > 1:
            sharing = [holder for holder in holders[weight] if holder != name]
            raise ValueError(
                f"{name} shares its weight with {', '.join(sharing)}. Choose other "
                f"targets, or untie them first: {name}.weight = "
                f"nn.Parameter({name}.weight.clone()), and "
                "config.tie_word_embeddings = False"
            )


def _layers_to_replace(
    model: nn.Module, targets: str | Iterable[str] | None, by_hand: str
) -> dict[str, nn.Module]:
    """Return the linear and adapted layers that ``targets`` match by name, a shared one
    under each of its names.

    Args:
        model: that they are in.
        targets: see ``replace_linear_layers``.
        by_hand: what to write for a model that is itself a linear layer.
    """
    check_module("model", model)
    if is_linear(model) or is_adapter(model):
        raise ValueError(
            f"model is itself a {type(model).__name__}, which can't be replaced in place; "
            f"for a linear layer write {by_hand}"
        )
    refuse_foreign_adapters(model)
    layers = _linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers")
    matched = {layers[name] for name in _matching_names(model, list(layers), targets)}
    return {name: layer for name, layer in layers.items() if layer in matched}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return plain and adapted linear layers by name, a shared one under each of its
    names.
    """
    return {
        name: module
        for name, module in named_modules_outside_adapters(
            model, remove_duplicate=False
        )
        if is_linear(module) or is_adapter(module)
    }


def _matching_names(
    model: nn.Module, names: list[str], targets: str | Iterable[str] | None
) -> list[str]:
    if targets is None:
        return names
    if not isinstance(targets, (str, Iterable)):
        raise TypeError(
            f"targets must be a pattern or a list of patterns; got {type(targets).__name__}"
        )
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty; leave it out to adapt all linear layers")
    for pattern in patterns:
        check_pattern("a target", pattern)
        if not any(fnmatchcase(name, pattern) for name in names):
            others = [
                f"{name} ({type(module).__name__})"
                for name, module in named_modules_outside_adapters(model)
                if fnmatchcase(name, pattern)
            ]
            matches = f" (it matches {others[0]}, which isn't one)" if others else ""
            raise ValueError(
                f"no linear layer matches {pattern!r}{matches}; the linear layers are: "
                f"{', '.join(names)}"
            )
    return [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def parameters_of_adapters(model: nn.Module) -> set[nn.Parameter]:
    """Return what the adapters in ``model`` add to it: A, B and m."""
    return {
        parameter
        for module in model.modules()
        if is_adapter(module)
        for name, parameter in module.named_parameters()
        if not name.startswith("linear.")
    }


def mark_only_adapters_as_trainable(
    model: nn.Module, also: str | Iterable[str] = ()
) -> list[str]:
    """Freeze all of ``model`` but its adapters' A, B and m, in place.

    Args:
        model: any module with adapters in it.
        also: glob patterns for names as ``named_parameters`` gives them, of what is
            trained along, such as ``"classifier.*"`` for a new head.

    Returns:
        The names of the trainable parameters, in the model's order.

    Raises:
        TypeError: ``model`` isn't a module, or a pattern isn't a text.
        ValueError: there is no adapter, or a pattern matches nothing.
    """
    check_module("model", model)
    trained = parameters_of_adapters(model)
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no adapters; put them in with "
            "replace_linear_layers first"
        )
    names = dict(model.named_parameters(remove_duplicate=False))
    for pattern in [also] if isinstance(also, str) else also:
        check_pattern("a pattern", pattern)
        matched = [p for name, p in names.items() if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"no parameter matches {pattern!r}; there are: {', '.join(names)}"
            )
        trained.update(matched)
    for parameter in names.values():
        parameter.requires_grad_(parameter in trained)
    return [name for name, p in model.named_parameters() if p.requires_grad]


def freeze_linear_layers(model: nn.Module) -> None:
    """Make the weights and biases of all plain linear layers untrainable, in place.

    A quantised layer is frozen from the start. A, B and m aren't inside an
    ``nn.Linear``, so they stay as they are, and so does
    everything that isn't a linear layer (normalisation, embeddings). In a model that has
    such, ``mark_only_adapters_as_trainable`` freezes them too.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.requires_grad_(False)


def parameter_groups(
    model: nn.Module, learning_rate: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters of ``model`` in groups, each with its own
    learning rate, for any optimizer.

    DoRA's m wants a larger rate than A and B, and LoRA+ gives B one (arXiv
    2402.12354)::

        optimizer = torch.optim.Adam(parameter_groups(model, 0.003, {"*.m": 30}))

    In a model of PEFT the magnitudes are called ``"*lora_magnitude_vector*"``, and B
    ``"*lora_B*"``.

    Args:
        model: any module. What is frozen is left out.
        learning_rate: of all parameters that no pattern matches.
        factors: glob pattern for names as ``named_parameters`` gives them → what the
            learning rate of the parameters that it matches is multiplied by. A
            parameter with several names goes by each of them.

    Returns:
        A group for what no pattern matches, if there is such, then one for each pattern
        in its order; each holds ``"params"`` in the model's order, and ``"lr"``.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a rate or a factor isn't larger than zero and finite, nothing is
            trainable, a pattern matches nothing trainable, or two patterns match the
            same parameter.
    """
    check_module("model", model)
    check_finite_number("learning_rate", learning_rate, above=0)
    if factors is not None and not isinstance(factors, Mapping):
        raise TypeError(
            f"factors must be a dict of pattern → factor; got {type(factors).__name__}"
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ValueError("model has no trainable parameters: everything is frozen")
    matched: dict[nn.Parameter, str] = {}
    groups = []
    for pattern, factor in (factors or {}).items():
        check_pattern("a pattern", pattern)
        check_finite_number(f"the factor of {pattern!r}", factor, above=0)
        members = [
            p
            for p, known in names.items()
            if any(fnmatchcase(name, pattern) for name in known)
        ]
        if not members:
            trainable = ", ".join(known[0] for known in names.values())
            raise ValueError(
                f"no trainable parameter matches {pattern!r}; trainable are: {trainable}"
            )
        if twice := [p for p in members if p in matched]:
            raise ValueError(
                f"{names[twice[0]][0]} is matched by {matched[twice[0]]!r} and by {pattern!r}; "
                "which of the two factors is meant?"
            )
        matched.update(dict.fromkeys(members, pattern))
        rate = float(learning_rate) * float(factor)
        check_finite_number(f"the learning rate of {pattern!r}", rate, above=0)
        groups.append({"params": members, "lr": rate})
    rest = [p for p in names if p not in matched]
    return [{"params": rest, "lr": float(learning_rate)}, *groups] if rest else groups


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which each adapter is a plain ``nn.Linear`` with
    the same outputs.

    ``model`` isn't changed, so nothing has to be subtracted later: to restore it, keep
    using it.

    Args:
        model: a module with adapters in it, or one adapter.

    Returns:
        A new module of the same structure, with all merged layers trainable.

    Raises:
        TypeError: ``model`` isn't a module, or a linear layer computes more than its
            weight says.
        ValueError: ``model`` has no adapters, or their base is quantised.
    """
    check_module("model", model)
    if quantized := [
        f"{name}.linear".lstrip(".")
        for name, module in model.named_modules()
        if is_adapter(module) and is_quantized(module.linear)
    ]:
        raise ValueError(
            f"quantised: {', '.join(quantized)}. A merged weight has none of the levels, and rounding it to "
            "them again would change what was trained. Call dequantize_linear_layers(model), and "
            "merge into the plain weights"
        )
    merged = copy.deepcopy(model)
    if is_adapter(merged):
        return _merged_linear(merged)
    adapters = {
        name: m
        for name, m in merged.named_modules(remove_duplicate=False)
        if is_adapter(m)
    }
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapters to merge")
    linears = {adapter: _merged_linear(adapter) for adapter in set(adapters.values())}
    for name, adapter in adapters.items():
        merged.set_submodule(name, linears[adapter])
    return merged


def _merged_linear(adapter: nn.Module) -> nn.Linear:
    training = adapter.training
    # What dropout leaves out in training is no part of the weight.
    adapter.eval()
    weight, bias = (
        getattr(adapter, "weight", None),
        getattr(adapter.linear, "bias", None),
    )
    if not isinstance(weight, torch.Tensor):
        raise TypeError(
            f"{type(adapter).__name__} has no weight to merge; give it a property `weight`"
        )
    return _linear_of(weight, bias, training)


def _linear_of(
    weight: torch.Tensor, bias: torch.Tensor | None, training: bool
) -> nn.Linear:
    out_features, in_features = weight.shape
    # Made on the meta device, the layer draws no random numbers for a weight that is
    # replaced anyway.
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear.train(training)


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a model holds; ``print`` shows it as a table.

    Attributes:
        trainable: those with ``requires_grad``.
        frozen: those without, and the weights of quantised layers.
        per_layer: name → (trainable, frozen). An adapted layer is one entry, with its
            linear layer inside.
        nbytes: how many bytes all of them take; of a quantised weight, those of its
            codes and scales.
    """

    trainable: int
    frozen: int
    per_layer: dict[str, tuple[int, int]]
    nbytes: int

    @property
    def total(self) -> int:
        """Trainable and frozen together."""
        return self.trainable + self.frozen

    def __str__(self) -> str:
        rows = [*self.per_layer.items(), ("all", (self.trainable, self.frozen))]
        width = max(5, *(len(name) for name, _ in rows))
        lines = [f"{'layer':<{width}} {'trainable':>12} {'frozen':>12}"]
        lines += [
            f"{name:<{width}} {trainable:>12,} {frozen:>12,}"
            for name, (trainable, frozen) in rows
        ]
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable and the frozen numbers of ``model``, in all and per layer.

    A parameter that is used in several places counts once, where it comes first.
    """
    per_layer: dict[str, tuple[int, int]] = {}
    nbytes = 0
    seen: set[torch.Tensor] = set()
    for name, module in named_modules_outside_adapters(model):
        new = [
            p for p in module.parameters(recurse=is_adapter(module)) if p not in seen
        ]
        seen.update(new)
        nbytes += sum(p.nbytes for p in new)
        linear = getattr(module, "linear", None) if is_adapter(module) else module
        quantized = linear if isinstance(linear, KeepsCodes) else None
        if quantized is not None and quantized.codes in seen:
            # Two adapters stand around one layer.
            quantized = None
        if new or quantized is not None:
            label = name or type(model).__name__
            trainable, frozen = per_layer.get(label, (0, 0))
            trainable += sum(p.numel() for p in new if p.requires_grad)
            frozen += sum(p.numel() for p in new if not p.requires_grad)
            if quantized is not None:
                seen.add(quantized.codes)
                frozen += quantized.in_features * quantized.out_features
                nbytes += quantized.codes.nbytes + quantized.scales.nbytes
            per_layer[label] = (trainable, frozen)
    return ParameterCount(
        trainable=sum(trainable for trainable, _ in per_layer.values()),
        frozen=sum(frozen for _, frozen in per_layer.values()),
        per_layer=per_layer,
        nbytes=nbytes,
    )
