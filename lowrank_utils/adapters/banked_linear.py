"""A linear layer with several adapters beside it, for one of which, several, or one per
row it can be asked.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._lazy_weight import lazy_weight
from lowrank_utils._weight_checks import check_weight_is_all, what_else
from lowrank_utils.adapters.mixed_batch import Kept, add_updates, along
from lowrank_utils.adapters.selection import Choice, Selection
from lowrank_utils.lora import AroundLinear, without_autocast


class BankedAdapter(nn.Module):
    """One adapter in one layer: A (in, r), B (r, out), the scaling s, and DoRA's c
    (out,) or None.
    """

    A: Tensor
    B: Tensor
    c: Tensor | None

    def __init__(self, A: Tensor, B: Tensor, alpha: float, c: Tensor | None) -> None:
        super().__init__()
        # They follow the model to another device or dtype and stay out of its
        # state_dict.
        for name, value in {"A": A, "B": B, "c": c}.items():
            self.register_buffer(name, value, persistent=False)
        self.alpha = alpha
        self.rank = A.shape[1]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, found faster than by name."""
        buffers: Any = self._buffers
        return buffers["A"], buffers["B"]

    def update(self, x: Tensor) -> Tensor:
        """Return s·xAB, in the wider of the dtypes of x and the adapter."""
        wide = torch.promote_types(x.dtype, self.A.dtype)
        return self.alpha * (x.to(wide) @ self.A.to(wide) @ self.B.to(wide))


class MergedWeight(nn.Module):
    """The weight that the adapters in ``slots`` make together."""

    weight: Tensor

    def __init__(self, weight: Tensor, slots: tuple[str, ...]) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.slots = slots


