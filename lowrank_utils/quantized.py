"""A base of four bits: weights as codes of some levels, and a linear layer that keeps
them so.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_utils._arguments import check_matrix, check_one_of, check_whole_number
from lowrank_utils._lazy_weight import LazyWeight, is_followed
from lowrank_utils._weight_checks import check_weight_is_all


def nf4_levels() -> Tensor:
    """Return NF4's 16 levels, quantiles of the normal distribution between −1 and 1 of
    which one is 0; (16,), float32, ascending.

    Eight of them are positive and seven negative (arXiv 2305.14314, §3). The outermost
    quantile lies halfway between 1 − 1/32 and 1 − 1/30, as in bitsandbytes.
    """
    # How far out: a choice of the authors' code.
    outermost = ((1 - 1 / 32) + (1 - 1 / 30)) / 2
    positive, negative = (
        torch.linspace(0.5, outermost, count, dtype=torch.float64, device="cpu")
        for count in (9, 8)
    )
    # Both hold the 0, which is one level.
    quantiles = torch.special.ndtri(torch.cat([1 - negative.flip(0)[:-1], positive]))
    return (quantiles / quantiles[-1]).float()


def even_levels(bits: int) -> Tensor:
    """Return 2ᵇⁱᵗˢ − 1 evenly spaced levels from −1 to 1, of which one is 0; float32,
    ascending.

    They are those of absmax quantisation (arXiv 2305.14314, Eq. 1): −127/127 to 127/127
    for eight bits.

    Args:
        bits: 2 to 8.
    """
    check_whole_number("bits", bits, minimum=2, maximum=8)
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1, device="cpu").float() / largest


# By name. Levels of one's own may be put in, under a name of their own.
LEVELS = {"nf4": nf4_levels(), "int4": even_levels(4), "int8": even_levels(8)}


# Of fewer bits a number is a code itself.
_WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class QuantizedWeight(NamedTuple):
    """A weight (out, in) as codes.

    Attributes:
        codes: the number of each weight's level, uint8: (out, ⌈in/2⌉), two to a byte,
            where there are 16 levels or fewer, and else (out, in).
        scales: the largest magnitude of each block, (out, ⌈in/block_size⌉), in the
            dtype of the weight.
        levels: what the codes stand for, between −1 and 1, ascending.
        block_size: how many weights of a row share a scale; the last block of a row
            may have fewer.
        columns: in.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor
    block_size: int
    columns: int


def pack(codes: Tensor) -> Tensor:
    """Return the codes (rows, columns), uint8 below 16, two to a byte: (rows,
    ⌈columns/2⌉), the first in the upper half.
    """
    even = F.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] << 4 | even[:, 1::2]


def unpack(packed: Tensor, columns: int) -> Tensor:
    """Return what ``pack`` packed, (rows, columns)."""
    return torch.stack([packed >> 4, packed & 15], dim=2).flatten(1)[:, :columns]


def quantize(weight: Tensor, levels: Tensor, block_size: int = 64) -> QuantizedWeight:
    """Cut each row into blocks, divide each block by its largest magnitude, and keep of
    each number only which level is nearest (arXiv 2305.14314, Eq. 1 and 2).

    Args:
        weight: (out, in), of floating-point numbers. A block of zeros has the scale 0
            and stays zero.
        levels: 2 to 256 numbers from −1 to 1, ascending, such as ``nf4_levels()``.
        block_size: how many weights share a scale. What a row has left over is a block
            of its own.

    Raises:
        TypeError: ``weight`` isn't a matrix of floating-point numbers.
        ValueError: it holds NaN or infinity, ``levels`` aren't such, or ``block_size``
            is below 1.
    """
    check_quantizable(weight, levels, block_size)
    columns = weight.shape[1]
    block_size = min(block_size, columns or 1)
    blocks = F.pad(weight.detach(), (0, -columns % block_size))
    blocks = blocks.unflatten(1, (-1, block_size))
    scales = blocks.abs().amax(dim=2)
    # A block of zeros has the scale 0, and 0/0 is no number.
    divisors = scales.masked_fill(scales == 0, 1).unsqueeze(2)
    shares = blocks.to(torch.promote_types(weight.dtype, torch.float32)) / divisors
    between = ((levels[:-1] + levels[1:]) / 2).to(shares)
    codes = torch.bucketize(shares, between, out_int32=True).to(torch.uint8)
    codes = codes.flatten(1)[:, :columns].contiguous()
    codes = pack(codes) if len(levels) <= 16 else codes
    return QuantizedWeight(codes, scales, levels, block_size, columns)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """Return the weight that the codes stand for, (out, in), in the dtype of the
    scales: each level times the scale of its block.
    """
    codes, scales, levels, block_size, columns = quantized
    codes = unpack(codes, columns) if len(levels) <= 16 else codes
    # Half precision would round the levels first and their products again.
    wide = torch.promote_types(scales.dtype, torch.float32)
    levels = levels.to(codes.device, wide)
    # levels[codes] is the same, and takes twice as long.
    values = levels.index_select(0, codes.flatten().int()).view(codes.shape)
    values *= scales.repeat_interleave(block_size, dim=1)[:, :columns]
    return values.to(scales.dtype)


