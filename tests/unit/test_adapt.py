"""Adapters in whole models: putting them in, freezing, counting, merging."""

import copy

import pytest
import torch
from support import (
    ALL,
    DORA,
    assert_close,
    assert_same_state,
    every_wrapper,
    linear_layer,
    move,
    move_all,
    moved,
    normal,
    snapshot,
)
from torch import nn

from lowrank_utils.adapt import (
    count_parameters,
    freeze_linear_layers,
    is_adapter,
    merge_adapters,
    named_modules_outside_adapters,
    replace_linear_layers,
)
from lowrank_utils.comparison.controls import LinearWithRandomRows
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged, LoRALayer
from lowrank_utils.training import MultilayerPerceptron


class Block(nn.Module):
    """Linear layers as attributes of a module of one's own, one of them the last but
    two in a list."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(6, 6, dtype=torch.float64)
        self.value = nn.Linear(6, 6, bias=False, dtype=torch.float64)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x + torch.relu(self.query(x)) * self.value(x))


class Network(nn.Module):
    """Containers of every kind, nested."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6, dtype=torch.float64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict(
            {
                "left": nn.Linear(6, 3, dtype=torch.float64),
                "right": nn.Sequential(nn.ReLU(), nn.Linear(6, 2, dtype=torch.float64)),
            }
        )

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.heads["left"](x), self.heads["right"](x)], dim=-1)


NAMES = [
    "embed",
    "blocks.0.query",
    "blocks.0.value",
    "blocks.1.query",
    "blocks.1.value",
    "heads.left",
    "heads.right.1",
]


class Tied(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 9, bias=False, dtype=torch.float64)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Shared(nn.Module):
    """One linear layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.other = nn.Linear(6, 6, dtype=torch.float64)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.relu(self.other(torch.relu(self.first(x)))))


class NotebookLoRA(nn.Module):
    """A wrapper as a notebook writes it: ``linear`` and ``lora``, and a weight to
    merge."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            dtype=linear.weight.dtype,
        )

    @property
    def weight(self):
        return self.linear.weight + self.lora.alpha * (self.lora.A @ self.lora.B).T

    def forward(self, x):
        return self.linear(x) + self.lora(x)


class NotebookLoRAWithoutWeight(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha)


def modules(model):
    return list(model.named_modules(remove_duplicate=False))


def adapter_names(model):
    return [name for name, module in modules(model) if is_adapter(module)]


# --- replace_linear_layers: what is replaced ---------------------------------------------------


@every_wrapper
def test_all_linear_layers_are_replaced_in_the_models_order_and_the_outputs_stay(
    wrapper,
):
    model = Network()
    x = normal(5, 4)
    before, linears = model(x), {name: model.get_submodule(name) for name in NAMES}
    assert replace_linear_layers(model, wrapper, 2, 4.0) == NAMES
    assert adapter_names(model) == NAMES
    for name, linear in linears.items():
        adapter = model.get_submodule(name)
        assert type(adapter) is wrapper
        assert adapter.linear is linear
        assert adapter.lora.alpha == 4.0
        assert adapter.lora.A.shape[1] == 2
    assert_close(model(x), before)
    move_all(model)
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("*.query", ["blocks.0.query", "blocks.1.query"]),
        ("embed", ["embed"]),
        ("blocks.1.*", ["blocks.1.query", "blocks.1.value"]),
        ("heads*", ["heads.left", "heads.right.1"]),
        ("blocks.[0]*", ["blocks.0.query", "blocks.0.value"]),
        ("blocks.?.value", ["blocks.0.value", "blocks.1.value"]),
        (["*.value", "embed"], ["embed", "blocks.0.value", "blocks.1.value"]),
        (("heads.right.1", "*right*"), ["heads.right.1"]),
        ({"*"}, NAMES),
        ((pattern for pattern in ["embed", "*left"]), ["embed", "heads.left"]),
    ],
)
def test_glob_patterns_choose_layers_and_the_models_order_stays(targets, expected):
    model = Network()
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0, targets) == expected
    assert adapter_names(model) == expected


