"""Each method of the comparison trains what it says, starts as the pretrained network,
and freezes the rest."""

import copy
import itertools

import pytest
import torch
from support import assert_same_state, normal, snapshot
from torch import nn

from lowrank_utils.adapt import count_parameters, parameter_groups
from lowrank_utils.comparison.methods import METHODS, SCALINGS, LowRank, make_trainable
from lowrank_utils.training import MultilayerPerceptron

ADAPTER = LowRank(rank=3, alpha=8.0, scaling="alpha/rank", init="peft")
LINEARS = (0, 2, 4)
EACH = pytest.mark.parametrize("method", METHODS)
WITH_LAST = pytest.mark.parametrize("last_layer", [True, False])


@pytest.fixture
def pretrained():
    return MultilayerPerceptron(20, 8, 6, 3).double()


def prepared(pretrained, method, adapter=ADAPTER, last_layer=False, seed=0):
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    make_trainable(method, model, adapter, last_layer)
    return model


def series(method, rank=4, last_layer=False, **changes):
    """Return the network of the series, prepared."""
    adapter = ADAPTER._replace(rank=rank, **changes)
    network = MultilayerPerceptron(784, 128, 256, 10)
    return prepared(network, method, adapter, last_layer)


def trained_numbers(model):
    return count_parameters(model).trainable


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of_layers(*endings, linears=LINEARS):
    return {f"layers.{i}.{ending}" for i in linears for ending in endings}


A_AND_B = ("lora.A", "lora.B")
# Method → the last names of what it trains in each adapted layer.
TRAINED = {
    "m alone": ("m",),
    "LoRA with one rate": A_AND_B,
    "LoRA": A_AND_B,
    "LoRA matched below": A_AND_B,
    "LoRA matched above": A_AND_B,
    "LoRA with biases": (*A_AND_B, "linear.bias"),
    "DoRA with one rate": (*A_AND_B, "m"),
    "DoRA with m's rate": (*A_AND_B, "m"),
    "DoRA norm kept with one rate": (*A_AND_B, "m"),
    "DoRA norm kept with m's rate": (*A_AND_B, "m"),
    "gain": (*A_AND_B, "g"),
    "positive gain": (*A_AND_B, "theta"),
    "random rows": (*A_AND_B, "v"),
}
OTHERS = {
    "frozen": set(),
    "last layer": {"layers.4.weight", "layers.4.bias"},
    "full": of_layers("weight", "bias"),
}


@EACH
@WITH_LAST
def test_what_is_trainable(pretrained, method, last_layer):
    assert TRAINED.keys() | OTHERS.keys() == METHODS.keys()
    expected = of_layers(*TRAINED.get(method, ())) | OTHERS.get(method, set())
    if method in TRAINED and last_layer:
        # The last layer itself.
        expected = of_layers(*TRAINED[method], linears=(0, 2)) | OTHERS["last layer"]
    elif last_layer and method != "frozen":
        expected = expected | OTHERS["last layer"]
    # All frozen before, or nothing: a method says itself what it trains.
    for before in (True, False):
        pretrained.requires_grad_(before)
        model = prepared(pretrained, method, last_layer=last_layer)
        assert trainable(model) == expected
    plain = last_layer or method in OTHERS
    assert (type(model.layers[4]) is nn.Linear) == plain


@EACH
@WITH_LAST
def test_a_method_starts_as_the_pretrained_network(pretrained, method, last_layer):
    before = snapshot(pretrained)
    model = prepared(pretrained, method, last_layer=last_layer)
    x = normal(5, 20)
    assert torch.allclose(model(x), pretrained(x), rtol=1e-12, atol=1e-12)
    if METHODS[method].has_rank:
        # A is random, so that the adapter can learn.
        assert model.layers[0].lora.A.std() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert_same_state(pretrained, before)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frozen"])
def test_a_step_moves_the_outputs(pretrained, method):
    model = prepared(pretrained, method)
    x = normal(5, 20)
    before = model(x).detach()
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=0.05)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), before)


def test_methods_of_one_rank_start_from_the_same_a(pretrained):
    """Whatever else they draw; only a LoRA with another rank in a layer can't."""

    def start(method, seed=0):
        layers = prepared(pretrained, method, seed=seed).layers
        return [layers[index].lora.A.tolist() for index in LINEARS]

    for method in TRAINED.keys() - {
        "m alone",
        "LoRA matched below",
        "LoRA matched above",
    }:
        assert start(method) == start("LoRA"), method
    assert start("LoRA", seed=1)[0] != start("LoRA")[0]


