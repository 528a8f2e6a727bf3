"""Adapters beside a base in half precision are kept in float32, in every form, and are
as exact as PEFT's.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from support import ALL, DORA, every_wrapper, linear_layer, move, normal
from torch import nn

from lowrank_utils.adapt import merge_adapters
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA

HALVES = [torch.bfloat16, torch.float16]
half = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])


@half
@every_wrapper
def test_what_is_trained_is_float32_and_the_output_is_the_bases(wrapper, dtype):
    layer = wrapper(linear_layer(dtype=dtype), 2, 1.5)
    trained = {n: p for n, p in layer.named_parameters() if not n.startswith("linear.")}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    x = normal(3, 7, dtype=dtype)
    before = layer.linear(x)
    assert layer(x).dtype == layer.weight.dtype == dtype
    # At the start it is the pretrained layer, but for one more rounding.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), before, rtol=2 * eps, atol=2 * eps)
    layer(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.values())
    assert wrapper(linear_layer(dtype=dtype), 2, 1.5, dtype=dtype).lora.A.dtype == dtype
    assert merge_adapters(nn.Sequential(layer))[0].weight.dtype == dtype


@half
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layer_class", [LinearWithLoRA, LinearWithDoRA])
def test_it_is_as_exact_as_peft(layer_class, dtype, autocast):
    peft = pytest.importorskip("peft")
    dora = layer_class is LinearWithDoRA
    errors = {}
    for seed in range(8):
        layer = move(layer_class(linear_layer(64, 48, dtype=dtype), 4, 0.5), seed)
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=dora)
        model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer.linear)), config)
        theirs = model.base_model.model[0]
        with torch.no_grad():
            theirs.lora_A["default"].weight.copy_(layer.lora.A.T)
            theirs.lora_B["default"].weight.copy_(layer.lora.B.T)
            if dora:
                theirs.lora_magnitude_vector["default"].weight.copy_(layer.m)
        exact = copy.deepcopy(layer).double()
        x = normal(16, 64, seed=seed, dtype=dtype)
        with torch.no_grad():
            expected = exact(x.double())
            context = torch.autocast("cpu", dtype) if autocast else nullcontext()
            with context:
                outputs = {"ours": layer(x), "theirs": model(x)}
        for name, output in outputs.items():
            assert output.dtype == dtype
            errors.setdefault(name, []).append((output.double() - expected).norm())
    ours, theirs = (torch.stack(errors[name]).mean() for name in ("ours", "theirs"))
    assert ours <= 1.02 * theirs


@half
@pytest.mark.parametrize("wrapper", DORA)
def test_small_steps_of_m_are_kept(wrapper, dtype):
    layer = wrapper(linear_layer(dtype=dtype), 2, 1.5)
    before = layer.m.detach().clone()
    optimizer = torch.optim.SGD([layer.m], lr=1e-5)
    for _ in range(10):
        optimizer.zero_grad()
        layer.m.sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.m.detach(), before - 1e-4, rtol=1e-5, atol=0)


def test_every_form_agrees():
    x = normal(6, 7, dtype=torch.bfloat16)
    for first, second in (ALL[:2], ALL[2:]):
        a, b = (
            move(form(linear_layer(dtype=torch.bfloat16), 2, 1.5))
            for form in (first, second)
        )
        eps = torch.finfo(torch.bfloat16).eps
        scale = a(x).abs().max().item()
        torch.testing.assert_close(a(x), b(x), rtol=0, atol=2 * eps * scale)
