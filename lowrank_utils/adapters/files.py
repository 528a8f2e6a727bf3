"""An adapter alone, on disk: PEFT's two files, ``adapter_config.json`` and
``adapter_model.safetensors``.

``saving`` writes them, and here they are read. ``layout`` says what is in them.
"""

import time
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowrank_utils._arguments import some_of
from lowrank_utils._weight_checks import check_weight_is_all
from lowrank_utils.adapt import refuse_foreign_adapters
from lowrank_utils.adapters.config import (
    CONFIG,
    AdapterConfig,
    AdapterFileError,
    fail,
    read_config,
)
from lowrank_utils.adapters.folders import is_being_replaced, recover
from lowrank_utils.adapters.layout import (
    PARTS,
    PREFIX,
    SETTINGS_DIGEST,
    TENSORS,
    TENSORS_DIGEST,
    LayerAdapter,
    converted,
    digest_of,
)
from lowrank_utils.adapters.loaded_along import Change, loaded_along
from lowrank_utils.adapters.names import (
    is_data_parallel,
    plain_modules,
    put_module,
    sharded_by,
    unwrapped,
)
from lowrank_utils.adapters.saving import adapter_of, save_adapter
from lowrank_utils.adapters.trained_along import names_trained_along
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import (
    AdaptedLinear,
    LinearWithLoRA,
    adapter_dtype,
    check_linear,
    is_adapter,
    is_linear,
)

__all__ = [
    "LayerAdapter",
    "adapted_layer",
    "adapter_of",
    "load_adapter",
    "names_trained_along",
    "plain_modules",
    "read_adapter",
    "save_adapter",
]

# Seconds for which a folder that another process replaces may stay away, or be replaced
# again.
PATIENCE = 2.0


def load_adapter(
    model: nn.Module, folder: str | Path, *, may_round: bool = False
) -> list[str]:
    """Put the adapter of ``folder`` into the plain ``model``, in place: one of ours or
    one that PEFT saved.

    Everything is checked first, so an error leaves ``model`` as it was. The layers
    become ``LinearWithLoRA`` or ``LinearWithDoRA``; to train them on, call
    ``mark_only_adapters_as_trainable``. Of what was trained beside the adapters (PEFT's
    ``modules_to_save`` and ``bias``), the values are copied into the model's own
    parameters, which stay trainable or frozen as they are; ``save_adapter`` saves them
    again in either case.

    Args:
        model: the base model, with plain or quantised linear layers where the adapter
            belongs. It may be inside wrappers (compiled, data parallel, checkpointed,
            averaged); a
            layer that was compiled by itself isn't compiled then.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        may_round: take numbers that the layer's dtype can't hold exactly, such as
            float32 for a bfloat16 layer.

    Returns:
        The names of the adapted layers, in the model's order and without the names of
        wrappers.

    Raises:
        FileNotFoundError: the folder or a file isn't there.
        AdapterFileError: a file is damaged, needs something that isn't supported, or
            doesn't fit the model.
        ValueError: the model's weights are in pieces, for several processes.

    Warns:
        UserWarning: the model is inside DistributedDataParallel, which won't
            synchronize the adapter's gradients.
    """
    linears = plain_modules(model)
    refuse_foreign_adapters(model)
    if (by := sharded_by(model)) is not None:
        raise ValueError(
            f"the weights of model are cut into pieces by {by}; load the adapter into the plain model and shard it then"
        )
    adapter, changes = _read_adapter(folder, linears, may_round, unwrapped(model))
    # All layers are built before the first is put in, so a failure leaves the model as
    # it was.
    layers = {
        name: adapted_layer(linears[name], part) for name, part in adapter.items()
    }
    for name, layer in layers.items():
        put_module(model, name, layer)
    for change in changes.values():
        change.apply()
    if is_data_parallel(model):
        warnings.warn(
            "model is inside DistributedDataParallel, which knows only the parameters that it was made with and "
            "won't synchronize the adapter's gradients; to train, load into the plain model and wrap it then",
            UserWarning,
            stacklevel=2,
        )
    return list(layers)