class BankedLinear(AroundLinear):
    """A linear layer with several adapters beside it, of which the selection says which
    count.

    With W′_i = c_i ⊙ (W + ΔW_i) for each adapter i (for LoRA, c_i = 1), several at once
    are defined as W + Σ (W′_i − W): each changes the base weight as if it were alone,
    c_i comes from the base weight's norms ‖W + ΔW_i‖, and the changes are added, in any
    order.

    Adapters may be wider than the base weight, float32 beside bfloat16. An output is
    then computed in their dtype from the base layer's, and rounded once to its dtype.
    """

    merged: MergedWeight | None

    def __init__(self, linear: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.linear = linear
        # Not a module's part a second time, which would be in the state_dict twice.
        self._first = (linear,)
        # Named as in the other wrappers, so that the functions of adapt.py know it for
        # an adapted layer.
        self.lora = nn.ModuleDict()
        self.selection = selection
        self.merged = None
        self.kept = Kept()
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, for modules that read it instead of
        calling the layer. It is formed when its numbers are needed.
        """
        choice = self.selection.choice()
        if choice.rows is not None:
            if torch.compiler.is_compiling():
                # What tells about the weight is right, and nothing computes with it.
                return torch.empty_like(self.linear.weight, device="meta")
            return lazy_weight(self.linear.weight, _no_weight_for_rows)
        if (merged := self._merged_for(choice)) is not None:
            return merged
        adapters = self.adapters(choice.active)
        if not adapters:
            return self.linear.weight
        return lazy_weight(self.linear.weight, lambda: self.formed_weight(adapters))

    def formed_weight(self, adapters: Sequence[BankedAdapter]) -> Tensor:
        """Return the weight that ``adapters`` make together, (out, in)."""
        check_weight_is_all(self.linear)
        W = self.linear.weight
        with without_autocast(W.device):
            wide = W.to(_widest(W.dtype, adapters))
            scale = _scale(adapters)
            scaled = wide if scale is None else scale.unsqueeze(1) * wide
            for adapter in adapters:
                update = adapter.alpha * (adapter.B.T @ adapter.A.T)
                scaled = scaled + (
                    update if adapter.c is None else adapter.c.unsqueeze(1) * update
                )
            return scaled.to(W.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        if self.selection.had_blocks and _is_in_backward():
            raise RuntimeError(
                "torch.utils.checkpoint calls this layer again in the backward pass, where it can't be told which "
                "rows block held in the first call: switch checkpointing off for a model in a bank"
            )
        choice = self.selection.choice()
        if choice.rows is not None:
            return self._by_rows(x, choice.rows, choice.batch_dim)
        if (merged := self._merged_for(choice)) is not None:
            return F.linear(x, merged, self.bias)
        return self._by_all(x, self.adapters(choice.active))

    def _by_all(self, x: Tensor, adapters: Sequence[BankedAdapter]) -> Tensor:
        """Apply ``adapters``, all of them, to every row."""
        if not adapters:
            return self.linear(x)
        scale = _scale(adapters)
        if scale is None:
            base = y = self.linear(x)
        else:
            # The bias isn't scaled, so with DoRA it is added at the end.
            check_weight_is_all(self.linear)
            base = F.linear(x, self.linear.weight)
            y = scale * base
        for adapter in adapters:
            update = adapter.update(x)
            y = y + (update if adapter.c is None else adapter.c * update)
        if scale is not None and self.bias is not None:
            y = y + self.bias
        return y.to(base.dtype)

    def _by_rows(self, x: Tensor, rows: Sequence[str | None], batch_dim: int) -> Tensor:
        """Apply the adapter in ``rows[i]`` to index i of ``batch_dim``: the unmerged
        form, computed by ``add_updates`` for all rows.
        """
        if x.dim() < batch_dim + 2 or x.shape[batch_dim] != len(rows):
            where = (
                "the first dimension" if batch_dim == 0 else f"dimension {batch_dim}"
            )
            raise ValueError(
                f"rows names {len(rows)} adapters, and a layer got an input of shape {tuple(x.shape)}: "
                f"{where} must be the batch's at every adapted layer, and the last the features'; "
                "give one name, or None, per row, and batch_dim where the batch isn't the first dimension"
            )
        adapters, places = self.kept.mixture(rows, self._mixture)
        has_plain, has_c = -1 in places, any(map(_has_c, adapters))
        if len(adapters) + has_plain < 2:
            return self._by_all(x, adapters)
        if has_c:
            check_weight_is_all(self.linear)
        # The bias isn't scaled by c, so it comes last. But the layer itself rounds that
        # sum in another way, and rows without an adapter have its very bits.
        bias_is_in = has_plain or not has_c
        base = self.linear(x) if bias_is_in else F.linear(x, self.linear.weight)
        dtype, wide = base.dtype, _widest(base.dtype, adapters)
        if bias_is_in and what_else(self.linear) is not None:
            # A hook may have kept it, and it is overwritten now.
            base = base.clone()
        y = add_updates(
            base.to(wide), x.to(wide), adapters, places, batch_dim, self.kept
        )
        if not has_c:
            return y.to(dtype)
        index = torch.tensor(places, device=x.device)
        c = self._scales(adapters, y.dtype)
        c_rows = along(c[index], y, batch_dim)
        if self.bias is None:
            return (c_rows * y).to(dtype)
        rest = self.bias.to(y.dtype)
        if bias_is_in:
            # What c took from the bias. To add −0.0 changes no bit of any number.
            rest = (1 - c) * rest
            rest[-1] = -0.0
            rest = along(rest[index], y, batch_dim)
        out = None if y.requires_grad else y
        return torch.addcmul(rest, c_rows, y, out=out).to(dtype)

    def _mixture(
        self, rows: Sequence[str | None]
    ) -> tuple[list[BankedAdapter], tuple[int, ...]]:
        """Return the adapters that the slots ``rows`` name, each once and in one order,
        in whatever order the rows are, and of each row the adapter's number in that
        list, or −1.
        """
        slots = sorted(slot for slot in set(rows) if slot is not None)
        found = {slot: self.adapter(slot) for slot in slots}
        numbers = itertools.count()
        place = {s: -1 if a is None else next(numbers) for s, a in found.items()}
        return (
            [adapter for adapter in found.values() if adapter is not None],
            tuple(-1 if slot is None else place[slot] for slot in rows),
        )

    def _scales(self, adapters: Sequence[BankedAdapter], dtype: torch.dtype) -> Tensor:
        """Return c of each adapter and, at the end, of none, (adapters + 1, out)."""
        A = adapters[0].factors[0]
        one = torch.ones(self.out_features, dtype=dtype, device=A.device)
        scales = [one if each.c is None else each.c for each in adapters]

        def make() -> Tensor:
            return torch.stack([*(scale.to(dtype) for scale in scales), one])

        known = [scale for scale in scales if scale is not one]
        return self.kept.value(("c", dtype), known, make)

    def adapter(self, slot: str | None) -> BankedAdapter | None:
        """Return the adapter in ``slot``, or None if this layer has none there.

        Raises:
            RuntimeError: it isn't in the bank any more.
        """
        if slot is None:
            return None
        if slot in self.lora:
            adapter = self.lora[slot]
            assert isinstance(adapter, BankedAdapter)
            return adapter
        if slot not in self.selection.present:
            raise RuntimeError(
                "an adapter was removed from the bank that this task or thread still applies; "
                "open a rows block of its own inside it"
            )
        return None

    def adapters(self, slots: Iterable[str | None]) -> list[BankedAdapter]:
        """Return the adapters in ``slots``, without those of which this layer has no
        part.
        """
        # Not in one step by :=, which torch's compiler doesn't follow here.
        adapters = [self.adapter(slot) for slot in slots]
        return [adapter for adapter in adapters if adapter is not None]

    def has_its_layer(self) -> bool:
        """Tell whether ``linear`` is still the layer that this one was made around."""
        return self.linear is self._first[0]

    def _merged_for(self, choice: Choice) -> Tensor | None:
        # A pass that began before the weights were merged may be for other adapters.
        merged = self.merged
        if merged is None or merged.slots != choice.active:
            return None
        return merged.weight

    def _apply(self, *arguments: Any, **options: Any) -> "BankedLinear":
        # What is kept would stay where the model was.
        self.kept.clear()
        return super()._apply(*arguments, **options)

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            "the base model's weights can't be loaded while a bank has adapters in it: each c was computed from "
            "the weights as they are. Remove the adapters, load, and add them again"
        )

    def _replicate_for_data_parallel(self) -> nn.Module:
        if self.selection.is_in_block():
            raise RuntimeError(
                "nn.DataParallel gives parts of the batch to threads of its own, which know nothing of the rows "
                "block here: call the model that it holds, or give each part its own block"
            )
        return super()._replicate_for_data_parallel()


def _is_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _no_weight_for_rows() -> Tensor:
    raise RuntimeError(
        "this model reads a layer's weight instead of calling the layer (nn.MultiheadAttention does, and "
        "torch's fast path for encoders in evaluation); a weight can't differ between the rows of a batch"
    )


def _scale(adapters: Sequence[BankedAdapter]) -> Tensor | None:
    """Return what W is multiplied by when ``adapters`` are active together, 1 + Σ (c −
    1); None for LoRA alone.
    """
    scales = [adapter.c for adapter in adapters if adapter.c is not None]
    if not scales:
        return None
    return (
        scales[0]
        if len(scales) == 1
        else torch.stack(scales).sum(dim=0) - (len(scales) - 1)
    )


def _has_c(adapter: BankedAdapter) -> bool:
    return adapter._buffers["c"] is not None


def _widest(dtype: torch.dtype, adapters: Sequence[BankedAdapter]) -> torch.dtype:
    """Return a dtype that holds ``dtype`` and those of all ``adapters``."""
    for other in {adapter.factors[0].dtype for adapter in adapters}:
        dtype = torch.promote_types(dtype, other)
    return dtype
