"""Each method of the comparison trains what it says, starts as the pretrained network,
and freezes the rest."""

import copy

import pytest
import torch
from support import normal
from torch import nn

from lowrank_utils.adapt import count_parameters, parameter_groups
from lowrank_utils.comparison.methods import METHODS, SCALINGS, LowRank, make_trainable
from lowrank_utils.training import MultilayerPerceptron

ADAPTER = LowRank(rank=3, alpha=8.0, scaling="alpha/rank", init="peft")
LINEARS = (0, 2, 4)
EACH = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def pretrained():
    return MultilayerPerceptron(20, 8, 6, 3).double()


def prepared(pretrained, method, adapter=ADAPTER, trains_last_layer=False, seed=0):
    model = copy.deepcopy(pretrained)
    torch.manual_seed(seed)
    make_trainable(method, model, adapter, trains_last_layer)
    return model


def trainable(model):
    return {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


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
def test_what_is_trainable(pretrained, method):
    assert TRAINED.keys() | OTHERS.keys() == METHODS.keys()
    expected = OTHERS[method] if method in OTHERS else of_layers(*TRAINED[method])
    # All frozen before, or nothing: a method says itself what it trains.
    for before in (True, False):
        assert (
            trainable(prepared(pretrained.requires_grad_(before), method)) == expected
        )


@EACH
def test_the_last_layer_is_trained_itself_where_a_task_wants_that(pretrained, method):
    model = prepared(pretrained, method, trains_last_layer=True)
    last = {"layers.4.weight", "layers.4.bias"}
    expected = {"frozen": set(), "last layer": last, "full": OTHERS["full"]}
    if method in TRAINED:
        expected[method] = of_layers(*TRAINED[method], linears=(0, 2)) | last
    assert trainable(model) == expected[method]
    assert type(model.layers[4]) is nn.Linear


@EACH
@pytest.mark.parametrize("trains_last_layer", [True, False])
def test_a_method_starts_as_the_pretrained_network_and_leaves_that_alone(
    pretrained, method, trains_last_layer
):
    before = copy.deepcopy(pretrained.state_dict())
    model = prepared(pretrained, method, trains_last_layer=trains_last_layer)
    x = normal(5, 20)
    assert torch.allclose(model(x), pretrained(x), rtol=1e-12, atol=1e-12)
    if METHODS[method].has_rank:
        # A is random, so that the adapter can learn.
        assert model.layers[0].lora.A.std() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(
        torch.equal(value, before[name])
        for name, value in pretrained.state_dict().items()
    )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frozen"])
def test_a_step_moves_the_outputs(pretrained, method):
    model = prepared(pretrained, method)
    x = normal(5, 20)
    before = model(x).detach()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.05
    )
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(model(x), before)


def test_methods_of_one_rank_start_from_the_same_a(pretrained):
    """Whatever else they draw; only a LoRA with another rank in a layer can't."""
    starts = {
        method: [
            prepared(pretrained, method).layers[i].lora.A.detach() for i in LINEARS
        ]
        for method in TRAINED
        if method not in ("m alone", "LoRA matched below", "LoRA matched above")
    }
    for method, start in starts.items():
        for mine, its in zip(start, starts["LoRA"], strict=True):
            assert torch.equal(mine, its), method
    assert not torch.equal(
        prepared(pretrained, "LoRA", seed=1).layers[0].lora.A, starts["LoRA"][0]
    )


def test_random_rows_are_others_in_each_layer_and_with_each_seed():
    square = MultilayerPerceptron(6, 6, 6, 6)
    rows = [layer.R for layer in prepared(square, "random rows").layers[::2]]
    again = prepared(square, "random rows").layers[0].R
    assert torch.equal(rows[0], again)
    others = [rows[1], rows[2], prepared(square, "random rows", seed=1).layers[0].R]
    directions = [nn.functional.normalize(R, dim=1) for R in (rows[0], *others)]
    assert not any(
        torch.allclose(directions[0], direction) for direction in directions[1:]
    )


@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.part]
)
def test_a_part_is_what_its_name_says_and_nothing_else(pretrained, method):
    model = prepared(pretrained, method, trains_last_layer=True)
    rest, part = parameter_groups(model, 0.01, {METHODS[method].part.pattern: 10})
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = {
        "LoRA": "lora.B",
        "LoRA matched below": "lora.B",
        "LoRA matched above": "lora.B",
    }
    expected = of_layers(own.get(method, TRAINED[method][-1]), linears=(0, 2))
    assert {names[parameter] for parameter in part["params"]} == expected
    assert {names[parameter] for parameter in rest["params"]} == trainable(
        model
    ) - expected


def test_which_methods_have_a_rank(pretrained):
    for method in METHODS:
        counts = {
            count_parameters(
                prepared(pretrained, method, ADAPTER._replace(rank=rank))
            ).trainable
            for rank in (1, 3)
        }
        assert len(counts) == (2 if METHODS[method].has_rank else 1), method


