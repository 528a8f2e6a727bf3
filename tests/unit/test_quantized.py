"""A quantised layer computes with the weight that its codes stand for, keeps nothing
else, and works wherever a plain layer does, or is refused by name.

The codes are held against loops in NumPy, and against bitsandbytes where it is
installed.
"""

import copy
import io
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from support import (
    ALL,
    array,
    assert_close,
    assert_same_state,
    every_dora_wrapper,
    every_variant,
    every_wrapper,
    linear_layer,
    move,
    move_all,
    moved,
    normal,
    snapshot,
)
from torch import nn
from torch.autograd import forward_ad

from lowrank_utils import quantized as module
from lowrank_utils.adapt import (
    count_parameters,
    dequantize_linear_layers,
    freeze_linear_layers,
    mark_only_adapters_as_trainable,
    merge_adapters,
    quantize_linear_layers,
    replace_linear_layers,
)
from lowrank_utils.adapters import AdapterBank, load_adapter, save_adapter
from lowrank_utils.comparison.controls import LinearWithGain
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged, reset_magnitudes
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged
from lowrank_utils.promises import constant_weights, frozen_weights
from lowrank_utils.quantized import (
    LEVELS,
    DequantizedProduct,
    KeepsCodes,
    QuantizedLinear,
    dequantize,
    even_levels,
    nf4_levels,
    pack,
    quantize,
    unpack,
)
from lowrank_utils.training import MultilayerPerceptron

every_kind = pytest.mark.parametrize("kind", LEVELS)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def quantized_layer(*sizes, kind="nf4", block_size=4, **options):
    return QuantizedLinear(linear_layer(*sizes, **options), kind, block_size)


def plain_layer(layer):
    """Return an nn.Linear with the weight that the codes stand for."""
    linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
    linear.weight = nn.Parameter(dequantize(layer.quantized), requires_grad=False)
    linear.bias = layer.bias
    return linear


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)
    return nn.Sequential(*layers).to(dtype)


def quantized_network(dtype=torch.float64):
    model = network(dtype)
    quantize_linear_layers(model, block_size=4)
    return model


def plain_network(model):
    plain = copy.deepcopy(model)
    dequantize_linear_layers(plain)
    return plain


X = normal(6, 7, seed=50)

# --- Levels ------------------------------------------------------------------------------------

# Appendix E of arXiv 2305.14314.
PUBLISHED = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def test_nf4s_levels_are_the_published_ones():
    # The authors computed theirs in float32.
    assert_close(nf4_levels(), torch.tensor(PUBLISHED), rtol=2e-7)
    assert nf4_levels()[[0, 7, 15]].tolist() == [-1, 0, 1]


def test_nf4s_levels_are_quantiles_of_the_normal_distribution():
    shares = norm.cdf(array(nf4_levels()) * norm.ppf(0.9677083333333333))
    for side in (shares[:8], shares[7:]):
        assert np.ptp(np.diff(side)) < 1e-7
    assert shares[7] == 0.5


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (4, 7), (8, 127)])
def test_even_levels_are_those_of_absmax_quantisation(bits, largest):
    expected = np.arange(-largest, largest + 1) / largest
    assert_close(even_levels(bits), torch.tensor(expected), rtol=1e-7)


# --- From a weight to codes, and back ---------------------------------------------------------


def reference(W, levels, block_size):
    """The same in loops: the number of each nearest level, each block's scale, and the
    weight."""
    codes, scales, values = [], [], []
    for row in W:
        for start in range(0, len(row), block_size):
            block = row[start : start + block_size]
            scale = max(abs(number) for number in block)
            scales.append(scale)
            for number in block:
                share = number / scale if scale else 0
                code = min(range(len(levels)), key=lambda i: abs(levels[i] - share))
                codes.append(code)
                values.append(levels[code] * scale)
    rows = len(W)
    return (np.reshape(part, (rows, -1)) for part in (codes, scales, values))