def test_patterns_distinguish_upper_and_lower_case():
    with pytest.raises(ValueError, match=r"no linear layer matches 'Embed'"):
        replace_linear_layers(Network(), LinearWithLoRA, 2, 4.0, "Embed")


def test_only_linear_layers_are_replaced():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.LayerNorm(4), nn.Bilinear(2, 2, 2), nn.Linear(4, 3)
    )
    kinds = [type(module) for module in model]
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == ["3"]
    assert [type(module) for module in model] == [*kinds[:3], LinearWithLoRA]


def test_a_subclass_of_linear_counts_as_linear():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 3))
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == ["0"]
    assert type(model[0].linear) is Mine


def test_options_are_passed_on_to_the_layer_class():
    model = Network()
    replace_linear_layers(model, LinearWithDoRA, 2, 4.0, detach_norm=False, init="peft")
    for name in NAMES:
        adapter = model.get_submodule(name)
        assert adapter.detach_norm is False
        assert adapter.lora.A.abs().max() <= adapter.in_features**-0.5


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_mode_are_carried_over_layer_by_layer(training):
    model = Network().train(training)
    model.embed.train(not training)
    replace_linear_layers(model, LinearWithDoRA, 2, 4.0)
    for name in NAMES:
        expected = training != (name == "embed")
        assert {m.training for m in model.get_submodule(name).modules()} == {
            expected
        }, name


@every_wrapper
def test_a_layer_shared_in_two_places_gets_one_adapter_in_both(wrapper):
    model = Shared()
    x = normal(5, 6)
    before = model(x)
    assert replace_linear_layers(model, wrapper, 2, 4.0) == ["first", "other", "again"]
    assert model.first is model.again
    assert model.first is not model.other
    assert_close(model(x), before)


def test_a_block_shared_in_two_places_keeps_being_one_block():
    block = Block()
    model = nn.Sequential(block, nn.ReLU(), block)
    names = ["0.query", "0.value", "2.query", "2.value"]
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == names
    assert model[0] is model[2] is block
    assert is_adapter(block.query)
    assert count_parameters(model).trainable == sum(
        p.numel() for p in block.parameters()
    )


@every_wrapper
def test_a_weight_tied_to_an_embedding_stays_tied(wrapper):
    model = Tied()
    tokens = torch.tensor([[1, 2, 8], [0, 0, 3]])
    before = model(tokens)
    assert replace_linear_layers(model, wrapper, 2, 4.0) == ["head"]
    assert model.head.linear.weight is model.embedding.weight
    assert_close(model(tokens), before)


def test_layers_left_plain_can_be_adapted_afterwards():
    model = Network()
    replace_linear_layers(model, LinearWithLoRA, 2, 4.0, "*.query")
    first = model.blocks[0].query
    rest = ["blocks.0.value", "blocks.1.value"]
    assert replace_linear_layers(model, LinearWithDoRA, 3, 1.0, "*.value") == rest
    assert model.blocks[0].query is first
    assert type(model.blocks[0].value) is LinearWithDoRA


@every_wrapper
def test_the_layer_inside_an_adapter_is_no_target(wrapper):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    replace_linear_layers(model, wrapper, 1, 4.0, "0")
    assert replace_linear_layers(model, wrapper, 1, 4.0, "[1-9]*") == ["1"]
    assert adapter_names(model) == ["0", "1"]
    with pytest.raises(
        ValueError,
        match=r"no linear layer matches '0\.linear'; the linear layers are: 0, 1$",
    ):
        replace_linear_layers(model, wrapper, 1, 4.0, "0.linear")


def test_a_layer_whose_name_begins_like_an_adapters_is_not_taken_for_a_part_of_it():
    model = nn.ModuleDict({"head": nn.Linear(4, 3), "head2": nn.Linear(4, 2)})
    assert replace_linear_layers(model, LinearWithLoRA, 1, 4.0, "head") == ["head"]
    assert count_parameters(model).per_layer == {"head": (15 + 7, 0), "head2": (10, 0)}
    assert replace_linear_layers(model, LinearWithLoRA, 1, 4.0, "head2") == ["head2"]


