"""Several adapters in one running model: switched, merged, or a different one for each
row of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lowrank_utils.adapters.banked_linear import BankedAdapter, BankedLinear, Selection
from lowrank_utils.adapters.files import (
    LayerAdapter,
    adapted_layer,
    adapter_of,
    plain_modules,
    read_adapter,
)
from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import is_adapter
from lowrank_utils.norms import row_scale


class AdapterBank:
    """Named adapters around one base model, which is kept as it is.

    ``add`` puts a small module around each linear layer that an adapter belongs to, and
    ``remove`` takes it away with the last one. The adapters are for use, not for
    training: they have no gradients. With nothing active the layers are called as if
    there were no bank, so the outputs are the base model's to the last bit::

        bank = AdapterBank(model.eval())
        bank.add("anna", "adapters/anna")
        bank.activate("anna")
        y = model(x)
        with bank.rows(["anna", None, "ben"]):  # a batch of three
            y = model(x)

    Several active at once are defined on the base weight: with W′_i what adapter i
    alone would make of W, the weight is W + Σ (W′_i − W). A DoRA adapter's norms are ‖W
    + ΔW_i‖ with the base's W, computed when it is added, so the base weights must not
    change while it is in. One bank serves one batch at a time.

    Args:
        model: the base model, with plain linear layers. It is changed in place.

    Raises:
        TypeError: ``model`` isn't a module.
        ValueError: it has adapters already, or is itself a linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = plain_modules(model)
        if isinstance(model, nn.Linear) or is_adapter(model):
            raise ValueError(
                f"model is itself a {type(model).__name__}; a bank needs a module with layers inside"
            )
        if taken := [
            name for name, module in self._modules.items() if is_adapter(module)
        ]:
            raise ValueError(
                f"already adapted: {', '.join(taken)}; a bank needs the plain base model"
            )
        self.model = model
        self._selection = Selection()
        self._banked: dict[str, BankedLinear] = {}
        # Slots name the modules inside, where a customer's name might not be allowed.
        self._slots: dict[str, str] = {}
        self._next = 0

    @property
    def names(self) -> list[str]:
        """The adapters in the bank, in the order in which they were added."""
        return list(self._slots)

    @property
    def active(self) -> list[str]:
        """The adapters that are applied to every row, in the order of ``names``."""
        return [
            name for name, slot in self._slots.items() if slot in self._selection.active
        ]

    @property
    def is_merged(self) -> bool:
        """Whether the layers use a merged weight now."""
        return any(layer.merged is not None for layer in self._banked.values())

    @torch.no_grad()
    def add(
        self, name: str, source: str | Path | nn.Module, *, may_round: bool = False
    ) -> None:
        """Put an adapter in under ``name``, without activating it. If anything is
        wrong, nothing changes.

        Args:
            name: any text that isn't in use.
            source: a folder as ``save_adapter`` or PEFT writes it, or a model with
                adapters in it, whose A, B and m are copied.
            may_round: see ``load_adapter``.

        Raises:
            TypeError, ValueError: the name isn't usable, or the adapter doesn't fit the
                base model.
            FileNotFoundError, AdapterFileError: see ``load_adapter``.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a text of one letter or more; got {name!r}")
        if name in self._slots:
            raise ValueError(
                f"{name!r} is in the bank already; remove it first or choose another name"
            )
        if isinstance(source, nn.Module):
            adapter = self._of_model(source, may_round)
        else:
            adapter = read_adapter(source, self._modules, may_round=may_round)
        parts = {layer: self._part(layer, part) for layer, part in adapter.items()}
        slot = str(self._next)
        self._next += 1
        self._slots[name] = slot
        for layer, part in parts.items():
            if layer not in self._banked:
                self._banked[layer] = BankedLinear(self._linear(layer), self._selection)
                self.model.set_submodule(layer, self._banked[layer])
            self._banked[layer].lora[slot] = part.train(self._banked[layer].training)

    def remove(self, name: str) -> None:
        """Take an adapter out; its memory is free again, and layers without adapters
        are plain again.
        """
        slot = self._slot(name)
        self._refuse_if_merged("remove")
        del self._slots[name]
        self._selection.active = tuple(
            other for other in self._selection.active if other != slot
        )
        for layer, banked in list(self._banked.items()):
            if slot in banked.lora:
                del banked.lora[slot]
            if not banked.lora:
                self.model.set_submodule(layer, banked.linear.train(banked.training))
                del self._banked[layer]

    def activate(self, *names: str) -> None:
        """Apply the adapters ``names``, and no others, to every row from now on."""
        slots = tuple(self._slot(name) for name in names)
        if len(set(slots)) < len(slots):
            raise ValueError(f"each adapter can be active once; got {', '.join(names)}")
        self._refuse_if_merged("activate")
        self._selection.active = slots

    def disable(self) -> None:
        """Apply no adapter: the outputs are the base model's, to the last bit."""
        self.activate()

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the block, apply to each row of a batch its own adapter, whatever is
        active outside.

        Args:
            names: one per row, that is per index of the first dimension; None is the
                base model.
        """
        if isinstance(names, str):
            raise TypeError(
                f"names must be a list with one name per row; got the text {names!r}"
            )
        self._refuse_if_merged("rows")
        before = self._selection.rows
        self._selection.rows = tuple(
            None if name is None else self._slot(name) for name in names
        )
        try:
            yield
        finally:
            self._selection.rows = before

    @torch.no_grad()
    def merge(self) -> None:
        """Compute the weights that the active adapters make, so that they cost no time
        in the forward pass.

        The base weights are kept beside them, so ``restore`` brings back every bit.
        """
        self._refuse_if_merged("merge")
        if not self._selection.active:
            raise ValueError(
                "no adapter is active, so there is nothing to merge; call activate first"
            )
        merged = {
            layer: banked.weight.clone()
            for layer, banked in self._banked.items()
            if banked.active_adapters()
        }
        for layer, weight in merged.items():
            self._banked[layer].merged = weight

    def restore(self) -> None:
        """Drop the merged weights; the base weights were never changed."""
        for banked in self._banked.values():
            banked.merged = None

    def size(self, name: str) -> int:
        """Return how many bytes an adapter takes in memory: those of its A, B and c."""
        slot = self._slot(name)
        parts = [
            banked.lora[slot] for banked in self._banked.values() if slot in banked.lora
        ]
        return sum(buffer.nbytes for part in parts for buffer in part.buffers())

    def _slot(self, name: str) -> str:
        if name not in self._slots:
            raise ValueError(
                f"there is no adapter {name!r}; the bank has {', '.join(map(repr, self._slots)) or 'none'}"
            )
        return self._slots[name]

    def _refuse_if_merged(self, what: str) -> None:
        if self.is_merged:
            raise RuntimeError(f"{what}: the weights are merged; call restore first")

    def _linear(self, layer: str) -> nn.Linear:
        linear = self._modules[layer]
        assert isinstance(linear, nn.Linear)
        return linear

    def _of_model(self, source: nn.Module, may_round: bool) -> dict[str, LayerAdapter]:
        adapter = adapter_of(source)
        for layer, part in adapter.items():
            shape = (part.B.shape[1], part.A.shape[0])
            linear = self._modules.get(layer)
            if not isinstance(linear, nn.Linear) or linear.weight.shape != shape:
                kind = (
                    "no such layer" if linear is None else f"a {type(linear).__name__}"
                )
                found = (
                    f"a linear layer of shape {tuple(linear.weight.shape)}"
                    if isinstance(linear, nn.Linear)
                    else kind
                )
                raise ValueError(
                    f"{layer} is adapted for a weight of shape {shape}; the base model has {found}"
                )
            if (
                not may_round
                and torch.promote_types(part.A.dtype, linear.weight.dtype)
                != linear.weight.dtype
            ):
                raise ValueError(
                    f"{layer}: the adapter is {part.A.dtype} and would be rounded to the base model's "
                    f"{linear.weight.dtype}; convert one of them, or pass may_round=True"
                )
            if sum(linear is other for other in self._modules.values()) > 1:
                raise ValueError(
                    f"{layer} is used in several places of the base model, which a bank can't adapt"
                )
        return adapter

    def _part(self, layer: str, part: LayerAdapter) -> BankedAdapter:
        """Return copies of A and B, and c from the base weight as it is now."""
        adapted = adapted_layer(self._linear(layer), part)
        c = None
        if isinstance(adapted, LinearWithDoRA):
            c = row_scale(adapted.m, row_norms(adapted.updated_weight()))
        A, B = adapted.lora.A.detach(), adapted.lora.B.detach()
        return BankedAdapter(A, B, part.alpha, c)
