"""What holds for all four wrappers: the formulas, their gradients, and being a module
like any other."""

import copy
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, strategies as st
from support import (
    ALL,
    DORA,
    LORA,
    Reference,
    array,
    assert_close,
    assert_same_state,
    cases,
    every_variant,
    every_wrapper,
    linear_layer,
    move_all,
    moved,
    normal,
    snapshot,
    tolerance,
)
from torch import nn
from torch.func import functional_call

from lowrank_utils.adapt import merge_adapters, replace_linear_layers


def assert_within_rounding(layer, x, y):
    """Hold ``y`` against the NumPy formula, as closely as the dtype's rounding
    allows."""
    reference = Reference.of(layer)
    # Where W and ΔW nearly cancel, their direction is made of rounding errors.
    assume(reference.error_unit(np.ones(x.shape[-1])).max() < 1e3)
    x, y, dtype = array(x), array(y), y.dtype
    error = np.abs(y - reference.output(x))
    assert (error <= tolerance(dtype) * reference.error_unit(x)).all()


# --- What comes out -------------------------------------------------------------------------


@every_variant
@given(case=cases())
def test_the_output_is_that_of_the_formula(wrapper, options, case):
    layer, x = case.adapter(wrapper, **options), case.x()
    y = layer(x)
    assert y.shape == (*case.batch, case.out_features)
    assert y.dtype == case.dtype
    assert_within_rounding(layer, x, y)


@every_wrapper
@given(case=cases())
def test_the_weight_property_reproduces_the_forward_pass(wrapper, case):
    layer, x = case.adapter(wrapper), case.x()
    assert layer.weight.shape == (case.out_features, case.in_features)
    assert layer.weight.dtype == case.dtype
    assert_within_rounding(layer, x, F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("unmerged", "merged"), [LORA, DORA])
@given(case=cases(dtypes=[torch.float64]))
def test_the_merged_and_the_unmerged_form_agree(unmerged, merged, case):
    first, second, x = case.adapter(unmerged), case.adapter(merged), case.x()
    reference = Reference.of(first)
    assume(reference.norm.min() > 1e-3)
    unit = torch.from_numpy(reference.error_unit(array(x)))
    assert ((first(x) - second(x)).abs() <= 1e-12 * unit).all()
    # The check above is empty if B isn't felt.
    assert not torch.allclose(first.weight, first.linear.weight)


@every_wrapper
@given(
    case=cases(dtypes=[torch.float64]),
    factors=st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
)
def test_without_the_bias_the_output_is_linear_in_the_input(wrapper, case, factors):
    layer, x, z = case.adapter(wrapper), case.x(0), case.x(1)
    reference = Reference.of(layer)
    assume(reference.norm.min() > 1e-3)
    b = 0 if layer.bias is None else layer.bias
    p, q = factors
    together = layer(p * x + q * z) - b
    apart = p * (layer(x) - b) + q * (layer(z) - b)
    unit = sum(reference.error_unit(array(t)) for t in (x, z, p * x, q * z))
    allowed = 1e-12 * (1 + abs(p) + abs(q)) * unit
    assert (np.abs(array(together - apart)) <= allowed).all()


@every_wrapper
@given(case=cases())
def test_the_bias_is_added_as_it_is_and_not_scaled(wrapper, case):
    layer, zero = case.adapter(wrapper), torch.zeros_like(case.x())
    bias = torch.zeros(case.out_features, dtype=case.dtype)
    bias = bias if layer.bias is None else layer.bias
    assert torch.equal(layer(zero), bias.expand(*case.batch, case.out_features))


@every_wrapper
def test_every_example_is_mapped_as_if_it_were_alone_and_none_can_be_trained_on(
    wrapper,
):
    layer, x = moved(wrapper), normal(2, 3, 7)
    for examples, outputs in zip(x, layer(x), strict=True):
        for example, output in zip(examples, outputs, strict=True):
            assert_close(output, layer(example))
    y = layer(x[:0])
    assert y.shape == (0, 3, 5)
    y.sum().backward()
    assert torch.equal(layer.lora.A.grad, torch.zeros_like(layer.lora.A))