def test_a_class_of_ones_own_is_used_like_the_four_wrappers():
    model = Network()
    assert replace_linear_layers(model, NotebookLoRA, 2, 4.0) == NAMES
    with pytest.raises(ValueError, match="already adapted: embed"):
        replace_linear_layers(model, NotebookLoRA, 2, 4.0)


# --- replace_linear_layers: what is refused, and that nothing is half done --------------------


def refused(model, *arguments, error=ValueError, match, **options):
    """Expect a refusal that leaves the very same modules in place, with the very same
    numbers."""
    before, state = modules(model), snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        replace_linear_layers(model, *arguments, **options)
    after = modules(model)
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert_same_state(model, state)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_pattern_that_matches_nothing_is_refused_and_the_names_are_listed():
    listed = ", ".join(NAMES).replace(".", r"\.")
    refused(
        Network(),
        LinearWithLoRA,
        2,
        4.0,
        ["*.query", "*.key"],
        match=rf"no linear layer matches '\*\.key'; the linear layers are: {listed}$",
    )


@pytest.mark.parametrize("empty", [[], (), set()])
def test_an_empty_list_of_targets_is_refused(empty):
    message = "^targets is empty; leave it out to adapt all linear layers$"
    refused(Network(), LinearWithLoRA, 2, 4.0, empty, match=message)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (7, "targets must be a pattern or a list of patterns; got int"),
        (nn.Linear, "targets must be a pattern or a list of patterns; got type"),
        (["embed", 7], r"a target must be a string; got 7 \(int\)"),
        ([["embed"]], r"a target must be a string; got \['embed'\] \(list\)"),
        ([None], r"a target must be a string; got None \(NoneType\)"),
    ],
)
def test_targets_of_a_wrong_type_are_refused(targets, message):
    refused(Network(), LinearWithLoRA, 2, 4.0, targets, error=TypeError, match=message)


@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(2, 2)]])
def test_a_model_that_is_no_module_is_refused(model):
    with pytest.raises(
        TypeError, match=rf"model must be an nn\.Module; got {type(model).__name__}"
    ):
        replace_linear_layers(model, LinearWithLoRA, 2, 4.0)


def test_a_bare_linear_layer_is_refused_with_what_to_write_instead():
    refused(
        nn.Linear(4, 3),
        LinearWithLoRA,
        2,
        4.0,
        match=r"^model is itself a Linear, which can't be replaced in place; "
        r"for a linear layer write layer_class\(linear, rank, alpha\)$",
    )


@every_wrapper
def test_an_adapter_as_the_model_is_refused(wrapper):
    refused(
        moved(wrapper), wrapper, 2, 4.0, match=f"model is itself a {wrapper.__name__}"
    )


def test_a_model_without_linear_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    refused(model, LinearWithLoRA, 2, 4.0, match="Sequential has no linear layers")


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_an_adapted_model_is_refused_whichever_wrappers_meet(first, second):
    model = MultilayerPerceptron(6, 5, 4, 3)
    replace_linear_layers(model, first, 2, 4.0, "layers.2")
    refused(
        model,
        second,
        2,
        4.0,
        match=r"already adapted: layers\.2\. Call merge_adapters\(model\) first",
    )


def test_only_the_adapted_layers_that_a_pattern_matches_are_named():
    model = Network()
    replace_linear_layers(model, LinearWithLoRA, 2, 4.0, ["*.query", "embed"])
    refused(
        model,
        LinearWithLoRA,
        2,
        4.0,
        "blocks.*",
        match=r"already adapted: blocks\.0\.query, blocks\.1\.query\. ",
    )


def test_when_the_third_layer_fails_the_model_is_as_it_was():
    built = []

    def fails_at_the_third(linear, rank, alpha):
        if len(built) == 2:
            raise RuntimeError("the third layer failed")
        built.append(LinearWithDoRA(linear, rank, alpha))
        return built[-1]

    refused(
        Network(),
        fails_at_the_third,
        2,
        4.0,
        error=RuntimeError,
        match="the third layer failed",
    )
    assert len(built) == 2


