"""Parts of a model with learning rates of their own: which parameter goes where, and
what is refused."""

import warnings
from collections import UserDict
from math import inf, nan
from types import MappingProxyType

import pytest
import torch
from support import assert_same_state, linear_layer, snapshot
from torch import nn

from lowrank_utils.adapt import (
    freeze_linear_layers,
    parameter_groups,
    replace_linear_layers,
)
from lowrank_utils.dora import LinearWithDoRA

ADAPTED = ["0.m", "0.lora.A", "0.lora.B", "2.m", "2.lora.A", "2.lora.B"]


def network():
    """Return two DoRA layers with a ReLU between them, W and b frozen."""
    model = nn.Sequential(linear_layer(7, 5), nn.ReLU(), linear_layer(5, 3, seed=4))
    replace_linear_layers(model, LinearWithDoRA, 2, 1.7)
    freeze_linear_layers(model)
    return model


def named(model, *arguments):
    """Return the rate and the names of the parameters of each group, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, *arguments)
    assert all(group.keys() == {"params", "lr"} for group in groups)
    return [
        (group["lr"], [names[id(parameter)] for parameter in group["params"]])
        for group in groups
    ]


# --- Which parameter goes where ------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [None, {}])
def test_without_factors_all_that_is_trainable_is_one_group(factors):
    assert named(network(), 0.01, factors) == [(0.01, ADAPTED)]


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_each_pattern_has_its_group_with_its_rate_after_that_of_all_the_rest(kind):
    assert named(network(), 0.01, kind({"*.m": 30, "*.lora.B": 0.5})) == [
        (0.01, ["0.lora.A", "2.lora.A"]),
        (pytest.approx(0.3), ["0.m", "2.m"]),
        (pytest.approx(0.005), ["0.lora.B", "2.lora.B"]),
    ]


def test_the_groups_are_in_the_order_of_the_patterns_and_within_one_in_that_of_the_model():
    expected = {"2.*": (2, ADAPTED[3:]), "0.m": (3, ["0.m"])}
    expected["0.lora.*"] = (5, ADAPTED[1:3])
    for order in (list(expected), list(reversed(expected))):
        factors = {pattern: expected[pattern][0] for pattern in order}
        # All is matched, so there is no group for the rest.
        assert named(network(), 1.0, factors) == [expected[name] for name in order]


def test_what_is_frozen_is_in_no_group_and_the_model_stays_as_it_is():
    model = network()
    model[0].m.requires_grad_(False)
    model[2].lora.A.requires_grad_(False)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    assert named(model, 1.0, {"*m": 3, "0.lora.B": 2}) == [
        (1.0, ["0.lora.A", "2.lora.B"]),
        (3.0, ["2.m"]),
        (2.0, ["0.lora.B"]),
    ]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_same_state(model, before)


def test_patterns_are_globs_for_the_whole_name_in_upper_and_lower_case():
    lora = [name for name in ADAPTED if "lora" in name]
    assert named(network(), 1.0, {"[02].lora.?": 2})[1] == (2.0, lora)
    for pattern in ("m", "*.M", "0.lora"):
        with pytest.raises(ValueError, match="no trainable parameter matches"):
            parameter_groups(network(), 1.0, {pattern: 2})


class Tied(nn.Module):
    """A table of words that also scores them: one parameter, two names."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.scores = nn.Linear(4, 6)
        self.scores.weight = self.words.weight


@pytest.mark.parametrize("pattern", ["words.*", "scores.weight", "*weight"])
def test_a_tied_parameter_stands_once_and_is_matched_by_either_name(pattern):
    model = Tied()
    expected = [(1.0, ["scores.bias"]), (2.0, ["words.weight"])]
    assert named(model, 1.0, {pattern: 2}) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a parameter that comes twice
        torch.optim.SGD(parameter_groups(model, 1.0, {pattern: 2}))


# --- In an optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
)
def test_in_one_step_of_an_optimizer_the_magnitudes_move_factor_times_as_far(optimizer):
    def moves(factors):
        torch.manual_seed(0)
        model = network()
        # The rate of the optimizer itself mustn't count.
        groups = parameter_groups(model, 1e-3, factors)
        update = optimizer(groups, lr=77.0, weight_decay=0.0)
        before = snapshot(model)
        x = torch.linspace(-1, 1, 28, dtype=torch.float64).reshape(4, 7)
        model(x).square().sum().backward()
        update.step()
        return {name: tensor - before[name] for name, tensor in snapshot(model).items()}

    plain, faster = moves(None), moves({"*.m": 30})
    for name, move in faster.items():
        expected = (30 if name.endswith(".m") else 1) * plain[name]
        torch.testing.assert_close(move, expected, rtol=1e-6, atol=1e-13)
        # A has no gradient as long as B is zero.
        trained = name.endswith((".m", ".lora.B"))
        assert (move.abs().max() > 0) == trained, name


