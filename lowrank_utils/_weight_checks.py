"""What an adapter reads of a linear layer must be all that the layer computes, and
DoRA's m must belong to the weight beside it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils.decompose import row_norms
from lowrank_utils.norms import values_can_be_read


def what_else(linear: nn.Module) -> str | None:
    """Return in words what a linear layer may do besides x·Wᵀ + b; None if nothing."""
    kind = type(linear)
    if (
        # A quantised layer has another forward, which says that it is the formula.
        kind.forward is not getattr(kind, "formula", nn.Linear.forward)
        or kind.__call__ is not nn.Module.__call__
        or "forward" in linear.__dict__
    ):
        return "has a forward of its own"
    if linear._forward_pre_hooks or linear._forward_hooks:
        return "has forward hooks"
    if linear._backward_pre_hooks or linear._backward_hooks:
        return "has backward hooks"
    return None


def check_weight_is_all(linear: nn.Module) -> None:
    """Refuse a layer that computes something else than x·Wᵀ + b of its weight as it is.

    DoRA, the merged forms and merging read the weight and never call the layer, so what
    the layer does besides would be passed over without a word.

    Raises:
        TypeError: it has a forward of its own, or hooks: pruning and the old form of
            weight norm bring one, weights that are fetched when they are needed too.
    """
    if (what := what_else(linear)) is None:
        return
    raise TypeError(
        f"linear {what} ({type(linear).__name__}), which would be passed over where its weight is "
        "read: in DoRA, in the merged forms, by merging and for an adapter's file. "
        "LinearWithLoRA calls the layer; or put hooks on the adapter, not on its linear "
        "layer"
    )


def sources_of(linear: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that a layer's weight comes from, by their names in it: the
    weight itself, and of a quantised layer the codes and their scales.
    """
    names = getattr(linear, "weight_comes_from", ("weight",))
    return {name: getattr(linear, name) for name in names}


def mark_of(linear: nn.Module) -> list[tuple[int, int | None]]:
    """Return what differs after a change of a layer's weight that torch counts."""
    return [
        (id(source), None if source.is_inference() else source._version)
        for source in sources_of(linear).values()
    ]


def are_same(values: Tensor, known: Tensor, *sources: Tensor) -> bool:
    """Tell whether ``values`` are those that are known, as exactly as the coarsest of
    the dtypes can say it.
    """
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in (known, *sources))
    return torch.allclose(values.to(known), known.detach(), rtol=8 * coarsest, atol=0)


def start_of(m: Tensor, linear: Any) -> Tensor:
    """Return a copy of m that says by its dtype how exactly it is known: in another
    dtype, a quantised weight is rounded in another way.
    """
    return m.detach().to(linear.weight.dtype, copy=True)


def check_weight(layer: Any) -> None:
    """Refuse to read the weight of an adapted layer that isn't all of its linear layer,
    or that isn't the one that m was computed from.

    Only while A, B and m weren't trained can the second be told: m is then the norm of
    the rows of W. Later W may have been trained along.

    Raises:
        TypeError: see ``check_weight_is_all``.
        RuntimeError: the weight changed after m was computed from it.
    """
    check_weight_is_all(layer.linear)
    m = layer._parameters.get("m")
    if (
        m is None
        or torch.compiler.is_compiling()
        or layer._mark == mark_of(layer.linear)
    ):
        return
    W = layer.linear.weight
    if not values_can_be_read(W):
        return
    start = layer._start
    # Without numbers at the start, as on the meta device, m's own must do.
    untrained = start.is_meta or are_same(start, m, start)
    if (
        m.shape == W.shape[:1]
        and untrained
        and not layer.lora.B.any()
        and not are_same(row_norms(W.detach()), m, W, start)
    ):
        raise RuntimeError(
            f"the weight of this {type(layer).__name__} changed after its m was computed "
            "from it. Load pretrained weights before DoRA goes in, or call "
            "reset_magnitudes(model) afterwards"
        )
    layer._mark = mark_of(layer.linear)


def check_loaded(layer: Any, state_dict: dict[str, Any], prefix: str) -> str | None:
    """Return why a state_dict can't be loaded into an adapted layer, or None if it can:
    it holds another weight, and no m for it.
    """
    m = layer._parameters.get("m")
    if m is None or f"{prefix}m" in state_dict:
        return None
    for name, source in sources_of(layer.linear).items():
        loaded = state_dict.get(f"{prefix}linear.{name}")
        if loaded is None or (
            not source.is_meta
            and loaded.shape == source.shape
            and torch.equal(loaded.to(source), source)
        ):
            continue
        return (
            f"{prefix}m was computed from the weight that {prefix}linear.{name} "
            f"replaces, and {prefix}m isn't among what is loaded. Load pretrained "
            "weights before DoRA goes in, or load m with them"
        )
    return None
