"""How PEFT lays out ``adapter_model.safetensors``, and what we put into its metadata.

Of the layer ``layers.0`` PEFT stores ``base_model.model.layers.0.lora_A.weight`` (r,
in), ``….lora_B.weight`` (out, r) and for DoRA ``….lora_magnitude_vector`` (out,), which
are our Aᵀ, Bᵀ and m. Its scaling is ``lora_alpha``/r, or with rsLoRA ``lora_alpha``/√r
(arXiv 2312.03732); ours is ``alpha`` as it is.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils.adapters.config import fail
from lowrank_utils.lora import is_adapter

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "m": ".lora_magnitude_vector"}
# Of an adapted layer, what PEFT stores besides: its bias if that was trained, and of an
# adapted lm_head the whole layer.
BASE = ".base_layer."
# On a module, the names of its tensors that load_adapter has set. They belong to the
# adapter, so save_adapter saves them again also when they are frozen.
MARK = "_loaded_along"
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The digests of the tensors and of the settings. PEFT passes over them.
TENSORS_DIGEST, SETTINGS_DIGEST = "sha256", "settings_sha256"


@dataclass(frozen=True)
class LayerAdapter:
    """What an adapter is for one linear layer: A (in, r), B (r, out), the scaling s,
    for DoRA m (out,), and the dropout before A in training.
    """

    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor | None = None
    dropout: float = 0.0


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield by name what ``state_dict`` has of a module itself, without those inside:
    its parameters and persistent buffers.
    """
    for kept in (module._parameters, module._buffers):
        for key, tensor in kept.items():
            if tensor is not None and key not in module._non_persistent_buffers_set:
                yield key, tensor


def names_of_tensors(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Return all names of each tensor, by its ``id``, as in the model without adapters.

    Args:
        modules: all modules of a model by name, the model itself as "".
    """
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        layer: Any = module.linear if is_adapter(module) else module
        for key, tensor in own_tensors(layer):
            names.setdefault(id(tensor), []).append(f"{name}.{key}" if name else key)
    return names


def mark(module: nn.Module, key: str) -> None:
    """Note on a module that ``load_adapter`` has set one of its tensors."""
    setattr(module, MARK, {*getattr(module, MARK, ()), key})


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def converted(name: str, tensor: Tensor, dtype: torch.dtype, may_round: bool) -> Tensor:
    """Return a tensor of the file in another dtype; if it doesn't fit, refuse it.

    Args:
        name: in the file.
        tensor: with floating-point numbers.
        dtype: of the layer that it is for.
        may_round: take numbers that the dtype can't hold exactly.
    """
    if tensor.dtype not in READABLE:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in READABLE)
        fail(TENSORS, f"{name} has the dtype {tensor.dtype}; allowed are {allowed}")
    if not torch.isfinite(tensor).all():
        fail(TENSORS, f"{name} holds NaN or infinite numbers")
    result = tensor.to(dtype)
    if not torch.isfinite(result).all():
        fail(TENSORS, f"{name} holds numbers that are too large for {dtype}")
    if not may_round and not torch.equal(result.to(tensor.dtype), tensor):
        fail(
            TENSORS,
            f"{name} is {tensor.dtype} and would be rounded to {dtype}; "
            "convert the model, or pass may_round=True",
        )
    return result
