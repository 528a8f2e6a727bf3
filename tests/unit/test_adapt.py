"""Adapters in whole models: putting them in, freezing, counting, merging."""

import copy
import re

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
    dequantize_linear_layers,
    freeze_linear_layers,
    is_adapter,
    mark_only_adapters_as_trainable,
    merge_adapters,
    named_modules_outside_adapters,
    parameter_groups,
    quantize_linear_layers,
    replace_linear_layers,
)
from lowrank_utils.comparison.controls import LinearWithRandomRows
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged, LoRALayer
from lowrank_utils.training import MultilayerPerceptron


def linear(in_features, out_features, **options):
    return nn.Linear(in_features, out_features, dtype=torch.float64, **options)


class Block(nn.Module):
    """Linear layers as attributes of a module of one's own."""

    def __init__(self):
        super().__init__()
        self.query, self.value = linear(6, 6), linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x + torch.relu(self.query(x)) * self.value(x))


class Network(nn.Module):
    """Containers of every kind, nested."""

    def __init__(self):
        super().__init__()
        self.embed = linear(4, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        right = nn.Sequential(nn.ReLU(), linear(6, 2))
        self.heads = nn.ModuleDict({"left": linear(6, 3), "right": right})

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return torch.cat([self.heads["left"](x), self.heads["right"](x)], dim=-1)


BLOCKS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("query", "value")]
NAMES = ["embed", *BLOCKS, "heads.left", "heads.right.1"]


class Tied(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6, dtype=torch.float64)
        self.head = linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


class Shared(nn.Module):
    """One linear layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.other = linear(6, 6), linear(6, 6)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.relu(self.other(torch.relu(self.first(x)))))


class NotebookLoRAWithoutWeight(nn.Module):
    """A wrapper as a notebook writes it: ``linear`` and ``lora``."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        sizes = linear.in_features, linear.out_features
        self.lora = LoRALayer(*sizes, rank, alpha, dtype=linear.weight.dtype)

    def forward(self, x):
        return self.linear(x) + self.lora(x)


class NotebookLoRA(NotebookLoRAWithoutWeight):
    @property
    def weight(self):
        return self.linear.weight + self.lora.delta_weight()


def modules(model):
    return list(model.named_modules(remove_duplicate=False))


def adapter_names(model):
    return [name for name, module in modules(model) if is_adapter(module)]


X, SIX = normal(5, 4), normal(5, 6)
TOKENS = torch.tensor([[1, 2, 8], [0, 0, 3]])

# --- replace_linear_layers: what is replaced ---------------------------------------------------


@pytest.mark.parametrize("wrapper", [*ALL, NotebookLoRA])
def test_all_linear_layers_are_replaced_in_the_models_order_and_the_outputs_stay(
    wrapper,
):
    model = Network()
    before, linears = model(X), [model.get_submodule(name) for name in NAMES]
    assert replace_linear_layers(model, wrapper, 2, 4.0) == NAMES
    assert adapter_names(model) == NAMES
    for name, linear in zip(NAMES, linears, strict=True):
        adapter = model.get_submodule(name)
        assert type(adapter) is wrapper
        assert adapter.linear is linear
        assert adapter.lora.alpha == 4.0
        assert adapter.lora.A.shape[1] == 2
    assert_close(model(X), before)
    assert not torch.allclose(move_all(model)(X), before)


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


def test_only_linear_layers_are_replaced_and_subclasses_of_them():
    class Mine(nn.Linear):
        pass

    others = nn.Conv2d(1, 2, 3), nn.LayerNorm(4), nn.Bilinear(2, 2, 2)
    model = nn.Sequential(*others, nn.Linear(4, 3), Mine(4, 3))
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == ["3", "4"]
    assert tuple(model[:3]) == others
    assert [type(layer) for layer in model[3:]] == [LinearWithLoRA] * 2
    assert type(model[4].linear) is Mine


