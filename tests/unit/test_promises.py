"""A promise by itself; what DoRA's layers keep on one is tested with the norms."""

import pytest
import torch
from support import assert_close, linear_layer, moved, normal
from torch import nn

from lowrank_utils import dora
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.promises import Promise, constant_weights, frozen_weights


class PromiseAboutW(Promise):
    """A promise about W, whose value here is twice the sum of W by rows; it notes each
    time it is computed."""

    def __init__(self, computed, **options):
        super().__init__("quiet_rows", lambda layer: (layer.linear.weight,), **options)
        self.computed = computed

    def value_of(self, layer):
        def compute(layer):
            self.computed.append(torch.is_grad_enabled())
            return 2 * layer.linear.weight.sum(dim=1)

        return self.value(layer, compute)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_value_is_computed_once_without_gradients_and_in_training_where_it_holds_there(
    in_training,
):
    computed, layer = [], moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    promise = PromiseAboutW(computed, in_training=in_training)
    assert promise.value_of(layer) is None, "kept without a promise"
    with promise.given_for(layer):
        first = promise.value_of(layer.eval())
        assert first is promise.value_of(layer)
        assert torch.equal(first, 2 * layer.linear.weight.sum(dim=1))
        assert computed == [False]
        assert (promise.value_of(layer.train()) is first) == in_training
    assert promise.value_of(layer.eval()) is None, "kept beyond the block"


def test_a_broken_promise_names_the_block():
    layer = moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    promise = PromiseAboutW([], in_training=True)

    def change():
        with promise.given_for(torch.nn.Sequential(layer)):
            promise.value_of(layer)
            layer.linear.weight.data.mul_(2)

    with pytest.raises(
        RuntimeError,
        match=r"^the weights of 0 changed inside quiet_rows, where they must not: ",
    ):
        change()


def test_two_promises_keep_their_own_values():
    layer = moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    first, second = (PromiseAboutW(computed, in_training=True) for computed in ([], []))
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
    layer = moved(LinearWithDoRA, linear_layer().requires_grad_(False))
    model = nn.Sequential(layer).train(mode == "trained")
    merged = moved(LinearWithDoRAMerged, linear_layer().requires_grad_(False))
    x, outputs, name = normal(4, 7, seed=9), [], f"0.{part}"
    shape = model.state_dict()[name].shape
    # All three are new tensors that nothing has changed, so only which they are tells
    # one from another.
    tensors = [normal(*shape, seed=20 + number) for number in range(3)]
    with torch.set_grad_enabled(mode == "trained"), promise(model):
        for tensor in tensors:
            # This one alone: with all of them assigned, any of the others would give
            # the change away.
            model.load_state_dict({name: tensor}, strict=False, assign=True)
            assert model.state_dict()[name].data_ptr() == tensor.data_ptr(), (
                "not exchanged"
            )
            merged.load_state_dict(layer.state_dict())
            outputs.append(model(x))
            assert_close(outputs[-1], merged(x))
    assert not torch.allclose(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[1])