def test_random_rows_are_others_in_each_layer_and_with_each_seed():
    square = MultilayerPerceptron(6, 6, 6, 6)

    def rows(seed):
        model = prepared(square, "random rows", seed=seed)
        return [layer.R for layer in model.layers[::2]]

    directions = [nn.functional.normalize(R, dim=1) for R in (*rows(0), *rows(1))]
    for one, other in itertools.combinations(directions, 2):
        assert not torch.allclose(one, other)
    assert torch.equal(rows(0)[0], rows(0)[0])


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.part]
)
def test_a_part_is_what_its_name_says_and_nothing_else(pretrained, method):
    model = prepared(pretrained, method, last_layer=True)
    groups = parameter_groups(model, 0.01, {METHODS[method].part.pattern: 10})
    names = {parameter: name for name, parameter in model.named_parameters()}
    rest, part = ({names[p] for p in group["params"]} for group in groups)
    of_b = method in ("LoRA", "LoRA matched below", "LoRA matched above")
    own = "lora.B" if of_b else TRAINED[method][-1]
    assert part == of_layers(own, linears=(0, 2))
    assert rest == trainable(model) - part


@pytest.mark.parametrize("rank", [1, 4, 32])
@WITH_LAST
def test_how_many_parameters_each_trains_in_the_series_network(rank, last_layer):
    adapted = rank * (784 + 128 + 128 + 256)
    lora = adapted + (2570 if last_layer else rank * (256 + 10))
    outputs = 128 + 256 + 10 * (not last_layer)
    expected = dict.fromkeys(TRAINED.keys() - {"m alone"}, outputs)
    expected |= {"LoRA": 0, "LoRA with one rate": 0}
    # One more rank in layer 2, and for more than m has in layer 4 as well; without
    # layer 4 m has just as many.
    expected["LoRA matched below"] = 384
    expected["LoRA matched above"] = 384 if last_layer else 650
    assert {name for name, m in METHODS.items() if m.has_rank} == expected.keys()
    for method, more in expected.items():
        assert trained_numbers(series(method, rank, last_layer)) == lora + more, method


def test_matched_lora_scales_each_layer_by_its_own_rank():
    layers = series("LoRA matched above").layers
    found = [(layers[i].lora.A.shape[1], layers[i].lora.alpha) for i in LINEARS]
    assert found == [(4, 8 / 4), (5, 8 / 5), (5, 8 / 5)]


@pytest.mark.parametrize(
    ("scaling", "expected"), [("alpha", 8), ("alpha/rank", 2), ("alpha/sqrt(rank)", 4)]
)
@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.has_rank]
)
def test_scaling_and_initialisation_reach_the_layers(method, scaling, expected):
    assert SCALINGS[scaling](8, 4) == expected
    # Layer 0 has the same rank in all methods.
    article, peft = (
        series(method, scaling=scaling, init=init).layers[0].lora
        for init in ("article", "peft")
    )
    assert article.alpha == peft.alpha == expected
    assert article.A.abs().max() > 0.5
    assert peft.A.abs().max() <= 1 / 784**0.5


@pytest.mark.parametrize("method", ["DoRA with one rate", "DoRA with m's rate"])
def test_the_forms_of_dora_differ_in_the_gradient_of_the_norm_alone(pretrained, method):
    kept = method.replace("DoRA", "DoRA norm kept")
    assert prepared(pretrained, method).layers[0].detach_norm
    assert not prepared(pretrained, kept).layers[0].detach_norm
    assert METHODS[kept].part == METHODS[method].part
    assert METHODS[kept].rates == METHODS[method].rates


def test_adapters_look_for_their_rates_in_one_range_and_factors_of_m_and_its_controls_too():
    assert len({m.rates for m in METHODS.values() if m.has_rank}) == 1
    controls = ("DoRA with m's rate", "gain", "positive gain", "random rows")
    assert len({METHODS[name].part._replace(pattern="") for name in controls}) == 1


def test_what_a_method_contains_is_a_method_that_trains_no_more():
    numbers = {name: trained_numbers(series(name, rank=3)) for name in METHODS}
    for name, method in METHODS.items():
        for part in method.contains:
            assert numbers[name] >= numbers[part], f"{name} can't contain {part}"
    assert "m alone" in METHODS["DoRA with one rate"].contains
    assert "LoRA" in METHODS["gain"].contains


def test_methods_work_on_a_model_with_other_layers():
    """Normalisation layers and embeddings are frozen where a method says that only
    something else is trained."""
    linears = (nn.Linear(6, 4), nn.Linear(4, 2))
    model = nn.Sequential(nn.LayerNorm(6), linears[0], nn.LayerNorm(4), linears[1])
    for method, expected in {
        "frozen": set(),
        "last layer": {"3.weight", "3.bias"},
        "m alone": {"1.m", "3.m"},
        "LoRA": {"1.lora.A", "1.lora.B", "3.lora.A", "3.lora.B"},
    }.items():
        assert trainable(prepared(model, method)) == expected


def test_an_unknown_method_is_refused(pretrained):
    with pytest.raises(ValueError, match="unknown method 'QLoRA'; there are 'frozen'"):
        make_trainable("QLoRA", pretrained, ADAPTER)
