"""What is computed once and kept, because the caller promised that the weights it comes
from stay as they are.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_utils._arguments import check_module
from lowrank_utils._blocks import is_generator, opener, running_frames
from lowrank_utils._weight_checks import sources_of
from lowrank_utils.lora import is_adapter


class Promise:
    """A promise about the layers of a model, and what each layer keeps on the strength
    of it.

    It holds in the task or thread that gave it, and in tasks that are started inside
    the block, until the block ends. Blocks may end in any order. A change that torch
    counts is seen at once, and the value is computed anew. Some changes aren't counted
    (through ``.data``, by a fused optimizer): these break the promise, and are an error
    at its end.

    A source that is another tensor each time it is asked for, as a parametrized weight
    is, doesn't show a change of what it comes from. Such a layer keeps nothing.

    Args:
        block: the name of the context manager that gives it, for the error.
        sources: layer → what its value comes from, tensors and numbers.
        in_training: whether it also holds for layers in training mode.
    """

    def __init__(
        self,
        block: str,
        sources: Callable[[Any], tuple[Any, ...]],
        *,
        in_training: bool,
    ) -> None:
        self._block = block
        self._sources = sources
        self._in_training = in_training
        # The innermost last.
        self._given: ContextVar[tuple[_Given, ...]] = ContextVar(block, default=())

    def given_for(self, model: nn.Module) -> AbstractContextManager[None]:
        """Let the adapters of ``model`` keep their values inside the block.

        Raises:
            TypeError: ``model`` isn't a module.
            RuntimeError: at the end, if a source was changed unnoticed.
        """
        check_module(f"{self._block}: model", model)
        return self._given_for(model)

    @contextmanager
    def _given_for(self, model: nn.Module) -> Iterator[None]:
        layers = [module for module in model.modules() if is_adapter(module)]
        given = _Given(layers, opener())
        self._given.set((*self._given.get(), given))
        try:
            yield
        finally:
            kept = given.end()
            self._given.set(
                tuple(other for other in self._given.get() if other is not given)
            )
        names = {module: name for name, module in model.named_modules()}
        stale = [
            names.get(layer) or type(layer).__name__
            for layer in layers
            if self._is_stale(layer, kept[layer])
        ]
        if stale:
            raise RuntimeError(
                f"the weights of {', '.join(stale)} changed inside {self._block}, where they must not: outputs "
                "since then used the norms from before the change. Change weights outside the block"
            )

    def value(
        self, layer: nn.Module, compute: Callable[[Any], Tensor]
    ) -> Tensor | None:
        """Return the layer's value, computed now or kept; None where nothing may be
        kept.

        Args:
            layer: whose value.
            compute: layer → the value, (out,). It is called without gradients.
        """
        kept = self._kept_for(layer)
        if kept is None:
            return None
        sources = self._sources(layer)
        trained = torch.is_grad_enabled() and any(
            isinstance(s, Tensor) and s.requires_grad for s in sources
        )
        if trained or (layer.training and not self._in_training):
            # After a pass with gradients an optimizer may follow, and not every one is
            # counted.
            kept[layer] = None
            return None
        marks = _marks(sources)
        entry = kept[layer]
        if entry is not None and not entry.is_from(sources):
            entry = None
        if entry is None or entry.marks != marks:
            kept[layer] = None
            references = [weakref.ref(s) for s in sources if isinstance(s, Tensor)]
            if not _are(references, self._sources(layer)):
                return None
            compute = torch.no_grad()(compute)
            entry = kept[layer] = _Kept(compute(layer), marks, references, compute)
        return entry.value

    def _kept_for(self, layer: nn.Module) -> "dict[nn.Module, _Kept | None] | None":
        """Return where the layer may keep a value; None if nothing is promised here."""
        for given in reversed(self._given.get()):
            kept = given.kept
            if layer in kept and given.holds_here():
                return kept
        return None

    def _is_stale(self, layer: Any, entry: "_Kept | None") -> bool:
        if entry is None:
            return False
        sources = self._sources(layer)
        if entry.marks != _marks(sources) or not entry.is_from(sources):
            # Torch noticed this change, and the next forward pass would have, too.
            return False
        # As exact as the sources are: a value of more digits than theirs holds their
        # rounding.
        rtol = 64 * torch.finfo(layer.linear.weight.dtype).eps
        return not torch.allclose(entry.compute(layer), entry.value, rtol=rtol, atol=0)


class _Given:
    """A promise that was given once, for some layers.

    Attributes:
        kept: layer → what it keeps; None if it has nothing yet.
    """

    def __init__(self, layers: list[nn.Module], frame: FrameType) -> None:
        self.kept: dict[nn.Module, _Kept | None] = dict.fromkeys(layers)
        # While a generator waits, its caller has promised nothing.
        self._generator = frame if is_generator(frame) else None

    def end(self) -> "dict[nn.Module, _Kept | None]":
        """Let it hold no longer, also for tasks that were started inside the block, and
        return what was kept.
        """
        self._generator = None
        kept, self.kept = self.kept, {}
        return kept

    def holds_here(self) -> bool:
        """Tell whether it is given for what runs now."""
        generator = self._generator
        return generator is None or any(
            frame is generator for frame in running_frames()
        )


class _Kept(NamedTuple):
    """A value, the marks of its sources when it was computed, these themselves, and how
    to compute it again.
    """

    value: Tensor
    marks: list[Any]
    references: "list[weakref.ref[Tensor]]"
    compute: Callable[[Any], Tensor]

    def is_from(self, sources: tuple[Any, ...]) -> bool:
        """Tell whether it was computed from these tensors, and not from others of which
        one has now the place and the number of an old one.
        """
        return _are(self.references, sources)


def _are(references: "list[weakref.ref[Tensor]]", sources: tuple[Any, ...]) -> bool:
    """Tell whether the tensors among ``sources`` are those that are referred to."""
    tensors = [source for source in sources if isinstance(source, Tensor)]
    return len(references) == len(tensors) and all(
        reference() is tensor
        for reference, tensor in zip(references, tensors, strict=True)
    )


def _marks(sources: tuple[Any, ...]) -> list[Any]:
    """Return what differs after every change that torch notices: another tensor, dtype,
    place, version or number.
    """
    return [
        (id(s), s.dtype, s.data_ptr(), None if s.is_inference() else s._version)
        if isinstance(s, Tensor)
        else s
        for s in sources
    ]


# DoRA's c = m/‖V‖, (out,).
SCALES = Promise(
    "constant_weights",
    # At each pass: a module looks its parts up slowly.
    lambda layer: (
        *sources_of(layer.linear).values(),
        (lora := layer.lora).A,
        lora.B,
        layer.m,
        lora.alpha,
    ),
    in_training=False,
)
# ‖W‖² by rows, (out,).
SQUARES = Promise(
    "frozen_weights",
    lambda layer: tuple(sources_of(layer.linear).values()),
    in_training=True,
)


def constant_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Promise that the weights of ``model`` stay as they are, so that each DoRA layer
    needs c = m/‖V‖ only once.

    Inside the block, a layer in evaluation mode computes c in its first forward pass
    without gradients and keeps it. A new one is computed after ``load_state_dict``, a
    conversion, another change that torch counts, or a forward pass with gradients,
    which an optimizer needs before its step. Copies of the model made in the block keep
    nothing. Some changes aren't counted (through ``.data``, by a fused optimizer), so
    at the end of the block every kept c is compared with a new one::

        model.eval()
        with torch.no_grad(), constant_weights(model):
            ...  # predict as often as you like

    Args:
        model: a module with adapters in it.

    Raises:
        TypeError: ``model`` isn't a module.
        RuntimeError: at the end of the block, if weights were changed unnoticed. The
            outputs since that change were computed with an old c.
    """
    return SCALES.given_for(model)


def frozen_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Promise that the pretrained weights of ``model`` stay as they are while its
    adapters are trained.

    Inside the block, a DoRA layer whose W is frozen reads W once for ‖W‖² and keeps it,
    where it computes ‖V‖ by ``factored_row_norms``. A large layer then saves a pass
    over W in each step, and computes the same bits. What is noticed of a change, and
    when, is as in ``constant_weights``::

        with frozen_weights(model):
            ...  # train as usual

    Args:
        model: a module with adapters in it.

    Raises:
        TypeError: ``model`` isn't a module.
        RuntimeError: at the end of the block, if a pretrained weight was changed
            unnoticed. The outputs since that change were computed with old norms.
    """
    return SQUARES.given_for(model)
