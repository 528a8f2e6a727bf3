"""Parts of a model with learning rates of their own: which parameter goes where, and
what is refused."""

import math
import warnings
from collections import UserDict
from types import MappingProxyType

import pytest
import torch
from support import linear_layer, snapshot
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


def named(model, groups):
    """Return the rate and the names of the parameters of each group, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(group.keys() == {"params", "lr"} for group in groups)
    return [
        (group["lr"], [names[id(parameter)] for parameter in group["params"]])
        for group in groups
    ]


# --- Which parameter goes where ------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [None, {}])
def test_without_factors_all_that_is_trainable_is_one_group(factors):
    model = network()
    assert named(model, parameter_groups(model, 0.01, factors)) == [(0.01, ADAPTED)]


def test_each_pattern_has_its_group_with_its_rate_after_that_of_all_the_rest():
    model = network()
    groups = named(model, parameter_groups(model, 0.01, {"*.m": 30, "*.lora.B": 0.5}))
    assert [rate for rate, _ in groups] == [
        0.01,
        pytest.approx(0.3),
        pytest.approx(0.005),
    ]
    assert [names for _, names in groups] == [
        ["0.lora.A", "2.lora.A"],
        ["0.m", "2.m"],
        ["0.lora.B", "2.lora.B"],
    ]


def test_the_groups_are_in_the_order_of_the_patterns_and_within_one_in_that_of_the_model():
    model = network()
    patterns = {"2.*": 2, "0.m": 3, "0.lora.*": 5}
    expected = {"2.*": ADAPTED[3:], "0.m": ["0.m"], "0.lora.*": ADAPTED[1:3]}
    for order in (list(patterns), list(reversed(patterns))):
        groups = named(
            model,
            parameter_groups(model, 1.0, {name: patterns[name] for name in order}),
        )
        # All is matched, so there is no group for the rest.
        assert groups == [(patterns[name], expected[name]) for name in order]


def test_every_trainable_parameter_stands_in_one_group_once_and_no_frozen_one_in_any():
    model = network()
    model[2].lora.A.requires_grad_(False)
    groups = parameter_groups(model, 0.01, {"*.m": 3, "0.lora.B": 2})
    given = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in given}) == len(given)
    assert {id(parameter) for parameter in given} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_a_frozen_parameter_that_a_pattern_matches_too_is_left_out():
    model = network()
    model[0].m.requires_grad_(False)
    groups = named(model, parameter_groups(model, 0.01, {"*m": 3}))
    assert groups[1][1] == ["2.m"]
    assert "0.m" not in groups[0][1]


def test_patterns_are_globs_for_the_whole_name_in_upper_and_lower_case():
    model = network()
    assert named(model, parameter_groups(model, 1.0, {"[02].lora.?": 2}))[1][1] == [
        name for name in ADAPTED if "lora" in name
    ]
    for pattern in ("m", "*.M", "0.lora"):
        with pytest.raises(ValueError, match="no trainable parameter matches"):
            parameter_groups(model, 1.0, {pattern: 2})


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType])
def test_any_mapping_will_do(kind):
    model = network()
    assert named(model, parameter_groups(model, 1.0, kind({"*.m": 3})))[1] == (
        3.0,
        ["0.m", "2.m"],
    )


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
    rest, matched = parameter_groups(model, 1.0, {pattern: 2})
    assert len(matched["params"]) == len(rest["params"]) == 1
    assert matched["params"][0] is model.words.weight
    assert rest["params"][0] is model.scores.bias
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a parameter that comes twice
        torch.optim.SGD([rest, matched])


def test_two_patterns_for_two_names_of_one_parameter_are_refused_as_well():
    with pytest.raises(
        ValueError,
        match=r"words\.weight is matched by 'words\.\*' and by 'scores\.weight'",
    ):
        parameter_groups(Tied(), 1.0, {"words.*": 2, "scores.weight": 3})


def test_the_model_stays_as_it_is():
    model = network()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    parameter_groups(model, 0.01, {"*.m": 3})
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items()
    )


# --- In an optimizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
)
def test_in_one_step_of_an_optimizer_the_magnitudes_move_factor_times_as_far(optimizer):
    def moves(factors):
        torch.manual_seed(0)
        model = network()
        options = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
        # The rate of the optimizer itself mustn't count.
        update = optimizer(parameter_groups(model, 1e-3, factors), lr=77.0, **options)
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


@pytest.mark.parametrize(
    "pattern", ["*.magnitude", "", "0.linear.weight", "*.linear.*"]
)
def test_a_pattern_that_matches_nothing_trainable_is_refused_and_the_trainable_names_are_listed(
    pattern,
):
    # The last two match what is frozen.
    with pytest.raises(ValueError, match="no trainable parameter matches") as caught:
        parameter_groups(network(), 0.01, {"*.m": 3, pattern: 2})
    expected = f"no trainable parameter matches {pattern!r}; trainable are: {', '.join(ADAPTED)}"
    assert str(caught.value) == expected


def test_a_tied_parameter_is_listed_by_its_first_name():
    with pytest.raises(
        ValueError, match=r"trainable are: words\.weight, scores\.bias$"
    ):
        parameter_groups(Tied(), 0.01, {"*.m": 3})


@pytest.mark.parametrize(
    ("first", "second"), [("*.m", "2.*"), ("2.*", "*.m"), ("*", "2.m"), ("2.m", "*.m")]
)
def test_two_patterns_that_match_one_parameter_are_refused_by_its_name_and_theirs(
    first, second
):
    with pytest.raises(ValueError, match="is matched by") as caught:
        parameter_groups(network(), 0.01, {first: 2, second: 2})
    message = str(caught.value)
    assert f"2.m is matched by {first!r} and by {second!r}; which of the two" in message


@pytest.mark.parametrize(
    ("factor", "error", "shown"),
    [
        (0, ValueError, "0"),
        (-1, ValueError, "-1"),
        (math.nan, ValueError, "nan"),
        (math.inf, ValueError, "inf"),
        (True, TypeError, "True (bool)"),
        ("3", TypeError, "'3' (str)"),
        (None, TypeError, "None (NoneType)"),
    ],
)
def test_a_factor_that_is_no_number_above_zero_is_refused_by_its_pattern(
    factor, error, shown
):
    with pytest.raises(error) as caught:
        parameter_groups(network(), 0.01, {"*.lora.B": 2, "*.m": factor})
    assert (
        str(caught.value)
        == f"the factor of '*.m' must be a finite number larger than 0; got {shown}"
    )


@pytest.mark.parametrize("factors", [[("*.m", 3)], "*.m", 3, {"*.m"}, 0, ""])
def test_factors_that_are_no_mapping_are_refused(factors):
    kind = type(factors).__name__
    with pytest.raises(
        TypeError, match=f"^factors must be a dict of pattern → factor; got {kind}$"
    ):
        parameter_groups(network(), 0.01, factors)


@pytest.mark.parametrize("pattern", [3, None, ("*.m",)])
def test_a_pattern_that_is_no_string_is_refused(pattern):
    with pytest.raises(TypeError, match="a pattern must be a string; got") as caught:
        parameter_groups(network(), 0.01, {pattern: 3})
    assert str(caught.value).endswith(f"got {pattern!r} ({type(pattern).__name__})")


@pytest.mark.parametrize("factors", [None, {"*": 2}])
@pytest.mark.parametrize("model", [nn.Linear(3, 2).requires_grad_(False), nn.ReLU()])
def test_a_model_with_nothing_to_train_is_refused(model, factors):
    with pytest.raises(
        ValueError, match="model has no trainable parameters: everything is frozen"
    ):
        parameter_groups(model, 0.01, factors)


@pytest.mark.parametrize("model", [[nn.Linear(3, 2)], nn.Linear, None])
def test_a_model_that_is_no_module_is_refused(model):
    with pytest.raises(
        TypeError, match=f"^model must be an nn.Module; got {type(model).__name__}$"
    ):
        parameter_groups(model, 0.01)


@pytest.mark.parametrize(
    ("rate", "error"),
    [
        (0, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("0.1", TypeError),
        (True, TypeError),
    ],
)
def test_a_learning_rate_that_is_no_number_above_zero_is_refused(rate, error):
    with pytest.raises(
        error, match="learning_rate must be a finite number larger than 0; got"
    ):
        parameter_groups(network(), rate, {"*.m": 3})


# --- In a model of PEFT --------------------------------------------------------------------------------------


def test_the_patterns_of_the_docstring_fit_pefts_names():
    peft = pytest.importorskip(
        "peft", reason='needs the extra peft: pip install -e ".[peft]"'
    )
    base = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["0", "2"], use_dora=True
    )
    model = peft.get_peft_model(base, config)
    factors = {"*lora_magnitude_vector*": 30, "*lora_B*": 16}
    (rest, A), (magnitudes, m), (b, B) = named(
        model, parameter_groups(model, 0.01, factors)
    )
    assert (rest, magnitudes, b) == (0.01, pytest.approx(0.3), pytest.approx(0.16))
    for names, part in ((A, "lora_A"), (m, "lora_magnitude_vector"), (B, "lora_B")):
        assert len(names) == 2
        assert all(
            f".{number}.{part}." in name
            for number, name in zip((0, 2), names, strict=True)
        )
    for layer in (0, 2):
        magnitude = (
            model.base_model.model[layer].lora_magnitude_vector["default"].weight
        )
        assert any(
            magnitude is p for p in parameter_groups(model, 0.01, factors)[1]["params"]
        )
