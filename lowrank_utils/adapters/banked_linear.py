"""A linear layer with several adapters beside it, for one of which, several, or one per
row it can be asked.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._lazy_weight import is_followed, lazy_weight
from lowrank_utils._weight_checks import (
    are_same,
    check_weight_is_all,
    mark_of,
    what_else,
)
from lowrank_utils.adapters.mixed_batch import (
    Kept,
    Mixture,
    add_updates,
    along,
    index_of,
)
from lowrank_utils.adapters.selection import Choice, Selection
from lowrank_utils.decompose import row_norms
from lowrank_utils.lora import HALF_PRECISION, AroundLinear, Linear, without_autocast
from lowrank_utils.norms import values_can_be_read


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

    @property
    def scale(self) -> Tensor | None:
        """C, found faster than by name."""
        return self._buffers["c"]

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

    def __init__(self, linear: Linear, selection: Selection) -> None:
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
        self._mark: object = None
        self._traces: Tensor | None = None
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, for modules that read it instead of
        calling the layer. It is formed when its numbers are needed.
        """
        choice = self.selection.choice()
        if choice.rows is not None:
            if is_followed():
                # What tells about the weight is right, and nothing computes with it.
                return torch.empty_like(self.linear.weight, device="meta")
            return lazy_weight(self.linear.weight, _no_weight_for_rows)
        if (merged := self._merged_for(choice)) is not None:
            return merged
        adapters = self.adapters(choice.active)
        if not adapters:
            return self.linear.weight
        return lazy_weight(self.linear.weight, lambda: self.formed_weight(adapters))

    def has_dora(self) -> bool:
        """Tell whether one of its adapters has a c."""
        return any(adapter.c is not None for adapter in self.lora.values())

    def remember_weight(self) -> None:
        """Note what the base weight is, from which each c in the bank was computed."""
        W = self.linear.weight
        # Rounded as W is, so that another dtype of W doesn't count as a change.
        self._mark, self._traces = mark_of(self.linear), _traces_of(W).to(W.dtype)

    def check_weight(self) -> None:
        """Refuse to read the weight where it isn't all of the linear layer, or isn't
        the one that each c was computed from.

        Raises:
            TypeError: see ``check_weight_is_all``.
            RuntimeError: the weight changed while an adapter with DoRA was in.
        """
        check_weight_is_all(self.linear)
        traces, W = self._traces, self.linear.weight
        if (
            traces is None
            or torch.compiler.is_compiling()
            or self._mark == mark_of(self.linear)
            or not values_can_be_read(W)
        ):
            return
        if not are_same(_traces_of(W), traces.to(W.device), W):
            raise RuntimeError(
                "a base weight changed while an adapter with DoRA was in the bank, whose c was computed from it: "
                "remove the adapters with DoRA, and add them again"
            )
        self._mark = mark_of(self.linear)

    def formed_weight(self, adapters: Sequence[BankedAdapter]) -> Tensor:
        """Return the weight that ``adapters`` make together, (out, in)."""
        if any(adapter.scale is not None for adapter in adapters):
            self.check_weight()
        else:
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
        if self.selection.had_others and _is_in_backward():
            raise RuntimeError(
                "torch.utils.checkpoint calls this layer again in the backward pass, where it can't be told which "
                "rows block held, or which adapters were active, in the first call: switch checkpointing off for "
                "a model in a bank"
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
            self.check_weight()
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
                "give one name, or None, per row (each as often as there are beams, where a model searches with "
                "several), and batch_dim where the batch isn't the first dimension"
            )
        mixture = self.kept.mixture(rows, self._mixture)
        adapters, has_plain = mixture.adapters, mixture.has_plain
        if len(adapters) + has_plain < 2:
            return self._by_all(x, adapters)
        has_c = any(adapter.scale is not None for adapter in adapters)
        if has_c:
            self.check_weight()
        has_bias = has_c and self.bias is not None
        # Rows without an adapter have the very bits of the layer, which sums up with the
        # bias in another order than c asks for, with the bias last.
        whole = self.linear(x) if has_plain or not has_bias else None
        base, bias_is_in = whole, has_bias
        if base is None or (has_bias and base.dtype in HALF_PRECISION):
            base, bias_is_in = F.linear(x, self.linear.weight), False
        wide = _widest(base.dtype, adapters)
        in_place = _may_overwrite(base, x, self.linear)
        y = add_updates(
            base.to(wide), x.to(wide), mixture, batch_dim, self.kept, in_place=in_place
        )
        if not has_c:
            return y.to(base.dtype)
        index = index_of(mixture.places, x)
        c, rest = self._scales(adapters, y.dtype, bias_is_in=bias_is_in)
        # The last, of no adapter, is what −1 stands for.
        own = index % len(c)
        c = along(c.index_select(0, own), y, batch_dim)
        if rest is None:
            y = c * y
        else:
            if bias_is_in:
                rest = along(rest.index_select(0, own), y, batch_dim)
            trained = any(tensor.requires_grad for tensor in (y, c, rest))
            y = torch.addcmul(rest, c, y, out=None if trained or not in_place else y)
        y = y.to(base.dtype)
        if whole is None or whole is base:
            return y
        return torch.where(along(index.unsqueeze(1) < 0, y, batch_dim), whole, y)

    def _mixture(self, rows: Sequence[str | None]) -> Mixture[BankedAdapter]:
        """Return the adapters that the slots ``rows`` name, in one order, in whatever
        order the rows are.
        """
        slots = sorted({slot for slot in rows if slot is not None})
        found = {slot: self.adapter(slot) for slot in slots}
        adapters = [adapter for adapter in found.values() if adapter is not None]
        numbers = itertools.count()
        place = {s: -1 if a is None else next(numbers) for s, a in found.items()}
        return Mixture(adapters, tuple([-1 if s is None else place[s] for s in rows]))

    def _scales(
        self, adapters: Sequence[BankedAdapter], dtype: torch.dtype, *, bias_is_in: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return c of each adapter and, at the end, of none, (adapters + 1, out), and
        what is to be added when an output was multiplied with it: the bias, (out,), or
        None without one; and if that is in the output, what c takes from it, of the
        shape of c.
        """
        scales = [adapter.scale for adapter in adapters]

        def make() -> Tensor:
            one = torch.ones(
                self.out_features, dtype=dtype, device=self.linear.weight.device
            )
            return torch.stack(
                [*(one if c is None else c.to(dtype) for c in scales), one]
            )

        known = [c for c in scales if c is not None]
        key = (dtype, *(c is None for c in scales))
        c = self.kept.value(key, known, make)
        if self.bias is None:
            return c, None
        bias = self.bias.to(dtype)
        if not bias_is_in:
            return c, bias
        # Of an infinite bias nothing can be taken away. To add −0.0 changes no bit.
        finite = bias.isfinite()
        rest = ((1 - c[:-1]) * bias).masked_fill(~finite, 0)
        rest = torch.cat([rest, torch.full_like(rest[:1], -0.0)])
        return c.masked_fill(~finite, 1), rest

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


def _traces_of(W: Tensor) -> Tensor:
    """Return what differs between W and nearly every other weight, (2, out): the norms
    of its rows, and for their signs those of W + 1.
    """
    W = W.detach()
    return torch.stack([row_norms(W), row_norms(W + 1)])


def _is_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _no_weight_for_rows() -> Tensor:
    raise RuntimeError(
        "this model reads a layer's weight instead of calling the layer (nn.MultiheadAttention does, and "
        "torch's fast path for encoders in evaluation); a weight can't differ between the rows of a batch. "
        "Adapt the layers that are called alone, or serve one adapter at a time with activate"
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


def _may_overwrite(output: Tensor, x: Tensor, linear: Linear) -> bool:
    """Tell whether nobody can hold the output of ``linear`` for x, and nothing follows
    its making.
    """
    return (
        what_else(linear) is None
        and not output.requires_grad
        and values_can_be_read(x)
        # Hooks of all modules, and modes that see each function.
        and not torch.nn.modules.module._global_forward_hooks
        and torch._C._len_torch_function_stack() == 0
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _widest(dtype: torch.dtype, adapters: Sequence[BankedAdapter]) -> torch.dtype:
    """Return a dtype that holds ``dtype`` and those of all ``adapters``."""
    for other in {adapter.factors[0].dtype for adapter in adapters}:
        dtype = torch.promote_types(dtype, other)
    return dtype