@pytest.mark.parametrize("training", [True, False])
def test_options_are_passed_on_and_training_and_evaluation_mode_carried_over(training):
    model = Network().train(training)
    model.embed.train(not training)
    replace_linear_layers(model, LinearWithDoRA, 2, 4.0, detach_norm=False, init="peft")
    for name in NAMES:
        adapter = model.get_submodule(name)
        modes = {module.training for module in adapter.modules()}
        assert modes == {training != (name == "embed")}, name
        assert adapter.detach_norm is False
        assert adapter.lora.A.abs().max() <= adapter.in_features**-0.5
        assert (
            adapter.out_features,
            adapter.in_features,
        ) == adapter.linear.weight.shape


@every_wrapper
@pytest.mark.parametrize("targets", [None, "again", "first"])
def test_a_layer_shared_in_two_places_gets_one_adapter_in_both(wrapper, targets):
    model = Shared()
    before, names = model(SIX), ["first", "again"] if targets else None
    expected = names or ["first", "other", "again"]
    assert replace_linear_layers(model, wrapper, 2, 4.0, targets) == expected
    assert model.first is model.again
    assert model.first is not model.other
    assert_close(model(SIX), before)


def test_a_block_shared_in_two_places_keeps_being_one_block():
    block = Block()
    model = nn.Sequential(block, nn.ReLU(), block)
    names = ["0.query", "0.value", "2.query", "2.value"]
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == names
    assert model[0] is model[2] is block
    assert is_adapter(block.query)
    numbers = sum(p.numel() for p in block.parameters())
    assert count_parameters(model).trainable == numbers


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


# --- replace_linear_layers: what is refused, and that nothing is half done --------------------


def refused(model, *targets, cls=LinearWithLoRA, rank=2, alpha=4.0, match, **options):
    """Expect a refusal that leaves the very same modules in place, with the very same
    numbers."""
    before, state = modules(model), snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(options.pop("error", ValueError), match=match):
        replace_linear_layers(model, cls, rank, alpha, *targets, **options)
    after = modules(model)
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))
    assert_same_state(model, state)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_pattern_that_matches_nothing_is_refused_and_the_names_are_listed():
    listed = ", ".join(NAMES).replace(".", r"\.")
    message = r"no linear layer matches '{}'; the linear layers are: " + listed + "$"
    refused(Network(), ["*.query", "*.key"], match=message.format(r"\*\.key"))
    # Upper and lower case differ.
    refused(Network(), "Embed", match=message.format("Embed"))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ValueError, "^targets is empty; leave it out to adapt all linear layers$"),
        (set(), ValueError, "^targets is empty; leave it out to adapt all"),
        (7, TypeError, "targets must be a pattern or a list of patterns; got int"),
        (nn.Linear, TypeError, "targets must be a pattern or a list .*; got type"),
        (["embed", 7], TypeError, r"a target must be a string; got 7 \(int\)"),
        ([["embed"]], TypeError, r"a target must be .*; got \['embed'\] \(list\)"),
        ([None], TypeError, r"a target must be a string; got None \(NoneType\)"),
    ],
)
def test_targets_that_are_empty_or_of_a_wrong_type_are_refused(targets, error, message):
    refused(Network(), targets, error=error, match=message)


@pytest.mark.parametrize("model", [None, "model", nn.Linear, [nn.Linear(2, 2)]])
def test_a_model_that_is_no_module_is_refused(model):
    message = rf"model must be an nn\.Module; got {type(model).__name__}"
    with pytest.raises(TypeError, match=message):
        replace_linear_layers(model, LinearWithLoRA, 2, 4.0)


INSTEAD = (
    r"^model is itself a {}, which can't be replaced in place; "
    r"for a linear layer write layer_class\(linear, rank, alpha\)$"
)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(4, 3), INSTEAD.format("Linear")),
        *[(moved(wrapper), INSTEAD.format(wrapper.__name__)) for wrapper in ALL],
        (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
            "Sequential has no linear layers",
        ),
    ],
)
def test_a_model_with_nothing_to_replace_is_refused_with_what_to_do(model, message):
    refused(model, match=message)