def check_quantizable(weight: Any, levels: Any, block_size: Any) -> None:
    """Refuse what ``quantize`` can't quantise."""
    check_whole_number("block_size", block_size, minimum=1)
    if check_matrix("weight", weight).dtype not in _WHOLE:
        raise TypeError(
            "weight must hold floating-point numbers of 16 to 64 bits; got "
            f"{weight.dtype}"
        )
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(
            "weight holds NaN or infinite numbers, which have no scale; did the training diverge?"
        )
    if not isinstance(levels, Tensor):
        raise TypeError(f"levels must be a tensor; got {type(levels).__name__}")
    if (
        levels.dim() != 1
        or not 2 <= len(levels) <= 256
        or not levels.is_floating_point()
        or not (levels.abs() <= 1).all()
        or not (levels.diff() > 0).all()
    ):
        raise ValueError(
            "levels must be 2 to 256 floating-point numbers from -1 to 1, ascending; got "
            f"shape {tuple(levels.shape)}, {levels.dtype}"
        )


class DequantizedProduct(torch.autograd.Function):
    """x·Wᵀ + b for a quantised W, which is formed in the forward pass, forgotten, and
    formed again in the backward pass: what autograd keeps is the codes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *quantized: Any) -> Tensor:
        """Map x (…, in) to (…, out)."""
        codes, scales, *ctx.others = quantized
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantize(QuantizedWeight(*quantized)), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the bias; the codes have none."""
        (to_y,) = gradients
        W = dequantize(QuantizedWeight(*ctx.saved_tensors, *ctx.others))
        to_x = to_y @ W.to(to_y.dtype) if ctx.needs_input_grad[0] else None
        to_bias = to_y.sum_to_size(len(W)) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None, None, None, None, None


class DequantizedWeight(LazyWeight):
    """The weight of a quantised layer, formed for those who compute with it. A product
    with it, ``F.linear(x, weight)``, is a ``DequantizedProduct``.

    What shares its memory, such as a row or ``weight.data``, is one as well, but for
    the codes.
    """

    quantized: QuantizedWeight | None = None

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse a change in place, which the codes wouldn't see."""
        if function is F.linear and torch.is_grad_enabled() and len(args) > 1:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            if type(weight) is cls and type(x) is Tensor and weight.quantized:
                return DequantizedProduct.apply(x, bias, *weight.quantized)
        changed = args[0] if _is_in_place(function, args) else (kwargs or {}).get("out")
        if type(changed) is cls:
            raise RuntimeError(
                "the weight of a quantised layer is computed from its codes, which a "
                "change in place wouldn't reach. Change the weight before it is "
                "quantised, or call dequantize_linear_layers(model) first"
            )
        result = super().__torch_function__(function, types, args, kwargs)
        if type(result) is Tensor and any(
            type(arg) is cls and _share_memory(arg._formed, result) for arg in args
        ):
            return cls(result, lambda: result, False)
        return result


def _share_memory(one: Tensor | None, other: Tensor) -> bool:
    if one is None or other.layout != torch.strided:
        return False
    places = one.untyped_storage().data_ptr(), other.untyped_storage().data_ptr()
    # Without numbers, as on the meta device, the place is 0.
    return places[0] == places[1] != 0