@pytest.mark.parametrize(
    ("rank", "alpha", "options", "error", "message"),
    [
        (0, 4.0, {}, ValueError, "rank must be"),
        (2, "4", {}, TypeError, "alpha must be"),
        (2, 4.0, {"init": "zeros"}, ValueError, "init must be one of"),
        (2, 4.0, {"droput": 0.1}, TypeError, "droput"),
    ],
)
def test_a_wrong_argument_of_the_layers_leaves_the_model_as_it_was(
    rank, alpha, options, error, message
):
    refused(
        Network(), LinearWithDoRA, rank, alpha, error=error, match=message, **options
    )


def test_a_layer_without_a_shape_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LazyLinear(2))
    before = list(model)
    with pytest.raises(
        ValueError, match="has no shape yet: pass one batch through the model first"
    ):
        replace_linear_layers(model, LinearWithLoRA, 2, 4.0)
    assert all(new is old for new, old in zip(model, before, strict=True))
    model(torch.zeros(1, 4))
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == ["0", "2"]


# --- named_modules_outside_adapters -------------------------------------------------------------


def test_without_adapters_the_modules_are_torchs_each_once_or_under_each_name():
    model = nn.Sequential(Shared(), Network())
    assert list(named_modules_outside_adapters(model)) == list(model.named_modules())
    assert list(
        named_modules_outside_adapters(model, remove_duplicate=False)
    ) == modules(model)
    assert len(modules(model)) == len(list(model.named_modules())) + 1


@every_wrapper
def test_nothing_inside_an_adapter_is_named_also_where_the_model_is_one(wrapper):
    layer = moved(wrapper)
    assert list(named_modules_outside_adapters(layer)) == [("", layer)]
    model = nn.Sequential(layer, nn.ReLU())
    assert [name for name, _ in named_modules_outside_adapters(model)] == ["", "0", "1"]


# --- freeze_linear_layers ----------------------------------------------------------------------