@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize("trains_last_layer", [True, False])
def test_how_many_parameters_each_trains_in_the_series_network(rank, trains_last_layer):
    series = MultilayerPerceptron(784, 128, 256, 10)
    counts = {
        method: count_parameters(
            prepared(series, method, ADAPTER._replace(rank=rank), trains_last_layer)
        ).trainable
        for method in TRAINED
    }
    lora = (
        rank * (784 + 128 + 128 + 256 + (256 + 10) * (not trains_last_layer))
        + 2570 * trains_last_layer
    )
    outputs = 128 + 256 + 10 * (not trains_last_layer)
    added = {
        method: count - lora for method, count in counts.items() if method != "m alone"
    }
    # One more rank in layer 2, and for more than m has in layer 4 as well; without
    # layer 4 m has just as many.
    assert added["LoRA matched below"] == 384 <= outputs <= added["LoRA matched above"]
    assert added["LoRA matched above"] == (384 if trains_last_layer else 650)
    assert {added[method] for method in added if not method.startswith("LoRA")} == {
        outputs
    }
    assert added["LoRA with biases"] == outputs
    assert added["LoRA"] == added["LoRA with one rate"] == 0


def test_matched_lora_scales_each_layer_by_its_own_rank():
    model = prepared(
        MultilayerPerceptron(784, 128, 256, 10),
        "LoRA matched above",
        ADAPTER._replace(rank=4),
    )
    layers = [model.layers[i].lora for i in LINEARS]
    assert [layer.A.shape[1] for layer in layers] == [4, 5, 5]
    assert [layer.alpha for layer in layers] == [8 / 4, 8 / 5, 8 / 5]


@pytest.mark.parametrize(
    ("scaling", "expected"), [("alpha", 8), ("alpha/rank", 2), ("alpha/sqrt(rank)", 4)]
)
@pytest.mark.parametrize(
    "method", [name for name, method in METHODS.items() if method.has_rank]
)
def test_scaling_and_initialisation_reach_the_layers(method, scaling, expected):
    assert SCALINGS[scaling](8, 4) == expected
    series = MultilayerPerceptron(784, 128, 256, 10)
    for init, largest in (("article", None), ("peft", 1 / 784**0.5)):
        model = prepared(series, method, LowRank(4, 8.0, scaling, init))
        # Layer 0 has the same rank in all methods.
        assert model.layers[0].lora.alpha == expected
        reached = model.layers[0].lora.A.abs().max()
        assert (reached <= largest) if largest else (reached > 0.5)


def test_the_forms_of_dora_differ_in_the_gradient_of_the_norm_alone(pretrained):
    for method in ("DoRA with one rate", "DoRA with m's rate"):
        assert prepared(pretrained, method).layers[0].detach_norm
        assert (
            not prepared(pretrained, method.replace("DoRA", "DoRA norm kept"))
            .layers[0]
            .detach_norm
        )
        kept = METHODS[method.replace("DoRA", "DoRA norm kept")]
        assert kept.part == METHODS[method].part
        assert kept.rates == METHODS[method].rates


def test_adapters_look_for_their_rates_in_one_range_and_factors_of_m_and_its_controls_too():
    adapters = [method for method in METHODS.values() if method.has_rank]
    assert len({method.rates for method in adapters}) == 1
    parts = [
        METHODS[name].part
        for name in ("DoRA with m's rate", "gain", "positive gain", "random rows")
    ]
    assert len({(part.low, part.high) for part in parts}) == 1


def test_what_a_method_contains_is_a_method_that_trains_no_more():
    series = MultilayerPerceptron(784, 128, 256, 10)
    for name, method in METHODS.items():
        for part in method.contains:
            counts = [
                count_parameters(prepared(series, one)).trainable
                for one in (name, part)
            ]
            assert counts[0] >= counts[1], f"{name} can't contain {part}"
    assert "m alone" in METHODS["DoRA with one rate"].contains
    assert "LoRA" in METHODS["gain"].contains


def test_methods_work_on_a_model_with_other_layers():
    """Normalisation layers and embeddings are frozen where a method says that only
    something else is trained."""
    model = nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)
    )
    for method, expected in (
        ("frozen", set()),
        ("last layer", {"3.weight", "3.bias"}),
        ("m alone", {"1.m", "3.m"}),
        ("LoRA", {"1.lora.A", "1.lora.B", "3.lora.A", "3.lora.B"}),
    ):
        assert trainable(prepared(model, method)) == expected


def test_an_unknown_method_is_refused(pretrained):
    with pytest.raises(
        ValueError, match="unknown method 'QLoRA'; there are 'frozen', "
    ):
        make_trainable("QLoRA", pretrained, ADAPTER)
