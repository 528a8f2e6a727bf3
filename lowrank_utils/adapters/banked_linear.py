"""A linear layer with several adapters beside it, for one of which, several, or one per
row it can be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils.lora import AroundLinear, without_autocast


@dataclass
class Selection:
    """Which adapters a model applies now, by their slots; all layers of a bank share
    one.
    """

    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None


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


class BankedLinear(AroundLinear):
    """A linear layer with several adapters beside it, of which the selection says which
    count.

    With W′_i = c_i ⊙ (W + ΔW_i) for each adapter i (for LoRA, c_i = 1), several at once
    are defined as W + Σ (W′_i − W): each changes the base weight as if it were alone,
    c_i comes from the base weight's norms ‖W + ΔW_i‖, and the changes are added, in any
    order.
    """

    merged: Tensor | None

    def __init__(self, linear: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.linear = linear
        # Named as in the other wrappers, so that the functions of adapt.py know it for
        # an adapted layer.
        self.lora = nn.ModuleDict()
        self.selection = selection
        self.register_buffer("merged", None, persistent=False)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The weight that the layer now amounts to, for modules that read it instead of
        calling the layer.
        """
        if self.merged is not None:
            return self.merged
        if self.selection.rows is not None:
            raise RuntimeError(
                "this model reads a layer's weight instead of calling the layer (nn.MultiheadAttention does, and "
                "torch's fast path for encoders in evaluation); a weight can't differ between the rows of a batch"
            )
        adapters = self.active_adapters()
        W = self.linear.weight
        if not adapters:
            return W
        with without_autocast(W.device):
            scaled = (
                W if (scale := _scale(adapters)) is None else scale.unsqueeze(1) * W
            )
            for adapter in adapters:
                update = adapter.alpha * (adapter.B.T @ adapter.A.T)
                scaled = scaled + (
                    update if adapter.c is None else adapter.c.unsqueeze(1) * update
                )
            return scaled

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        if self.selection.rows is not None:
            chosen = [self.adapter(slot) for slot in self.selection.rows]
            return self._by_rows(x, chosen) if any(chosen) else self.linear(x)
        adapters = self.active_adapters()
        if not adapters:
            return self.linear(x)
        scale = _scale(adapters)
        # The bias isn't scaled, so with DoRA it is added at the end.
        y = self.linear(x) if scale is None else F.linear(x, self.linear.weight)
        y = y if scale is None else scale.to(y.dtype) * y
        for adapter in adapters:
            update = adapter.alpha * (x @ adapter.A @ adapter.B)
            y = y + (update if adapter.c is None else adapter.c.to(y.dtype) * update)
        return y if scale is None or self.bias is None else y + self.bias.to(y.dtype)

    def _by_rows(self, x: Tensor, chosen: Sequence[BankedAdapter | None]) -> Tensor:
        """Apply ``chosen[i]`` to x[i] (…, in): the unmerged form with A, B and c
        gathered for each row.
        """
        if x.dim() < 2 or len(x) != len(chosen):
            raise ValueError(
                f"rows names {len(chosen)} adapters, and a layer got an input of shape {tuple(x.shape)}: "
                "the first dimension must be the batch's at every adapted layer"
            )
        W = self.linear.weight
        rank = max(adapter.A.shape[1] for adapter in chosen if adapter is not None)
        # Zeros fill up the lower ranks, and the rows without an adapter: they add
        # nothing.
        nothing = BankedAdapter(
            W.new_zeros(self.in_features, 0),
            W.new_zeros(0, self.out_features),
            0.0,
            None,
        )
        adapters = [adapter or nothing for adapter in chosen]
        A = torch.stack(
            [F.pad(adapter.A, (0, rank - adapter.A.shape[1])) for adapter in adapters]
        )
        B = torch.stack(
            [
                F.pad(adapter.B, (0, 0, 0, rank - adapter.B.shape[0]))
                for adapter in adapters
            ]
        )
        alphas = torch.tensor(
            [adapter.alpha for adapter in adapters], dtype=W.dtype, device=W.device
        )
        between = torch.bmm(x.reshape(len(x), -1, self.in_features), A)
        update = torch.bmm(between * alphas.view(-1, 1, 1).to(between.dtype), B)
        update = update.reshape(*x.shape[:-1], self.out_features)
        if all(adapter.c is None for adapter in adapters):
            return self.linear(x) + update
        one = W.new_ones(self.out_features)
        c = torch.stack(
            [one if adapter.c is None else adapter.c for adapter in adapters]
        )
        c = c.view(len(x), *[1] * (x.dim() - 2), self.out_features)
        y = c.to(update.dtype) * (F.linear(x, W) + update)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def adapter(self, slot: str | None) -> BankedAdapter | None:
        """Return the adapter in ``slot``, or None if this layer has none there."""
        if slot is None or slot not in self.lora:
            return None
        adapter = self.lora[slot]
        assert isinstance(adapter, BankedAdapter)
        return adapter

    def active_adapters(self) -> list[BankedAdapter]:
        """Return the adapters that the selection has active and that belong to this
        layer.
        """
        return [
            adapter
            for slot in self.selection.active
            if (adapter := self.adapter(slot)) is not None
        ]

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError(
            "the base model's weights can't be loaded while a bank has adapters in it: each c was computed from "
            "the weights as they are. Remove the adapters, load, and add them again"
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
