"""Which adapters of a bank a forward pass applies: each request's own, told apart by
task and thread.
"""

import itertools
import sys
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_utils._blocks import (
    is_generator,
    running_frames,
    runs_anywhere,
)
from lowrank_utils.adapters.names import module_at

if TYPE_CHECKING:
    from lowrank_utils.adapters.banked_linear import BankedLinear


@dataclass(frozen=True)
class Choice:
    """What one forward pass applies, by slots: the ``active`` adapters to every row, or
    ``rows[i]`` to row i, that is to index i of dimension ``batch_dim``.
    """

    active: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    batch_dim: int = 0

    @property
    def slots(self) -> set[str]:
        """The adapters that it names."""
        return {slot for slot in self.rows or self.active if slot is not None}


class Held:
    """A choice that holds for a while: in a block of the caller's, or during one
    forward pass of the whole model.

    Attributes:
        frame: the function that it belongs to; None as soon as it has ended.
        is_pass: whether it is a forward pass.
        in_generator: whether the function is a generator.
        number: a later one has a larger number.
    """

    _numbers = itertools.count()

    def __init__(self, choice: Choice, frame: FrameType, *, is_pass: bool) -> None:
        self.choice = choice
        self.frame: FrameType | None = frame
        self.is_pass = is_pass
        self.in_generator = not is_pass and is_generator(frame)
        self.number = next(self._numbers)
        self.is_open = True

    def end(self) -> None:
        """Let it hold no longer, in whatever contexts it is still named."""
        self.is_open, self.frame = False, None


