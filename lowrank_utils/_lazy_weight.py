"""A weight whose dtype, shape and place are known at once, and whose numbers are
computed when something needs them.

Some models look at a layer's weight and never multiply by it: T5's feed-forward layer
asks ``self.wo.weight.dtype`` in every pass. What a wrapper calls its weight costs a
product, or doesn't exist as one tensor, so it is formed for those alone that compute
with it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What tells about a tensor without its numbers.
_ATTRIBUTES = (
    "device",
    "dtype",
    "is_cpu",
    "is_cuda",
    "is_meta",
    "is_mps",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "is_xpu",
    "itemsize",
    "layout",
    "nbytes",
    "ndim",
    "requires_grad",
    "shape",
)
_KNOWN = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {
    Tensor.__len__,
    Tensor.dim,
    Tensor.element_size,
    Tensor.get_device,
    Tensor.is_complex,
    Tensor.is_floating_point,
    Tensor.is_signed,
    Tensor.ndimension,
    Tensor.nelement,
    Tensor.numel,
    Tensor.size,
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}


class LazyWeight(Tensor):
    """A tensor that is formed by the first operation that needs its numbers, and
    stands for what was formed from then on.

    Results of operations are plain tensors.
    """

    _form: Callable[[], Tensor]
    _formed: Tensor | None

    @staticmethod
    def __new__(
        cls, like: Tensor, form: Callable[[], Tensor], requires_grad: bool
    ) -> Self:
        """Return a tensor that looks like ``like`` and holds no numbers."""
        weight = torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            dtype=like.dtype,
            device=like.device,
            requires_grad=requires_grad,
        )
        weight._form = form
        weight._formed = None
        return weight

    def formed(self) -> Tensor:
        """Return the tensor itself; what was formed without gradients is formed anew
        where they are asked for.
        """
        formed = self._formed
        if formed is None or (
            torch.is_grad_enabled()
            and not formed.requires_grad
            and _plainly(self, "requires_grad")
        ):
            formed = self._formed = self._form()
        return formed

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``function`` on the formed tensor, unless it asks for what is known."""
        if function in _KNOWN:
            return super().__torch_function__(function, types, args, kwargs)
        return function(*_formed(args), **_formed(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no cls
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do the same for operations that come from C++ and pass the first by."""
        return function(*_formed(args), **_formed(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # Torch copies no result of an operation that has gradients.
        copy = memo[id(self)] = self.formed().detach().clone()
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What is stored is a tensor like any other, and needs no code of ours to read.
        return self.formed().detach().__reduce_ex__(protocol)


def lazy_weight(
    like: Tensor, form: Callable[[], Tensor], *, requires_grad: bool | None = None
) -> Tensor:
    """Return a tensor whose numbers ``form`` computes when an operation needs them.

    Where torch follows what is computed (see ``is_followed``) it is ``form()`` itself,
    because that takes plain tensors.

    Args:
        like: has the shape, the dtype and the device of what ``form`` returns.
        form: returns the tensor. It is called in the grad mode of the operation, so
            gradients flow to what it computes with.
        requires_grad: what the tensor answers when it is asked; None for what ``like``
            answers.
    """
    if is_followed():
        return form()
    return LazyWeight(
        like, form, like.requires_grad if requires_grad is None else requires_grad
    )


def is_followed() -> bool:
    """Tell whether torch compiles, traces, transforms or differentiates forward what is
    computed now.
    """
    return (
        torch.compiler.is_compiling()
        # vmap, grad, jvp, jacfwd, functionalize.
        or torch._C._are_functorch_transforms_active()
        # torch.jit.trace, and the older of ONNX's two exports.
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def _plainly(weight: LazyWeight, name: str) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return getattr(weight, name)


def _formed(values: Any) -> Any:
    """Return ``values`` with each lazy weight in them replaced by what it stands
    for.
    """
    if isinstance(values, LazyWeight):
        return values.formed()
    if isinstance(values, (list, tuple)):
        items = [_formed(value) for value in values]
        if hasattr(values, "_fields"):
            return type(values)(*items)
        return type(values)(items)
    if isinstance(values, Mapping):
        return {key: _formed(value) for key, value in values.items()}
    return values
