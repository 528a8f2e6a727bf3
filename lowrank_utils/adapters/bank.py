"""Several adapters in one running model: switched, merged, or a different one for each
row of a batch.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils._arguments import check_whole_number, some_of
from lowrank_utils._blocks import opener
from lowrank_utils._weight_checks import check_weight_is_all
from lowrank_utils.adapt import refuse_foreign_adapters
from lowrank_utils.adapters.banked_linear import (
    BankedAdapter,
    BankedLinear,
    MergedWeight,
)
from lowrank_utils.adapters.files import (
    LayerAdapter,
    adapter_of,
    plain_modules,
    read_adapter,
)
from lowrank_utils.adapters.layout import MARK
from lowrank_utils.adapters.names import put_module
from lowrank_utils.adapters.selection import Choice, Selection
from lowrank_utils.decompose import row_norms
from lowrank_utils.lora import (
    HALF_PRECISION,
    Linear,
    adapter_dtype,
    is_adapter,
    is_linear,
    without_autocast,
)
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
    change while it is in: at the next use of the adapter that is an error.

    A mixed batch is computed in two batched products, for which A and B of its adapters
    are put side by side: as many bytes again, which are kept for the next batch of the
    same adapters, and dropped when one comes or goes. (A change of A or B through
    ``.data`` isn't seen.)

    One bank serves many requests at a time. ``rows`` holds for the task or thread that
    opened it and for tasks that are started inside it; ``activate``, ``merge`` and
    ``restore`` hold for all who have no block of their own. A call of the model goes by
    what held when it began, to its end. (A compiled model does so from one of its graph
    breaks to the next, and compiles anew for other rows. Torch 2.5 can't compile it;
    the pinned release can.)

    Args:
        model: the base model, with plain or quantised linear layers. It is changed in
            place.

    Raises:
        TypeError: ``model`` isn't a module.
        ValueError: it has adapters already, or is itself a linear layer.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = plain_modules(model)
        if is_linear(model) or is_adapter(model):
            raise ValueError(
                f"model is itself a {type(model).__name__}; a bank needs a module with layers inside"
            )
        refuse_foreign_adapters(model)
        _refuse_adapted(modules)
        self.model = model
        self._selection = Selection()
        self._layers = self._selection.layers
        # Slots name the modules inside, where a customer's name might not be allowed.
        self._slots: dict[str, str] = {}
        self._next = 0
        self._hooks: list[Any] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A selection is copied without them, for copies of the model alone.
        self._selection.layers = self._layers

    @property
    def names(self) -> list[str]:
        """The adapters in the bank, in the order in which they were added."""
        return list(self._slots)

    @property
    def active(self) -> list[str]:
        """The adapters that are applied to every row where no block is open, in the
        order of ``names``.
        """
        active = self._selection.always.active
        return [name for name, slot in self._slots.items() if slot in active]

    @property
    def is_merged(self) -> bool:
        """Whether the layers use a merged weight now."""
        return any(layer.merged is not None for layer in self._layers.values())

    @torch.no_grad()
    def add(
        self, name: str, source: str | Path | nn.Module, *, may_round: bool = False
    ) -> None:
        """Put an adapter in under ``name``, without activating it. If anything is
        wrong, nothing changes.

        It fits into the model as it is now. No random number is drawn.

        Args:
            name: any text that isn't in use.
            source: a folder as ``save_adapter`` or PEFT writes it, or a model with
                adapters in it, whose A, B and m are copied. Beside a base model in
                bfloat16 or float16 they may be float32 and stay so.
            may_round: see ``load_adapter``.

        Raises:
            TypeError, ValueError: the name isn't usable, or the adapter doesn't fit the
                base model.
            RuntimeError: a layer of the model was exchanged meanwhile.
            FileNotFoundError, AdapterFileError: see ``load_adapter``.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a text of one letter or more; got {name!r}")
        self._refuse_taken(name)
        modules = self._plain_modules()
        if isinstance(source, nn.Module):
            adapter = _of_model(source, modules, may_round)
        else:
            adapter = read_adapter(source, modules, may_round=may_round)
        parts = {
            layer: _part(_linear(modules, layer), part)
            for layer, part in adapter.items()
        }
        # What takes long is done, and requests that run meanwhile weren't held up.
        with self._selection.lock:
            self._refuse_taken(name)
            now = self._plain_modules()
            for layer in parts:
                if now.get(layer) is not modules[layer]:
                    raise RuntimeError(
                        f"{layer} was exchanged while {name!r} was being added; add it again"
                    )
                if (banked := self._layers.get(layer)) is not None:
                    self._selection.refuse_exchanged(self.model, banked.lora)
                    if banked.has_dora():
                        banked.check_weight()
            slot = str(self._next)
            self._next += 1
            for layer, part in parts.items():
                banked = self._layers.get(layer)
                if banked is None:
                    banked = BankedLinear(_linear(modules, layer), self._selection)
                    self._layers[layer] = banked
                    put_module(self.model, layer, banked)
                if part.c is not None:
                    banked.remember_weight()
                banked.lora[slot] = part.train(banked.training)
                banked.kept.clear()
            self._selection.present = {**self._selection.present, slot: name}
            # The last step, so that nobody can name an adapter of which a part is
            # missing.
            self._slots[name] = slot
            self._keep_hooks()

    def remove(self, name: str) -> None:
        """Take an adapter out; its memory is free again, and layers without adapters
        are plain again.

        Raises:
            ValueError: there is no such adapter.
            RuntimeError: the weights are merged, or somebody uses the adapter now: a
                block in any task or thread that names it, or a forward pass that has
                begun.
        """
        with self._selection.lock:
            slot = self._slot(name)
            self._refuse_if_merged("remove")
            if (user := self._selection.user_of(slot)) is not None:
                raise RuntimeError(
                    f"remove: {name!r} is in use by {user}; remove it when that has ended"
                )
            del self._slots[name]
            active = self._selection.always.active
            if slot in active:
                self._selection.choose(Choice(tuple(s for s in active if s != slot)))
            self._selection.present = {
                other: known
                for other, known in self._selection.present.items()
                if other != slot
            }
            for layer, banked in list(self._layers.items()):
                # Also without a part of this adapter, whose rows are refused from now.
                banked.kept.clear()
                if slot in banked.lora:
                    del banked.lora[slot]
                if not banked.lora:
                    # A layer that somebody put there since then stays.
                    if self._selection.is_in_place(self.model, layer):
                        plain = banked.linear.train(banked.training)
                        put_module(self.model, layer, plain)
                    del self._layers[layer]
            self._keep_hooks()

    def activate(self, *names: str) -> None:
        """Apply the adapters ``names``, and no others, to every row from now on.

        This holds for all tasks and threads, but for those inside a ``rows`` block, and
        for passes that have begun.
        """
        with self._selection.lock:
            slots = tuple(self._slot(name) for name in names)
            if len(set(slots)) < len(slots):
                raise ValueError(
                    f"each adapter can be active once; got {', '.join(names)}"
                )
            self._refuse_if_merged("activate")
            self._selection.refuse_exchanged(self.model, slots)
            self._selection.choose(Choice(slots))

    def disable(self) -> None:
        """Apply no adapter: the outputs are the base model's, to the last bit."""
        self.activate()

    @contextmanager
    def rows(
        self, names: Iterable[str | None], batch_dim: int | None = None
    ) -> Iterator[None]:
        """Inside the block, apply to each row of a batch its own adapter, whatever is
        active outside.

        The block holds in the task or thread that opened it, and in the tasks that are
        started inside it while it is open. A thread that is started inside it knows
        nothing of it, as with all context variables: open the block in that thread, or
        let it run ``contextvars.copy_context().run``. Any number of blocks may be open
        at a time, and end in any order. A block that is opened in a generator is that
        generator's own.

        Args:
            names: one per row; None is the base model.
            batch_dim: the dimension of the batch in the input of every adapted layer.
                None is the first, and is refused where the model has parts for which
                the first is time or position (``batch_first=False``).

        Raises:
            TypeError: ``names`` isn't a list of names.
            ValueError: a name isn't in the bank, or it must be said which dimension is
                the batch's; and from the forward pass: the names aren't as many as the
                rows.
            RuntimeError: the weights are merged, or an adapted layer was exchanged.
        """
        if isinstance(names, (str, Set, Mapping)) or not isinstance(names, Iterable):
            kind = "text" if isinstance(names, str) else type(names).__name__
            raise TypeError(
                f"names must be a list with one name per row; got the {kind} {names!r}"
            )
        if batch_dim is not None:
            check_whole_number("batch_dim", batch_dim, minimum=0)
        with self._selection.lock:
            self._refuse_if_merged("rows")
            known = self._slots
            # Without a call for each row, of which there may be many.
            slots = tuple(
                [
                    None
                    if name is None
                    else known[name]
                    if name in known
                    else self._slot(name)
                    for name in names
                ]
            )
            choice = Choice(rows=slots, batch_dim=batch_dim or 0)
            self._selection.refuse_exchanged(self.model, choice.slots)
            if batch_dim is None:
                self._refuse_sequence_first()
            block = self._selection.begin_block(choice, opener())
            self._keep_hooks()
        try:
            yield
        finally:
            self._selection.end_block(block)
            with self._selection.lock:
                self._keep_hooks()

    @torch.no_grad()
    def merge(self) -> None:
        """Compute the weights that the active adapters make, so that they cost no time
        in the forward pass.

        The base weights are kept beside them, so ``restore`` brings back every bit. Of
        a quantised base the merged weights are whole ones, beside its codes.
        Like ``activate``, this holds for all tasks and threads.
        """
        with self._selection.lock:
            self._refuse_if_merged("merge")
            choice = self._selection.always
            if not choice.active:
                raise ValueError(
                    "no adapter is active, so there is nothing to merge; call activate first"
                )
            self._selection.refuse_exchanged(self.model, choice.slots)
            merged = {
                layer: banked.formed_weight(adapters)
                for layer, banked in self._layers.items()
                if (adapters := banked.adapters(choice.active))
            }
            for layer, weight in merged.items():
                banked = self._layers[layer]
                banked.merged = MergedWeight(weight, choice.active).train(
                    banked.training
                )

    def restore(self) -> None:
        """Drop the merged weights, for all tasks and threads; the base weights were
        never changed.
        """
        with self._selection.lock:
            for banked in self._layers.values():
                banked.merged = None

    def size(self, name: str) -> int:
        """Return how many bytes an adapter takes in memory: those of its A, B and c."""
        slot = self._slot(name)
        parts = [
            banked.lora[slot]
            for banked in list(self._layers.values())
            if slot in banked.lora
        ]
        return sum(buffer.nbytes for part in parts for buffer in part.buffers())

    def _slot(self, name: str) -> str:
        if name not in self._slots:
            raise ValueError(
                f"there is no adapter {name!r}; the bank has {', '.join(map(repr, self._slots)) or 'none'}"
            )
        return self._slots[name]

    def _refuse_taken(self, name: str) -> None:
        if name in self._slots:
            raise ValueError(
                f"{name!r} is in the bank already; remove it first or choose another name"
            )

    def _refuse_if_merged(self, what: str) -> None:
        if self.is_merged:
            raise RuntimeError(f"{what}: the weights are merged; call restore first")

    def _refuse_sequence_first(self) -> None:
        found = [
            f"{name or 'the model'} ({type(module).__name__})"
            for name, module in _sequence_first(self.model)
        ]
        if found:
            raise ValueError(
                f"batch_first is False in {', '.join(found)}: say which dimension is the batch's at the adapted "
                "layers, batch_dim=1 where the first is the sequence's, batch_dim=0 where it is the batch's"
            )

    def _plain_modules(self) -> dict[str, nn.Module]:
        """Return the modules that the model has now, with the linear layers in the
        place of those that this bank put around them.
        """
        modules = plain_modules(self.model)
        for layer, banked in self._layers.items():
            if modules.get(layer) is banked:
                modules[layer] = banked.linear
        _refuse_adapted(modules)
        return modules

    def _keep_hooks(self) -> None:
        """Hook the selection to the model's calls as long as there is something to
        select.
        """
        needed = bool(self._slots) or self._selection.has_blocks()
        if needed and not self._hooks:
            self._hooks = [
                self.model.register_forward_pre_hook(
                    self._selection.begin_pass, prepend=True, with_kwargs=True
                ),
                self.model.register_forward_hook(
                    self._selection.end_pass, with_kwargs=True, always_call=True
                ),
            ]
        elif not needed:
            while self._hooks:
                self._hooks.pop().remove()