@every_wrapper
def test_freezing_leaves_the_adapters_and_everything_that_is_not_linear_trainable(
    wrapper,
):
    model = Network()
    replace_linear_layers(model, wrapper, 2, 4.0)
    freeze_linear_layers(model)
    adapters = ["lora.A", "lora.B"] + (["m"] if wrapper in DORA else [])
    expected = {f"{name}.{parameter}" for name in NAMES for parameter in adapters}
    expected |= {
        f"blocks.{i}.norm.{parameter}"
        for i in (0, 1)
        for parameter in ("weight", "bias")
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_freezing_a_model_without_adapters_freezes_its_linear_layers():
    model = MultilayerPerceptron(6, 5, 4, 3)
    freeze_linear_layers(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_freezing_before_adapting_gives_the_same_flags_as_after():
    before, after = MultilayerPerceptron(6, 5, 4, 3), MultilayerPerceptron(6, 5, 4, 3)
    freeze_linear_layers(before)
    replace_linear_layers(before, LinearWithDoRA, 2, 4.0)
    replace_linear_layers(after, LinearWithDoRA, 2, 4.0)
    freeze_linear_layers(after)
    flags = [[p.requires_grad for p in model.parameters()] for model in (before, after)]
    assert flags[0] == flags[1]
    assert any(flags[0])


def test_freezing_a_single_linear_layer_freezes_it():
    linear = nn.Linear(4, 3)
    freeze_linear_layers(linear)
    assert not linear.weight.requires_grad
    assert not linear.bias.requires_grad


# --- count_parameters --------------------------------------------------------------------------


def article_model(wrapper, rank=4):
    model = MultilayerPerceptron(784, 128, 256, 10)
    replace_linear_layers(model, wrapper, rank, 8)
    freeze_linear_layers(model)
    return model


@pytest.mark.parametrize(
    ("wrapper", "rank", "trainable"),
    [
        (LinearWithLoRA, 2, 3_124),
        (LinearWithLoRA, 4, 6_248),
        (LinearWithLoRAMerged, 4, 6_248),
        (LinearWithDoRA, 4, 6_642),
        (LinearWithDoRAMerged, 4, 6_642),
        (LinearWithDoRA, 16, 25_386),
    ],
)
def test_the_articles_model_has_136074_frozen_parameters_and_this_many_trainable(
    wrapper, rank, trainable
):
    count = count_parameters(article_model(wrapper, rank))
    assert (count.trainable, count.frozen, count.total) == (
        trainable,
        136_074,
        trainable + 136_074,
    )


def test_the_count_per_layer_has_one_entry_for_an_adapted_layer():
    assert count_parameters(article_model(LinearWithDoRA)).per_layer == {
        "layers.0": (4 * (784 + 128) + 128, 784 * 128 + 128),
        "layers.2": (4 * (128 + 256) + 256, 128 * 256 + 256),
        "layers.4": (4 * (256 + 10) + 10, 256 * 10 + 10),
    }


def test_the_printed_count_is_a_table_with_thousands_and_a_total():
    assert str(count_parameters(article_model(LinearWithLoRA))) == (
        "layer       trainable       frozen\n"
        "layers.0        3,648      100,480\n"
        "layers.2        1,536       33,024\n"
        "layers.4        1,064        2,570\n"
        "all             6,248      136,074"
    )


def test_the_first_column_is_as_wide_as_its_heading_where_all_names_are_shorter():
    assert str(count_parameters(nn.Sequential(nn.Linear(2, 3)))) == (
        "layer    trainable       frozen\n0                9            0\nall              9            0"
    )


def test_the_columns_of_the_printed_count_stay_aligned_under_long_and_short_names():
    for model in (
        Network(),
        nn.Linear(2, 2),
        nn.ModuleDict({"a" * 40: nn.Linear(2, 2)}),
    ):
        lines = str(count_parameters(model)).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert len(lines) == 2 + len(count_parameters(model).per_layer)


def test_a_plain_model_is_all_trainable_and_modules_without_parameters_are_left_out():
    count = count_parameters(MultilayerPerceptron(6, 5, 4, 3))
    assert count.per_layer == {
        "layers.0": (35, 0),
        "layers.2": (24, 0),
        "layers.4": (15, 0),
    }
    assert (count.trainable, count.frozen) == (74, 0)


def test_shared_and_tied_parameters_count_once_where_they_come_first():
    count = count_parameters(Shared())
    assert count.per_layer == {"first": (42, 0), "other": (42, 0)}
    tied = Tied()
    replace_linear_layers(tied, LinearWithLoRA, 2, 4.0)
    assert count_parameters(tied).per_layer == {
        "embedding": (54, 0),
        "head": (2 * (6 + 9), 0),
    }
    shared = Shared()
    replace_linear_layers(shared, LinearWithLoRA, 2, 4.0)
    assert count_parameters(shared).total == 2 * (42 + 24)


@every_wrapper
def test_an_adapter_as_the_root_is_one_entry_under_its_class_name(wrapper):
    layer = moved(wrapper)
    freeze_linear_layers(layer)
    trainable = 3 * (7 + 5) + (5 if wrapper in DORA else 0)
    assert count_parameters(layer).per_layer == {wrapper.__name__: (trainable, 40)}


def test_parameters_of_a_module_that_also_has_children_are_counted():
    model = Network()
    model.scale = nn.Parameter(torch.ones(3))
    model.register_parameter("shift", nn.Parameter(torch.ones(2), requires_grad=False))
    count = count_parameters(model)
    assert count.per_layer["Network"] == (3, 2)
    assert count.total == sum(p.numel() for p in model.parameters())


def test_a_child_with_the_name_of_the_models_class_hides_nothing():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.Head = nn.Linear(2, 2)

    assert count_parameters(Head()).per_layer == {"Head": (9, 0)}
    assert count_parameters(Head().requires_grad_(False)).per_layer == {"Head": (0, 9)}


def test_buffers_are_not_counted():
    # Statistics of a batch normalisation, and the random rows of a control.
    count = count_parameters(nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)))
    assert count.per_layer == {"0": (40, 0), "1": (10, 0)}
    linear = linear_layer().requires_grad_(False)
    layer = LinearWithRandomRows(linear, 3, 1.7)
    assert layer.R.numel() == 35
    assert count_parameters(layer).per_layer == {
        "LinearWithRandomRows": (3 * (7 + 5) + 5, 40)
    }