@every_kind
@every_dtype
@pytest.mark.parametrize(
    ("rows", "columns", "block_size"),
    [(5, 12, 4), (3, 13, 4), (4, 7, 64), (2, 9, 1), (1, 1, 64), (2, 5, 2**40)],
    ids=str,
)
def test_codes_scales_and_weight_are_those_of_loops(
    rows, columns, block_size, dtype, kind
):
    W = normal(rows, columns, seed=3, dtype=dtype)
    if columns > 4:
        W[0, :4] = 0
    quantized = quantize(W, LEVELS[kind], block_size)
    codes, scales, values = reference(array(W), array(LEVELS[kind]), block_size)
    expected = torch.tensor(codes, dtype=torch.uint8)
    if kind == "int8":
        assert torch.equal(quantized.codes, expected)
    else:
        assert quantized.codes.shape == (rows, -(-columns // 2))
        assert torch.equal(unpack(quantized.codes, columns), expected)
    assert torch.equal(quantized.scales.double(), torch.tensor(scales))
    # Rounded to the dtype once.
    assert torch.equal(dequantize(quantized), torch.tensor(values).to(dtype))


def test_a_block_that_is_longer_than_a_row_is_the_row():
    long, row = (quantized_layer(block_size=size) for size in (2**40, 7))
    assert torch.equal(long(X), row(X))


def test_two_codes_stand_in_a_byte_the_first_in_the_upper_half():
    codes = torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8)
    assert pack(codes).tolist() == [[0x12, 0x30], [0xF0, 0x90]]
    assert torch.equal(unpack(pack(codes), 3), codes)


@every_kind
def test_no_number_is_further_off_than_half_the_gap_between_two_levels(kind):
    W = normal(40, 128)
    quantized = quantize(W, LEVELS[kind], 64)
    scales = quantized.scales.repeat_interleave(64, dim=1)
    errors = (dequantize(quantized) - W).abs() / scales
    half = LEVELS[kind].diff().max() / 2
    assert 0.9 * half < errors.max() <= half * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e37])
def test_tiny_and_huge_weights_get_the_same_codes(size):
    W = normal(4, 8, dtype=torch.float32)
    same = quantize(W.double() * size, nf4_levels(), 4).codes
    assert torch.equal(
        quantize((W.double() * size).float(), nf4_levels(), 4).codes, same
    )


def test_it_is_what_bitsandbytes_computes():
    functional = pytest.importorskip("bitsandbytes.functional")
    W = normal(32, 256, dtype=torch.float32)
    packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    ours = quantize(W, nf4_levels(), 64)
    assert torch.equal(ours.codes, packed.view(32, 128))
    assert torch.equal(ours.scales, state.absmax.view(32, 4))
    theirs = functional.dequantize_4bit(packed, state)
    assert_close(dequantize(ours), theirs, rtol=2e-7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], nf4_levels()), TypeError, "weight must be a tensor; got list"),
        ((torch.ones(3), nf4_levels()), ValueError, "weight must be a matrix"),
        ((torch.ones(2, 2).int(), nf4_levels()), TypeError, "got torch.int32"),
        ((torch.ones(2, 2).to(torch.float8_e4m3fn), nf4_levels()), TypeError, "8_e4m"),
        ((torch.tensor([[1, torch.nan]]), nf4_levels()), ValueError, "holds NaN"),
        ((torch.tensor([[1, torch.inf]]), nf4_levels()), ValueError, "infinite"),
        ((torch.ones(2, 2), nf4_levels(), 0), ValueError, "block_size must be"),
        ((torch.ones(2, 2), nf4_levels(), 2.5), TypeError, "block_size must be"),
        ((torch.ones(2, 2), "nf4"), TypeError, "levels must be a tensor; got str"),
        ((torch.ones(2, 2), nf4_levels().flip(0)), ValueError, "ascending"),
        ((torch.ones(2, 2), 2 * nf4_levels()), ValueError, "from -1 to 1"),
        ((torch.ones(2, 2), torch.linspace(-1, 1, 257)), ValueError, "2 to 256"),
        ((torch.ones(2, 2), torch.tensor([-1, 0, 1])), ValueError, "floating"),
    ],
    ids=str,
)
def test_what_cannot_be_quantised_is_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(*arguments)


def test_bits_that_are_none_are_refused():
    for bits, error in ((1, ValueError), (9, ValueError), (4.0, TypeError)):
        with pytest.raises(error, match="bits must be a whole number, 2 to 8"):
            even_levels(bits)


# --- The layer --------------------------------------------------------------------------------


def results(function, layer, x):
    """Return the output and the gradients of x and of all that is trained."""
    own = x.clone().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = function(own)
    return y, *torch.autograd.grad(y.double().square().sum(), [own, *trained])


