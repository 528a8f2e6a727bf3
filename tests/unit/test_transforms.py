"""What torch makes of a DoRA layer when it traces, batches, differentiates forward or
only infers shapes: the formula's numbers, below and above the size from which the norms
come from the factors."""

import pytest
import torch
from support import DORA, assert_close, linear_layer, move, moved, normal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, jacfwd, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from lowrank_utils import norms
from lowrank_utils.decompose import row_norms
from lowrank_utils.dora import LinearWithDoRA

# torch.jit, which torch uses itself at the first forward derivative, says that it is old,
# and linearize says something of its own graph. That a trace may not hold for other inputs
# is a warning too, and an error here.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]

# Out and in; the second has 2¹⁹ entries.
SIZES = [(8, 16), (512, 1024)]
DTYPES = [torch.float64, torch.float32]
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}

every_size = pytest.mark.parametrize("size", SIZES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
either_norm = pytest.mark.parametrize("detach_norm", [True, False])


def layer(size, dtype=torch.float64, **options):
    linear = linear_layer(size[1], size[0], dtype=dtype)
    made = move(LinearWithDoRA(linear, 4, 0.5, **options))
    with torch.no_grad():
        # About as long as W, so that the norms are another than W's.
        made.lora.A.mul_(0.5)
    return made


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(values):
    return {
        name: value * 1.3 + 0.1 * normal(*value.shape, seed=9).to(value.dtype)
        for name, value in values.items()
    }


def formula(values, x):
    V = values["linear.weight"] + 0.5 * (values["lora.A"] @ values["lora.B"]).T
    c = values["m"] / row_norms(V).to(x.dtype)
    return x @ (c.unsqueeze(1) * V).T + values["linear.bias"]


def inputs(size, dtype=torch.float64, seed=5):
    return normal(3, size[1], seed=seed).to(dtype)


def called(module):
    return lambda values, x: functional_call(module, values, (x,))


# --- Graphs that hold for other inputs and other weights --------------------------------


def traced_by_jit(module, x):
    trace = torch.jit.trace(module, x)

    def call(values, x):
        with torch.no_grad():
            for name, parameter in trace.named_parameters():
                parameter.copy_(values[name])
            return trace(x)

    return call


def made_by(mode):
    return lambda module, x: make_fx(called(module), tracing_mode=mode)(
        weights(module), x
    )


def exported(strict):
    def export(module, x):
        program = torch.export.export(module, (x,), strict=strict).module()
        return lambda values, x: functional_call(program, values, (x,))

    return export


TRACED = {
    "jit.trace": traced_by_jit,
    "make_fx": made_by("real"),
    "make_fx, fake": made_by("fake"),
    "make_fx, symbolic": made_by("symbolic"),
    "export": exported(strict=False),
    "export, strict": exported(strict=True),
}


@pytest.mark.parametrize("way", TRACED)
@every_size
@every_dtype
@either_norm
def test_a_graph_holds_for_other_inputs_and_weights(way, size, dtype, detach_norm):
    module = layer(size, dtype, detach_norm=detach_norm)
    graph = TRACED[way](module, inputs(size, dtype))
    values, x = changed(weights(module)), inputs(size, dtype, seed=6)
    assert_close(graph(values, x), formula(values, x), rtol=RTOL[dtype])


@pytest.mark.parametrize("gradients", [True, False])
@every_size
@every_dtype
def test_shapes_are_inferred_without_numbers(gradients, size, dtype):
    module, x = layer(size, dtype), inputs(size, dtype)
    with torch.set_grad_enabled(gradients):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(x).shape == (3, size[0])
            fake = LinearWithDoRA(nn.Linear(size[1], size[0], dtype=dtype), 4, 0.5)
        # Its tensors hold no numbers after the block either.
        assert fake(mode.from_tensor(x)).shape == (3, size[0])
        meta = layer(size, dtype).to("meta")
        assert meta(x.to("meta")).shape == (3, size[0])


# --- Batches, and derivatives ------------------------------------------------------------


@every_size
@every_dtype
def test_models_and_inputs_are_batched(size, dtype):
    module = layer(size, dtype)
    values, x = weights(module), inputs(size, dtype)
    both = [values, changed(values)]
    stacked = {name: torch.stack([v[name] for v in both]) for name in values}
    batch = torch.stack([x, inputs(size, dtype, seed=6)])
    expected = torch.stack([formula(values, one) for one in batch])
    assert_close(vmap(module)(batch), expected, rtol=RTOL[dtype])
    outputs = vmap(called(module), in_dims=(0, None))(stacked, x)
    expected = torch.stack([formula(v, x) for v in both])
    assert_close(outputs, expected, rtol=RTOL[dtype])
    assert_close(functionalize(module)(x), formula(values, x), rtol=RTOL[dtype])


def by_dual_numbers(function, primal, tangent):
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(primal, tangent))
        return forward_ad.unpack_dual(dual).tangent