def _refuse_adapted(modules: Mapping[str, nn.Module]) -> None:
    if taken := [name for name, module in modules.items() if is_adapter(module)]:
        raise ValueError(
            f"already adapted: {', '.join(taken)}; a bank needs the plain base model"
        )


def _sequence_first(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose inputs have the sequence in front, by name, but nothing
    from inside one.
    """
    # Not by named_modules, which takes ten times as long, at each block.
    waiting = [("", model)]
    seen = set()
    while waiting:
        name, module = waiting.pop()
        if vars(module).get("batch_first") is False:
            yield name, module
            continue
        for part, child in module._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append((f"{name}.{part}" if name else part, child))


def _linear(modules: Mapping[str, nn.Module], layer: str) -> Linear:
    linear = modules[layer]
    assert is_linear(linear)
    return linear


def _of_model(
    source: nn.Module, modules: Mapping[str, nn.Module], may_round: bool
) -> dict[str, LayerAdapter]:
    """Return the adapter of another model, checked to fit ``modules``."""
    if along := [
        f"{name}.{key}"
        for name, module in plain_modules(source).items()
        for key, parameter in _parameters_beside(module)
        if (parameter.requires_grad or key in getattr(module, MARK, ()))
        and not _is_as_in(modules.get(name), key, parameter)
    ]:
        raise ValueError(
            f"{some_of(along)} was trained along, which can't be switched with the adapter; freeze what wasn't "
            "trained (mark_only_adapters_as_trainable), or serve that model by itself"
        )
    adapter = adapter_of(source)
    uses = Counter(map(id, modules.values()))
    for layer, part in adapter.items():
        shape = (part.B.shape[1], part.A.shape[0])
        linear = modules.get(layer)
        if not is_linear(linear) or linear.weight.shape != shape:
            kind = "no such layer" if linear is None else f"a {type(linear).__name__}"
            found = (
                f"a linear layer of shape {tuple(linear.weight.shape)}"
                if is_linear(linear)
                else kind
            )
            raise ValueError(
                f"{layer} is adapted for a weight of shape {shape}; the base model has {found}"
            )
        if not may_round and _kept_dtype(part.A.dtype, linear.weight.dtype) is None:
            raise ValueError(
                f"{layer}: the adapter is {part.A.dtype} and would be rounded to "
                f"{adapter_dtype(linear.weight.dtype)}; convert one of them, or pass may_round=True"
            )
        if uses[id(linear)] > 1:
            raise ValueError(
                f"{layer} is used in several places of the base model, which a bank can't adapt"
            )
    return adapter


def _parameters_beside(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module by name, of an adapted layer those that it was
    put around.
    """
    plain = module.linear if is_adapter(module) else module
    assert isinstance(plain, nn.Module)
    yield from plain.named_parameters(recurse=False)


def _is_as_in(base: nn.Module | None, key: str, parameter: Tensor) -> bool:
    """Tell whether the base model's linear layer has the same numbers, so that whatever
    could be trained beside an adapter was not.
    """
    if not is_linear(base) or key not in base._parameters:
        return False
    known = base._parameters[key]
    return known is not None and torch.equal(parameter.detach().to(known), known)


def _kept_dtype(adapter: torch.dtype, weight: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which an adapter's numbers can be kept beside a weight, all
    digits of them; None if there is none.
    """
    both = torch.promote_types(adapter, weight)
    if both == weight or (weight in HALF_PRECISION and both == torch.float32):
        return both
    return None


def _part(linear: Linear, part: LayerAdapter) -> BankedAdapter:
    """Return copies of A and B, and c from the base weight as it is now."""
    W = linear.weight
    dtype = _kept_dtype(part.A.dtype, W.dtype) or adapter_dtype(W.dtype)

    def copied(values: Tensor) -> Tensor:
        return values.detach().to(device=W.device, dtype=dtype, copy=True)

    A, B, c = copied(part.A), copied(part.B), None
    if part.m is not None:
        check_weight_is_all(linear)
        with without_autocast(W.device):
            V = torch.addmm(W.to(dtype), B.T, A.T, alpha=part.alpha)
        c = row_scale(copied(part.m), row_norms(V))
    return BankedAdapter(A, B, part.alpha, c)
