"""In which precisions train() trains, which it refuses, and what bfloat16 loses."""

import re
import warnings

import pytest
import torch
from support import assert_same_state, blobs, snapshot
from torch import nn

from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.data import Digits, load_mnist
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import MultilayerPerceptron, accuracy, train

ONCE = {"epochs": 1, "learning_rate": 0.001, "progress": False}
kinds = pytest.mark.parametrize("kind", [None, LinearWithLoRA, LinearWithDoRA])


def perceptron(kind=None, dtype=torch.float32, sizes=(12, 8, 6, 3)):
    torch.manual_seed(0)
    model = MultilayerPerceptron(*sizes)
    if kind is not None:
        replace_linear_layers(model, kind, 2, 2.0)
        freeze_linear_layers(model)
    return model.to(dtype)


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@kinds
@pytest.mark.parametrize("converted", [True, False])
def test_float16_is_refused_with_the_reason_and_what_to_do(kind, converted):
    model = perceptron(kind, torch.float32 if converted else torch.float16)
    before = snapshot(model)
    said = r"layers\.0.* can't be trained in float16: .*epsilon.*vanish\. Train in float32.*autocast"
    with pytest.raises(ValueError, match=said):
        train(model, blobs(), **ONCE, dtype=torch.float16 if converted else None)
    assert_same_state(model, before)


def test_float16_is_named_by_what_is_trained_in_it_alone():
    model = perceptron()
    model.layers[2].half()
    with pytest.raises(
        ValueError, match=r"^layers\.2\.weight, layers\.2\.bias can't be trained"
    ):
        train(model, blobs(), **ONCE)
    # What is converted on the way may have been in float16 before.
    assert train(model, blobs(), **ONCE, dtype=torch.float32).steps > 0


def test_of_many_names_the_first_eight_stand_in_the_error():
    model = perceptron(LinearWithDoRA, torch.float16)
    names = trained(model)
    with pytest.raises(ValueError, match=re.escape(f"{names[7]} and 1 more can't")):
        train(model, blobs(), **ONCE)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_by_name_and_converted_if_asked(dtype, frozen):
    model = perceptron()
    model.layers[2].to(dtype).requires_grad_(not frozen)
    with pytest.raises(
        ValueError,
        match=rf"^layers\.2\.weight is in {dtype}, .*dtype=torch\.float32",
    ):
        train(model, blobs(), **ONCE)
    assert model.layers[2].weight.dtype == dtype
    with pytest.raises(ValueError, match=rf"^layers\.0\.weight is in {dtype}"):
        train(model, blobs(), **ONCE, dtype=dtype)
    assert train(model, blobs(), **ONCE, dtype=torch.float32).steps > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@kinds
def test_bfloat16_is_warned_of_by_name_once(kind):
    model = perceptron(kind)
    names = trained(model)[:8]
    with pytest.warns(UserWarning, match="are trained in bfloat16") as caught:
        train(model, blobs(), **ONCE, dtype=torch.bfloat16)
    (warning,) = caught
    assert str(warning.message).startswith(", ".join(names))
    assert "dtype=torch.float32" in str(warning.message)
    assert warning.filename == __file__


def test_a_frozen_layer_in_bfloat16_is_not_warned_of():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 3), nn.Linear(12, 8).bfloat16()
            self.body.requires_grad_(False)

        def forward(self, x):
            return self.head(self.body(x.bfloat16()).float())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Mixed(), blobs(dtype=torch.float32), **ONCE)
        # Nor is the way that the warning names: float32 under autocast.
        with torch.autocast("cpu", torch.bfloat16):
            train(perceptron(LinearWithDoRA), blobs(), **ONCE)


@pytest.mark.filterwarnings("ignore:.*are trained in bfloat16:UserWarning")
def test_what_is_lost_in_bfloat16_is_what_the_warning_says():
    """On the embedded digits: m stands still, A nearly, and what is learnt without them
    is as good."""
    digits, validation, _ = load_mnist("mnist-5k")
    digits = Digits(digits.images[:1000], digits.labels[:1000])
    sizes = (784, 64, 32, 10)
    base = perceptron(sizes=sizes)
    train(base, digits, epochs=4, learning_rate=0.005, progress=False)
    still, accuracies = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = perceptron(sizes=sizes)
        model.load_state_dict(base.state_dict())
        replace_linear_layers(model, LinearWithDoRA, 4, 2.0)
        freeze_linear_layers(model)
        model.to(dtype)
        before = snapshot(model)
        train(model, digits, **{**ONCE, "epochs": 2})
        accuracies[dtype] = accuracy(model, validation)
        for part in ("m", "A", "B"):
            same = [
                p == before[name]
                for name, p in model.named_parameters()
                if name.endswith(f".{part}")
            ]
            still[dtype, part] = torch.cat([s.flatten() for s in same]).double().mean()
    assert still[torch.bfloat16, "m"] == 1
    assert still[torch.float32, "m"] < 0.3
    assert still[torch.bfloat16, "A"] > 0.5
    assert still[torch.float32, "A"] < 0.3
    assert still[torch.bfloat16, "B"] < 0.3
    assert accuracies[torch.bfloat16] == pytest.approx(
        accuracies[torch.float32], abs=0.03
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("schedule", "cosine"), ("optimizer", "sgd"), ("optimizer", None)],
)
def test_a_name_is_no_schedule_and_no_optimizer(name, value):
    model = perceptron()
    with pytest.raises(TypeError, match=rf"^{name} must be a function such as"):
        train(model, blobs(), **ONCE, dtype=torch.float64, **{name: value})
    assert model.layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("kind", [LinearWithLoRA, LinearWithDoRA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_float32_are_trained_beside_a_base_in_half_precision(kind, dtype):
    torch.manual_seed(0)
    model = MultilayerPerceptron(12, 8, 6, 3).to(dtype)
    replace_linear_layers(model, kind, 2, 2.0)
    freeze_linear_layers(model)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = train(model, blobs(), batch_size=8, **ONCE)
    assert history.loss[0] > 0
    moved = [name for name, t in snapshot(model).items() if not t.equal(before[name])]
    assert sorted(moved) == sorted(trained(model))
    assert 0 <= accuracy(model, blobs()) <= 1
