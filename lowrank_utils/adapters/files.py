"""An adapter alone, on disk: PEFT's two files, ``adapter_config.json`` and
``adapter_model.safetensors``.

Of the layer ``layers.0`` PEFT stores ``base_model.model.layers.0.lora_A.weight`` (r,
in), ``….lora_B.weight`` (out, r) and for DoRA ``….lora_magnitude_vector`` (out,), which
are our Aᵀ, Bᵀ and m. Its scaling is ``lora_alpha``/r, or with rsLoRA ``lora_alpha``/√r
(arXiv 2312.03732); ours is ``alpha`` as it is.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowrank_utils.adapt import named_modules_outside_adapters
from lowrank_utils.adapters.config import (
    CONFIG,
    AdapterConfig,
    AdapterFileError,
    config_text,
    fail,
    read_config,
)
from lowrank_utils.adapters.folders import is_being_replaced, recover, replace_folder
from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import AdaptedLinear, LinearWithLoRA, is_adapter
from lowrank_utils.norms import row_scale

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "m": ".lora_magnitude_vector"}
# Seconds for which a folder that another process replaces may stay away, or be replaced
# again.
PATIENCE = 2.0
READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerAdapter:
    """What an adapter is for one linear layer: A (in, r), B (r, out), the scaling s,
    and for DoRA m (out,).
    """

    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor | None = None


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of ``model``, without the base model, in PEFT's format.

    ``PeftModel.from_pretrained(plain_model, folder)`` then gives the same outputs. The
    folder is replaced in one step: a crash leaves the old adapter or the new one.

    Args:
        model: with adapters in it, all LoRA or all DoRA; ranks and scalings may differ
            between layers.
        folder: new, empty, or with an older adapter in it.

    Raises:
        ValueError: there is no adapter, or something that the format can't express:
            LoRA and DoRA mixed, a layer used in several places, m per input, a layer
            that computes something else, numbers that aren't finite, or further
            trainable parameters, which would be lost.
        OSError: the folder can't be written.
    """
    adapter = adapter_of(model)
    inside = {
        p
        for module in model.modules()
        if is_adapter(module)
        for p in _trained_tensors(module)
    }
    if lost := [
        n for n, p in model.named_parameters() if p.requires_grad and p not in inside
    ]:
        raise ValueError(
            f"trainable, but not part of an adapter's files: {', '.join(lost)}. Freeze what wasn't trained "
            "(freeze_linear_layers, or requires_grad_(False)), or save these weights by yourself and freeze them then"
        )
    kinds = {part.m is None for part in adapter.values()}
    if len(kinds) > 1:
        raise ValueError(
            "model has LoRA and DoRA adapters; PEFT's config names one kind for all layers"
        )
    tensors = {}
    for name, part in adapter.items():
        stored = {"A": part.A.T, "B": part.B.T} | (
            {} if part.m is None else {"m": part.m}
        )
        for field, value in stored.items():
            tensors[f"{PREFIX}{name}{PARTS[field]}"] = (
                value.detach().to("cpu").contiguous()
            )
    metadata = {"format": "pt", "sha256": _digest(tensors)}
    layers = {name: (part.A.shape[1], part.alpha) for name, part in adapter.items()}
    config = config_text(layers, kinds == {False}, plain_modules(model))
    replace_folder(
        Path(folder),
        {CONFIG: config.encode(), TENSORS: safetensors.torch.save(tensors, metadata)},
    )


def load_adapter(
    model: nn.Module, folder: str | Path, *, may_round: bool = False
) -> list[str]:
    """Put the adapter of ``folder`` into the plain ``model``, in place: one of ours or
    one that PEFT saved.

    Everything is checked first, so an error leaves ``model`` as it was. The layers
    become ``LinearWithLoRA`` or ``LinearWithDoRA``; to train them on, call
    ``freeze_linear_layers``.

    Args:
        model: the base model, with plain linear layers where the adapter belongs.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        may_round: take numbers that the layer's dtype can't hold exactly, such as
            float32 for a bfloat16 layer.

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        FileNotFoundError: the folder or a file isn't there.
        AdapterFileError: a file is damaged, needs something that isn't supported, or
            doesn't fit the model.
    """
    linears = plain_modules(model)
    adapter = read_adapter(folder, linears, may_round=may_round)
    # All layers are built before the first is put in, so a failure leaves the model as
    # it was.
    layers = {
        name: adapted_layer(linears[name], part) for name, part in adapter.items()
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers)