@pytest.mark.parametrize("first", [*ALL, NotebookLoRA])
@pytest.mark.parametrize("second", ALL)
def test_an_adapted_model_is_refused_whichever_wrappers_meet(first, second):
    model = Network()
    replace_linear_layers(model, first, 2, 4.0, ["*.query", "embed"])
    # Only those that a pattern matches are named.
    for targets, names in ((None, "embed, "), ("blocks.*", "")):
        names += r"blocks\.0\.query, blocks\.1\.query"
        message = rf"already adapted: {names}\. Call merge_adapters\(model\) first"
        refused(model, targets, cls=second, match=message)


def test_when_the_third_layer_fails_the_model_is_as_it_was():
    built = []

    def fails_at_the_third(linear, rank, alpha):
        if len(built) == 2:
            raise RuntimeError("the third layer failed")
        built.append(LinearWithDoRA(linear, rank, alpha))
        return built[-1]

    message = "the third layer failed"
    refused(Network(), cls=fails_at_the_third, error=RuntimeError, match=message)
    assert len(built) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be"),
        ({"alpha": "4"}, TypeError, "alpha must be"),
        ({"init": "zeros"}, ValueError, "init must be one of"),
        ({"droput": 0.1}, TypeError, "droput"),
    ],
)
def test_a_wrong_argument_of_the_layers_leaves_the_model_as_it_was(
    options, error, message
):
    refused(Network(), cls=LinearWithDoRA, error=error, match=message, **options)


def test_a_layer_without_a_shape_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LazyLinear(2))
    before = list(model)
    message = "has no shape yet: pass one batch through the model first"
    with pytest.raises(ValueError, match=message):
        replace_linear_layers(model, LinearWithLoRA, 2, 4.0)
    assert all(new is old for new, old in zip(model, before, strict=True))
    model(torch.zeros(1, 4))
    assert replace_linear_layers(model, LinearWithLoRA, 2, 4.0) == ["0", "2"]


# --- named_modules_outside_adapters -------------------------------------------------------------


def test_without_adapters_the_modules_are_torchs_each_once_or_under_each_name():
    model = nn.Sequential(Shared(), Network())
    once, all_names = list(model.named_modules()), modules(model)
    assert list(named_modules_outside_adapters(model)) == once
    found = named_modules_outside_adapters(model, remove_duplicate=False)
    assert list(found) == all_names
    assert len(all_names) == len(once) + 1


@every_wrapper
def test_nothing_inside_an_adapter_is_named_also_where_the_model_is_one(wrapper):
    layer = moved(wrapper)
    assert list(named_modules_outside_adapters(layer)) == [("", layer)]
    model = nn.Sequential(layer, nn.ReLU())
    assert [name for name, _ in named_modules_outside_adapters(model)] == ["", "0", "1"]


# --- freeze_linear_layers ----------------------------------------------------------------------


@every_wrapper
@pytest.mark.parametrize("freeze_first", [False, True])
def test_freezing_leaves_the_adapters_and_everything_that_is_not_linear_trainable(
    wrapper, freeze_first
):
    model = Network()
    if freeze_first:
        freeze_linear_layers(model)
    replace_linear_layers(model, wrapper, 2, 4.0)
    if not freeze_first:
        freeze_linear_layers(model)
    parts = ["lora.A", "lora.B"] + (["m"] if wrapper in DORA else [])
    expected = {f"{name}.{part}" for name in NAMES for part in parts}
    norms = [f"blocks.{i}.norm.{part}" for i in (0, 1) for part in ("weight", "bias")]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == expected.union(norms)


@pytest.mark.parametrize("model", [MultilayerPerceptron(6, 5, 4, 3), nn.Linear(4, 3)])
def test_freezing_a_model_without_adapters_freezes_its_linear_layers(model):
    freeze_linear_layers(model)
    assert not any(p.requires_grad for p in model.parameters())


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
    count, total = count_parameters(article_model(wrapper, rank)), trainable + 136_074
    assert (count.trainable, count.frozen, count.total) == (trainable, 136_074, total)
    sizes, m = {0: (784, 128), 2: (128, 256), 4: (256, 10)}, wrapper in DORA
    assert count.per_layer == {
        f"layers.{index}": (rank * (i + o) + m * o, i * o + o)
        for index, (i, o) in sizes.items()
    }


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (
            article_model(LinearWithLoRA),
            "layer       trainable       frozen\n"
            "layers.0        3,648      100,480\n"
            "layers.2        1,536       33,024\n"
            "layers.4        1,064        2,570\n"
            "all             6,248      136,074",
        ),
        # The first column is as wide as its heading where all names are shorter.
        (
            nn.Sequential(nn.Linear(2, 3)),
            "layer    trainable       frozen\n"
            "0                9            0\n"
            "all              9            0",
        ),
    ],
)
def test_the_printed_count_is_a_table_with_thousands_and_a_total(model, table):
    assert str(count_parameters(model)) == table