# --- merge_adapters ----------------------------------------------------------------------------


def adapted_network(wrapper, dtype=torch.float64):
    model = Network()
    replace_linear_layers(model, wrapper, 2, 1.5)
    freeze_linear_layers(model)
    return move_all(model).to(dtype)


@every_wrapper
def test_the_merged_model_has_plain_linear_layers_only_and_the_same_outputs(wrapper):
    model = adapted_network(wrapper)
    merged = merge_adapters(model)
    assert adapter_names(merged) == []
    assert [(name, type(module)) for name, module in modules(merged)] == [
        (name, type(module)) for name, module in modules(Network())
    ]
    x = normal(5, 4)
    assert_close(merged(x), model(x))
    for name in NAMES:
        old, new = model.get_submodule(name), merged.get_submodule(name)
        assert (new.in_features, new.out_features) == (
            old.in_features,
            old.out_features,
        )
        assert (new.bias is None) == (old.bias is None)
        assert torch.equal(new.weight, old.weight)


@every_wrapper
def test_a_merged_bfloat16_model_stays_bfloat16_and_close(wrapper):
    model = nn.Sequential(moved(wrapper, linear_layer(dtype=torch.bfloat16)), nn.Tanh())
    merged = merge_adapters(model)
    assert merged[0].weight.dtype == merged[0].bias.dtype == torch.bfloat16
    x = normal(5, 7, dtype=torch.bfloat16)
    torch.testing.assert_close(merged(x), model(x), rtol=0.02, atol=0.1)


@every_wrapper
def test_merging_leaves_the_original_bit_for_bit_as_it_was(wrapper):
    model = adapted_network(wrapper)
    before, places = snapshot(model), modules(model)
    flags = [p.requires_grad for p in model.parameters()]
    merged = merge_adapters(model)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.fill_(7)
    assert_same_state(model, before)
    assert all(
        new is old for (_, new), (_, old) in zip(modules(model), places, strict=True)
    )
    assert [p.requires_grad for p in model.parameters()] == flags


@every_wrapper
def test_merging_twice_gives_equal_and_independent_models(wrapper):
    model = adapted_network(wrapper)
    first, second = merge_adapters(model), merge_adapters(model)
    assert_same_state(first, snapshot(second))
    shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not shared


@every_wrapper
def test_an_adapter_as_the_root_is_merged_into_a_linear_layer(wrapper):
    layer = moved(wrapper)
    merged = merge_adapters(layer)
    assert type(merged) is nn.Linear
    x = normal(4, 7)
    assert_close(merged(x), layer(x))


def test_a_shared_adapter_stays_one_layer():
    model = Shared()
    replace_linear_layers(model, LinearWithDoRA, 2, 4.0)
    move_all(model)
    merged = merge_adapters(model)
    assert type(merged.first) is nn.Linear
    assert merged.first is merged.again
    assert merged.first is not merged.other
    x = normal(5, 6)
    assert_close(merged(x), model(x))


@every_wrapper
def test_merging_unties_a_tied_weight_and_leaves_the_embedding(wrapper):
    model = Tied()
    embedding = model.embedding.weight.detach().clone()
    replace_linear_layers(model, wrapper, 2, 4.0)
    move_all(model)
    merged = merge_adapters(model)
    assert torch.equal(merged.embedding.weight, embedding)
    assert torch.equal(model.embedding.weight, embedding)
    assert not torch.allclose(merged.head.weight, embedding)
    tokens = torch.tensor([[1, 2, 8], [0, 0, 3]])
    assert_close(merged(tokens), model(tokens))