def _is_in_place(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    name = getattr(function, "__name__", "")
    if name == "requires_grad_":
        # What shares its memory must not become a parameter.
        return args[1:] != (False,) or getattr(args[0], "quantized", args) is None
    return name in ("__setitem__", "__set__") or (
        # add_ and __iadd__, and not is_floating_point or __init__.
        (name.endswith("_") and not name.endswith("__"))
        or (name.startswith("__i") and name[3:-2] in _OPERATORS)
    )


_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


class KeepsCodes(nn.Module):
    """What a quantised linear layer answers besides its forward pass: sizes, bias,
    weight, and what may be loaded into it. It is frozen from the start.

    A class on it registers the buffers ``codes`` and ``scales`` and has as forward
    x·Wᵀ + b of ``weight``, and nothing else, since DoRA and the merged forms read the
    weight and never call the layer.

    Args:
        linear: the layer. Its bias is kept, not copied, and frozen here.
        levels: ``"nf4"``, ``"int4"`` or ``"int8"``.
        block_size: how many weights share a scale.

    Raises:
        TypeError: ``linear`` isn't an ``nn.Linear`` that computes x·Wᵀ + b of its
            weight, in floating-point numbers.
        ValueError: it has no shape yet or holds NaN or infinity, or ``levels`` or
            ``block_size`` aren't such.
    """

    codes: Tensor
    scales: Tensor
    # What the weight comes from, for those who ask whether it changed.
    weight_comes_from: ClassVar[tuple[str, ...]] = ("codes", "scales")
    # The forward of the class that stands on this one, for those who ask whether a
    # layer computes anything besides.
    formula: ClassVar[Any]

    def __init_subclass__(cls) -> None:
        if KeepsCodes in cls.__bases__:
            cls.formula = cls.forward

    def __init__(self, linear: nn.Linear, levels: str, block_size: int) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"linear must be an nn.Linear; got {type(linear).__name__}"
                + (", which is quantised already" if is_quantized(linear) else "")
            )
        if isinstance(linear.weight, nn.UninitializedParameter):
            raise ValueError(
                f"linear ({type(linear).__name__}) has no shape yet: pass one batch "
                "through the model first"
            )
        check_weight_is_all(linear)
        self.level_name = check_one_of("levels", levels, LEVELS)
        self.block_size = check_whole_number("block_size", block_size, minimum=1)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias = linear.bias
        # The same numbers, frozen like the weight.
        self.bias = None if bias is None else nn.Parameter(bias.detach(), False)
        self.train(linear.training)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as codes.

        Raises:
            RuntimeError: the codes aren't whole numbers any more, or the scales are to
                be trained, which they have no gradient for.
            ValueError: the levels, under a name of one's own, aren't in ``LEVELS``.
        """
        codes, scales = self.codes, self.scales
        if codes.dtype != torch.uint8:
            raise RuntimeError(
                f"codes must be uint8; got {codes.dtype}. Convert a quantised layer with "
                ".to(dtype), and not with .type(dtype)"
            )
        if scales.requires_grad:
            raise RuntimeError(
                "the scales of a quantised layer can't be trained: they get no gradient"
            )
        levels = LEVELS[check_one_of("levels", self.level_name, LEVELS)]
        # No block is longer than a row.
        size = min(self.block_size, self.in_features or 1)
        return QuantizedWeight(codes, scales, levels, size, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The weight that the codes stand for, (out, in), without a gradient. It is
        formed for those who compute with it, and isn't kept.
        """
        quantized = self.quantized
        if is_followed():
            return dequantize(quantized)
        like = self.scales.new_empty(()).expand(self.out_features, self.in_features)
        weight = DequantizedWeight(like, lambda: dequantize(quantized), False)
        weight.quantized = quantized
        return weight

    def extra_repr(self) -> str:
        """Return the sizes, and how the weight is quantised."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, levels={self.level_name!r}, "
            f"block_size={self.block_size}"
        )

    def get_extra_state(self) -> Tensor:
        """Return what the codes stand for, as a text's bytes."""
        text = f"{self.level_name} {self.block_size}"
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing, since what is loaded is compared before."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: Any
    ) -> None:
        if error := self._cannot_load(state_dict, prefix):
            others[-1].append(error)
            return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _cannot_load(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Return why a state_dict can't be loaded, also not with strict=False; None if
        it can.
        """
        if f"{prefix}weight" in state_dict:
            return (
                f"{prefix}weight isn't quantised, and this layer is: load it into the "
                "plain model and quantise that"
            )
        parts = ("codes", "scales", "_extra_state")
        found = [part for part in parts if f"{prefix}{part}" in state_dict]
        if found and len(found) < len(parts):
            return (
                f"of {', '.join(prefix + part for part in parts)} there is only "
                f"{', '.join(found)}, and each means nothing without the others"
            )
        if not found:
            return None
        format_ = state_dict[f"{prefix}_extra_state"]
        if not torch.equal(format_.to("cpu"), self.get_extra_state()):
            return (
                f"{prefix}codes are quantised as {bytes(format_.tolist()).decode()!r}, "
                f"and this layer as '{self.level_name} {self.block_size}' (levels and "
                "block size)"
            )
        codes = state_dict[f"{prefix}codes"]
        if codes.dtype != torch.uint8:
            return f"{prefix}codes must be uint8; got {codes.dtype}"
        return None


class QuantizedLinear(KeepsCodes):
    """A linear layer of which only codes and scales are kept: y = xWᵀ + b with a W that
    is formed when it is needed (arXiv 2305.14314, Eq. 5, without double quantisation).

    With NF4 and blocks of 64 a float32 weight takes 4.5 bits a number instead of 32:
    half a byte for its code, and 4 bytes for the scale of each block. It isn't an
    ``nn.Linear``, because its weight can't be trained or changed, and is no parameter.

    Args:
        linear: the layer, which isn't changed. Its bias is kept, not copied, and is
            frozen here.
        levels: ``"nf4"``, or evenly spaced ``"int4"`` or ``"int8"``.
        block_size: how many weights of a row share a scale.

    Attributes:
        codes: see ``QuantizedWeight``, a buffer, uint8 in whatever dtype the layer is.
        scales: a buffer in the dtype of the weight. Converting the layer rounds them.

    Raises:
        TypeError, ValueError: see ``KeepsCodes`` and ``quantize``.
    """

    def __init__(
        self, linear: nn.Linear, levels: str = "nf4", block_size: int = 64
    ) -> None:
        super().__init__(linear, levels, block_size)
        quantized = quantize(linear.weight, LEVELS[levels], block_size)
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scales", quantized.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (…, in) to y of shape (…, out)."""
        return DequantizedProduct.apply(x, self.bias, *self.quantized)


def is_quantized(module: Any) -> bool:
    """Tell whether ``module`` is a linear layer that keeps codes."""
    return isinstance(module, KeepsCodes)
