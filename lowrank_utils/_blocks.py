"""Whose code a ``with`` block is in: the function that opened it, and whether that runs
now.

A context variable tells tasks and threads apart. A generator has no context of its own:
while it waits at a ``yield``, its open blocks hold for whoever called it, and where each
step runs in another context (as a server does it that steps a generator in a pool of
threads), they don't hold for itself. So for a block that was opened in a generator it
is asked whether the generator runs.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from types import FrameType


def opener() -> FrameType:
    """Return the frame of the function whose ``with`` opens the block that is being
    opened now.

    A helper made with ``contextlib.contextmanager`` waits at its ``yield`` as well, but
    opens the block for its caller.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        _is_contextlib(frame) or (is_generator(frame) and _is_contextlib(frame.f_back))
    ):
        frame = frame.f_back
    return frame


def is_generator(frame: FrameType) -> bool:
    """Tell whether ``frame`` is that of a generator, which may wait and go on later."""
    kinds = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    return bool(frame.f_code.co_flags & kinds)


def running_frames() -> Iterator[FrameType]:
    """Yield the frames of the functions that run in this thread, the innermost
    first.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def runs_anywhere(frame: FrameType) -> bool:
    """Tell whether ``frame`` is that of a function that runs, in any thread."""
    for top in sys._current_frames().values():
        running: FrameType | None = top
        while running is not None:
            if running is frame:
                return True
            running = running.f_back
    return False


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__