def with_own_parameters():
    """Return a model whose own parameters stand beside those of its children."""
    model = nn.ModuleDict({"ModuleDict": nn.Linear(2, 2), "plain": nn.Linear(1, 1)})
    model.scale = nn.Parameter(torch.ones(3))
    model.register_parameter("shift", nn.Parameter(torch.ones(2), requires_grad=False))
    return model


def adapted(model, wrapper=LinearWithLoRA, rank=2, alpha=4.0):
    replace_linear_layers(model, wrapper, rank, alpha)
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # Modules without parameters are left out.
        (
            MultilayerPerceptron(6, 5, 4, 3),
            {"layers.0": (35, 0), "layers.2": (24, 0), "layers.4": (15, 0)},
        ),
        # What is shared or tied counts once, where it comes first.
        (Shared(), {"first": (42, 0), "other": (42, 0)}),
        (adapted(Shared()), {"first": (66, 0), "other": (66, 0)}),
        (adapted(Tied()), {"embedding": (54, 0), "head": (2 * (6 + 9), 0)}),
        # A child with the name of the model's class hides nothing.
        (with_own_parameters(), {"ModuleDict": (9, 2), "plain": (2, 0)}),
        (
            with_own_parameters().requires_grad_(False),
            {"ModuleDict": (0, 11), "plain": (0, 2)},
        ),
        # Buffers aren't counted: statistics of a batch, and the random rows of a control.
        (
            nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)),
            {"0": (40, 0), "1": (10, 0)},
        ),
        (
            LinearWithRandomRows(linear_layer().requires_grad_(False), 3, 1.7),
            {"LinearWithRandomRows": (3 * (7 + 5) + 5, 40)},
        ),
        *[
            (
                wrapper(linear_layer().requires_grad_(False), 3, 1.7),
                {wrapper.__name__: (3 * (7 + 5) + 5 * (wrapper in DORA), 40)},
            )
            for wrapper in ALL
        ],
    ],
)
def test_the_count_per_layer_is_complete_and_counts_nothing_twice(model, expected):
    count = count_parameters(model)
    assert count.per_layer == expected
    assert count.total == sum(p.numel() for p in model.parameters())


# --- merge_adapters ----------------------------------------------------------------------------


def adapted_network(wrapper):
    model = adapted(Network(), wrapper, alpha=1.5)
    freeze_linear_layers(model)
    return move_all(model)


@pytest.mark.parametrize("wrapper", [*ALL, NotebookLoRA])
def test_the_merged_model_has_plain_linear_layers_only_and_the_same_outputs(wrapper):
    model = adapted_network(wrapper)
    merged = merge_adapters(model)
    kinds = [[(name, type(m)) for name, m in modules(n)] for n in (merged, Network())]
    assert kinds[0] == kinds[1]
    assert_close(merged(X), model(X))
    for name in NAMES:
        old, new = model.get_submodule(name), merged.get_submodule(name)
        sizes = old.linear.in_features, old.linear.out_features
        assert (new.in_features, new.out_features) == sizes
        assert (new.bias is None) == (old.linear.bias is None)
        assert torch.equal(new.weight, old.weight)
    # It can be adapted again.
    before = merged(X)
    assert replace_linear_layers(merged, LinearWithLoRA, 2, 4.0) == NAMES
    assert_close(merged(X), before)


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
    state = torch.get_rng_state()
    merged, again = merge_adapters(model), merge_adapters(model)
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    first = snapshot(merged)
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.fill_(7)
    assert_same_state(again, first)
    assert_same_state(model, before)
    assert all(
        new is old for (_, new), (_, old) in zip(modules(model), places, strict=True)
    )
    assert [p.requires_grad for p in model.parameters()] == flags


