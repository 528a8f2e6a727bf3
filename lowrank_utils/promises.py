"""What is computed once and kept, because the caller promised that the weights it comes from stay as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_utils._arguments import is_adapter


class Promise:
    """A promise about the layers of a model, and what each layer keeps on the strength of it.

    It holds in the thread that gave it alone. A change that torch counts is seen at once, and the value is
    computed anew. Some changes aren't counted (through ``.data``, by a fused optimizer): these break the promise,
    and are an error at its end.

    Args:
        block: the name of the context manager that gives it, for the error.
        sources: layer → what its value comes from, tensors and numbers.
        compute: layer → the value, (out,).
        in_training: whether it also holds for layers in training mode.
    """

    def __init__(
        self,
        block: str,
        sources: Callable[[Any], tuple[Any, ...]],
        compute: Callable[[Any], Tensor],
        *,
        in_training: bool,
    ) -> None:
        self._block = block
        self._sources = sources
        self._compute = torch.no_grad()(compute)
        self._in_training = in_training
        # Layer → the value that it keeps and the marks of its sources; None if it has none yet.
        self._kept: ContextVar[dict[nn.Module, tuple[Tensor, list[Any]] | None]] = ContextVar(block)

    @contextmanager
    def given_for(self, model: nn.Module) -> Iterator[None]:
        """Let the adapters of ``model`` keep their values inside the block.

        Raises:
            RuntimeError: at the end, if a source was changed unnoticed.
        """
        layers = [module for module in model.modules() if is_adapter(module)]
        token = self._kept.set({**self._kept.get({}), **dict.fromkeys(layers)})
        try:
            yield
            entries = self._kept.get()
        finally:
            self._kept.reset(token)
        names = {module: name for name, module in model.named_modules()}
        stale = [
            names.get(layer, type(layer).__name__)
            for layer in layers
            if self._is_stale(layer, entries[layer])
        ]
        if stale:
            raise RuntimeError(
                f"the weights of {', '.join(stale)} changed inside {self._block}, where they must not: outputs "
                "since then used the norms from before the change. Change weights outside the block"
            )

    def value(self, layer: nn.Module) -> Tensor | None:
        """Return the layer's value, computed now or kept; None where nothing may be kept."""
        kept = self._kept.get({})
        if layer not in kept:
            return None
        sources = self._sources(layer)
        trained = torch.is_grad_enabled() and any(isinstance(s, Tensor) and s.requires_grad for s in sources)
        if trained or (layer.training and not self._in_training):
            # After a pass with gradients an optimizer may follow, and not every one is counted.
            kept[layer] = None
            return None
        marks = _marks(sources)
        entry = kept[layer]
        if entry is None or entry[1] != marks:
            entry = kept[layer] = (self._compute(layer), marks)
        return entry[0]

    def _is_stale(self, layer: Any, entry: tuple[Tensor, list[Any]] | None) -> bool:
        if entry is None:
            return False
        value, marks = entry
        if marks != _marks(self._sources(layer)):
            # Torch noticed this change, and the next forward pass would have, too.
            return False
        # As exact as the sources are: a value of more digits than theirs holds their rounding.
        rtol = 64 * torch.finfo(layer.linear.weight.dtype).eps
        return not torch.allclose(self._compute(layer), value, rtol=rtol, atol=0)


def _marks(sources: tuple[Any, ...]) -> list[Any]:
    """Return what differs after every change that torch notices: another tensor, dtype, place, version or number."""
    return [
        (id(s), s.dtype, s.data_ptr(), None if s.is_inference() else s._version)
        if isinstance(s, Tensor)
        else s
        for s in sources
    ]