@every_wrapper
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_a_new_wrapper_gives_the_linear_layers_output(wrapper, bias, dtype):
    linear = linear_layer(bias=bias, dtype=dtype)
    layer = wrapper(linear, 3, 1.7)
    x = normal(4, 7, dtype=dtype)
    assert torch.equal(layer.weight, linear.weight)
    if wrapper in LORA:
        assert torch.equal(layer(x), linear(x))
    else:
        torch.testing.assert_close(layer(x), linear(x))


# --- Gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@every_variant
def test_the_gradients_are_those_derived_by_hand(wrapper, options, bias):
    layer = moved(wrapper, linear_layer(bias=bias), **options)
    x, G = normal(4, 7, seed=20).requires_grad_(), normal(4, 5, seed=21)
    (layer(x) * G).sum().backward()
    expected = Reference.of(layer).gradients(
        array(x), array(G), options.get("detach_norm", True)
    )
    actual = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    if not bias:
        del expected["linear.bias"]
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], torch.from_numpy(expected[name]))


@pytest.mark.parametrize(
    ("wrapper", "options"),
    [(w, {}) for w in LORA] + [(w, {"detach_norm": False}) for w in DORA],
)
def test_the_gradients_are_those_of_finite_differences(wrapper, options):
    layer, x = moved(wrapper, linear_layer(4, 3), 2, **options), normal(2, 4, seed=20)
    names, values = zip(*layer.named_parameters(), strict=True)

    def forward(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    given = (x.requires_grad_(), *values)
    assert torch.autograd.gradcheck(forward, given)
    if wrapper in DORA:
        # With the norm detached they are others: the comparison would notice.
        layer.detach_norm = True
        assert not torch.autograd.gradcheck(forward, given, raise_exception=False)


@every_variant
def test_a_frozen_linear_layer_gets_no_gradient_and_the_adapter_does(wrapper, options):
    layer = moved(wrapper, **options)
    layer.linear.requires_grad_(False)
    layer(normal(4, 7)).pow(2).sum().backward()
    for name, parameter in layer.named_parameters():
        if name.startswith("linear"):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 0, name


# --- A module like any other ----------------------------------------------------------------


@every_wrapper
def test_the_linear_layer_is_kept_unchanged_and_the_wrapper_answers_like_it(wrapper):
    linear = linear_layer()
    before, layer = snapshot(linear), moved(wrapper, linear)
    layer(normal(4, 7))
    assert layer.linear is linear
    assert_same_state(linear, before)
    assert all(p.requires_grad for p in linear.parameters())
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.bias is linear.bias
    assert wrapper(linear_layer(bias=False), 2, 1.0).bias is None


@every_wrapper
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_adapter_takes_the_dtype_of_the_layer_and_not_torchs_default(
    wrapper, dtype
):
    layer = wrapper(linear_layer(dtype=dtype), 3, 1.0)
    # Beside half precision it is float32.
    adapter = {p.dtype for n, p in layer.named_parameters() if n[:6] != "linear"}
    assert adapter == {torch.float32 if dtype == torch.bfloat16 else dtype}


@every_wrapper
def test_a_wrapper_can_be_built_and_run_on_the_meta_device(wrapper):
    layer = wrapper(nn.Linear(7, 5, device="meta"), 3, 1.0)
    assert all(p.is_meta for p in layer.parameters())
    y = layer(torch.empty(4, 7, device="meta"))
    assert y.is_meta
    assert y.shape == (4, 5)
    assert layer.weight.shape == (5, 7)


@every_wrapper
def test_copies_state_dicts_and_other_dtypes_carry_everything(wrapper):
    layer, fresh = moved(wrapper), wrapper(linear_layer(seed=50), 3, 1.7)
    x, twin = normal(4, 7), copy.deepcopy(layer)
    expected = layer(x).detach()
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(twin(x), expected)
    assert not torch.allclose(fresh(x), expected)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    y = layer.to(torch.float32)(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@every_wrapper
def test_autocast_gives_the_dtype_of_a_linear_layer_and_a_close_value(wrapper):
    linear = linear_layer(dtype=torch.float32)
    layer, x = moved(wrapper, linear), normal(4, 7, dtype=torch.float32)
    exact, expected = layer(x), layer.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, y, weight = linear(x), layer(x.requires_grad_()), layer.weight
    assert y.dtype == plain.dtype == torch.bfloat16
    unit = Reference.of(layer).error_unit(array(x))
    assert (np.abs(array(y) - array(exact)) <= tolerance(torch.bfloat16) * unit).all()
    y.float().sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
    # The weight keeps the precision of the parameters.
    assert weight.dtype == torch.float32
    assert torch.equal(weight, expected)


COMPILERS = [os.environ.get("CXX") or "g++", "clang++", "c++", "cl"]


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS),
    reason="torch.compile needs a C++ compiler, and this machine has none",
)
def test_torch_compile_gives_the_same_outputs_and_gradients(monkeypatch, tmp_path):
    # What torch has compiled for one vector unit it takes for another one too, with
    # wrong results (seen in 2.15.0).
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # One compilation for all: it takes most of its time whatever the size.
    sizes = [(7, 5), (5, 6), (6, 4), (4, 3)]
    layers = [linear_layer(*size, seed=10 * i) for i, size in enumerate(sizes)]
    model = nn.Sequential(*map(moved, ALL, layers))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    outputs = [network(normal(4, 7, seed=20)) for network in (model, compiled)]
    assert_close(outputs[1], outputs[0])
    for y in outputs:
        y.pow(2).sum().backward()
    for actual, expected in zip(compiled.parameters(), model.parameters(), strict=True):
        assert expected.grad.abs().max() > 0
        assert_close(actual.grad, expected.grad, rtol=1e-11)