# --- What is refused -----------------------------------------------------------------------------------------


def refused(error, message, model, *arguments):
    with pytest.raises(error) as caught:
        parameter_groups(model, *arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "pattern", ["*.magnitude", "", "0.linear.weight", "*.linear.*"]
)
def test_a_pattern_that_matches_nothing_trainable_is_refused_and_the_trainable_names_are_listed(
    pattern,
):
    # The last two match what is frozen. A tied parameter has its first name.
    tied = ["words.weight", "scores.bias"]
    for model, names in ((network(), ADAPTED), (Tied(), tied)):
        message = f"no trainable parameter matches {pattern!r}; trainable are: "
        with pytest.raises(ValueError, match="no trainable") as caught:
            parameter_groups(model, 0.01, {names[0]: 3, pattern: 2})
        assert str(caught.value) == message + ", ".join(names)


@pytest.mark.parametrize(
    ("model", "name", "first", "second"),
    [
        (network(), "2.m", "*.m", "2.*"),
        (network(), "2.m", "2.*", "*.m"),
        (network(), "2.m", "*", "2.m"),
        (network(), "2.m", "2.m", "*.m"),
        (Tied(), "words.weight", "words.*", "scores.weight"),
    ],
)
def test_two_patterns_that_match_one_parameter_are_refused_by_its_name_and_theirs(
    model, name, first, second
):
    message = f"{name} is matched by {first!r} and by {second!r}; which of the two"
    refused(ValueError, message, model, 0.01, {first: 2, second: 2})


NO_NUMBERS = [
    (0, ValueError, "0"),
    (-0.1, ValueError, "-0.1"),
    (nan, ValueError, "nan"),
    (inf, ValueError, "inf"),
    (True, TypeError, "True (bool)"),
    ("3", TypeError, "'3' (str)"),
    (None, TypeError, "None (NoneType)"),
]


@pytest.mark.parametrize(("bad", "error", "shown"), NO_NUMBERS)
def test_a_factor_that_is_no_number_above_zero_is_refused_by_its_pattern(
    bad, error, shown
):
    end = f" must be a finite number larger than 0; got {shown}"
    factors = {"*.lora.B": 2, "*.m": bad}
    refused(error, f"the factor of '*.m'{end}", network(), 0.01, factors)
    # So is the rate itself, by its name.
    refused(error, f"learning_rate{end}", network(), bad, {"*.m": 3})


@pytest.mark.parametrize("factors", [[("*.m", 3)], "*.m", 3, {"*.m"}, 0, ""])
def test_factors_that_are_no_mapping_are_refused(factors):
    message = (
        f"factors must be a dict of pattern → factor; got {type(factors).__name__}"
    )
    refused(TypeError, message, network(), 0.01, factors)


@pytest.mark.parametrize("pattern", [3, None, ("*.m",)])
def test_a_pattern_that_is_no_string_is_refused(pattern):
    shown = f"{pattern!r} ({type(pattern).__name__})"
    message = f"a pattern must be a string; got {shown}"
    refused(TypeError, message, network(), 0.01, {pattern: 3})


@pytest.mark.parametrize("factors", [None, {"*": 2}])
@pytest.mark.parametrize("model", [nn.Linear(3, 2).requires_grad_(False), nn.ReLU()])
def test_a_model_with_nothing_to_train_is_refused(model, factors):
    refused(ValueError, "model has no trainable parameters", model, 0.01, factors)


@pytest.mark.parametrize("model", [[nn.Linear(3, 2)], nn.Linear, None])
def test_a_model_that_is_no_module_is_refused(model):
    message = f"model must be an nn.Module; got {type(model).__name__}"
    refused(TypeError, message, model, 0.01)


# --- In a model of PEFT --------------------------------------------------------------------------------------


def test_the_patterns_of_the_docstring_fit_pefts_names():
    peft = pytest.importorskip(
        "peft", reason='needs the extra peft: pip install -e ".[peft]"'
    )
    base = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    targets = {"target_modules": ["0", "2"], "use_dora": True}
    config = peft.LoraConfig(r=2, lora_alpha=4, **targets)
    model = peft.get_peft_model(base, config)
    rates, names = zip(
        *named(model, 0.01, {"*lora_magnitude_vector*": 30, "*lora_B*": 16}),
        strict=True,
    )
    assert rates == (0.01, pytest.approx(0.3), pytest.approx(0.16))
    parts = ("lora_A.default.weight", "lora_magnitude_vector.default.weight")
    assert names == tuple(
        [f"base_model.model.{layer}.{part}" for layer in (0, 2)]
        for part in (*parts, "lora_B.default.weight")
    )
