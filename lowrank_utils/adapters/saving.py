"""From a model to an adapter's files: its adapters, checked to be what PEFT would make
of them, and what was trained beside them.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lowrank_utils.adapters.config import CONFIG, config_text, parse_config
from lowrank_utils.adapters.folders import replace_folder
from lowrank_utils.adapters.layout import (
    PARTS,
    PREFIX,
    SETTINGS_DIGEST,
    TENSORS,
    TENSORS_DIGEST,
    LayerAdapter,
    digest_of,
)
from lowrank_utils.adapters.names import (
    around,
    is_piece,
    plain_modules,
    unwrapped,
    whole,
    whole_weights,
)
from lowrank_utils.adapters.trained_along import trained_along
from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import (
    LinearWithLoRA,
    LinearWithLoRAMerged,
    is_adapter,
    is_linear,
    without_autocast,
)
from lowrank_utils.norms import row_scale

OWN = (LinearWithLoRA, LinearWithLoRAMerged, LinearWithDoRA, LinearWithDoRAMerged)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of ``model``, and what was trained beside them, in PEFT's
    format, without the rest of the base model.

    ``PeftModel.from_pretrained(plain_model, folder)`` then gives the same outputs. The
    folder is replaced in one step: a crash leaves the old adapter or the new one.

    Trainable parameters outside the adapters are saved as PEFT's ``modules_to_save``,
    the whole module that holds them, or as trained biases. So freeze what wasn't
    trained. Wrappers (compiled, data parallel, sharded, checkpointed, averaged) are
    passed over. Where FullyShardedDataParallel or DTensor hold the weights in pieces,
    all processes must call this together.

    Args:
        model: with adapters in it, all LoRA or all DoRA; ranks and scalings may differ
            between layers.
        folder: new, empty, or with an older adapter in it.

    Raises:
        ValueError: there is no adapter, or something that the format can't express:
            LoRA and DoRA mixed, a layer used in several places, m per input, a layer
            that computes something else, several dropouts, numbers that aren't finite,
            or trained parameters that PEFT has no place for.
        OSError: the folder can't be written.

    Warns:
        UserWarning: modules keep running statistics, which are not saved.
    """
    modules = plain_modules(model)
    with whole_weights(model):
        adapter = _adapter_of(model, modules)
        kinds = {part.m is None for part in adapter.values()}
        if len(kinds) > 1:
            raise ValueError(
                "model has LoRA and DoRA adapters; PEFT's config names one kind for all layers"
            )
        along = trained_along(model, modules)
        tensors = {}
        for name, part in adapter.items():
            stored = {"A": part.A.T, "B": part.B.T} | (
                {} if part.m is None else {"m": part.m}
            )
            for field, value in stored.items():
                tensors[f"{PREFIX}{name}{PARTS[field]}"] = _stored(value)
        for key, value in along.tensors.items():
            tensors[f"{PREFIX}{key}"] = _stored(value)
        config = config_text(
            {name: (part.A.shape[1], part.alpha) for name, part in adapter.items()},
            kinds == {False},
            modules,
            saved=along.modules,
            bias=along.bias,
            dropout=_one_dropout(adapter),
        ).encode()
    _warn_of_running_statistics(modules, set(along.modules))
    metadata = {
        "format": "pt",
        TENSORS_DIGEST: digest_of(tensors),
        SETTINGS_DIGEST: parse_config(config).digest(),
    }
    replace_folder(
        Path(folder),
        {CONFIG: config, TENSORS: safetensors.torch.save(tensors, metadata)},
    )


def _stored(tensor: Tensor) -> Tensor:
    # A copy also where the model is on the CPU: two names may share one tensor there,
    # which the format doesn't allow.
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


def _one_dropout(adapter: Mapping[str, LayerAdapter]) -> float:
    shares = Counter(part.dropout for part in adapter.values())
    if len(shares) > 1:
        usual = shares.most_common(1)[0][0]
        name, part = next((n, p) for n, p in adapter.items() if p.dropout != usual)
        raise ValueError(
            f"{name} has a dropout of {part.dropout}, and other layers have {usual}; "
            "PEFT's config has one for all layers"
        )
    return next(iter(shares))


def _warn_of_running_statistics(
    modules: Mapping[str, nn.Module], saved: set[str]
) -> None:
    names = [
        name
        for name, module in modules.items()
        if getattr(module, "running_mean", None) is not None
        and saved.isdisjoint(around(name))
    ]
    if names:
        warnings.warn(
            f"{', '.join(names)}: the running statistics are no part of the adapter's files. If training "
            "changed them, the base model with this adapter gives other outputs. Keep these modules in eval() "
            "while training; or train them too (requires_grad_(True)), and they are saved",
            UserWarning,
            stacklevel=3,
        )