FORWARD = {
    "dual numbers": by_dual_numbers,
    "jvp": lambda function, p, t: jvp(function, (p,), (t,))[1],
    "linearize": lambda function, p, t: linearize(function, p)[1](t),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("gradients", [True, False])
@every_size
@pytest.mark.parametrize("name", ["linear.weight", "lora.A", "lora.B", "m", "x"])
def test_it_is_differentiated_forward(way, gradients, size, name):
    module = layer(size, detach_norm=False)
    values = weights(module) | {"x": inputs(size)}

    def of(function):
        def of_one(value):
            others = values | {name: value}
            x = others.pop("x")
            return function(others, x)

        return of_one

    primal = values[name]
    tangent = normal(*primal.shape, seed=7)
    expected = jvp(of(formula), (primal,), (tangent,))[1]
    assert expected.abs().max() > 0.01
    with torch.set_grad_enabled(gradients):
        actual = FORWARD[way](of(called(module)), primal, tangent)
    assert_close(actual, expected, rtol=1e-11)


@every_size
def test_its_whole_jacobian_is_found_forward(size):
    # With a norm that is a constant backward, m and x have the formula's derivatives.
    module, x = layer(size), inputs(size)[:1]
    values = weights(module)
    of_m = jacfwd(lambda m: called(module)(values | {"m": m}, x))(values["m"])
    expected = torch.diag_embed(
        (formula(values, x) - values["linear.bias"]) / values["m"]
    )
    kept = (values["m"] != 0).nonzero().squeeze()
    assert_close(of_m[0][kept][:, kept], expected[0][kept][:, kept], rtol=1e-11)


# --- Where nothing of this is at work, values are read -----------------------------------


def test_values_are_read_otherwise_also_inside_a_mode_that_only_counts():
    from torch.utils.flop_counter import FlopCounterMode

    W = layer(SIZES[1]).linear.weight
    assert norms.values_can_be_read(W)
    with FlopCounterMode(display=False):
        assert norms.values_can_be_read(W)
    with FakeTensorMode():
        assert not norms.values_can_be_read(W)
    with forward_ad.dual_level():
        assert not norms.values_can_be_read(W)
    assert norms.values_can_be_read(W)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_graph_holds_the_layer():
    module = layer(SIZES[1], torch.float32).cuda()
    x = inputs(SIZES[1], torch.float32).cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            module(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(x)
        module.m.mul_(2)
        graph.replay()
    values = {name: p.cpu() for name, p in weights(module).items()}
    assert_close(y.cpu(), formula(values, x.cpu()), rtol=1e-4)


def test_a_detached_norm_is_a_constant_forward_as_it_is_backward():
    layers = [moved(wrapper, linear_layer(64, 32), 4, 1.0) for wrapper in DORA]
    x, tangent = normal(5, 64), normal(64, 4, seed=9)
    derivatives = []
    for layer in layers:

        def output(A, layer=layer):
            parameters = {"lora.A": A}
            return torch.func.functional_call(layer, parameters, (x,)).sum()

        A = layer.lora.A.detach()
        derivatives.append(torch.func.jvp(output, (A,), (tangent,))[1])
        backward = torch.func.grad(output)(A)
        assert_close(derivatives[-1], (backward * tangent).sum(), rtol=1e-9)
    assert_close(*derivatives, rtol=1e-9)
