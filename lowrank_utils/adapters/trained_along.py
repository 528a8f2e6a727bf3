"""What was trained beside the adapters: whole modules, which PEFT calls
``modules_to_save``, and biases.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowrank_utils.adapters.layout import BASE, MARK, names_of_tensors, own_tensors
from lowrank_utils.adapters.names import around, plain_modules, unwrapped, whole
from lowrank_utils.adapters.patterns import SavedModules, plain_text
from lowrank_utils.lora import is_adapter

# PEFT can't put its copy of a module into the place of these.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# What PEFT adds inside an adapted layer, where it looks for modules_to_save too.
PEFTS_OWN = [
    *("base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"),
    *("lora_A.default", "lora_B.default", "lora_dropout", "lora_dropout.default"),
    *("lora_magnitude_vector", "lora_magnitude_vector.default"),
]
FREEZE = (
    "Freeze what wasn't trained (mark_only_adapters_as_trainable), "
    "or save these weights by yourself and freeze them then"
)


@dataclass
class Along:
    """What goes into an adapter's files beside the adapters.

    Attributes:
        tensors: the file's key, without its prefix → value.
        modules: PEFT's ``modules_to_save``.
        bias: PEFT's ``bias``.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    bias: str = "none"


def names_trained_along(model: nn.Module) -> list[str]:
    """Return the names of the trained parameters outside the adapters of ``model``, and
    of those that ``load_adapter`` has set.
    """
    trained = _trained(model, plain_modules(model))
    return [
        f"{name}.{key}" if name else key
        for name, keys in trained.items()
        for key in sorted(keys)
    ]


def trained_along(model: nn.Module, modules: Mapping[str, nn.Module]) -> Along:
    """Return what was trained beside the adapters, in PEFT's terms.

    Args:
        model: with adapters in it.
        modules: of this model, as ``plain_modules`` gives them.

    Raises:
        ValueError: PEFT has no place for a trained parameter.
    """
    trained = _trained(model, modules)
    everything = {"": unwrapped(model), **modules}
    of_adapters = {name for name in trained if is_adapter(everything[name])}
    only_biases = {
        name for name, keys in trained.items() if keys == {"bias"}
    } - of_adapters
    # In the model's order, and without those that are inside others of them.
    to_save = {
        _module_to_save(name, keys, everything): None
        for name, keys in trained.items()
        if name not in of_adapters | only_biases
    }
    names = [n for n in to_save if to_save.keys().isdisjoint([*around(n)][1:])]
    _check_modules_to_save(names, modules)
    saved = set(names)
    only_biases = {n for n in only_biases if saved.isdisjoint(around(n))}
    along = Along(
        modules=names,
        bias="all" if only_biases else "lora_only" if of_adapters else "none",
    )
    names_of = names_of_tensors(everything)
    in_place: set[str] = set()
    tied: list[list[str]] = []
    for name, module in everything.items():
        inside = not saved.isdisjoint(around(name))
        # Of an adapted layer, PEFT knows the linear layer as its base layer.
        between = BASE if is_adapter(module) else "." if name else ""
        layer: Any = module.linear if is_adapter(module) else module
        for key, tensor in own_tensors(layer):
            biased = along.bias == "all" or (
                along.bias == "lora_only" and is_adapter(module)
            )
            biased = biased and key == "bias" and not inside
            if inside or biased:
                along.tensors[f"{name}{between}{key}"] = tensor
                _check_tensor(f"{name}.{key}" if name else key, tensor)
            if biased:
                in_place.add(f"{name}.{key}" if name else key)
            if key in trained.get(name, ()):
                tied.append(names_of[id(tensor)])
    for same in tied:
        # PEFT trains biases in their places, and of modules it trains copies.
        if len(same) > 1 and not in_place.issuperset(same):
            _refuse(
                f"{', '.join(same)} are one tensor (tied), which is trained; PEFT would change it in one place alone"
            )
    return along


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no numbers to save")
    if not torch.isfinite(whole(tensor)).all():
        raise ValueError(
            f"{name} holds NaN or infinite numbers; did the training diverge?"
        )


def _trained(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """Return the names of trained tensors by module, "" for the model itself; of an
    adapter, that is the bias of its linear layer.
    """
    found: dict[str, set[str]] = {}
    lost: list[str] = []
    for name, module in [("", unwrapped(model)), *modules.items()]:
        if is_adapter(module):
            keys = _bias_trained(name, module, lost)
        else:
            keys = {k for k, p in module._parameters.items() if _requires_grad(p)}
            keys |= getattr(module, MARK, set())
        if keys:
            found[name] = keys
    if lost:
        raise ValueError(
            f"trainable, but not part of an adapter's files: {', '.join(lost)}. {FREEZE}"
        )
    return found


def _bias_trained(name: str, layer: Any, lost: list[str]) -> set[str]:
    lora, linear = unwrapped(layer.lora), layer.linear
    parts = [getattr(lora, "A", None), getattr(lora, "B", None)]
    parts.append(getattr(layer, "m", None))
    of_adapter = {id(part) for part in [*parts, linear.bias]}
    lost += [
        f"{name}.{key}"
        for key, parameter in layer.named_parameters()
        if parameter.requires_grad and id(parameter) not in of_adapter
    ]
    if _requires_grad(linear.bias) or "bias" in getattr(linear, MARK, set()):
        return {"bias"}
    return set()


def _requires_grad(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"{what}. {FREEZE}")


def _module_to_save(
    name: str, keys: set[str], everything: Mapping[str, nn.Module]
) -> str:
    """Return the module that PEFT would save for trained tensors of the module
    ``name``.
    """
    for outer in around(name) if name else ():
        if not isinstance(everything[outer], CONTAINERS):
            return outer
    kind = type(everything[""]).__name__
    _refuse(
        f"{', '.join(f'{name}.{key}' if name else key for key in sorted(keys))}: is trained, but belongs to the "
        f"{kind} itself, and PEFT's modules_to_save means modules inside it"
    )


def _check_modules_to_save(names: list[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse modules that PEFT can't save whole, or whose names mean others too."""
    saved, wanted = SavedModules(names), set(names)
    for name in names:
        if (text := plain_text(name)) is None or text[0] != name:
            _refuse(
                f"{name} is trained, but in PEFT's modules_to_save its name is a pattern that means something else"
            )
    for name, module in modules.items():
        outer = next((n for n in around(name) if n in wanted), None)
        if is_adapter(module):
            if outer is not None:
                _refuse(
                    f"parameters of {outer} are trained, and {name} inside it is adapted; PEFT saves modules as a "
                    "whole or adapts what is inside, not both"
                )
            if saved.keep_out(name):
                meant = next(n for n in names if SavedModules([n]).keep_out(name))
                _refuse(
                    f"{meant} is trained, but by this name in modules_to_save PEFT would not adapt {name}"
                )
        seen = [name, *(f"{name}.{own}" for own in PEFTS_OWN if is_adapter(module))]
        for known in seen:
            if known in saved and known not in wanted:
                meant = next(n for n in names if known.endswith(n))
                _refuse(
                    f"{meant} is trained, but by this name in modules_to_save PEFT would take {known} as well"
                )
        if outer is not None and (
            type(module).get_extra_state is not nn.Module.get_extra_state
        ):
            _refuse(
                f"{name} is trained, but has an extra state besides its tensors, which the file can't hold"
            )