@every_kind
@every_dtype
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (0, 7), (1, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_has_the_bits_of_a_plain_layer_with_the_same_weight(
    kind, dtype, shape, bias
):
    layer = quantized_layer(kind=kind, dtype=dtype, bias=bias)
    plain = plain_layer(layer)
    layer.requires_grad_(True)
    assert plain.bias is layer.bias
    x = normal(*shape, dtype=dtype)
    ours, theirs = results(layer, layer, x), results(plain, layer, x)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == its.dtype
        # A sum over the batch may be taken in another order.
        assert_close(mine, its, rtol=4 * torch.finfo(dtype).eps)
    assert torch.equal(ours[0], theirs[0])


def test_its_gradients_are_those_of_differences():
    layer = quantized_layer().requires_grad_(True)

    def product(x, bias):
        return DequantizedProduct.apply(x, bias, *layer.quantized)

    arguments = normal(3, 7).requires_grad_(), layer.bias
    assert torch.autograd.gradcheck(product, arguments)
    assert torch.autograd.gradgradcheck(product, arguments)


def kept_bytes(function):
    """Return how many bytes of floating-point numbers autograd keeps for a backward
    pass, each tensor counted once, and what the function returns."""
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point():
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize("size", [256, 600, 2048], ids=str)
@pytest.mark.parametrize(
    "wrapper", [None, LinearWithLoRA, LinearWithDoRA, LinearWithGain]
)
def test_autograd_keeps_no_weight(wrapper, size):
    linear = nn.Linear(size, size)
    layer = QuantizedLinear(linear)
    if wrapper is not None:
        layer = wrapper(layer, 2, 1.0)
    x = torch.randn(2, size, requires_grad=True)
    kept, y = kept_bytes(lambda: layer(x))
    assert kept < linear.weight.nbytes / 4
    held = kept_bytes(lambda: linear.requires_grad_(False)(x))[0]
    assert held >= linear.weight.nbytes
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_it_keeps_codes_and_scales_alone():
    linear = nn.Linear(784, 128)
    layer = QuantizedLinear(linear)
    tensors = [*layer.parameters(), *layer.buffers()]
    assert [t.nbytes for t in tensors] == [512, 128 * 392, 128 * 13 * 4]
    assert not any(t.requires_grad for t in tensors)
    assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert linear.bias.requires_grad
    assert all(
        isinstance(value, (int, str, bool)) or not torch.is_tensor(value)
        for value in vars(layer).values()
    )


def test_its_weight_looks_like_one_and_is_formed_when_it_is_needed(monkeypatch):
    layer = quantized_layer()
    formed = []
    monkeypatch.setattr(
        module,
        "dequantize",
        lambda quantized: formed.append(1) or dequantize(quantized),
    )
    weight = layer.weight
    assert (weight.shape, weight.dtype) == ((5, 7), torch.float64)
    assert not weight.requires_grad
    assert not formed
    assert torch.equal(weight + 0, dequantize(layer.quantized))
    assert formed == [1]


# Python makes a @= b of a @ b.
IN_PLACE = [
    getattr(operator, name)
    for name in (
        *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand"),
        *("ior", "ixor", "ilshift", "irshift"),
    )
]


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.__setitem__(0, 1),
        lambda weight: weight.__iadd__(1),
        lambda weight: nn.init.zeros_(weight),
        lambda weight: weight.requires_grad_(),
        lambda weight: setattr(weight, "data", torch.ones(5, 7)),
        lambda weight: weight.data.mul_(2),
        lambda weight: nn.init.zeros_(weight.detach()),
        lambda weight: weight[3].zero_(),
        lambda weight: weight.T[2].add_(1),
        lambda weight: torch.mul(weight, 2, out=weight),
        lambda weight: nn.Parameter(weight, requires_grad=False),
        *(
            lambda weight, change=change: change(weight, torch.ones(5, 7))
            for change in IN_PLACE
        ),
    ],
    ids=[
        *("mul_", "item", "+=", "init", "requires_grad_", "data", "data.mul_"),
        *("detach", "row", "column", "out", "parameter"),
        *(change.__name__ for change in IN_PLACE),
    ],
)
def test_a_change_of_its_weight_in_place_is_refused(change):
    layer = quantized_layer()
    with pytest.raises(RuntimeError) as caught:
        change(layer.weight)
    assert str(caught.value) == (
        "the weight of a quantised layer is computed from its codes, which a change in "
        "place wouldn't reach. Change the weight before it is quantised, or call "
        "dequantize_linear_layers(model) first"
    )
    layer.weight.requires_grad_(False)
    # What shares no memory with it is a tensor like any other.
    assert type(layer.weight.clone().mul_(2)) is torch.Tensor
    assert layer.weight.to_sparse().to_dense().mul_(0).sum() == 0
    assert_close(F.linear(X, layer.weight.data), F.linear(X, layer.weight))