# --- Inside torch's own modules, which read weights instead of calling layers -----------------


@every_wrapper
def test_attention_uses_the_adapted_weight_of_its_output_projection(wrapper):
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    given = [normal(3, 5, 8)] * 3
    plain = attention(*given)[0].detach()
    assert replace_linear_layers(attention, wrapper, 2, 1.0) == ["out_proj"]
    torch.testing.assert_close(attention(*given)[0], plain)
    adapted = move_all(attention)(*given)[0]
    assert not torch.allclose(adapted, plain)
    assert_close(adapted, merge_adapters(attention)(*given)[0])
    adapted.pow(2).sum().backward()
    assert attention.out_proj.lora.B.grad.abs().max() > 0


@every_wrapper
def test_an_encoder_layer_gives_the_merged_models_outputs_in_both_modes(wrapper):
    encoder = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, batch_first=True
    ).double()
    x = normal(3, 5, 8)
    plain = encoder(x).detach()
    names = ["self_attn.out_proj", "linear1", "linear2"]
    assert replace_linear_layers(encoder, wrapper, 2, 1.0) == names
    merged = merge_adapters(move_all(encoder))
    assert not torch.allclose(encoder(x), plain)
    assert_close(encoder(x), merged(x))
    encoder.eval()
    merged.eval()
    assert_close(encoder(x), merged(x))
    # Where torch has a fast path, it takes the merged model's weights.
    with torch.no_grad():
        assert_close(encoder(x), merged(x))


@every_wrapper
@pytest.mark.parametrize("trained", [(), ("W",), ("B",), ("W", "B")])
def test_the_weight_says_whether_it_has_a_gradient(wrapper, trained):
    layer = wrapper(linear_layer(), 2, 1.0).requires_grad_(False)
    layer.linear.weight.requires_grad_("W" in trained)
    layer.lora.B.requires_grad_("B" in trained)
    assert layer.weight.requires_grad == bool(trained)


@every_wrapper
def test_a_weight_is_formed_in_its_own_dtype_beside_narrower_factors(wrapper):
    layer = wrapper(linear_layer(), 2, 1.5, dtype=torch.float32)
    nn.init.ones_(layer.lora.B)
    wide = copy.deepcopy(layer).double()
    assert (layer.weight + 0).dtype == torch.float64
    assert_close(layer.weight + 0, wide.weight + 0)
