"""What an adapter's file holds beside the adapters, and where in the model it belongs:
modules that were trained as a whole, trained biases, and copies of base weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_utils.adapters.config import CONFIG, AdapterConfig, fail
from lowrank_utils.adapters.layout import (
    BASE,
    PARTS,
    PREFIX,
    TENSORS,
    converted,
    mark,
    names_of_tensors,
    own_tensors,
)
from lowrank_utils.adapters.names import around
from lowrank_utils.lora import is_adapter

# Where PEFT keeps a module that it trains as a whole, and its copy in training.
ORIGINAL, COPY = ".original_module.", ".modules_to_save."


@dataclass(frozen=True)
class Own:
    """A tensor of the base model: the module that it belongs to, and its name there."""

    module: nn.Module
    key: str
    tensor: Tensor


@dataclass(frozen=True)
class Change:
    """A tensor of the base model, and the value that the adapter's file has for it."""

    own: Own
    value: Tensor

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the value into the model, and note that it belongs to the adapter."""
        self.own.tensor.copy_(self.value)
        mark(self.own.module, self.own.key)


def loaded_along(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, object],
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
    may_round: bool,
) -> dict[str, Change]:
    """Return by name what the file changes in the base model beside the adapters.

    Args:
        tensors: those of the file that aren't parts of adapters, without PEFT's prefix.
        layers: the adapted ones by name.
        config: the adapter's settings.
        modules: of the base model by name, the model itself as "".
        may_round: see ``load_adapter``.

    Raises:
        AdapterFileError: something isn't there, is unknown, or doesn't fit.
    """
    owned = {
        f"{name}.{key}" if name else key: Own(module, key, tensor)
        for name, module in modules.items()
        if not is_adapter(module)
        for key, tensor in own_tensors(module)
    }
    expected = _expected(layers, config, modules)
    values: dict[str, Tensor] = {}
    copies: list[tuple[str, str, Tensor]] = []
    for key, tensor in tensors.items():
        name, is_copy = _place(key, layers, config, owned)
        if name is None:
            fail(
                TENSORS,
                f"unknown tensor {PREFIX + key!r}; allowed are {PREFIX}<layer> with {', '.join(PARTS.values())}, and "
                "what modules_to_save and bias name (no embeddings)",
            )
        if is_copy or name not in expected:
            copies.append((key, name, tensor))
        else:
            values[name] = tensor
    if missing := [name for name in expected if name not in values]:
        fail(
            TENSORS,
            f"no tensors for {', '.join(missing)}, which {expected[missing[0]]} names",
        )
    for key, name, tensor in copies:
        # The copy that was trained is in the file a second time.
        other = values.get(name) if COPY in key else None
        if not _same(tensor, owned[name].tensor if other is None else other):
            fail(
                TENSORS,
                f"{key} isn't the model's own {name}, and no setting says that it was trained; "
                "is this the base model of this adapter, with the vocabulary that it was trained with?",
            )
    changes = {}
    for name, tensor in values.items():
        value = _fitted(name, tensor, owned[name].tensor, may_round)
        if not torch.equal(value, owned[name].tensor):
            changes[name] = Change(owned[name], value)
    _check_ties(changes, modules, values)
    return changes


def _expected(
    layers: Mapping[str, object],
    config: AdapterConfig,
    modules: Mapping[str, nn.Module],
) -> dict[str, str]:
    """Return the names of the base model's tensors that must be in the file, each with
    the setting that says so.
    """
    whole_ones = {n for n in modules if n and n in config.saved_modules}
    expected = {}
    for name, module in modules.items():
        places = [outer for outer in around(name) if outer in whole_ones]
        if places and is_adapter(module):
            fail(
                CONFIG,
                f"modules_to_save names {places[0]}, where {name} is already adapted",
            )
        if len(places) > 1:
            fail(
                CONFIG,
                f"modules_to_save names {places[0]} inside {places[1]}; PEFT would use only one of them",
            )
        if is_adapter(module):
            continue
        biased = config.bias == "all" or (config.bias == "lora_only" and name in layers)
        for key, _ in own_tensors(module):
            full = f"{name}.{key}" if name else key
            if places:
                expected[full] = "modules_to_save"
            elif biased and key == "bias":
                expected[full] = f"bias={config.bias!r}"
    return expected


def _place(
    key: str,
    layers: Mapping[str, object],
    config: AdapterConfig,
    owned: Mapping[str, Own],
) -> tuple[str | None, bool]:
    """Return which tensor of the base model a key of the file means, and whether it is
    a copy that the file has besides; None if there is no such tensor.
    """
    if key in owned and key.rpartition(".")[0] not in layers:
        return key, False
    for layer, own in _splits(key, BASE):
        if layer in layers and f"{layer}.{own}" in owned:
            return f"{layer}.{own}", False
    for module, own in _splits(key, ORIGINAL):
        if module in config.saved_modules and f"{module}.{own}" in owned:
            return f"{module}.{own}", True
    for module, own in _splits(key, COPY):
        # Maybe with the adapter's name before the rest.
        for rest in (own, own.partition(".")[2]):
            if module in config.saved_modules and f"{module}.{rest}" in owned:
                return f"{module}.{rest}", True
    return None, False


def _splits(key: str, between: str) -> Iterator[tuple[str, str]]:
    start = key.find(between)
    while start >= 0:
        yield key[:start], key[start + len(between) :]
        start = key.find(between, start + 1)


def _same(tensor: Tensor, own: Tensor) -> bool:
    """Tell whether two tensors are equal in one of their dtypes."""
    own = own.detach().cpu()
    return tensor.shape == own.shape and (
        torch.equal(tensor.to(own.dtype), own)
        or torch.equal(own.to(tensor.dtype), tensor)
    )


def _fitted(name: str, tensor: Tensor, own: Tensor, may_round: bool) -> Tensor:
    if tensor.shape != own.shape:
        fail(
            TENSORS,
            f"{name} has the shape {tuple(tensor.shape)}; the model's own has {tuple(own.shape)}",
        )
    if own.is_meta:
        fail(TENSORS, f"{name} of the model is on the meta device and can't be set")
    if own.dtype.is_floating_point:
        tensor = converted(name, tensor, own.dtype, may_round)
    elif tensor.dtype != own.dtype:
        fail(
            TENSORS, f"{name} has the dtype {tensor.dtype}; the model's is {own.dtype}"
        )
    return tensor.to(own.device)


def _check_ties(
    changes: Mapping[str, Change],
    modules: Mapping[str, nn.Module],
    values: Mapping[str, Tensor],
) -> None:
    """Refuse changes of a tensor that the model uses elsewhere too, unless the file has
    the same value there.
    """
    if not changes:
        return
    places = names_of_tensors(modules)
    for name, change in changes.items():
        for other in places[id(change.own.tensor)]:
            if other not in values or not _same(values[other], change.value):
                fail(
                    TENSORS,
                    f"{name} was trained, and is one tensor with {other} in this model (tied), where the file has "
                    "no such value; untie them first",
                )