@every_wrapper
def test_the_merged_layers_are_trainable_and_other_flags_stay(wrapper):
    model = adapted_network(wrapper)
    model.blocks[0].norm.requires_grad_(False)
    merged = merge_adapters(model)
    frozen = {name for name, p in merged.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.0.norm.weight", "blocks.0.norm.bias"}
    merged(normal(5, 4)).sum().backward()
    assert merged.embed.weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_mode_survive_the_merge(training):
    model = adapted_network(LinearWithDoRA).train(training)
    model.embed.train(not training)
    merged = merge_adapters(model)
    assert merged.embed.training is not training
    assert {m.training for name, m in merged.named_modules() if name != "embed"} == {
        training
    }


def test_partly_adapted_models_and_different_wrappers_in_one_model_are_merged():
    model = Network()
    for wrapper, target in zip(
        ALL, ["embed", "blocks.0.*", "blocks.1.*", "heads.left"], strict=True
    ):
        replace_linear_layers(model, wrapper, 2, 1.5, target)
    move_all(model)
    merged = merge_adapters(model)
    assert adapter_names(merged) == []
    assert_close(merged(normal(5, 4)), model(normal(5, 4)))
    assert torch.equal(merged.heads["right"][1].weight, model.heads["right"][1].weight)


def test_a_merged_model_can_be_adapted_again():
    merged = merge_adapters(adapted_network(LinearWithDoRA))
    before = merged(normal(5, 4))
    assert replace_linear_layers(merged, LinearWithLoRA, 2, 4.0) == NAMES
    assert_close(merged(normal(5, 4)), before)


@every_wrapper
def test_merging_draws_no_random_numbers(wrapper):
    model = adapted_network(wrapper)
    state = torch.get_rng_state()
    merge_adapters(model)
    assert torch.equal(torch.get_rng_state(), state)


@every_wrapper
def test_a_model_on_the_meta_device_is_merged_there(wrapper):
    model = nn.Sequential(wrapper(nn.Linear(7, 5, device="meta"), 2, 1.0))
    merged = merge_adapters(model)
    assert merged[0].weight.is_meta
    assert merged[0].weight.shape == (5, 7)


def test_a_class_of_ones_own_with_a_weight_is_merged():
    model = Network()
    replace_linear_layers(model, NotebookLoRA, 2, 4.0)
    move_all(model)
    merged = merge_adapters(model)
    assert adapter_names(merged) == []
    assert_close(merged(normal(5, 4)), model(normal(5, 4)))


def test_a_class_of_ones_own_without_a_weight_is_refused_by_name():
    model = Network().float()
    replace_linear_layers(model, NotebookLoRAWithoutWeight, 2, 4.0)
    with pytest.raises(
        TypeError,
        match=r"NotebookLoRAWithoutWeight has no weight to merge; .* `weight`",
    ):
        merge_adapters(model)


@pytest.mark.parametrize("model", [nn.Linear(4, 3), Network(), nn.Sequential()])
def test_a_model_without_adapters_is_refused(model):
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} has no adapters to merge"
    ):
        merge_adapters(model)


def test_a_module_with_only_one_of_the_two_attributes_is_no_adapter():
    only_linear, only_lora, neither = nn.Module(), nn.Module(), nn.Module()
    only_linear.linear = nn.Linear(4, 3)
    only_lora.lora = LoRALayer(4, 3, 2, 1.0)
    neither.linear, neither.lora = nn.ReLU(), nn.ReLU()
    assert not any(
        is_adapter(module)
        for module in (only_linear, only_lora, neither, nn.Linear(2, 2))
    )
    assert all(is_adapter(wrapper(nn.Linear(4, 3), 2, 1.0)) for wrapper in ALL)


def test_a_copy_of_an_adapted_model_is_independent_of_it():
    model = adapted_network(LinearWithDoRA)
    x = normal(5, 4)
    expected = model(x).detach()
    twin = copy.deepcopy(model)
    move(twin.embed, seed=77)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(twin(x), expected)