@every_wrapper
def test_an_adapter_as_the_root_is_merged_into_a_linear_layer(wrapper):
    layer, x = moved(wrapper), normal(4, 7)
    merged = merge_adapters(layer)
    assert type(merged) is nn.Linear
    assert_close(merged(x), layer(x))


def test_a_shared_adapter_stays_one_layer():
    model = move_all(adapted(Shared(), LinearWithDoRA))
    merged = merge_adapters(model)
    assert type(merged.first) is nn.Linear
    assert merged.first is merged.again
    assert merged.first is not merged.other
    assert_close(merged(SIX), model(SIX))


@every_wrapper
def test_a_tied_weight_stays_tied_until_merging_unties_it(wrapper):
    model = Tied()
    embedding, before = model.embedding.weight.detach().clone(), model(TOKENS)
    assert replace_linear_layers(model, wrapper, 2, 4.0) == ["head"]
    assert model.head.linear.weight is model.embedding.weight
    assert_close(model(TOKENS), before)
    merged = merge_adapters(move_all(model))
    assert torch.equal(merged.embedding.weight, embedding)
    assert torch.equal(model.embedding.weight, embedding)
    assert not torch.allclose(merged.head.weight, embedding)
    assert_close(merged(TOKENS), model(TOKENS))


@every_wrapper
@pytest.mark.parametrize("training", [True, False])
def test_the_merged_layers_are_trainable_and_other_flags_and_modes_stay(
    wrapper, training
):
    model = adapted_network(wrapper).train(training)
    model.embed.train(not training)
    model.blocks[0].norm.requires_grad_(False)
    merged = merge_adapters(model)
    frozen = {name for name, p in merged.named_parameters() if not p.requires_grad}
    assert frozen == {"blocks.0.norm.weight", "blocks.0.norm.bias"}
    merged(X).sum().backward()
    assert merged.embed.weight.grad.abs().max() > 0
    modes = {name: module.training for name, module in merged.named_modules()}
    assert modes.pop("embed") is not training
    assert set(modes.values()) == {training}


def test_partly_adapted_models_and_different_wrappers_in_one_model_are_merged():
    model = Network()
    targets = ["embed", "blocks.0.*", "blocks.1.*", "heads.left"]
    for wrapper, target in zip(ALL, targets, strict=True):
        replace_linear_layers(model, wrapper, 2, 1.5, target)
    merged = merge_adapters(move_all(model))
    assert adapter_names(merged) == []
    assert_close(merged(X), model(X))
    assert torch.equal(merged.heads["right"][1].weight, model.heads["right"][1].weight)


@every_wrapper
def test_a_model_on_the_meta_device_is_merged_there(wrapper):
    model = nn.Sequential(wrapper(nn.Linear(7, 5, device="meta"), 2, 1.0))
    weight = merge_adapters(model)[0].weight
    assert weight.is_meta
    assert weight.shape == (5, 7)


def test_a_class_of_ones_own_without_a_weight_is_refused_by_name():
    model = adapted(Network(), NotebookLoRAWithoutWeight)
    message = r"NotebookLoRAWithoutWeight has no weight to merge; .* `weight`"
    with pytest.raises(TypeError, match=message):
        merge_adapters(model)


@pytest.mark.parametrize("model", [nn.Linear(4, 3), Network(), nn.Sequential()])
def test_a_model_without_adapters_is_refused(model):
    message = f"{type(model).__name__} has no adapters to merge"
    with pytest.raises(ValueError, match=message):
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
    expected, twin = model(X).detach(), copy.deepcopy(model)
    move(twin.embed, seed=77)
    assert torch.equal(model(X), expected)
    assert not torch.allclose(twin(X), expected)


# --- what is refused, in all its words ---------------------------------------------------------


def lora_in(model, targets=None):
    replace_linear_layers(model, LinearWithLoRA, 2, 1.0, targets)
    return model


def partly_quantized():
    model = Network()
    quantize_linear_layers(model, targets=BLOCKS[:2])
    return model


