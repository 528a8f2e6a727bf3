"""What is read of a layer's weight is all that the layer computes, and m belongs to the
weight beside it; else it is refused by name.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import (
    DORA,
    assert_close,
    every_dora_wrapper,
    linear_layer,
    move,
    moved,
    normal,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_utils.adapt import merge_adapters, replace_linear_layers
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged, reset_magnitudes
from lowrank_utils.lora import LinearWithLoRA, LinearWithLoRAMerged

X = normal(4, 7)


class Scaled(nn.Linear):
    """A layer with a forward of its own, as quantisation-aware training has."""

    def forward(self, x):
        return 2 * super().forward(x) + 1


class Called(nn.Linear):
    """A layer that does more when it is called."""

    def __call__(self, x):
        return 3 * super().__call__(x)


def own_forward():
    return Scaled(7, 5, dtype=torch.float64)


def own_call():
    return Called(7, 5, dtype=torch.float64)


def replaced_forward():
    linear = linear_layer()
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def hook():
    linear = linear_layer()
    linear.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    return linear


def pre_hook():
    linear = linear_layer()
    linear.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    return linear


def backward_hook():
    linear = linear_layer()
    linear.register_full_backward_hook(lambda _module, grads, _out: (2 * grads[0],))
    return linear


def backward_pre_hook():
    linear = linear_layer()
    linear.register_full_backward_pre_hook(lambda _module, grads: (2 * grads[0],))
    return linear


def pruned():
    return prune.l1_unstructured(linear_layer(), "weight", 0.5)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(linear_layer())


def old_spectral_norm():
    return nn.utils.spectral_norm(linear_layer()).eval()


MORE_THAN_THE_WEIGHT = [
    own_forward,
    own_call,
    replaced_forward,
    hook,
    pre_hook,
    backward_hook,
    backward_pre_hook,
    pruned,
    old_weight_norm,
    old_spectral_norm,
]
each = pytest.mark.parametrize("made", MORE_THAN_THE_WEIGHT)


@each
@pytest.mark.parametrize("wrapper", [LinearWithLoRAMerged, *DORA])
def test_what_reads_the_weight_refuses_a_layer_that_computes_more(wrapper, made):
    with pytest.raises(
        TypeError, match=r"linear has (a forward of its own|(for|back)ward hooks)"
    ):
        wrapper(made(), 2, 1.5)
    model = nn.Sequential(linear_layer(), made())
    with pytest.raises(TypeError, match="would be passed over"):
        replace_linear_layers(model, wrapper, 2, 1.5)
    assert isinstance(model[0], nn.Linear), "nothing is half done"


@each
def test_lora_calls_it_and_its_weight_is_refused(made):
    linear = made()
    layer = moved(LinearWithLoRA, linear)
    assert_close(layer(X), linear(X) + layer.lora(X))
    with pytest.raises(TypeError, match="would be passed over"):
        layer.weight.sum()
    # Torch can't copy the old forms of weight norm and of pruning.
    with pytest.raises((TypeError, RuntimeError), match=r"passed over|deepcopy"):
        merge_adapters(nn.Sequential(layer))


@pytest.mark.parametrize("wrapper", [LinearWithLoRAMerged, *DORA])
def test_a_hook_that_comes_later_is_refused_at_the_next_output(wrapper):
    layer = moved(wrapper)
    y = layer(X)
    handle = layer.linear.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    with pytest.raises(TypeError, match="has forward hooks"):
        layer(X)
    handle.remove()
    assert_close(layer(X), y)
    # On the adapter a hook does what it says.
    layer.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert_close(layer(X), 2 * y)


@pytest.mark.parametrize("wrapper", [LinearWithLoRAMerged, *DORA])
def test_a_parametrised_weight_is_read_anew_each_time(wrapper):
    layer = moved(wrapper, parametrizations.weight_norm(linear_layer()))
    plain = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.linear.parametrizations.weight.original0.mul_(1.3)
        plain.weight.copy_(layer.linear.weight)
        plain.bias.copy_(layer.linear.bias)
    expected = wrapper(plain, 3, 1.7)
    for mine, its in (
        (expected.lora.A, layer.lora.A),
        (expected.lora.B, layer.lora.B),
        *([(expected.m, layer.m)] if wrapper in DORA else []),
    ):
        mine.data.copy_(its.data)
    assert_close(layer(X), expected(X))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_by_name(dtype):
    linear = linear_layer()
    linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"floating-point weight; got {dtype}"):
        LinearWithLoRA(linear, 2, 1.5)


# --- m belongs to the weight ------------------------------------------------------------


def untrained_and_pretrained(wrapper):
    """Return a model with fresh adapters, and the pretrained weights that came late."""
    model = nn.Sequential(linear_layer(seed=1), nn.ReLU(), linear_layer(5, 3, seed=2))
    pretrained = nn.Sequential(
        linear_layer(seed=3), nn.ReLU(), linear_layer(5, 3, seed=4)
    )
    replace_linear_layers(model, wrapper, 2, 1.5)
    return model, pretrained


def renamed(state):
    return {
        name.replace(".weight", ".linear.weight").replace(
            ".bias", ".linear.bias"
        ): value
        for name, value in state.items()
    }


@every_dora_wrapper
@pytest.mark.parametrize("assign", [False, True])
def test_weights_without_their_m_are_not_loaded_after_dora_went_in(wrapper, assign):
    model, pretrained = untrained_and_pretrained(wrapper)
    with pytest.raises(RuntimeError, match=r"0\.m was computed from the weight"):
        model.load_state_dict(
            renamed(pretrained.state_dict()), strict=False, assign=assign
        )
    # With its m, or with the weights that are there, it is loaded.
    other, _ = untrained_and_pretrained(wrapper)
    move(other[0])
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_close(model(X), other(X))
    same = {n: t for n, t in other.state_dict().items() if not n.endswith("m")}
    model.load_state_dict(same, strict=False, assign=assign)


@every_dora_wrapper
def test_weights_that_are_copied_in_are_noticed_at_the_next_output(wrapper):
    model, pretrained = untrained_and_pretrained(wrapper)
    with torch.no_grad():
        for place in (0, 2):
            model[place].linear.weight.copy_(pretrained[place].weight)
            model[place].linear.bias.copy_(pretrained[place].bias)
    with pytest.raises(RuntimeError, match="changed after its m was computed"):
        model(X)
    reset_magnitudes(model)
    assert_close(model(X), pretrained(X))
    # And the next change is noticed, too.
    with torch.no_grad():
        model[0].linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed after its m was computed"):
        model(X)


@every_dora_wrapper
def test_a_model_that_was_made_without_numbers_is_not_believed(wrapper):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 5, dtype=torch.float64))
    replace_linear_layers(model, wrapper, 2, 1.5)
    model = model.to_empty(device="cpu")
    # What happens to lie in the memory that it was given.
    nn.init.ones_(model[0].linear.weight)
    state = renamed(nn.Sequential(linear_layer()).state_dict())
    with pytest.raises(RuntimeError, match=r"0\.m was computed from"):
        model.load_state_dict(state, strict=False)


@every_dora_wrapper
def test_what_changes_no_number_and_what_training_does_are_no_faults(wrapper):
    layer = wrapper(linear_layer(), 2, 1.5)
    y = layer(X)
    assert_close(copy.deepcopy(layer)(X), y)
    layer.linear.weight.data = layer.linear.weight.data.clone()
    with torch.no_grad():
        layer.linear.weight.mul_(1.0)
    assert_close(layer(X), y)
    assert_close(layer.float()(X.float()), y, rtol=1e-5)
    assert_close(layer.double()(X), y, rtol=1e-5)
    # The pretrained weight may be trained along.
    layer = wrapper(linear_layer(), 2, 1.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        layer(X).square().sum().backward()
        optimizer.step()


@every_dora_wrapper
def test_an_m_of_ones_own_is_not_taken_for_the_one_at_the_start(wrapper):
    layer = wrapper(linear_layer(), 2, 1.5)
    layer.m = nn.Parameter(2 * layer.m.detach())
    with torch.no_grad():
        layer.linear.weight.mul_(1.0)
    twice = 2 * F.linear(X, layer.linear.weight) + layer.linear.bias
    assert_close(layer(X), twice)


def only_m_trained(wrapper, how):
    """Return a layer whose B never moved, and what it was made around."""
    layer = wrapper(linear_layer(), 2, 1.5)
    layer.linear.requires_grad_(False)
    if how == "alone":
        optimizer = torch.optim.Adam([layer.m], lr=0.1)
    else:
        # Adam leaves what has no gradient where it is, and AdamW lets it decay.
        layer.lora.requires_grad_(False)
        optimizer = torch.optim.AdamW([layer.m], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(X).square().sum() * (how == "alone")).backward()
        optimizer.step()
    return layer


@every_dora_wrapper
@pytest.mark.parametrize("how", ["alone", "decays"])
def test_a_layer_of_which_only_m_was_trained_is_copied_merged_and_loaded(wrapper, how):
    layer = only_m_trained(wrapper, how)
    assert not layer.lora.B.any()
    y = layer(X)
    assert (y - layer.linear(X)).abs().max() > 0.1
    model = nn.Sequential(layer)
    assert_close(copy.deepcopy(model)(X), y)
    assert_close(pickle.loads(pickle.dumps(model))(X), y)
    assert_close(merge_adapters(model)(X), y)
    assert_close(merge_adapters(copy.deepcopy(model))(X), y)
    fresh = nn.Sequential(wrapper(linear_layer(seed=9), 2, 1.5))
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(X), y)
    assert_close(copy.deepcopy(fresh)(X), y)
    layer.float().double()
    assert_close(layer(X), y, rtol=1e-5)


def test_resetting_m_makes_the_layer_what_its_weight_says():
    model = nn.Sequential(moved(LinearWithDoRA), moved(LinearWithDoRAMerged))
    reset_magnitudes(model[:1])
    layer = model[0]
    assert_close(layer.m, layer.linear.weight.norm(dim=1))
    assert not torch.allclose(model[1].m, model[1].linear.weight.norm(dim=1))
