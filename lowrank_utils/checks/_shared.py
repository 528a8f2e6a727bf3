"""What all checks are made of: the frame around a check, the call of the learner's
function, the comparison, the count of what ran.

An error that the learner's function raises is a hint too, with the line that stopped.
``__tracebackhide__`` leaves the check's frames out of the traceback.
"""

import copy
import inspect
import linecache
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# In float64 this number + 1 is this number again: what is added to it before the rest
# is lost, and shows the order.
ONE_IS_LOST = 2.0**60


class ExerciseError(AssertionError):
    """The answer isn't right yet; the message is a hint."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that Jupyter shows: the hint alone, for the last frame would
        show the check's code.
        """
        return [f"{type(self).__name__}: {self}"]


class Remark(Exception):
    """The answer is right, and isn't what was asked for in every respect."""


def exercise(number: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a check say what came out: right, or not begun. A wrong answer raises its
    hint.
    """

    def decorate(check: Callable[[Any], None]) -> Callable[[Any], None]:
        @wraps(check)
        def run(function: Any) -> None:
            __tracebackhide__ = True
            try:
                check(told(function))
            except NotImplementedError as untouched:
                # No error, so that "Run All Cells" and papermill go through an
                # untouched notebook.
                print(f"To do: {untouched}")
            except Remark as remark:
                print(f"Exercise {number}: right, but {remark}")
            else:
                # Who only runs the folded solution has solved nothing.
                whose = "Solution" if _is_solution(function) else "Exercise"
                print(f"{whose} {number}: correct")

        return run

    return decorate


def told(function: Any) -> Any:
    """Return the learner's function so that an error in it becomes a hint: which line
    stopped, why, and the shapes that it was given.
    """
    if not callable(function):
        return function

    @wraps(function)
    def run(*inputs: Any) -> Any:
        __tracebackhide__ = True
        try:
            return function(*inputs)
        except ExerciseError:
            raise
        except Exception as error:
            # Torch raises the same error for what it doesn't have.
            if isinstance(error, NotImplementedError) and "Exercise " in str(error):
                raise
            raise ExerciseError(_what_stopped(function, inputs, error)) from error

    return run


def _is_solution(function: Any) -> bool:
    """Tell whether a notebook's own solution defines the function."""
    file = getattr(getattr(function, "__code__", None), "co_filename", "")
    return linecache.getline(file, 1).startswith("# Solution ")


def _what_stopped(function: Any, inputs: tuple[Any, ...], error: Exception) -> str:
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    lines = [
        frame.line
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == file and frame.line
    ]
    where = f" at `{lines[-1].strip()}`" if lines else ""
    hint = f"your function stopped{where}: {type(error).__name__}: {error}"
    try:
        given = inspect.signature(function).bind(*inputs).arguments
    except (TypeError, ValueError):
        return f"{hint}. It is called with {len(inputs)} arguments"
    shapes = [
        f"{name} {tuple(value.shape)}"
        for name, value in given.items()
        if isinstance(value, Tensor)
    ]
    if isinstance(error, (RuntimeError, IndexError)) and shapes:
        deep = any(isinstance(v, Tensor) and v.ndim > 2 for v in given.values())
        question = "is a transpose missing, or one too many?"
        if deep and "must match the size" in str(error):
            question = "does one of them lack a dimension (unsqueeze)?"
        if "out of bounds" in str(error):
            question = "which dim does argmin or argmax go over?"
        return f"{hint}. The shapes are {', '.join(shapes)}: {question}"
    return hint


def ask(function: Callable[..., Any], **inputs: Any) -> Any:
    """Return the learner's answer to copies of ``inputs``, which are passed in this
    order.

    Raises:
        ExerciseError: the function changed one of them.
    """
    __tracebackhide__ = True
    given = copy.deepcopy(inputs)
    answer = function(*given.values())
    for name, value in inputs.items():
        same = (
            torch.equal(given[name], value)
            if isinstance(value, Tensor)
            else given[name] == value
        )
        if not same:
            raise ExerciseError(
                f"{name} was changed in place; others still need it as it was"
            )
    return answer


def compare(name: str, answer: Any, expected: Any, mistakes: dict[str, Any]) -> None:
    """Accept ``answer`` if it equals ``expected``, else raise the hint of the mistake
    that it equals.

    Args:
        name: what the answer is called in a hint.
        answer: what the learner's function returned.
        expected: a number, a tensor, or a tuple of them.
        mistakes: hint → the value that this mistake gives. In a tuple, None stands for
            parts that it leaves alone.

    Raises:
        ExerciseError: the answer isn't the expected one.
    """
    __tracebackhide__ = True
    if answer is None:
        raise ExerciseError(f"{name} is None: is the `return` missing?")
    if isinstance(expected, tuple):
        if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
            raise ExerciseError(
                f"{name} must be a tuple of {len(expected)}; got {type(answer).__name__}"
            )
        for place, part in enumerate(expected):
            hints = {
                hint: wrong[place]
                for hint, wrong in mistakes.items()
                if wrong[place] is not None
            }
            compare(f"{name}[{place}]", answer[place], part, hints)
        return
    for hint, wrong in mistakes.items():
        if equal(answer, wrong) and not equal(wrong, expected):
            raise ExerciseError(hint)
    if problem := _wrong_kind(answer, expected):
        raise ExerciseError(f"{name} {problem}")
    if not equal(answer, expected):
        raise ExerciseError(
            f"{name} isn't right yet; try a small example by hand and compare each step"
        )


def equal(first: Any, second: Any) -> bool:
    """Return whether two numbers or tensors have the same shape and, up to rounding,
    the same values.
    """
    try:
        first, second = torch.as_tensor(first), torch.as_tensor(second)
    except (TypeError, ValueError, RuntimeError):
        return False
    if first.shape != second.shape:
        return False
    return torch.allclose(
        first.double(), second.double(), rtol=1e-6, atol=1e-9, equal_nan=True
    )


def _wrong_kind(answer: Any, expected: Any) -> str | None:
    """Say what is wrong with the answer's type, shape or dtype, if anything is."""
    # A single number may come as a tensor without dimensions or as Python's.
    numbers = isinstance(answer, (int, float)) or not isinstance(expected, Tensor)
    if numbers and torch.as_tensor(expected).ndim == 0:
        if isinstance(answer, (list, tuple)) or (
            isinstance(answer, Tensor) and answer.ndim > 0
        ):
            shape = (
                f" of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else ""
            )
            return f"must be one number; got a {type(answer).__name__.lower()}{shape}"
        return None
    if not isinstance(answer, Tensor):
        return f"must be a tensor; got {type(answer).__name__}"
    if answer.shape != expected.shape:
        shapes = f"{tuple(answer.shape)} instead of {tuple(expected.shape)}"
        if answer.ndim == 2 and equal(answer.T, expected):
            return f"has the right values, but is transposed: {shapes}"
        if answer.numel() == expected.numel() and equal(
            answer.reshape(expected.shape), expected
        ):
            return f"has the right values in the wrong shape: {shapes}"
        return f"has the wrong shape: {shapes}"
    if answer.dtype != expected.dtype:
        return f"has the wrong dtype: {answer.dtype} instead of {expected.dtype}"
    return None


class Watch(TorchDispatchMode):
    """Note how many operations run, which results need ``limit`` numbers or more that
    no input holds, and how many numbers all results have that aren't an input's.
    """

    def __init__(self, limit: int, inputs: list[Tensor]) -> None:
        super().__init__()
        self.limit, self.inputs = limit, inputs
        self.operations = self.written = 0
        self.large: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        __tracebackhide__ = True
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        taken = {tensor.untyped_storage().data_ptr() for tensor in self.inputs}
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(part, Tensor):
                continue
            if part.layout != torch.strided:
                # Sparse: it has no storage of this kind.
                if part._nnz() >= self.limit:
                    self.large.append(part)
                continue
            if part.untyped_storage().data_ptr() in taken:
                continue
            self.written += part.numel()
            # The storage counts: what is expanded to a large shape holds few numbers.
            if part.untyped_storage().nbytes() >= self.limit * part.element_size():
                self.large.append(part)
        return result


class Parts(NamedTuple):
    """The parts of an adapted layer, and inputs for it, in float64."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    alpha: float
    m: Tensor

    def take(self, names: str) -> dict[str, Any]:
        """Return the parts of these names, in this order."""
        return {name: getattr(self, name) for name in names.split()}

    @property
    def V(self) -> Tensor:
        """W + ΔW, (out, in)."""
        return self.weight + self.alpha * (self.A @ self.B).T

    @property
    def c(self) -> Tensor:
        """m/‖V‖, (out,)."""
        return self.m / self.V.norm(dim=1)


def examples() -> Sequence[Parts]:
    """Return two layers with in ≠ out, a bias, a moved m, a batch, and an alpha that
    isn't 1.

    They agree in no size, so that an answer which fits one of them alone is noticed.
    """
    return [
        _draw(0, batch=5, n_in=7, n_out=4, rank=3, alpha=2.5),
        _draw(1, batch=6, n_in=5, n_out=8, rank=2, alpha=0.75),
    ]


def _draw(
    seed: int, *, batch: int, n_in: int, n_out: int, rank: int, alpha: float
) -> Parts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias = draw(batch, n_in), draw(n_out, n_in), draw(n_out)
    return Parts(
        x,
        weight,
        bias,
        draw(n_in, rank),
        draw(rank, n_out),
        alpha,
        draw(n_out).abs() + 0.5,
    )
