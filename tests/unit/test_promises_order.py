"""Promises whose blocks overlap, are handed on or wait in a generator, and weights that
are another tensor each time."""

import asyncio
import contextvars
import copy
import itertools
import threading

import pytest
import torch
from support import assert_close, linear_layer, moved, normal
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from lowrank_utils import dora
from lowrank_utils.dora import LinearWithDoRA, LinearWithDoRAMerged
from lowrank_utils.promises import Promise, constant_weights, frozen_weights

PROMISES = pytest.mark.parametrize("promise", [constant_weights, frozen_weights])


class PromiseAboutW(Promise):
    """A promise about W that notes each time its value is computed."""

    def __init__(self):
        super().__init__(
            "quiet_rows", lambda layer: (layer.linear.weight,), in_training=True
        )
        self.computed = 0

    def is_kept_for(self, layer):
        """Tell whether a second question is answered by what the first one left."""
        counts = []
        for _ in range(2):
            if self.value(layer, self.compute) is None:
                return False
            counts.append(self.computed)
        return counts[0] == counts[1]

    def compute(self, layer):
        self.computed += 1
        return layer.linear.weight.sum(dim=1)


def layers(count=3):
    return [
        moved(LinearWithDoRA, linear_layer(seed=seed)).requires_grad_(False).eval()
        for seed in range(count)
    ]


def test_blocks_that_end_in_any_order_leave_what_is_still_promised():
    promise, all_layers = PromiseAboutW(), layers()
    for order in itertools.permutations(range(3)):
        blocks = [promise.given_for(layer) for layer in all_layers]
        for block in blocks:
            block.__enter__()
        promised = {0, 1, 2}
        for number in order:
            blocks[number].__exit__(None, None, None)
            promised.remove(number)
            for other, layer in enumerate(all_layers):
                assert promise.is_kept_for(layer) == (other in promised)


def test_a_promise_is_kept_until_the_last_of_two_blocks_for_a_layer_ends():
    promise, (layer,) = PromiseAboutW(), layers(1)
    one, two = promise.given_for(layer), promise.given_for(nn.Sequential(layer))
    one.__enter__()
    two.__enter__()
    assert promise.is_kept_for(layer)
    layer.linear.weight.data.mul_(2)
    one.__exit__(None, None, None)
    with pytest.raises(
        RuntimeError, match=r"^the weights of 0 changed inside quiet_ro"
    ):
        two.__exit__(None, None, None)
    assert not promise.is_kept_for(layer)


def test_a_task_that_outlives_the_block_keeps_nothing():
    promise, (layer,) = PromiseAboutW(), layers(1)

    async def main():
        ended = asyncio.Event()

        async def later():
            assert promise.is_kept_for(layer)
            await ended.wait()
            assert not promise.is_kept_for(layer)

        with promise.given_for(layer):
            task = asyncio.create_task(later())
            await asyncio.sleep(0)
            assert await asyncio.to_thread(promise.is_kept_for, layer)
        ended.set()
        await task

    asyncio.run(main())
    with promise.given_for(layer):
        seen = []
        thread = threading.Thread(
            target=lambda: seen.append(promise.is_kept_for(layer))
        )
        thread.start()
        thread.join()
        assert seen == [False]


def test_a_generator_that_waits_promises_nothing_for_its_caller():
    promise, (layer,) = PromiseAboutW(), layers(1)

    def steps():
        with promise.given_for(layer):
            while True:
                yield promise.is_kept_for(layer)

    generator = steps()
    for _ in range(2):
        assert next(generator)
        assert not promise.is_kept_for(layer)
    # Where it is stepped in another context, the block isn't seen.
    assert not contextvars.copy_context().run(promise.is_kept_for, layer)
    generator.close()

    async def async_steps():
        with promise.given_for(layer):
            while True:
                await asyncio.sleep(0)
                yield promise.is_kept_for(layer)

    async def main():
        generator = async_steps()
        for _ in range(2):
            assert await anext(generator)
            assert not promise.is_kept_for(layer)
        await generator.aclose()

    asyncio.run(main())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Computed(nn.Linear):
    """A linear layer whose weight is what a property makes of another tensor."""

    def __init__(self):
        super().__init__(7, 5, dtype=torch.float64)
        self.stored = nn.Parameter(normal(5, 7))

    @property
    def weight(self):
        return 2 * self.stored

    @weight.setter
    def weight(self, value):
        pass

    def __setattr__(self, name, value):
        # A module would take a parameter of this name for itself.
        if name != "weight":
            super().__setattr__(name, value)

    def register_parameter(self, name, parameter):
        if name != "weight":
            super().register_parameter(name, parameter)

    def reset_parameters(self):
        pass


def normed():
    linear = weight_norm(linear_layer())
    return linear, linear.parametrizations.weight.original0


def doubled():
    linear = linear_layer()
    parametrize.register_parametrization(linear, "weight", Doubled())
    return linear, linear.parametrizations.weight.original


def computed():
    linear = Computed()
    return linear, linear.stored


@PROMISES
@pytest.mark.parametrize("made", [normed, doubled, computed])
def test_a_weight_that_is_another_tensor_each_time_keeps_nothing(
    promise, made, monkeypatch
):
    monkeypatch.setattr(dora, "factored_norm_pays", lambda *_: True)
    linear, source = made()
    model = nn.Sequential(moved(LinearWithDoRA, linear)).requires_grad_(False).eval()
    x, quiet = normal(4, 7, seed=9), PromiseAboutW()
    with quiet.given_for(model):
        assert not quiet.is_kept_for(model[0])
    assert not quiet.computed
    with torch.no_grad(), promise(model):
        for factor in (1.0, 1.2, 0.7, 3.0):
            source.mul_(factor)
            # Tensors that are made later may lie where an older one was.
            for _ in range(3):
                fresh = copy.deepcopy(model)
                assert_close(model(x), fresh(x))
        source.data.mul_(2)
        assert_close(model(x), copy.deepcopy(model)(x))


@PROMISES
def test_a_tensor_that_lies_where_an_old_one_was_is_noticed(promise, monkeypatch):
    monkeypatch.setattr(dora, "factored_norm_pays", lambda *_: True)
    # As if every new tensor got the place and the number of the old one.
    monkeypatch.setattr("lowrank_utils.promises._marks", lambda sources: len(sources))
    (layer,) = layers(1)
    merged = moved(LinearWithDoRAMerged, linear_layer())
    x = normal(4, 7, seed=9)
    with torch.no_grad(), promise(layer):
        layer(x)
        layer.linear.weight = nn.Parameter(normal(5, 7, seed=8), requires_grad=False)
        merged.load_state_dict(layer.state_dict())
        assert_close(layer(x), merged(x))


@PROMISES
@pytest.mark.parametrize("wrong", ["model", None, torch.ones(2), LinearWithDoRA])
def test_what_is_no_module_is_refused_at_the_door(promise, wrong):
    kind = type(wrong).__name__
    name = promise.__name__
    with pytest.raises(
        TypeError, match=rf"^{name}: model must be an nn\.Module; got {kind}$"
    ):
        promise(wrong)