ALL_NAMES = ", ".join(name for name, _ in lora_in(Network()).named_parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantize_linear_layers(linear(4, 6)),
            "model is itself a Linear, which can't be replaced in place; for a linear "
            "layer write QuantizedLinear(linear)",
        ),
        (
            lambda: quantize_linear_layers(lora_in(Network(), BLOCKS[:2])),
            "already adapted: blocks.0.query, blocks.0.value. Quantise the plain model, "
            "and put the adapters in then",
        ),
        (
            lambda: quantize_linear_layers(partly_quantized()),
            "already quantised: blocks.0.query, blocks.0.value",
        ),
        (
            lambda: dequantize_linear_layers([1]),
            "model must be an nn.Module; got list",
        ),
        (
            lambda: dequantize_linear_layers(Network()),
            "Network has no quantised layers",
        ),
        (
            lambda: dequantize_linear_layers(partly_quantized().blocks[0].query),
            "model is itself a QuantizedLinear, which can't be replaced in place",
        ),
        (
            lambda: mark_only_adapters_as_trainable(Network()),
            "Network has no adapters; put them in with replace_linear_layers first",
        ),
        (
            lambda: mark_only_adapters_as_trainable(lora_in(Network()), also="head"),
            f"no parameter matches 'head'; there are: {ALL_NAMES}",
        ),
        (
            lambda: mark_only_adapters_as_trainable(lora_in(Network()), also=[3]),
            "a pattern must be a string; got 3 (int)",
        ),
        (
            lambda: parameter_groups(lora_in(Network()), 1e-200, {"*.A": 1e-200}),
            "the learning rate of '*.A' must be a finite number larger than 0; got 0.0",
        ),
        (lambda: merge_adapters("a"), "model must be an nn.Module; got str"),
        (
            lambda: merge_adapters(lora_in(partly_quantized())),
            "quantised: blocks.0.query.linear, blocks.0.value.linear. A merged weight "
            "has none of the levels, and rounding it to them again would change what "
            "was trained. Call dequantize_linear_layers(model), and merge into the "
            "plain weights",
        ),
    ],
)
def test_what_is_refused_is_said_in_whole(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == message


class TiesAgain(Tied):
    """As a language model of transformers does."""

    def tie_weights(self):
        self.head.weight = self.embedding.weight


def test_a_tied_weight_is_refused_where_the_model_would_tie_it_again():
    class Config:
        pass

    message = (
        "head shares its weight with embedding. Choose other targets, or untie them "
        "first: head.weight = nn.Parameter(head.weight.clone()), and "
        "config.tie_word_embeddings = False"
    )
    for kind, config, refused in [
        (TiesAgain, {"tie_word_embeddings": True}, True),
        (TiesAgain, {"tie_word_embeddings": False}, False),
        (TiesAgain, {}, False),
        (TiesAgain, None, False),
        (Tied, {"tie_word_embeddings": True}, False),
    ]:
        model = kind()
        if config is not None:
            model.config = Config()
            vars(model.config).update(config)
        if refused:
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                lora_in(model)
        else:
            assert replace_linear_layers(model, LinearWithLoRA, 2, 1.0) == ["head"]


def test_a_name_that_is_the_second_of_a_parameter_is_trained_along():
    model = Tied()
    model.other = linear(6, 6)
    lora_in(model, "other")
    trained = mark_only_adapters_as_trainable(model, also="head.weight")
    assert trained == ["embedding.weight", "other.lora.A", "other.lora.B"]


def test_a_layer_that_was_quantised_keeps_or_lacks_its_bias():
    model = partly_quantized()
    plain = copy.deepcopy(model)
    assert dequantize_linear_layers(plain) == BLOCKS[:2]
    assert [plain.get_submodule(name).bias is None for name in BLOCKS[:2]] == [
        False,
        True,
    ]
    assert_close(plain(X), model(X))


def test_a_block_has_64_weights():
    model = nn.Sequential(linear(130, 2))
    quantize_linear_layers(model)
    assert model[0].scales.shape == (2, 3)
    assert model[0].block_size == 64
