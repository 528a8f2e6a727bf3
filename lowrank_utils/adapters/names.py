"""The modules of a model by name, as if nothing were wrapped around them.

``torch.compile``, data parallelism and the like put a module of their own around a
model or a part of it, whose name would get into every name inside.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_utils._arguments import check_module
from lowrank_utils.lora import is_adapter

FSDP = "_fsdp_wrapped_module"
COMPILED = "_orig_mod"
# By their names, because to import them takes time, and not every build of torch has
# them all.
WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": COMPILED,
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": FSDP,
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch.optim.swa_utils.AveragedModel": "module",
}


def wrapped_name(module: nn.Module) -> str | None:
    """Return the name under which a wrapper has what is inside; None for a module that
    isn't a wrapper.
    """
    # type() and not __class__, which a compiled module borrows from the one inside.
    return _name_inside(type(module).__mro__)


@functools.cache
def _name_inside(kinds: tuple[type, ...]) -> str | None:
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return next((WRAPPERS[name] for name in names if name in WRAPPERS), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what is inside all wrappers around a module, or the module itself."""
    while (name := wrapped_name(module)) is not None:
        module = getattr(module, name)
    return module


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules inside ``model`` by name, a shared one under each name, but
    nothing from inside an adapter, and of wrappers what is inside.
    """
    check_module("model", model)
    return {name: module for name, module in _walk(model, "") if name}


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    yield name, module
    if not is_adapter(module):
        # named_children() would give a shared child once.
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{key}" if name else key)


def around(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules that it is inside of."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def module_at(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module ``name`` of ``model``, as ``plain_modules`` gives it; None if
    there is none.
    """
    module: nn.Module | None = unwrapped(model)
    for part in name.split("."):
        child = None if module is None else module._modules.get(part)
        module = None if child is None else unwrapped(child)
    return module


def put_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` into the place of the module ``name``, in place.

    A wrapper around the old module is kept around the new one. A compiled layer is
    replaced with its compiled code, which would go on computing what the old one did.

    Args:
        model: maybe wrapped.
        name: as ``plain_modules`` gives it.
        new: what to put there.
    """
    *path, key = name.split(".")
    holder = unwrapped(model)
    for part in path:
        holder = unwrapped(_child(holder, part))
    child = _child(holder, key)
    while (inside := wrapped_name(child)) is not None:
        if inside != COMPILED:
            holder, key = child, inside
        child = getattr(child, inside)
    setattr(holder, key, new)


def _child(module: nn.Module, key: str) -> nn.Module:
    child = module._modules[key]
    assert child is not None
    return child


def is_data_parallel(model: nn.Module) -> bool:
    """Tell whether DistributedDataParallel is around ``model`` or a part of it."""
    return any(
        kind.__name__ == "DistributedDataParallel"
        for module in model.modules()
        for kind in type(module).__mro__
        if wrapped_name(module)
    )


# --- Weights in pieces ------------------------------------------------------------------------


def sharded_by(model: nn.Module) -> str | None:
    """Return the name of what has cut the weights of ``model`` into pieces for several
    processes; None if they are whole.
    """
    if any(wrapped_name(module) == FSDP for module in model.modules()):
        return "FullyShardedDataParallel"
    if any(is_piece(parameter) for parameter in model.parameters()):
        return "fully_shard or another user of DTensor"
    return None


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let the weights that FullyShardedDataParallel has cut into pieces be whole inside
    the block; all its processes must come here together.
    """
    if any(wrapped_name(module) == FSDP for module in model.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            yield
    else:
        yield


def is_piece(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which each process has a piece."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Any:
    """Return a DTensor's whole content, and any other tensor or None as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