def adapted_layer(linear: nn.Module, part: LayerAdapter) -> AdaptedLinear:
    """Return ``linear`` with the adapter ``part`` beside it, in the adapter's dtype and
    the linear layer's place. No random number is drawn.
    """
    layer_class = LinearWithLoRA if part.m is None else LinearWithDoRA
    layer = layer_class(
        linear,  # type: ignore[arg-type]
        part.A.shape[1],
        part.alpha,
        dtype=part.A.dtype,
        dropout=part.dropout,
        init=nn.init.zeros_,
    )
    with torch.no_grad():
        layer.lora.A.copy_(part.A)
        layer.lora.B.copy_(part.B)
        if part.m is not None:
            layer.m.copy_(part.m)  # type: ignore[operator]
    return layer.train(linear.training)


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
        AdapterFileError: see ``load_adapter``; or something in the base model was
            trained along, for which the result has no place.
    """
    adapter, changes = _read_adapter(folder, modules, may_round)
    if changes:
        fail(
            TENSORS,
            f"{some_of(list(changes))} of the base model was trained along, which can't be switched with the adapter; "
            "load it with load_adapter into a model of its own",
        )
    return adapter


# --- From a folder --------------------------------------------------------------------------


def _read_adapter(
    folder: str | Path,
    modules: Mapping[str, nn.Module],
    may_round: bool,
    model: nn.Module | None = None,
) -> tuple[dict[str, LayerAdapter], dict[str, Change]]:
    """Return the adapter by layer, and what the file changes in the model besides."""
    config, tensors, settings_digest = _read_files(Path(folder).resolve())
    by_layer, others = _by_layer(tensors)
    _check_layers(by_layer, config, modules)
    adapter = {
        name: _fitted(name, by_layer[name], config, modules[name], may_round)
        for name in modules
        if name in by_layer
    }
    everything = modules if model is None else {"": model, **modules}
    changes = loaded_along(others, by_layer, config, everything, may_round)
    # After the other checks, because they say what is wrong.
    if settings_digest not in (None, config.digest()):
        fail(
            CONFIG,
            f"was altered after it was saved: its settings don't have the digest in {TENSORS}; copy or save it again",
        )
    return adapter, changes


def _read_files(
    folder: Path,
) -> tuple[AdapterConfig, dict[str, Tensor], str | None]:
    """Read the two files of one and the same adapter, also while another process
    replaces the folder. The text is the digest of the settings, if there is one.
    """
    recover(folder)
    give_up, missing = time.monotonic() + PATIENCE, 0
    while time.monotonic() < give_up:
        before = _identity(folder)
        try:
            config = read_config(_file_inside(folder, CONFIG))
            tensors, settings_digest = _read_tensors(_file_inside(folder, TENSORS))
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
                return config, tensors, settings_digest
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
        inside = sorted(found.parent.name for found in folder.glob(f"*/{name}"))
        if inside and not pickled:
            hint = f"; PEFT puts an adapter with a name of its own one folder deeper: there is one in {some_of(inside)}"
        raise FileNotFoundError(
            f"{folder} has no {name}" + (hint if pickled or inside else "")
        )
    if not path.resolve().is_relative_to(folder.resolve()):
        fail(
            name,
            f"leads out of {folder}, to {path.resolve()}; put the file itself into the folder",
        )
    return path


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
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
    known = {"format", TENSORS_DIGEST, SETTINGS_DIGEST}
    if unknown := metadata.keys() - known or (
        metadata.get("format", "pt") != "pt" and {"format"}
    ):
        fail(
            TENSORS,
            f"is damaged, or isn't from PEFT: unknown metadata {sorted(unknown)}",
        )
    if metadata.get(TENSORS_DIGEST, digest := digest_of(tensors)) != digest:
        fail(
            TENSORS,
            "was altered after it was saved: its numbers don't have its digest; copy or save it again",
        )
    return tensors, metadata.get(SETTINGS_DIGEST)


def _by_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort out the parts of LoRA and DoRA by layer, and return what is left, without
    PEFT's prefix.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            fail(
                TENSORS,
                f"unknown tensor {key!r}; allowed are {PREFIX}<layer> with {', '.join(PARTS.values())}",
            )
        name = key.removeprefix(PREFIX)
        field = next((f for f, ending in PARTS.items() if name.endswith(ending)), None)
        if field is None:
            others[name] = tensor
        else:
            layers.setdefault(name.removesuffix(PARTS[field]), {})[field] = tensor
    return layers, others


def _check_layers(
    found: Collection[str], config: AdapterConfig, modules: Mapping[str, nn.Module]
) -> None:
    """Hold the layers of the file against those of the config and of the model."""
    meant = {name: None for name in modules if config.names(name)}
    if not found and not meant:
        fail(CONFIG, f"target_modules={config.targets!r} names no layer of this model")
    uses = Counter(map(id, modules.values()))
    for name in {**dict.fromkeys(found), **meant}:
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
        if not is_linear(module):
            kind = type(module).__name__
            article = "an" if kind[0] in "AEIOU" else "a"
            fail(CONFIG, f"{name} is {article} {kind}; only nn.Linear is supported")
        try:
            linear = check_linear(module)
            if config.dora:
                check_weight_is_all(linear)
        except (TypeError, ValueError) as error:
            fail(CONFIG, f"{name}: {error}")
        if uses[id(module)] > 1:
            fail(
                CONFIG,
                f"{name} is used in several places of the model; PEFT would adapt only one of them",
            )
    if config.transposed:
        # PEFT passes over it for nn.Linear, but doesn't write it for such layers.
        fail(
            CONFIG,
            "fan_in_fan_out=True isn't supported; it is for layers that hold their weight as (in, out)",
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
    if W.is_meta:
        fail(TENSORS, f"{name} of the model is on the meta device and can't be adapted")
    rank = config.rank_of(name)
    out_dim, in_dim = W.shape
    shapes = {"A": (rank, in_dim), "B": (out_dim, rank)} | (
        {"m": (out_dim,)} if config.dora else {}
    )
    fitted = {}
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
        value = converted(tensor, parts[field], adapter_dtype(W.dtype), may_round)
        fitted[field] = value.to(W.device)
    return LayerAdapter(
        fitted["A"].T,
        fitted["B"].T,
        config.scaling_of(name, rank),
        fitted.get("m"),
        config.dropout,
    )