def adapted_layer(linear: nn.Module, part: LayerAdapter) -> AdaptedLinear:
    """Return ``linear`` with the adapter ``part`` beside it, in the linear layer's
    dtype and place.
    """
    layer_class = LinearWithLoRA if part.m is None else LinearWithDoRA
    with torch.random.fork_rng(devices=[]):  # A is drawn and then replaced
        layer = layer_class(linear, part.A.shape[1], part.alpha)  # type: ignore[arg-type]
    with torch.no_grad():
        for mine, its in zip(
            _trained_tensors(layer), (part.A, part.B, part.m), strict=False
        ):
            mine.copy_(its)  # type: ignore[arg-type]
    return layer.train(linear.training)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules inside ``model`` by name, a shared one under each name, but
    nothing from inside an adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    return {
        name: m
        for name, m in named_modules_outside_adapters(model, remove_duplicate=False)
        if name
    }


# --- From a model ---------------------------------------------------------------------------


def adapter_of(model: nn.Module) -> dict[str, LayerAdapter]:
    """Return the adapter of each adapted layer of ``model`` by name, checked to be LoRA
    or DoRA.

    The tensors are those of the model, not copies.
    """
    places = [(n, m) for n, m in plain_modules(model).items() if is_adapter(m)]
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no adapters inside; put them in with replace_linear_layers first"
        )
    if shared := [
        f"{n} ({type(m).__name__})"
        for n, m in places
        if sum(m is other for _, other in places) > 1
    ]:
        raise ValueError(
            f"one layer under several names: {', '.join(shared)}. PEFT would adapt only the first of them"
        )
    return {name: _layer_adapter(name, module) for name, module in places}