class Selection:
    """What all layers of a bank ask which adapters count now.

    A block holds in the task or thread that opened it, and in tasks that are started
    inside it. Elsewhere, and without a block, ``always`` holds. A forward pass of the
    whole model goes by what held at its beginning: hooks of the model, which the bank
    puts in, call ``begin_pass`` and ``end_pass``.

    Compiled code can't run these hooks. It reads what holds as its own guards do: at
    the beginning of each of its graphs, for all layers in it.

    Attributes:
        always: what holds where no block is open.
        present: slot → name, of the adapters in the bank.
        layers: the adapted layers by their names in the model.
        had_others: whether a block was ever opened, or ``always`` exchanged after a
            pass: what is computed once more in a backward pass may then have been
            another's.
        lock: to be held while one of these changes, or a choice is made.
    """

    def __init__(
        self,
        always: Choice | None = None,
        present: dict[str, str] | None = None,
    ) -> None:
        self.always = Choice() if always is None else always
        self.present = {} if present is None else present
        self.layers: dict[str, BankedLinear] = {}
        self.lock = threading.RLock()
        # The innermost last.
        self._held: ContextVar[tuple[Held, ...]] = ContextVar("adapters", default=())
        self.had_others = self.had_passes = False
        # In all tasks and threads, by number.
        self._open: dict[int, Held] = {}
        self._in_generators: dict[int, Held] = {}

    def __getstate__(self) -> dict[str, Any]:
        if self.is_in_block():
            raise RuntimeError(
                "a copy of the model has no bank to choose its rows: copy or save it outside the rows block"
            )
        return {"always": self.always, "present": self.present}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy of the model knows nothing of the blocks that are open in this process,
        # and may have its layers merged.
        Selection.__init__(self, **state)

    def choice(self) -> Choice:
        """Return what holds now.

        Raises:
            RuntimeError: that can't be told, because the block has ended in which this
                task was started, or belongs to a generator that waits.
        """
        held = self._held.get()
        if self._in_generators:
            return self._found(held)
        if not held:
            return self.always
        last = held[-1]
        if last.is_open and (
            not last.is_pass
            or last.choice is self.always
            or last.choice.rows is not None
        ):
            return last.choice
        return self._found(held)

    def choose(self, choice: Choice) -> None:
        """Let ``choice`` hold where no block is open; the caller holds the lock."""
        self.had_others |= self.had_passes and choice != self.always
        self.always = choice

    def begin_block(self, choice: Choice, frame: FrameType) -> Held:
        """Let ``choice`` hold from now on in this task or thread.

        Args:
            choice: was made under the lock, which the caller still holds.
            frame: whose block it is.
        """
        self.had_others = True
        held = Held(choice, frame, is_pass=False)
        self._open[held.number] = held
        if held.in_generator:
            self._in_generators[held.number] = held
        self._held.set((*self._held.get(), held))
        return held

    def end_block(self, held: Held) -> None:
        """End what ``begin_block`` has begun; blocks may end in any order."""
        held.end()
        self._open.pop(held.number, None)
        self._in_generators.pop(held.number, None)
        # A pass that was begun later has ended, too, if perhaps by Ctrl-C.
        self._held.set(
            tuple(
                other
                for other in self._held.get()
                if other is not held
                and not (other.is_pass and other.number > held.number)
            )
        )

    def is_in_block(self) -> bool:
        """Tell whether a block is open here."""
        return any(held.is_open and not held.is_pass for held in self._held.get())

    def has_blocks(self) -> bool:
        """Tell whether a block is open in any task or thread."""
        return any(not held.is_pass for held in list(self._open.values()))

    def is_in_place(self, model: nn.Module, name: str) -> bool:
        """Tell whether ``model`` still has an adapted layer where it was put."""
        return module_at(model, name) is self.layers[name]

    def refuse_exchanged(self, model: nn.Module, slots: Iterable[str]) -> None:
        """Refuse adapters of which a part belongs to a layer that ``model`` has no
        more.
        """
        slots = list(slots)
        if not slots:
            return
        for name, layer in self.layers.items():
            if not (self.is_in_place(model, name) and layer.has_its_layer()):
                for slot in slots:
                    if slot in layer.lora:
                        raise RuntimeError(
                            f"{name} was exchanged after {self.present[slot]!r} had been added, which belongs to "
                            "the old layer: remove it, and add it again if it fits the new one"
                        )

    def user_of(self, slot: str) -> str | None:
        """Return in words who uses an adapter now, in any task or thread; None if
        nobody does.
        """
        for held in list(self._open.values()):
            if slot not in held.choice.slots:
                continue
            frame = held.frame
            if not held.is_pass:
                return "a rows block that is open"
            if frame is not None and runs_anywhere(frame):
                return "a forward pass that has begun"
        return None

    def begin_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Fix what holds for the layers until ``end_pass``; the model calls it as a
        hook.
        """
        if torch.compiler.is_compiling():
            return
        with self.lock:
            self.had_passes = True
            outer = self._without_ended_passes(self._held.get())
            self._held.set(outer)
            choice = self.choice()
            self.refuse_exchanged(module, choice.slots)
            held = Held(choice, sys._getframe(1), is_pass=True)
            self._open[held.number] = held
            self._held.set((*outer, held))
        if choice.rows is not None and not self.present:
            # There is no adapted layer that could compare it with its input.
            _check_inputs((args, kwargs), len(choice.rows))

    def end_pass(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        """End what ``begin_pass`` has begun; the model calls it as a hook, also after
        an error.
        """
        if torch.compiler.is_compiling():
            return
        held = self._held.get()
        passes = [other for other in held if other.is_pass]
        if passes:
            last = passes[-1]
            last.end()
            self._open.pop(last.number, None)
            self._held.set(tuple(other for other in held if other is not last))

    @staticmethod
    def _without_ended_passes(held: tuple[Held, ...]) -> tuple[Held, ...]:
        """Leave out the passes that Ctrl-C ended, which no hook is called after."""
        if not any(other.is_pass for other in held):
            return held
        frames = list(running_frames())
        return tuple(
            other
            for other in held
            if not other.is_pass or any(other.frame is frame for frame in frames)
        )

    def _found(self, held: tuple[Held, ...]) -> Choice:
        found = self._found_here
        if torch.compiler.is_compiling():
            # Not as a decorator, which would load torch's compiler for everybody.
            found = torch.compiler.disable(found)
        return found(held)

    def _found_here(self, held: tuple[Held, ...]) -> Choice:
        """Return what holds where that isn't simply the last of ``held``."""
        # A list, because a frame that nobody holds may have the id of another one.
        frames = list(running_frames())
        depth = {id(frame): number for number, frame in enumerate(frames)}
        running = [
            other
            for other in list(self._in_generators.values())
            if id(other.frame) in depth
        ]
        here, waiting = None, None
        for other in reversed(held):
            if other.in_generator:
                if other.is_open and id(other.frame) not in depth:
                    waiting = waiting or other
            elif not other.is_pass or id(other.frame) in depth:
                # Else it is a pass that Ctrl-C ended without its last hook.
                here = other
                break
        within = min(
            running,
            key=lambda other: (depth[id(other.frame)], -other.number),
            default=None,
        )
        if within is not None and (here is None or _is_inside(within, here, depth)):
            return within.choice
        if waiting is not None and waiting.frame is not None:
            raise RuntimeError(
                f"rows was opened in the generator {waiting.frame.f_code.co_name!r}, and this pass isn't made by it: "
                "while a generator waits, its block is open for all who share its task or thread. "
                "Open a block around this pass, or the generator's around each of its passes"
            )
        if here is None:
            return self.always
        if not here.is_open:
            raise RuntimeError(
                "the rows block has ended in which this task or thread was started; open one inside it"
            )
        return here.choice


def _is_inside(generator: Held, other: Held, depth: dict[int, int]) -> bool:
    """Tell whether a running generator was called inside ``other``, and not the other
    way round.
    """
    place = depth.get(id(other.frame)) if other.frame is not None else None
    if place is None:
        return generator.number > other.number
    return depth[id(generator.frame)] < place


def _check_inputs(values: Any, count: int) -> None:
    """Refuse inputs of the model of which none can be a batch of ``count`` rows."""
    shapes = list(_shapes(values))
    for shape in shapes:
        # Some models take several groups of rows in further dimensions in front.
        products = itertools.accumulate(shape, lambda a, b: a * b)
        if count in shape or count in products:
            return
    if shapes:
        raise ValueError(
            f"rows names {count} adapters, and the model got inputs of shapes "
            f"{', '.join(map(str, shapes))}: give one name, or None, per row of the batch"
        )


def _shapes(values: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(values, Tensor):
        yield tuple(values.shape)
    elif isinstance(values, dict):
        yield from _shapes(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _shapes(value)