@every_kind
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda layer: layer.type(torch.float64), RuntimeError, r"with \.to\(dtype\)"),
        (
            lambda layer: layer.scales.requires_grad_(),
            RuntimeError,
            "^the scales of a quantised layer can't be trained: they get no gradient$",
        ),
        (
            lambda layer: setattr(layer, "scales", nn.Parameter(layer.scales)),
            RuntimeError,
            "can't be trained",
        ),
        (
            lambda layer: setattr(layer, "level_name", "mine"),
            ValueError,
            "levels must be one of .*got 'mine'",
        ),
    ],
    ids=["type", "scales", "parameter", "levels"],
)
def test_what_it_cannot_compute_with_is_refused(kind, change, error, message):
    layer = quantized_layer(kind=kind)
    adapter = moved(LinearWithDoRAMerged, layer)
    change(layer)
    for each in (layer, adapter):
        with pytest.raises(error, match=message):
            each(X)


def test_its_weight_cannot_be_replaced():
    layer = quantized_layer()
    with pytest.raises(KeyError, match="weight"):
        layer.weight = nn.Parameter(torch.ones(5, 7))


@pytest.mark.parametrize("block_size", [64, 3])
def test_it_follows_to_another_dtype_with_the_same_codes(block_size):
    layer = quantized_layer(block_size=block_size, dtype=torch.float32)
    before = layer.codes.clone()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        other = copy.deepcopy(layer).to(dtype)
        assert other.codes.dtype == torch.uint8
        assert torch.equal(other.codes, before)
        assert other.weight.dtype == dtype
        assert other(X.to(dtype)).dtype == dtype
        # The scale is rounded, and then the number.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert_close(other.weight, layer.weight, rtol=2 * eps)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(X.bfloat16())


def test_autocast_computes_as_with_a_plain_layer():
    layer = quantized_layer(dtype=torch.float32)
    plain = plain_layer(layer)
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(layer, layer, x), results(plain, layer, x)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.dtype == its.dtype
        assert_close(mine, its, rtol=2**-7)
    assert ours[0].dtype == torch.bfloat16


def test_copies_and_pickles_answer_alike():
    layer = quantized_layer()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    )
    for other in copies:
        assert torch.equal(other(X), layer(X))
        assert other.codes.data_ptr() != layer.codes.data_ptr()


def test_it_works_on_the_meta_device_and_is_filled_there():
    layer = quantized_layer()
    with torch.device("meta"):
        empty = QuantizedLinear(nn.Linear(7, 5, dtype=torch.float64), "nf4", 4)
    assert empty(X.to("meta")).shape == (6, 5)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(X), layer(X))


