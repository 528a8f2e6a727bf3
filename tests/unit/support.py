"""What the unit tests share: layers as training leaves them, and NumPy formulas to hold
them against."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from lowrank_utils.data import Digits
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged

LORA = [LinearWithLoRA, LinearWithLoRAMerged]
DORA = [LinearWithDoRA, LinearWithDoRAMerged]
ALL = LORA + DORA

every_wrapper = pytest.mark.parametrize("wrapper", ALL)
every_dora_wrapper = pytest.mark.parametrize("wrapper", DORA)

# The wrappers as one can configure them: LoRA has no norm to detach.
every_variant = pytest.mark.parametrize(
    ("wrapper", "options"),
    [(w, {}) for w in LORA]
    + [(w, {"detach_norm": detach}) for w in DORA for detach in (True, False)],
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64):
    """Normal numbers that depend on nothing but ``seed``: they are drawn in float64 and
    then rounded."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def linear_layer(in_features=7, out_features=5, bias=True, dtype=torch.float64, seed=0):
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(out_features, in_features, seed=seed))
        if bias:
            linear.bias.copy_(normal(out_features, seed=seed + 1))
    return linear


def move(adapter, seed=0):
    """Put an adapter where training could have left it: A and B random, m longer,
    shorter, negative and zero."""
    with torch.no_grad():
        adapter.lora.A.copy_(normal(*adapter.lora.A.shape, seed=seed + 2))
        adapter.lora.B.copy_(normal(*adapter.lora.B.shape, seed=seed + 3))
        if hasattr(adapter, "m"):
            factors = normal(*adapter.m.shape, seed=seed + 4).to(adapter.m.dtype)
            adapter.m.mul_(1 + factors)
            adapter.m[0] = -adapter.m[0].abs()
            if len(adapter.m) > 2:
                adapter.m[1] = 0
    return adapter


def moved(wrapper, linear=None, rank=3, alpha=1.7, seed=0, **options):
    """Return a moved adapter; by default 7 inputs and 5 outputs, so that no axis can be
    taken for another."""
    linear = linear_layer(seed=seed) if linear is None else linear
    return move(wrapper(linear, rank, alpha, **options), seed)


def move_all(model):
    """Move all adapters in ``model``, each differently."""
    adapters = [module for module in model.modules() if hasattr(module, "lora")]
    assert adapters
    for index, adapter in enumerate(adapters):
        move(adapter, seed=10 * index)
    return model


def snapshot(model):
    """Return copies of all parameters and buffers by name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same_state(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name


def assert_close(actual, expected, rtol=1e-12, atol=0.0):
    """Compare element by element, relative to the largest expected element."""
    actual, expected = (torch.as_tensor(t).detach() for t in (actual, expected))
    atol += rtol * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, check_dtype=False)


def assert_equal_but_for_rounding(actual, expected):
    """Compare two ways to compute the same in one dtype: they may differ by thirty
    roundings of the largest element.

    With SSE, AVX2 and AVX-512 up to eleven were seen. A sum's rounding error goes by
    its terms, so an element where they cancel has as large a one as all others.
    """
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, rtol=30 * torch.finfo(expected.dtype).eps)


# The formulas, written once more in NumPy and float64. They use nothing of the package.


def array(tensor):
    return tensor.detach().to(torch.float64).numpy()


@dataclass
class Reference:
    """What the layer should compute, from its numbers."""

    W: np.ndarray
    b: np.ndarray
    A: np.ndarray
    B: np.ndarray
    s: float
    m: np.ndarray | None

    @classmethod
    def of(cls, adapter):
        W, bias = array(adapter.linear.weight), adapter.linear.bias
        return cls(
            W=W,
            b=np.zeros(len(W)) if bias is None else array(bias),
            A=array(adapter.lora.A),
            B=array(adapter.lora.B),
            s=float(adapter.lora.alpha),
            m=array(adapter.m) if hasattr(adapter, "m") else None,
        )

    @property
    def V(self):
        return self.W + self.s * (self.A @ self.B).T

    @property
    def norm(self):
        return np.sqrt((self.V**2).sum(axis=1))

    @property
    def c(self):
        """What each output is multiplied by; 1 for LoRA and for a zero row."""
        ones = np.ones(len(self.W))
        if self.m is None:
            return ones
        return np.divide(self.m, self.norm, out=ones, where=self.norm > 0)

    def output(self, x):
        return self.c * (x @ self.W.T + self.s * (x @ self.A @ self.B)) + self.b

    def gradients(self, x, G, detach_norm=True):
        """Return dL/d(x, W, b, A, B, m) for G = dL/dy, derived by hand from y = c ⊙
        (xVᵀ) + b."""
        u = x @ self.V.T
        to_c = (G * u).sum(axis=0)
        to_V = (G * self.c).T @ x
        if self.m is not None and not detach_norm:
            # c = m/n with n = ‖V‖, so dc/dV = −m/n² · V/n.
            to_V = to_V - (to_c * self.m / self.norm**3)[:, None] * self.V
        return {
            "x": (G * self.c) @ self.V,
            "linear.weight": to_V,
            "linear.bias": G.sum(axis=0),
            "lora.A": self.s * to_V.T @ self.B.T,
            "lora.B": self.s * self.A.T @ to_V.T,
            **({} if self.m is None else {"m": to_c / self.norm}),
        }

    def error_unit(self, x):
        """Return, per output, how large an error of one unit in the last place anywhere
        can become."""
        terms = np.abs(self.W) + abs(self.s) * (np.abs(self.A) @ np.abs(self.B)).T
        amplified = np.ones(len(self.W))
        if self.m is not None:
            amplified += np.sqrt((terms**2).sum(axis=1)) / self.norm
        return np.abs(self.c) * amplified * (np.abs(x) @ terms.T) + np.abs(self.b)


# Units in the last place that a layer may be off. In half precision the roundings of
# the intermediate results count, in float32 those of the sums of up to 20 terms too.
ALLOWED_UNITS = {torch.bfloat16: 4, torch.float16: 4, torch.float32: 16}


def tolerance(dtype):
    if dtype == torch.float64:
        return 1e-12
    return ALLOWED_UNITS[dtype] * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Case:
    """A layer and its input, small enough to read in a falsifying example."""

    in_features: int
    out_features: int
    rank: int
    alpha: float
    bias: bool
    dtype: torch.dtype
    batch: tuple[int, ...]
    seed: int

    def adapter(self, wrapper, **options):
        linear = linear_layer(
            self.in_features, self.out_features, self.bias, self.dtype, self.seed
        )
        return moved(wrapper, linear, self.rank, self.alpha, self.seed, **options)

    def x(self, number=0):
        seed = self.seed + 10 + number
        return normal(*self.batch, self.in_features, seed=seed, dtype=self.dtype)


BATCHES = [(), (0,), (1,), (4,), (2, 3), (3, 0, 2), (2, 1, 3)]


@st.composite
def cases(draw, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    in_features, out_features = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    return Case(
        in_features,
        out_features,
        rank=draw(st.integers(1, max(in_features, out_features))),
        alpha=draw(st.sampled_from([0.25, 1, 4.0, -1.7])),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        batch=draw(st.sampled_from(BATCHES)),
        seed=draw(st.integers(0, 10**6)),
    )


def blobs(count=60, features=12, classes=3, dtype=torch.float64, seed=0):
    """Return digits that are easy to learn: a cloud of points around one centre per
    class."""
    labels = torch.arange(count) % classes
    centres = 3 * normal(classes, features, seed=1000)
    points = centres[labels] + normal(count, features, seed=seed)
    return Digits(points.to(dtype), labels)
