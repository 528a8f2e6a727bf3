"""Dropout before the low-rank branch: as in PEFT, off in evaluation, and never merged."""

import copy

import pytest
import torch
from support import assert_close, linear_layer, move, moved, normal
from torch import nn

from lowrank_utils.adapt import merge_adapters, replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged, LoRALayer

peft = pytest.importorskip("peft")

UNMERGED = [LinearWithLoRA, LinearWithDoRA]
MERGED = [LinearWithLoRAMerged, LinearWithDoRAMerged]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_class", UNMERGED)
def test_in_training_it_is_peft_s_with_the_same_mask(layer_class, bias):
    ours = moved(layer_class, linear_layer(bias=bias), 2, 1.5, dropout=0.4)
    base = nn.Sequential(copy.deepcopy(ours.linear))
    dora = layer_class is LinearWithDoRA
    config = peft.LoraConfig(
        r=2, lora_alpha=3, lora_dropout=0.4, target_modules=["0"], use_dora=dora
    )
    model = peft.get_peft_model(base, config).double()
    theirs = model.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora.A.T)
        theirs.lora_B["default"].weight.copy_(ours.lora.B.T)
        if dora:
            theirs.lora_magnitude_vector["default"].weight.copy_(ours.m)
    x, outputs = normal(6, 7, seed=3), []
    for layer in (ours, theirs):
        torch.manual_seed(11)
        outputs.append(layer.train()(x))
        outputs[-1].square().sum().backward()
    assert_close(*outputs)
    assert_close(ours.lora.A.grad.T, theirs.lora_A["default"].weight.grad)
    assert_close(ours.lora.B.grad.T, theirs.lora_B["default"].weight.grad)
    assert_close(ours.eval()(x), theirs.eval()(x))
    # Without dropout it is another output, so the mask counted.
    assert not torch.allclose(outputs[0], ours(x))


@pytest.mark.parametrize("layer_class", UNMERGED)
def test_in_training_the_output_is_as_narrow_as_the_layer_s(layer_class):
    linear = linear_layer().bfloat16()
    layer = layer_class(linear, 2, 1.5, dropout=0.4).train()
    x = normal(6, 7).bfloat16()
    assert layer(x).dtype == linear(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        wide = layer_class(linear_layer().float(), 2, 1.5, dropout=0.4)(x.float())
    assert wide.dtype == torch.bfloat16


def test_in_training_a_part_is_left_out_and_the_rest_grows():
    layer = LoRALayer(1000, 1, 1, 1.0, dropout=0.25, init=nn.init.ones_)
    nn.init.ones_(layer.B)
    torch.manual_seed(0)
    dropped = layer.dropped(torch.ones(1000))
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 1 / 0.75])
    assert 650 < (dropped > 0).sum() < 850
    assert layer.eval().dropped(dropped) is dropped
    assert layer(torch.ones(1000)).item() == 1000


@pytest.mark.parametrize("layer_class", [*UNMERGED, *MERGED])
def test_no_weight_is_formed_in_training(layer_class):
    layer = moved(layer_class, dropout=0.4)
    assert layer.weight.dtype == torch.float64
    with pytest.raises(
        RuntimeError,
        match=rf"^{layer_class.__name__} has dropout=0\.4, which a weight can't express in training. Use LinearWithLoRA or LinearWithDoRA, or call eval\(\)$",
    ):
        layer.weight.sum()
    if layer_class in MERGED:
        with pytest.raises(RuntimeError, match="Use LinearWithLoRA or LinearWithDoRA"):
            layer(normal(4, 7))
    assert layer.eval().weight.shape == (5, 7)


@pytest.mark.parametrize("layer_class", UNMERGED)
def test_merging_leaves_it_out_and_the_model_in_training(layer_class):
    model = nn.Sequential(linear_layer())
    replace_linear_layers(model, layer_class, 3, 1.7, dropout=0.4)
    move(model[0])
    merged = merge_adapters(model)
    assert model[0].training
    assert merged[0].training
    x = normal(4, 7)
    assert_close(merged(x), model.eval()(x))


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_a_dropout_that_is_no_share_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout"):
        LinearWithLoRA(linear_layer(), 2, 1.0, dropout=dropout)


def test_a_dropout_that_is_no_number_is_refused_by_its_name():
    message = r"^dropout must be a finite number; got '0\.1' \(str\)$"
    with pytest.raises(TypeError, match=message):
        LinearWithLoRA(linear_layer(), 2, 1.0, dropout="0.1")