@pytest.mark.parametrize("wrapper", [None, *ALL])
def test_it_is_compiled(wrapper):
    layer = quantized_layer()
    if wrapper is not None:
        layer = moved(wrapper, layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for mine, its in zip(
        results(compiled, layer, X), results(layer, layer, X), strict=True
    ):
        assert_close(mine, its)


@pytest.mark.filterwarnings("ignore")
def test_transformed_it_is_right_or_refused():
    layer = quantized_layer()
    dora = moved(LinearWithDoRA, layer)
    gradient = torch.func.grad(lambda x: dora(x).square().sum())
    assert_close(torch.func.vmap(gradient)(X), results(dora, dora, X)[1])
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vmap(layer)(X)
    trace = torch.jit.trace(dora, (X,))
    assert_close(trace(2 * X), dora(2 * X))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(dora(forward_ad.make_dual(X, X))).tangent
    assert_close(tangent, dora(X) - layer.bias)


class OnesOwn(KeepsCodes):
    """What a reader of notebook 10 writes."""

    def __init__(self, linear, levels="nf4", block_size=64):
        super().__init__(linear, levels, block_size)
        codes, scales, *_ = quantize(linear.weight, LEVELS[levels], block_size)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Doubled(OnesOwn):
    """A layer that computes more than its weight says."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_of_ones_own_is_taken_and_one_that_computes_more_is_not():
    linear = linear_layer()
    own = OnesOwn(linear)
    assert torch.equal(own(X), QuantizedLinear(linear)(X))
    assert torch.equal(
        moved(LinearWithDoRA, own)(X), moved(LinearWithDoRA, QuantizedLinear(linear))(X)
    )
    assert_close(moved(LinearWithLoRA, Doubled(linear)).linear(X), 2 * own(X))
    for wrapper in (LinearWithLoRAMerged, LinearWithDoRA, LinearWithDoRAMerged):
        with pytest.raises(TypeError, match="has a forward of its own"):
            wrapper(Doubled(linear), 2, 1.0)


def hooked():
    linear = linear_layer()
    linear.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    return linear


@pytest.mark.parametrize(
    ("linear", "options", "error", "message"),
    [
        (
            lambda: nn.Conv1d(2, 2, 1),
            {},
            TypeError,
            "^linear must be an nn.Linear; got Conv1d$",
        ),
        (
            quantized_layer,
            {},
            TypeError,
            "^linear must be an nn.Linear; got QuantizedLinear, which is quantised already$",
        ),
        (lambda: LinearWithLoRA(linear_layer(), 1, 1.0), {}, TypeError, "got LinearW"),
        (
            lambda: nn.LazyLinear(3),
            {},
            ValueError,
            r"^linear \(LazyLinear\) has no shape yet: pass one batch through the model "
            "first$",
        ),
        (hooked, {}, TypeError, "forward hooks"),
        (
            linear_layer,
            {"levels": "fp4"},
            ValueError,
            "^levels must be one of 'int4', 'int8', 'nf4'.*; got 'fp4'$",
        ),
        (linear_layer, {"block_size": 0}, ValueError, "block_size must be"),
        (linear_layer, {"block_size": True}, TypeError, "block_size must be"),
    ],
)
def test_what_is_no_layer_to_quantise_is_refused(linear, options, error, message):
    with pytest.raises(error, match=message):
        QuantizedLinear(linear(), **options)


def test_what_it_says_of_itself():
    layer = QuantizedLinear(linear_layer(bias=True))
    sizes = f"in_features={layer.in_features}, out_features={layer.out_features}"
    kind = "levels='nf4', block_size=64)"
    assert repr(layer) == f"QuantizedLinear({sizes}, bias=True, {kind}"
    bare = QuantizedLinear(linear_layer(bias=False))
    assert repr(bare) == f"QuantizedLinear({sizes}, bias=False, {kind}"


def test_a_block_of_one_weight_keeps_its_magnitude():
    linear = linear_layer()
    layer = QuantizedLinear(linear, block_size=1)
    assert_close(layer.weight + 0, linear.weight.detach(), rtol=1e-6)


def test_levels_and_what_is_stored_are_on_the_cpu_whatever_the_default_device():
    layer = quantized_layer()
    with torch.device("meta"):
        assert nf4_levels().device.type == "cpu"
        assert even_levels(4).device.type == "cpu"
        state = layer.get_extra_state()
    assert (state.device.type, state.dtype) == ("cpu", torch.uint8)
    assert (layer.to("meta").weight + 0).device.type == "meta"


def test_a_product_knows_its_weight_by_name_too():
    layer = quantized_layer()
    assert_close(F.linear(X, weight=layer.weight), F.linear(X, layer.weight))
    assert_close(F.linear(input=X, weight=layer.weight), F.linear(X, layer.weight))


# --- What is stored ---------------------------------------------------------------------------


def test_a_state_dict_gives_the_same_layer_again(tmp_path):
    layer, other = quantized_layer(), quantized_layer(seed=5)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(X), layer(X))
    assert all(torch.is_tensor(value) for value in layer.state_dict().values())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("0.scales"),
            "of 0.codes, 0.scales, 0._extra_state there is only codes, _extra_state, and "
            "each means nothing without the others",
        ),
        (lambda state: state.pop("0.codes"), "there is only scales, _extra_state"),
        (lambda state: state.pop("0._extra_state"), "there is only codes, scales"),
        (
            lambda state: state.update(quantized_state(kind="int4")),
            r"0.codes are quantised as 'int4 4', and this layer as 'nf4 4' \(levels and "
            r"block size\)",
        ),
        (
            lambda state: state.update(quantized_state(block_size=5)),
            "quantised as 'nf4 5'",
        ),
        (
            lambda state: state.update({"0.weight": torch.ones(5, 7)}),
            "0.weight isn't quantised, and this layer is: load it into the plain model "
            "and quantise that",
        ),
        (
            lambda state: state.update({"0.codes": state["0.codes"].float()}),
            "codes must be uint8; got torch.float32",
        ),
    ],
    ids=["no scales", "no codes", "no format", "levels", "blocks", "plain", "dtype"],
)
def test_half_of_a_layer_or_another_kind_is_not_loaded(change, message, strict):
    model = nn.Sequential(quantized_layer())
    before = snapshot(model)
    state = quantized_state()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=strict)
    assert_same_state(model, before)


def quantized_state(**options):
    return nn.Sequential(quantized_layer(seed=7, **options)).state_dict()


# --- With adapters ----------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("sizes", [(7, 5), (520, 512)], ids=["small", "factored norm"])
def test_an_adapter_on_it_is_that_on_a_plain_layer_with_the_same_weight(
    wrapper, options, sizes
):
    layer = quantized_layer(*sizes)
    ours = moved(wrapper, layer, **options)
    theirs = moved(wrapper, plain_layer(layer), **options)
    x = normal(6, sizes[0])
    for mine, its in zip(
        results(ours, ours, x), results(theirs, theirs, x), strict=True
    ):
        assert_close(mine, its)
    assert_close(ours.weight, theirs.weight)
    assert not torch.allclose(ours(x), layer(x))


@pytest.mark.parametrize("detach_norm", [True, False])
def test_a_large_one_reads_its_weight_once_for_the_product_and_the_norm(
    monkeypatch, detach_norm
):
    layer = QuantizedLinear(nn.Linear(2048, 2048))
    formed = []
    monkeypatch.setattr(
        module,
        "dequantize",
        lambda quantized: formed.append(1) or dequantize(quantized),
    )
    dora = LinearWithDoRA(layer, 2, 1.0, detach_norm=detach_norm)
    with torch.no_grad():
        dora.lora.B.normal_(std=0.01)
    x = torch.randn(4, 2048, requires_grad=True)
    y = LinearWithDoRAMerged.forward(dora, x)
    with frozen_weights(dora):
        dora(x)
        formed.clear()
        assert_close(dora(x), y, rtol=1e-5)
        if detach_norm:
            assert len(formed) == 1
            dora(x).sum().backward()
            assert len(formed) == 3


@every_dora_wrapper
def test_a_promise_keeps_its_norms_and_sees_other_codes(wrapper, monkeypatch):
    dora = moved(wrapper, quantized_layer()).eval()
    other = moved(wrapper, quantized_layer(seed=9)).eval()
    formed = []
    with torch.no_grad(), constant_weights(dora):
        first = dora(X)
        monkeypatch.setattr(
            module,
            "dequantize",
            lambda quantized: formed.append(1) or dequantize(quantized),
        )
        assert torch.equal(dora(X), first)
        assert len(formed) == 1
        dora.load_state_dict(other.state_dict())
        assert_close(dora(X), other(X))
        # Either of the two alone, with A, B and m as they were.
        for part in (dora.linear.scales, dora.linear.codes):
            part.copy_(part.flip(0))
            assert_close(dora(X), copy.deepcopy(dora)(X))


@every_dora_wrapper
def test_codes_that_change_under_an_untrained_dora_are_noticed(wrapper):
    dora, other = wrapper(quantized_layer(), 2, 1.0), quantized_layer(seed=9)
    dora(X)
    dora.linear.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="changed after its m was computed"):
        dora(X)
    reset_magnitudes(dora)
    assert_close(dora(X), other(X))


@every_dora_wrapper
def test_codes_are_not_loaded_without_their_m(wrapper):
    dora = wrapper(quantized_layer(), 2, 1.0)
    other = wrapper(quantized_layer(seed=9), 2, 1.0).state_dict()
    del other["m"]
    with pytest.raises(RuntimeError, match="m was computed from the weight"):
        dora.load_state_dict(other, strict=False)


@every_dora_wrapper
@pytest.mark.parametrize("start", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("end", [torch.float32, torch.float64, torch.bfloat16])
def test_another_dtype_is_no_other_weight(wrapper, start, end):
    layer = quantized_layer(70, 50, dtype=start)
    dora = wrapper(layer, 2, 1.0)
    bank = AdapterBank(nn.Sequential(copy.deepcopy(layer)))
    bank.add("anna", nn.Sequential(copy.deepcopy(dora)))
    bank.activate("anna")
    x = normal(4, 70)
    eps = max(torch.finfo(dtype).eps for dtype in (start, end))
    for model in (dora, bank.model):
        y = model(x.to(start))
        assert_close(model.to(end)(x.to(end)), y, rtol=8 * eps)
    with torch.no_grad():
        for scales in (layer.scales, bank.model[0].linear.scales):
            scales.mul_(1.5)
    for model in (dora, bank.model):
        with pytest.raises(RuntimeError, match="changed"):
            model(x.to(end))


@every_wrapper
def test_an_adapter_learns_on_it_and_the_codes_stay(wrapper):
    layer = quantized_layer()
    before = snapshot(layer)
    adapter = wrapper(layer, 2, 1.0)
    freeze_linear_layers(adapter)
    trained = [name for name, p in adapter.named_parameters() if p.requires_grad]
    assert all(name in ("lora.A", "lora.B", "m") for name in trained)
    target = normal(6, 5, seed=8)
    optimizer = torch.optim.Adam(
        [p for p in adapter.parameters() if p.requires_grad], 0.02
    )
    losses = []
    for _ in range(80):
        loss = (adapter(X) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert_same_state(layer, before)


def test_beside_a_layer_in_half_precision_an_adapter_is_wider():
    layer = quantized_layer(dtype=torch.bfloat16)
    for wrapper in ALL:
        adapter = move(wrapper(layer, 2, 1.0))
        assert adapter.lora.A.dtype == torch.float32
        assert adapter(X.bfloat16()).dtype == torch.bfloat16


# --- In a model -------------------------------------------------------------------------------


def test_all_layers_or_those_of_a_pattern_are_replaced():
    model = network()
    assert quantize_linear_layers(model, "int8", 3, targets=["0", "4"]) == ["0", "4"]
    kinds = [type(layer) for layer in model]
    assert kinds[::2] == [QuantizedLinear, nn.Linear, QuantizedLinear]
    assert (model[0].level_name, model[0].block_size) == ("int8", 3)
    assert quantize_linear_layers(model, targets="2") == ["2"]
    assert torch.equal(
        model[0].weight, dequantize(quantize(network()[0].weight, even_levels(8), 3))
    )


def test_a_layer_used_twice_is_one_quantised_layer_in_both_places():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert quantize_linear_layers(model) == ["0", "2"]
    assert model[0] is model[2]
    assert count_parameters(model).frozen == 20
    dequantize_linear_layers(model)
    assert model[0] is model[2]


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (quantized_network, ValueError, "already quantised: 0, 2, 4"),
        (
            lambda: nn.Sequential(LinearWithLoRA(linear_layer(), 1, 1.0)),
            ValueError,
            "already adapted: 0. Quantise the plain model",
        ),
        (linear_layer, ValueError, r"itself a Linear.*QuantizedLinear\(linear\)"),
        (lambda: nn.Sequential(nn.ReLU()), ValueError, "has no linear layers"),
        (lambda: "model", TypeError, "model must be an nn.Module; got str"),
    ],
    ids=["quantised", "adapted", "bare", "empty", "text"],
)
def test_a_model_that_cannot_be_quantised_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        quantize_linear_layers(model())


def test_when_the_last_layer_fails_the_model_is_as_it_was():
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    before = list(model)
    with pytest.raises(ValueError, match="NaN"):
        quantize_linear_layers(model)
    assert list(model) == before


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (network, ValueError, "has no quantised layers"),
        (quantized_layer, ValueError, "model is itself a QuantizedLinear"),
        (lambda: None, TypeError, "must be an nn.Module"),
    ],
)
def test_a_model_without_quantised_layers_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        dequantize_linear_layers(model())


def test_a_layer_that_computes_more_than_its_weight_says_stays_quantised():
    hooked = quantized_layer()
    hooked.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    for layer in (hooked, Doubled(linear_layer())):
        model = nn.Sequential(quantized_layer(7, 7), LinearWithLoRA(layer, 2, 1.0))
        before = list(model.modules())
        with pytest.raises(TypeError, match=r"linear has (forward hooks|a forward of)"):
            dequantize_linear_layers(model)
        assert list(model.modules()) == before


def test_a_layer_that_two_adapters_stand_around_counts_once_and_is_not_merged():
    layer = quantized_layer(7, 7)
    model = nn.Sequential(layer, *[LinearWithLoRA(layer, 2, 1.0) for _ in range(2)])
    alone, count = count_parameters(layer), count_parameters(model)
    assert count.per_layer == {"0": (0, 56), "1": (28, 0), "2": (28, 0)}
    assert count.nbytes == alone.nbytes + 2 * 28 * 8
    with pytest.raises(ValueError, match=r"quantised: 1\.linear, 2\.linear"):
        merge_adapters(model)


@every_wrapper
def test_merging_is_refused_until_the_base_is_dequantised(wrapper):
    model = quantized_network()
    replace_linear_layers(model, wrapper, 2, 1.0)
    mark_only_adapters_as_trainable(model)
    y = move_all(model)(X)
    with pytest.raises(ValueError, match=r"quantised: 0.linear.*dequantize_linear_la"):
        merge_adapters(model)
    with pytest.raises(ValueError, match="quantised: linear"):
        merge_adapters(model[0])
    assert dequantize_linear_layers(model) == ["0.linear", "2.linear", "4.linear"]
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if "linear" in n
    )
    assert_close(model(X), y)
    assert_close(merge_adapters(model)(X), y)


def test_only_a_quantised_adapter_stands_in_the_way_of_merging():
    model = network()
    quantize_linear_layers(model, targets="0")
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, targets=["2", "4"])
    y = move_all(model)(X)
    merged = merge_adapters(model)
    assert type(merged[0]) is QuantizedLinear
    assert_close(merged(X), y)


def test_numbers_and_bytes_are_counted():
    model = MultilayerPerceptron(784, 128, 256, 10)
    plain = count_parameters(model)
    assert plain.nbytes == 4 * 136_074
    quantize_linear_layers(model)
    quantized = count_parameters(model)
    assert (quantized.trainable, quantized.frozen) == (0, plain.total)
    assert quantized.per_layer.keys() == plain.per_layer.keys()
    codes = 784 * 128 // 2 + 128 * 256 // 2 + 256 * 10 // 2
    scales = 4 * (128 * 13 + 256 * 2 + 10 * 4)
    assert quantized.nbytes == codes + scales + 4 * (128 + 256 + 10)
    replace_linear_layers(model, LinearWithLoRA, 4, 1.0)
    adapted = count_parameters(model)
    assert (adapted.trainable, adapted.frozen) == (6_248, 136_074)
    assert adapted.nbytes == quantized.nbytes + 4 * 6_248


def test_an_attention_that_reads_the_weight_gets_it():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    quantize_linear_layers(attention)
    assert type(attention.out_proj) is QuantizedLinear
    x = normal(2, 3, 8)
    with torch.no_grad():
        y = attention(x, x, x)[0]
        dequantize_linear_layers(attention)
        assert_close(attention(x, x, x)[0], y)


# --- On disk and in a bank --------------------------------------------------------------------


def adapted(model, wrapper, seed):
    other = copy.deepcopy(model)
    replace_linear_layers(other, wrapper, 2, 1.3)
    mark_only_adapters_as_trainable(other)
    torch.manual_seed(seed)
    for layer in other:
        if hasattr(layer, "lora"):
            move(layer, seed)
    return other


@pytest.mark.parametrize("wrapper", [LinearWithLoRA, LinearWithDoRA])
def test_an_adapter_is_saved_and_loaded_onto_a_quantised_base(tmp_path, wrapper):
    base = quantized_network()
    model = adapted(base, wrapper, seed=3)
    save_adapter(model, tmp_path / "adapter")
    for other in (copy.deepcopy(base), plain_network(base)):
        load_adapter(other, tmp_path / "adapter")
        assert_close(other(X), model(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_bank_on_it_answers_as_on_a_plain_base(dtype):
    base = quantized_network(dtype)
    plain = plain_network(base)
    customers = {
        "anna": adapted(base, LinearWithLoRA, seed=4),
        "ben": adapted(base, LinearWithDoRA, seed=5),
    }
    x, rtol = X.to(dtype), 8 * torch.finfo(dtype).eps
    banks = [AdapterBank(model.eval()) for model in (base, plain)]
    expected = base(x)
    for bank in banks:
        for name, model in customers.items():
            bank.add(name, model)
    for active in (["anna"], ["ben"], ["anna", "ben"]):
        ours, theirs = (_active(bank, active)(x) for bank in banks)
        assert_close(ours, theirs, rtol=rtol)
        assert not torch.allclose(ours, expected)
    rows = ["anna", None, "ben", "ben", None, "anna"]
    ours, theirs = (_rows(bank, rows, x) for bank in banks)
    assert_close(ours, theirs, rtol=rtol)
    assert_close(ours[1], expected[1], rtol=rtol)
    (bank, _), before = banks, base(x)
    bank.merge()
    assert_close(base(x), before, rtol=rtol)
    bank.restore()
    with pytest.raises(
        ValueError,
        match=r"in a bank, which reads their weights: 0, 2, 4\. Remove",
    ):
        dequantize_linear_layers(base)
    bank.remove("anna")
    bank.remove("ben")
    assert torch.equal(base(x), expected)
    assert type(base[0]) is QuantizedLinear


def _active(bank, names):
    bank.activate(*names)
    return bank.model


def _rows(bank, names, x):
    with bank.rows(names):
        return bank.model(x)


def test_a_bank_notices_codes_that_change_under_dora():
    base = quantized_network().eval()
    bank = AdapterBank(base)
    bank.add("ben", adapted(quantized_network(), LinearWithDoRA, seed=5))
    bank.activate("ben")
    base(X)
    with torch.no_grad():
        base[0].linear.scales.mul_(1.5)
    with pytest.raises(RuntimeError, match="base weight changed"):
        base(X)