def _layer_adapter(name: str, layer: Any) -> LayerAdapter:
    W, kind = layer.linear.weight, type(layer).__name__
    if not all(isinstance(getattr(layer.lora, field, None), Tensor) for field in "AB"):
        raise ValueError(
            f"{name} ({kind}) has no A and B of one adapter; save each adapter from a model of its own"
        )
    m = getattr(layer, "m", None)
    part = LayerAdapter(layer.lora.A, layer.lora.B, float(layer.lora.alpha), m)
    if W.is_meta:
        raise ValueError(f"{name} is on the meta device and has no numbers to save")
    if m is not None and m.shape != W.shape[:1]:
        raise ValueError(
            f"{name} ({kind}) has m of shape {tuple(m.shape)}; PEFT's DoRA has one number per output, {(len(W),)}"
        )
    for field, value in (("A", part.A), ("B", part.B), ("m", m)):
        if value is not None and not torch.isfinite(value).all():
            raise ValueError(
                f"{field} of {name} holds NaN or infinite numbers; did the training diverge?"
            )
    # A class written elsewhere may look like an adapter and compute something else,
    # which PEFT would not.
    x = torch.randn(
        4, W.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    x = x.to(device=W.device, dtype=W.dtype)
    with torch.no_grad():
        V = torch.addmm(W, part.B.T, part.A.T, alpha=part.alpha)
        scale = torch.ones_like(W[:, 0]) if m is None else row_scale(m, row_norms(V))
        expected = nn.functional.linear(x, scale.unsqueeze(1) * V, layer.linear.bias)
        difference = torch.linalg.vector_norm((layer(x) - expected).double())
        size = torch.linalg.vector_norm(expected.double())
    if not difference <= math.sqrt(torch.finfo(W.dtype).eps) * size:
        form = "LoRA's x(W + ΔW)ᵀ + b" if m is None else "DoRA's x(c ⊙ V)ᵀ + b"
        raise ValueError(
            f"{name} ({kind}) doesn't compute {form}, so PEFT's outputs would be others: it can't be saved"
        )
    return part


def _trained_tensors(layer: Any) -> list[Tensor]:
    return [layer.lora.A, layer.lora.B, *([layer.m] if hasattr(layer, "m") else [])]


# --- From a folder --------------------------------------------------------------------------


def read_adapter(
    folder: str | Path, modules: Mapping[str, nn.Module], *, may_round: bool = False
) -> dict[str, LayerAdapter]:
    """Return the adapter in ``folder`` by layer, checked against the base model's
    ``modules``.

    Args:
        folder: with the two files.
        modules: all modules of the base model by name, without those inside an adapter.
        may_round: take numbers that a layer's dtype can't hold exactly.

    Raises:
        FileNotFoundError: the folder or a file isn't there.
        AdapterFileError: see ``load_adapter``.
    """
    config, tensors = _read_files(Path(folder).resolve())
    by_layer = _by_layer(tensors)
    _check_layers(list(by_layer), config, modules)
    return {
        name: _fitted(name, by_layer[name], config, modules[name], may_round)
        for name in modules
        if name in by_layer
    }


def _read_files(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read the two files of one and the same adapter, also while another process
    replaces the folder.
    """
    recover(folder)
    give_up, missing = time.monotonic() + PATIENCE, 0
    while time.monotonic() < give_up:
        before = _identity(folder)
        try:
            config = read_config(_file_inside(folder, CONFIG))
            tensors = _read_tensors(_file_inside(folder, TENSORS))
        except (OSError, AdapterFileError) as error:
            # A file that doesn't fit is an error only if its folder is still the same.
            # What is missing may be between two names, where folders can't be exchanged
            # in one step; missed several times in a row with nobody at work there, it
            # is gone.
            recover(folder)
            gone = isinstance(error, FileNotFoundError)
            missing = missing + 1 if gone and not is_being_replaced(folder) else 0
            if _identity(folder) == before and (missing > 20 or not gone):
                raise
            time.sleep(0.001)
        else:
            if _identity(folder) == before:
                return config, tensors
    # What a process that was killed left may look as if it were still at work; then the
    # folder is missing.
    _file_inside(folder, CONFIG)
    raise AdapterFileError(
        f"{folder}: is replaced over and over; load it when nobody saves there"
    )


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells this folder from a later one under its name; None if there is
    none.
    """
    try:
        status = folder.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def _file_inside(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} isn't a folder; an adapter is a folder with {CONFIG} and {TENSORS}"
        )
    path = folder / name
    if not path.is_file():
        pickled = name == TENSORS and (folder / "adapter_model.bin").exists()
        hint = (
            ". There is adapter_model.bin, a pickle, which can run any code when it is read and is never read here; "
            "let PEFT save the adapter with safe_serialization"
        )
        raise FileNotFoundError(f"{folder} has no {name}" + (hint if pickled else ""))
    if not path.resolve().is_relative_to(folder.resolve()):
        fail(
            name,
            f"leads out of {folder}, to {path.resolve()}; put the file itself into the folder",
        )
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (
        SafetensorError,
        ValueError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        fail(TENSORS, f"is damaged or cut off ({error}); copy or save it again")
    if unknown := metadata.keys() - {"format", "sha256"} or (
        metadata.get("format", "pt") != "pt" and {"format"}
    ):
        fail(
            TENSORS,
            f"is damaged, or isn't from PEFT: unknown metadata {sorted(unknown)}",
        )
    if metadata.get("sha256", digest := _digest(tensors)) != digest:
        fail(
            TENSORS,
            "was altered after it was saved: its numbers don't have its digest; copy or save it again",
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors by layer and part; refuse what isn't a part of LoRA or DoRA on a
    linear layer.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        field = next(
            (field for field, ending in PARTS.items() if key.endswith(ending)), None
        )
        if field is None or not key.startswith(PREFIX):
            fail(
                TENSORS,
                f"unknown tensor {key!r}; allowed are {PREFIX}<layer> with "
                f"{', '.join(PARTS.values())} (no embeddings, biases or whole modules)",
            )
        layers.setdefault(key.removeprefix(PREFIX).removesuffix(PARTS[field]), {})[
            field
        ] = tensor
    return layers


def _check_layers(
    found: Iterable[str], config: AdapterConfig, modules: Mapping[str, nn.Module]
) -> None:
    """Hold the layers of the file against those of the config and of the model."""
    meant = [name for name in modules if config.names(name)]
    if not found and not meant:
        fail(CONFIG, f"target_modules={config.targets!r} names no layer of this model")
    for name in [*found, *meant]:
        module = modules.get(name)
        if module is None:
            fail(
                TENSORS,
                f"the model has no layer {name!r}; is it the base model of this adapter?",
            )
        if is_adapter(module):
            fail(
                TENSORS,
                f"{name} is already adapted: load into the plain model, or use an AdapterBank",
            )
        if not isinstance(module, nn.Linear):
            fail(
                CONFIG,
                f"{name} is a {type(module).__name__}; only nn.Linear is supported",
            )
        if sum(module is other for other in modules.values()) > 1:
            fail(
                CONFIG,
                f"{name} is used in several places of the model; PEFT would adapt only one of them",
            )
    if missing := [name for name in meant if name not in found]:
        fail(
            TENSORS, f"no tensors for {', '.join(missing)}, which target_modules names"
        )
    if extra := [name for name in found if name not in meant]:
        fail(
            TENSORS,
            f"tensors for {', '.join(extra)}, which target_modules doesn't name",
        )


def _fitted(
    name: str,
    parts: Mapping[str, Tensor],
    config: AdapterConfig,
    linear: nn.Module,
    may_round: bool,
) -> LayerAdapter:
    """Return one layer's adapter in our orientation and the layer's dtype, with all
    shapes checked.
    """
    W: Any = linear.weight
    rank = config.rank_of(name)
    out_dim, in_dim = W.shape
    shapes = {"A": (rank, in_dim), "B": (out_dim, rank)} | (
        {"m": (out_dim,)} if config.dora else {}
    )
    for field in [field for field in PARTS if field in shapes or field in parts]:
        tensor = f"{name}{PARTS[field]}"
        if field not in parts:
            fail(TENSORS, f"{tensor} is missing")
        if field not in shapes:
            fail(TENSORS, f"{tensor} is a magnitude, but use_dora is false")
        if parts[field].shape != shapes[field]:
            fail(
                TENSORS,
                f"{tensor} has the shape {tuple(parts[field].shape)}; "
                f"rank {rank} and a layer from {in_dim} to {out_dim} features need {shapes[field]}",
            )
        if parts[field].dtype not in READABLE:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in READABLE)
            fail(
                TENSORS,
                f"{tensor} has the dtype {parts[field].dtype}; allowed are {allowed}",
            )
        if not torch.isfinite(parts[field]).all():
            fail(TENSORS, f"{tensor} holds NaN or infinite numbers")
        converted = parts[field].to(W.dtype)
        if not torch.isfinite(converted).all():
            fail(TENSORS, f"{tensor} holds numbers that are too large for {W.dtype}")
        if not may_round and not torch.equal(
            converted.to(parts[field].dtype), parts[field]
        ):
            fail(
                TENSORS,
                f"{tensor} is {parts[field].dtype} and would be rounded to {W.dtype}; "
                "convert the model, or pass may_round=True",
            )
    fitted = {
        field: tensor.to(device=W.device, dtype=W.dtype)
        for field, tensor in parts.items()
    }
    return LayerAdapter(
        fitted["A"].T, fitted["B"].T, config.scaling_of(name, rank), fitted.get("m")
    )