def adapter_of(model: nn.Module) -> dict[str, LayerAdapter]:
    """Return the adapter of each adapted layer of ``model`` by name, checked to be LoRA
    or DoRA.

    The tensors are those of the model, not copies.
    """
    return _adapter_of(model, plain_modules(model))


def _adapter_of(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, LayerAdapter]:
    for name, module in modules.items():
        linear = getattr(module, "linear", None)
        if isinstance(linear, nn.Module) and hasattr(module, "lora"):
            inside = unwrapped(linear)
            if is_linear(inside) and inside is not linear:
                raise ValueError(
                    f"{name}: its linear layer alone is inside a {type(linear).__name__}; "
                    "wrap the adapted layer as a whole, or take the wrapper off"
                )
    places = [(n, m) for n, m in modules.items() if is_adapter(m)]
    if not places:
        raise ValueError(
            f"{type(unwrapped(model)).__name__} has no adapters inside; put them in with replace_linear_layers first"
        )
    uses = Counter(id(module) for _, module in places)
    if shared := [f"{n} ({type(m).__name__})" for n, m in places if uses[id(m)] > 1]:
        raise ValueError(
            f"one layer under several names: {', '.join(shared)}. PEFT would adapt only the first of them"
        )
    return {name: _layer_adapter(name, module) for name, module in places}


def _layer_adapter(name: str, layer: Any) -> LayerAdapter:
    W, kind = layer.linear.weight, type(layer).__name__
    lora: Any = unwrapped(layer.lora)
    if not all(isinstance(getattr(lora, field, None), Tensor) for field in "AB"):
        raise ValueError(
            f"{name} ({kind}) has no A and B of one adapter; save each adapter from a model of its own"
        )
    m = getattr(layer, "m", None)
    part = LayerAdapter(
        lora.A, lora.B, float(lora.alpha), m, float(getattr(lora, "dropout", 0.0))
    )
    if W.is_meta:
        raise ValueError(f"{name} is on the meta device and has no numbers to save")
    if m is not None and m.shape != W.shape[:1]:
        raise ValueError(
            f"{name} ({kind}) has m of shape {tuple(m.shape)}; PEFT's DoRA has one number per output, {(len(W),)}"
        )
    for field, value in (("A", part.A), ("B", part.B), ("m", m)):
        if value is not None and not torch.isfinite(whole(value)).all():
            raise ValueError(
                f"{field} of {name} holds NaN or infinite numbers; did the training diverge?"
            )
    if any(map(is_piece, layer.parameters())):
        _check_class(name, layer)
    else:
        _check_outputs(name, layer, part)
    return part


def _check_class(name: str, layer: nn.Module) -> None:
    # A layer in pieces can't be called from outside: the first call decides how
    # fully_shard splits the work. So here the class must tell what it computes.
    kind = type(layer)
    if is_sharded_class := kind.__mro__[1].__name__ == "FSDPModule":
        kind = kind.__mro__[2]
    if kind not in OWN:
        raise ValueError(
            f"{name} ({kind.__name__}) has its weights in pieces{', by fully_shard' if is_sharded_class else ''}, "
            "and what a class of your own computes can't be checked so; save it from a model with whole weights"
        )


def _check_outputs(name: str, layer: Any, part: LayerAdapter) -> None:
    """Refuse a class written elsewhere that looks like an adapter and computes
    something else, which PEFT would not.
    """
    W, m = layer.linear.weight, part.m
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(
        4, W.shape[1], generator=generator, dtype=torch.float64, device="cpu"
    )
    x = x.to(device=W.device, dtype=W.dtype)
    # The adapter may be wider than the weight; the wider dtype is the judge.
    wide = torch.promote_types(W.dtype, part.A.dtype)
    with torch.no_grad(), without_autocast(W.device), _in_eval_mode(layer):
        V = torch.addmm(
            W.to(wide), part.B.T.to(wide), part.A.T.to(wide), alpha=part.alpha
        )
        scale = torch.ones_like(V[:, 0])
        if m is not None:
            scale = row_scale(m.to(wide), row_norms(V))
        bias = layer.linear.bias
        expected = nn.functional.linear(
            x.to(wide),
            scale.unsqueeze(1) * V,
            None if bias is None else bias.to(wide),
        )
        difference = torch.linalg.vector_norm((layer(x) - expected).double())
        size = torch.linalg.vector_norm(expected.double())
    if not difference <= math.sqrt(torch.finfo(W.dtype).eps) * size:
        form = "LoRA's x(W + ΔW)ᵀ + b" if m is None else "DoRA's x(c ⊙ V)ᵀ + b"
        raise ValueError(
            f"{name} ({type(layer).__name__}) doesn't compute {form}, so PEFT's outputs would be others: it can't be saved"
        )


@contextmanager
def _in_eval_mode(layer: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the block."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
