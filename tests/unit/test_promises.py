"""A promise by itself; what DoRA's layers keep on one is tested with the norms."""

import pytest
import torch
from support import assert_close, linear_layer, moved, normal
from torch import nn

from lowrank_utils import dora
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.promises import Promise, constant_weights, frozen_weights


def weight_alone(layer):
    return (layer.linear.weight,)


def frozen(wrapper=LinearWithLoRA):
    return moved(wrapper, linear_layer().requires_grad_(False))


class PromiseAboutW(Promise):
    """A promise about W, whose value here is twice the sum of W by rows; it notes whether
    gradients were on each time it was computed."""

    def __init__(self, *, in_training=True):
        super().__init__("quiet_rows", weight_alone, in_training=in_training)
        self.computed = []

    def value_of(self, layer):
        def compute(layer):
            self.computed.append(torch.is_grad_enabled())
            return 2 * layer.linear.weight.sum(dim=1)

        return self.value(layer, compute)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_value_is_computed_once_without_gradients_and_in_training_where_it_holds_there(
    in_training,
):
    layer, promise = frozen(), PromiseAboutW(in_training=in_training)
    assert promise.value_of(layer) is None, "kept without a promise"
    with promise.given_for(layer):
        first = promise.value_of(layer.eval())
        assert first is promise.value_of(layer)
        assert torch.equal(first, 2 * layer.linear.weight.sum(dim=1))
        assert promise.computed == [False]
        assert (promise.value_of(layer.train()) is first) == in_training
    assert promise.value_of(layer.eval()) is None, "kept beyond the block"


def test_a_broken_promise_names_the_block():
    layer, promise = frozen(), PromiseAboutW()

    def change():
        with promise.given_for(nn.Sequential(layer)):
            promise.value_of(layer)
            layer.linear.weight.data.mul_(2)

    with pytest.raises(RuntimeError, match="weights of 0 changed inside quiet_rows, "):
        change()


def test_two_promises_keep_their_own_values():
    layer, first, second = frozen(), PromiseAboutW(), PromiseAboutW()
    with first.given_for(layer):
        assert second.value_of(layer) is None
        with second.given_for(layer):
            assert first.value_of(layer) is not second.value_of(layer)


@pytest.mark.parametrize("promise", [constant_weights, frozen_weights])
@pytest.mark.parametrize("mode", ["evaluated", "trained"])
@pytest.mark.parametrize("part", ["linear.weight", "lora.A", "lora.B", "m"])
def test_tensors_that_are_exchanged_inside_the_block_are_used_from_the_next_output_on(
    promise, mode, part, monkeypatch
):
    # At any size, so that small layers reach what frozen_weights keeps.
    monkeypatch.setattr(dora, "factored_norm_pays", lambda *_: True)
    layer, merged = frozen(LinearWithDoRA), frozen(LinearWithDoRAMerged)
    model = nn.Sequential(layer).train(mode == "trained")
    x, outputs, name = normal(4, 7, seed=9), [], f"0.{part}"
    shape = model.state_dict()[name].shape
    # All three are new tensors that nothing has changed, so only which they are tells
    # one from another.
    tensors = [normal(*shape, seed=20 + number) for number in range(3)]
    with torch.set_grad_enabled(mode == "trained"), promise(model):
        for tensor in tensors:
            # This one alone: with all of them assigned, any of the others would give
            # the change away.
            holder, _, attribute = name.rpartition(".")
            trained = part != "linear.weight"
            new = nn.Parameter(tensor, requires_grad=trained)
            setattr(model.get_submodule(holder), attribute, new)
            assert model.state_dict()[name].data_ptr() == tensor.data_ptr()
            merged.load_state_dict(layer.state_dict())
            outputs.append(model(x))
            assert_close(outputs[-1], merged(x))
    assert not torch.allclose(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[1])
