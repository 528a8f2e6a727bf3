"""Each method of the comparison trains what it says, starts as the pretrained network, and freezes the rest."""

import copy

import pytest
import torch
from support import normal
from torch import nn

from lowrank_utils.adapt import count_parameters
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.methods import METHODS, SCALINGS, Adapter
from lowrank_utils.training import MultilayerPerceptron

ADAPTER = Adapter(rank=3, alpha=8.0, scaling="alpha/rank", init="peft")


@pytest.fixture
def pretrained():
    return MultilayerPerceptron(20, 8, 6, 3).double()


def prepared(pretrained, method, adapter=ADAPTER):
    model = copy.deepcopy(pretrained)
    METHODS[method].prepare(model, adapter)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


LINEARS = (0, 2, 4)
A_AND_B = {f"layers.{i}.lora.{part}" for i in LINEARS for part in "AB"}
MAGNITUDES = {f"layers.{i}.m" for i in LINEARS}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("frozen", set()),
        ("last layer", {"layers.4.weight", "layers.4.bias"}),
        ("magnitude", MAGNITUDES),
        ("LoRA", A_AND_B),
        ("LoRA matched", A_AND_B),
        ("DoRA", A_AND_B | MAGNITUDES),
        ("DoRA norm kept", A_AND_B | MAGNITUDES),
        ("full", {f"layers.{i}.{part}" for i in LINEARS for part in ("weight", "bias")}),
    ],
)
def test_what_is_trainable(pretrained, method, expected):
    assert set(METHODS) == {
        *("frozen", "last layer", "magnitude", "LoRA", "LoRA matched", "DoRA", "DoRA norm kept", "full")
    }
    # Frozen before, so that a method must say what it trains.
    assert trainable(prepared(pretrained.requires_grad_(method != "full"), method)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_as_the_pretrained_network_and_leaves_that_alone(pretrained, method):
    before = copy.deepcopy(pretrained.state_dict())
    model = prepared(pretrained, method)
    x = normal(5, 20)
    assert torch.allclose(model(x), pretrained(x), rtol=1e-12, atol=1e-12)
    if METHODS[method].has_rank:
        # A is random, so that the adapter can learn.
        assert model.layers[0].lora.A.std() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(value, before[name]) for name, value in pretrained.state_dict().items())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frozen"])
def test_a_step_moves_the_outputs(pretrained, method):
    model = prepared(pretrained, method)
    x = normal(5, 20)
    before = model(x).detach()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), before)


def test_which_methods_have_a_rank(pretrained):
    for method, (_, has_rank) in METHODS.items():
        counts = {
            count_parameters(prepared(pretrained, method, ADAPTER._replace(rank=rank))).trainable
            for rank in (1, 3)
        }
        assert len(counts) == (2 if has_rank else 1), method


@pytest.mark.parametrize("rank", [1, 2, 4, 32])
def test_matched_lora_has_as_many_numbers_as_dora(rank):
    series = MultilayerPerceptron(784, 128, 256, 10)
    counts = {
        method: count_parameters(prepared(series, method, ADAPTER._replace(rank=rank))).trainable
        for method in ("LoRA", "LoRA matched", "DoRA")
    }
    assert counts["DoRA"] - counts["LoRA"] == 128 + 256 + 10
    assert counts["LoRA matched"] - counts["LoRA"] == 128 + 256
    assert abs(counts["LoRA matched"] - counts["DoRA"]) == 10


def test_matched_lora_scales_each_layer_by_its_own_rank():
    model = prepared(MultilayerPerceptron(784, 128, 256, 10), "LoRA matched", ADAPTER._replace(rank=4))
    layers = [model.layers[i].lora for i in LINEARS]
    assert [layer.A.shape[1] for layer in layers] == [4, 5, 4]
    assert [layer.alpha for layer in layers] == [8 / 4, 8 / 5, 8 / 4]


@pytest.mark.parametrize(("scaling", "expected"), [("alpha", 8), ("alpha/rank", 2), ("alpha/sqrt(rank)", 4)])
def test_scaling_and_initialisation_reach_the_layers(pretrained, scaling, expected):
    assert SCALINGS[scaling](8, 4) == expected
    for init, largest in (("article", None), ("peft", 1 / 20**0.5)):
        model = prepared(pretrained, "DoRA", Adapter(4, 8.0, scaling, init))
        assert {model.layers[i].lora.alpha for i in LINEARS} == {expected}
        reached = model.layers[0].lora.A.abs().max()
        assert (reached <= largest) if largest else (reached > 0.5)


def test_the_two_dora_differ_in_the_gradient_of_the_norm_alone(pretrained):
    layers = {method: prepared(pretrained, method).layers[0] for method in ("DoRA", "DoRA norm kept")}
    assert all(type(layer) is LinearWithDoRA for layer in layers.values())
    assert layers["DoRA"].detach_norm
    assert not layers["DoRA norm kept"].detach_norm


def test_methods_work_on_a_model_with_other_layers():
    """Normalisation layers and embeddings are frozen where a method says that only something else is trained."""
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for method, expected in (
        ("frozen", set()),
        ("last layer", {"3.weight", "3.bias"}),
        ("magnitude", {"1.m", "3.m"}),
    ):
        assert trainable(prepared(model, method)) == expected
