"""A promise by itself; what DoRA's layers keep on one is tested with the norms."""

import pytest
import torch
from support import linear_layer, moved

from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.promises import Promise


def promise_about_w(computed, **options):
    """Return a promise whose value is twice the sum of W by rows, and which notes each time it is computed."""

    def compute(layer):
        computed.append(torch.is_grad_enabled())
        return 2 * layer.linear.weight.sum(dim=1)

    return Promise("quiet_rows", lambda layer: (layer.linear.weight,), compute, **options)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_value_is_computed_once_without_gradients_and_in_training_where_it_holds_there(in_training):
    computed, layer = [], moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    promise = promise_about_w(computed, in_training=in_training)
    assert promise.value(layer) is None, "kept without a promise"
    with promise.given_for(layer):
        first = promise.value(layer.eval())
        assert first is promise.value(layer)
        assert torch.equal(first, 2 * layer.linear.weight.sum(dim=1))
        assert computed == [False]
        assert (promise.value(layer.train()) is first) == in_training
    assert promise.value(layer.eval()) is None, "kept beyond the block"


def test_a_broken_promise_names_the_block():
    layer = moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    promise = promise_about_w([], in_training=True)

    def change():
        with promise.given_for(torch.nn.Sequential(layer)):
            promise.value(layer)
            layer.linear.weight.data.mul_(2)

    with pytest.raises(
        RuntimeError, match=r"^the weights of 0 changed inside quiet_rows, where they must not: "
    ):
        change()


def test_two_promises_keep_their_own_values():
    layer = moved(LinearWithLoRA, linear_layer().requires_grad_(False))
    first, second = (promise_about_w(computed, in_training=True) for computed in ([], []))
    with first.given_for(layer):
        assert second.value(layer) is None
        with second.given_for(layer):
            assert first.value(layer) is not second.value(layer)
