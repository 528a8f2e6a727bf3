"""The training loop, accuracy and the reproducible setting."""

import functools
import math
import os
import random
import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm
from support import (
    ALL,
    DORA,
    assert_same_state,
    blobs,
    every_wrapper,
    generator,
    normal,
    snapshot,
)
from torch import nn
from torch.optim import SGD

from lowrank_utils import training
from lowrank_utils.adapt import freeze_linear_layers, replace_linear_layers
from lowrank_utils.data import Digits
from lowrank_utils.dora import LinearWithDoRA
from lowrank_utils.lora import LinearWithLoRA
from lowrank_utils.training import (
    History,
    MultilayerPerceptron,
    accuracy,
    reproducible,
    warm_up_and_decay,
)

train = functools.partial(training.train, epochs=1, learning_rate=0.01, progress=False)


def perceptron(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return MultilayerPerceptron(12, 8, 6, 3).to(dtype)


def frozen():
    model = perceptron()
    freeze_linear_layers(model)
    return model


def adapted(wrapper):
    model = perceptron()
    replace_linear_layers(model, wrapper, 2, 2.0)
    freeze_linear_layers(model)
    return model


def assert_near(model, other, rtol, atol):
    """Compare all parameters and buffers of two models."""
    expected = snapshot(other)
    torch.testing.assert_close(snapshot(model), expected, rtol=rtol, atol=atol)


class Recorder(nn.Module):
    """Remembers what it was shown, and in which mode; the first number of an example is
    its index."""

    def __init__(self):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.trained_on, self.evaluated_on = [], []

    def forward(self, x):
        seen = self.trained_on if self.training else self.evaluated_on
        seen.append(x[:, 0].int().tolist())
        return self.scores.expand(len(x), -1)


def numbered(count, first=0):
    images = torch.zeros(count, 12, dtype=torch.float64)
    images[:, 0] = torch.arange(first, first + count)
    return Digits(images, torch.arange(count) % 3)


class FirstFeatures(nn.Module):
    """Takes the features themselves for scores, so the digits say what it gets
    right."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.factor * x


def scored(correct):
    """Return digits of class 0 that ``FirstFeatures`` classifies correctly or not, as
    ``correct`` says."""
    right = torch.tensor(correct, dtype=torch.float64)
    images = torch.stack([right, 1 - right], dim=1)
    return Digits(images, torch.zeros(len(correct), dtype=torch.int64))


# --- What training does ------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, *ALL])
def test_the_loss_goes_down_and_new_examples_are_classified(wrapper):
    model = perceptron() if wrapper is None else adapted(wrapper)
    before = accuracy(model, blobs(90, seed=1))
    history = train(model, blobs(), epochs=25, batch_size=16)
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert accuracy(model, blobs(90, seed=1)) > max(0.9, before)


def test_training_in_place_returns_a_history_with_one_entry_per_epoch():
    model, fresh, seen = perceptron().eval(), blobs(9, seed=1), []

    def look(trained):
        assert trained is model
        seen.append(trained.layers[0].weight.detach().clone())

    options = {"validation": fresh, "after_epoch": look}
    history = train(model, blobs(50), epochs=3, batch_size=16, **options)
    assert isinstance(history, History)
    measured = (history.loss, history.train_accuracy, history.validation_accuracy)
    assert [len(values) for values in (*measured, seen)] == [3, 3, 3, 3]
    assert history.steps == 3 * 4
    # Whatever mode the model was in, it is left in that of training.
    assert model.training
    assert history.train_accuracy[-1] == accuracy(model, blobs(50))
    assert history.validation_accuracy[-1] == accuracy(model, fresh)
    assert torch.equal(seen[-1], model.layers[0].weight)
    assert not torch.equal(seen[0], seen[1])


def test_training_is_not_measured_unless_wanted_and_ends_alike():
    models = [perceptron(seed=1) for _ in range(2)]
    measured, silent = (
        train(model, blobs(), epochs=2, measure_training=wanted)
        for model, wanted in zip(models, (True, False), strict=True)
    )
    assert len(measured.loss) == len(measured.train_accuracy) == 2
    assert silent == History(measured.loss, [], [], measured.steps)
    assert_same_state(models[1], snapshot(models[0]))


@every_wrapper
def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(
    wrapper,
):
    models = [adapted(wrapper) for _ in range(3)]
    histories = [
        train(model, blobs(), epochs=2, batch_size=16, seed=seed)
        for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert_same_state(models[1], snapshot(models[0]))
    assert histories[1] == histories[0]
    assert histories[2].loss != histories[0].loss
    assert not torch.equal(models[2].layers[0].lora.B, models[0].layers[0].lora.B)


def test_training_neither_draws_from_nor_seeds_the_global_generators():
    model = perceptron()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(model, blobs(), epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4, 2]), (1000, [10])])
def test_every_example_is_seen_once_per_epoch_and_the_last_batch_may_be_smaller(
    batch_size, sizes
):
    model = Recorder()
    history = train(model, numbered(10), epochs=3, batch_size=batch_size)
    assert [len(batch) for batch in model.trained_on] == 3 * sizes
    assert history.steps == 3 * len(sizes)
    seen = np.reshape(list(chain(*model.trained_on)), (3, 10)).tolist()
    assert [sorted(epoch) for epoch in seen] == 3 * [list(range(10))]
    # They are shuffled anew for each epoch.
    assert len({tuple(epoch) for epoch in [*seen, range(10)]}) == 4


@pytest.mark.parametrize("factors", [None, {"*.m": 30}])
@pytest.mark.parametrize("schedule", [None, lambda step, steps: (1 + step) / steps])
def test_training_takes_the_steps_of_a_loop_written_by_hand(factors, schedule):
    ours, theirs, digits = adapted(LinearWithDoRA), adapted(LinearWithDoRA), blobs(50)
    before, shuffle, losses = snapshot(ours), generator(5), []
    options = {"factors": factors, "schedule": schedule, "optimizer": SGD}
    history = train(ours, digits, epochs=2, batch_size=16, seed=5, **options)
    for epoch in range(2):
        losses.append(0)
        # The last batch is of two examples, and counts as two.
        batches = torch.randperm(50, generator=shuffle).split(16)
        for step, batch in enumerate(batches, start=4 * epoch):
            theirs.zero_grad()
            loss = F.cross_entropy(theirs(digits.images[batch]), digits.labels[batch])
            loss.backward()
            losses[-1] += loss.item() * len(batch) / 50
            rate = 0.01 * (schedule(step, 8) if schedule else 1)
            with torch.no_grad():
                for name, parameter in theirs.named_parameters():
                    if parameter.requires_grad:
                        factor = 30 if factors and name.endswith(".m") else 1
                        parameter -= factor * rate * parameter.grad
    assert history.loss == pytest.approx(losses, rel=1e-12)
    assert_near(ours, theirs, rtol=1e-10, atol=1e-12)
    for name, tensor in snapshot(ours).items():
        assert torch.equal(tensor, before[name]) == (".linear." in name)


def test_gradients_do_not_add_up_from_step_to_step():
    ours, theirs = perceptron(), perceptron()
    digits = Digits(*(part[:1].repeat_interleave(6, 0) for part in blobs()))
    train(ours, digits, epochs=2, batch_size=2, optimizer=SGD)
    for _ in range(6):
        loss = F.cross_entropy(theirs(digits.images), digits.labels)
        parameters = list(theirs.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= 0.01 * gradient
    assert_near(ours, theirs, rtol=1e-7, atol=1e-7)


def test_validation_digits_are_measured_in_evaluation_mode_and_never_learnt_from():
    model = Recorder()
    train(model, numbered(10), epochs=2, validation=numbered(6, first=100))
    assert max(chain(*model.trained_on)) == 9
    expected = sorted(2 * [*range(10), *range(100, 106)])
    assert sorted(chain(*model.evaluated_on)) == expected

    without, with_validation = perceptron(), perceptron()
    train(without, blobs(), epochs=2)
    train(with_validation, blobs(), epochs=2, validation=blobs(30, seed=1))
    assert_same_state(with_validation, snapshot(without))


@every_wrapper
def test_only_the_adapters_reach_the_optimizer_and_only_they_move(wrapper):
    model, made = adapted(wrapper), []
    before = snapshot(model)

    def recording(parameters, learning_rate):
        made.append(torch.optim.AdamW(parameters, learning_rate, weight_decay=0.1))
        return made[0]

    train(model, blobs(), epochs=3, batch_size=16, optimizer=recording)
    assert [update.defaults["lr"] for update in made] == [0.01]
    given = {id(p) for group in made[0].param_groups for p in group["params"]}
    names = [n for n, p in model.named_parameters() if id(p) in given]
    adapters = ["lora.A", "lora.B"] + (["m"] if wrapper in DORA else [])
    assert len(given) == len(names)
    assert sorted(names) == [
        f"layers.{i}.{name}" for i in (0, 2, 4) for name in adapters
    ]
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]) == (name not in names), name


@pytest.mark.parametrize("factors", [None, {"*.m": 30}])
def test_the_default_optimizer_is_adam_with_the_rates(factors):
    ours, theirs = adapted(LinearWithDoRA), adapted(LinearWithDoRA)
    for model, options in ((ours, {}), (theirs, {"optimizer": torch.optim.Adam})):
        train(model, blobs(16), epochs=4, factors=factors, **options)
    assert_near(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_default_optimizer_takes_the_steps_of_torchs_fused_adam_to_the_last_bit():
    models, digits, counted = (perceptron(), perceptron()), blobs(16), []
    ours, theirs = models
    updates = (
        training.adam(ours.parameters(), 0.03),
        torch.optim.Adam(theirs.parameters(), 0.03, fused=True),
    )
    for update in updates:
        update.register_step_post_hook(lambda optimizer, *_: counted.append(optimizer))
    for _ in range(4):
        for model, update in zip(models, updates, strict=True):
            update.zero_grad()
            F.cross_entropy(model(digits.images), digits.labels).backward()
            update.step()
    assert counted == 4 * [*updates]
    assert_same_state(ours, snapshot(theirs))
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())
    state, expected = (update.state_dict()["state"] for update in updates)
    assert expected[0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_training_loads_no_compiler_and_the_variable_tqdm_disable_silences_its_bar():
    # tqdm reads it when it is imported, so this takes a new process.
    code = (
        "import sys, torch\n"
        "from lowrank_utils.data import Digits\n"
        "from lowrank_utils.training import MultilayerPerceptron, reproducible, train\n"
        "reproducible(0)\n"
        "digits = Digits(torch.rand(8, 5), torch.arange(8) % 3)\n"
        "model = MultilayerPerceptron(5, 4, 4, 3)\n"
        "history = train(model, digits, epochs=2, learning_rate=0.01)\n"
        "print(history.steps, 'torch._dynamo' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "2 False\n"
    assert "step" not in run.stderr


# --- Device and dtype ----------------------------------------------------------------------------


def test_digits_are_brought_into_the_precision_of_the_model():
    model, digits = perceptron(dtype=torch.float32), blobs(dtype=torch.float64)
    train(model, digits, validation=blobs(9, dtype=torch.float16))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert digits.images.dtype == torch.float64
    assert 0 <= accuracy(model, digits) <= 1


no_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_and_a_device_convert_the_model_in_place(device, dtype):
    model, options = adapted(LinearWithDoRA), {"device": device, "dtype": dtype}
    history = train(model, blobs(), validation=blobs(9), **options)
    kinds = {(p.dtype, p.device.type) for p in model.parameters()}
    assert kinds == {(dtype, device)}
    assert math.isfinite(history.loss[0])


# --- What is refused --------------------------------------------------------------------------------


def test_a_loss_that_is_no_longer_finite_is_an_error_that_names_the_epoch_and_the_learning_rate():
    message = r"the loss is (nan|inf) in epoch \d+; .* smaller than 1e\+200"
    with pytest.raises(FloatingPointError, match=message):
        train(perceptron(), blobs(), epochs=9, learning_rate=1e200, optimizer=SGD)
    digits = blobs()
    digits.images[7, 3] = math.nan
    message = r"the loss is nan in epoch 1; .* look for NaN in the images"
    with pytest.raises(FloatingPointError, match=message):
        train(perceptron(), digits, epochs=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be a whole number, 1 or more; got 0"),
        ({"epochs": -1}, ValueError, "epochs must be .*; got -1"),
        ({"epochs": 1.5}, TypeError, r"epochs must be .*; got 1\.5 \(float\)"),
        ({"epochs": True}, TypeError, r"epochs must be .*; got True \(bool\)"),
        ({"batch_size": 0}, ValueError, "batch_size must be .*, 1 or more; got 0"),
        ({"batch_size": "64"}, TypeError, r"batch_size must be .*; got '64' \(str\)"),
        ({"seed": -1}, ValueError, "seed must be .*, 0 to 4294967295; got -1"),
        ({"learning_rate": 0}, ValueError, "learning_rate .* larger than 0; got 0"),
        ({"learning_rate": -0.1}, ValueError, r"learning_rate must .*; got -0\.1"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate must .*; got nan"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must .*; got inf"),
        ({"learning_rate": "0.1"}, TypeError, r"learning_rate must .*'0\.1' \(str\)"),
        ({"dtype": "float64"}, TypeError, "dtype must be a torch dtype"),
        ({"dtype": torch.int32}, ValueError, "dtype must be a floating-point dtype"),
        ({"digits": blobs(0)}, ValueError, "digits is empty"),
        # load_mnist(validation=0) returns such a set.
        ({"validation": blobs(0)}, ValueError, "validation is empty"),
        ({"model": frozen()}, ValueError, "model has no trainable parameters"),
        ({"factors": {"*.n": 3}}, ValueError, r"no trainable .* '\*\.n'; .* are: "),
        ({"factors": {"*0.*": 3, "*.bias": 3}}, ValueError, r"0\.bias is matched by"),
        ({"factors": {"*.bias": 0}}, ValueError, r"the factor of '\*\.bias' must be"),
        ({"factors": ["*.bias"]}, TypeError, "factors must be a dict .*; got list"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_has_changed(
    arguments, error, message
):
    # The dtype would convert the model, too.
    given = {"model": perceptron(), "digits": blobs(), "dtype": torch.float32}
    given |= arguments
    before = snapshot(given["model"])
    with pytest.raises(error, match=message):
        train(**given)
    assert_same_state(given["model"], before)


# --- The progress bar ---------------------------------------------------------------------------------


def test_a_progress_bar_counts_the_steps_and_is_cleared_at_the_end_if_it_is_wanted(
    monkeypatch, capsys
):
    # Explicitly on, since TQDM_DISABLE may be set where the tests run.
    shown = functools.partial(tqdm.tqdm, disable=False, mininterval=0)
    monkeypatch.setattr(training, "tqdm", shown)
    training.train(perceptron(), blobs(10), epochs=2, learning_rate=0.01, batch_size=4)
    out, _ = capsys.readouterr()
    assert all(part in out for part in ("0/6", "6/6", "step"))
    assert out.endswith("\r")
    train(perceptron(), blobs(), epochs=2)
    assert list(capsys.readouterr()) == ["", ""]


# --- accuracy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 4096])
def test_accuracy_counts_examples_and_not_batches(batch_size):
    # Of the first, by batches of 3 it would be the mean of 1 and 0.
    for correct in ([1, 1, 1, 0, 0], [1, 1, 0, 1], [0], [1, 1, 1]):
        share = sum(correct) / len(correct)
        assert accuracy(FirstFeatures(), scored(correct), batch_size) == share


def test_accuracy_shows_no_more_than_batch_size_examples_at_once():
    model = Recorder()
    accuracy(model, numbered(10), batch_size=4)
    assert model.evaluated_on == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_accuracy_is_measured_without_dropout_and_restores_the_mode_of_every_module():
    model = nn.Sequential(FirstFeatures(), nn.Dropout(0.9))
    for outer, inner in [(True, True), (True, False), (False, False), (False, True)]:
        model.train(outer)
        model[0].train(inner)
        assert accuracy(model, scored([1] * 40)) == 1.0
        assert [m.training for m in model.modules()] == [outer, inner, outer]


def test_accuracy_restores_the_mode_even_if_the_model_fails():
    model = perceptron().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accuracy(model, Digits(normal(4, 5), torch.zeros(4, dtype=torch.int64)))
    assert model.training


def test_accuracy_records_nothing_for_gradients_and_changes_nothing():
    model, recorded = adapted(LinearWithLoRA), []
    before = snapshot(model)
    model.register_forward_hook(
        lambda _module, _inputs, scores: recorded.append(scores.requires_grad)
    )
    accuracy(model, blobs())
    assert recorded == [False]
    assert_same_state(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_of_no_digits_is_refused():
    with pytest.raises(ValueError, match="digits is empty"):
        accuracy(perceptron(), blobs(0))


@pytest.mark.parametrize(
    ("batch_size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_accuracy_refuses_a_batch_size_below_one(batch_size, error):
    with pytest.raises(error, match="batch_size must be a whole number, 1 or more"):
        accuracy(perceptron(), blobs(), batch_size)


# --- reproducible ---------------------------------------------------------------------------------------


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


def test_called_twice_it_gives_the_same_numbers_from_torch_numpy_and_python():
    draws = []
    for seed in (7, None, 7, 8):
        if seed is not None:
            reproducible(seed)
        draws.append(draw())
    first, second, again, other = draws
    assert again == first
    for numbers in zip(first, second, other, strict=True):
        assert all(number != numbers[0] for number in numbers[1:])


@pytest.mark.parametrize(("workspace", "kept"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_it_sets_the_default_dtype_one_thread_and_deterministic_algorithms_alone(
    monkeypatch, workspace, kept
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if workspace:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    torch.set_num_threads(2)
    reproducible(0)
    assert nn.Linear(2, 2).weight.dtype == torch.get_default_dtype() == torch.float64
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == kept
    # Sums are then taken in one order.
    assert torch.get_num_threads() == 1
    reproducible(0, torch.float32)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "seed must be a whole number, 0 to 4294967295; got -1"),
        ((1.0,), TypeError, r"seed must be .*; got 1\.0 \(float\)"),
        ((None,), TypeError, r"seed must be .*; got None \(NoneType\)"),
        ((2**32,), ValueError, "seed must be .*; got 4294967296"),
        ((0, "float64"), TypeError, r"dtype must be .*; got 'float64' \(str\)"),
        ((0, torch.int64), ValueError, r"dtype must be .*; got torch\.int64"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_state_has_changed(
    arguments, error, message
):
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    with pytest.raises(error, match=message):
        reproducible(*arguments)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_default_dtype()) == before[1:]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_training_run_ends_alike_with_one_thread_and_with_two():
    models = []
    for threads in (1, 2):
        reproducible(0)
        torch.set_num_threads(threads)
        models.append(MultilayerPerceptron(200, 64, 32, 3))
        train(models[-1], blobs(300, features=200), epochs=2)
    assert_near(*models, rtol=1e-9, atol=1e-9)


# --- Rates of each part, and of each step ---------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [training.adam, SGD])
@pytest.mark.parametrize("factors", [{}, {"*.m": 1}, {"*.lora.*": 1, "*.m": 1.0}])
def test_factors_of_one_change_no_bit(optimizer, factors):
    plain, grouped = adapted(LinearWithDoRA), adapted(LinearWithDoRA)
    options = {"epochs": 2, "batch_size": 16, "optimizer": optimizer}
    expected = train(plain, blobs(), **options)
    assert train(grouped, blobs(), factors=factors, **options) == expected
    assert_same_state(grouped, snapshot(plain))


@pytest.mark.parametrize(
    "schedule", [None, warm_up_and_decay, lambda step, steps: (1 + step) / (7 * steps)]
)
@pytest.mark.parametrize(
    ("factors", "rates"),
    [(None, [0.01]), ({"*.m": 30, "*.lora.B": 0.5}, [0.01, 0.3, 0.005])],
)
def test_each_step_goes_with_rate_times_factor_times_schedule(schedule, factors, rates):
    used, asked = [], []

    def noted(step, steps):
        asked.append((step, steps))
        return schedule(step, steps)

    def recording(parameters, learning_rate):
        # What it really steps with.
        update = SGD(parameters, learning_rate)
        update.register_step_pre_hook(
            lambda *_: used.append([group["lr"] for group in update.param_groups])
        )
        return update

    options = {"schedule": schedule and noted, "optimizer": recording}
    # Four batches in each of six epochs, the last of them smaller.
    model, digits = adapted(LinearWithDoRA), blobs(50)
    train(model, digits, epochs=6, batch_size=16, factors=factors, **options)
    steps = [(step, 24) for step in range(24)]
    assert list(dict.fromkeys(asked)) == (steps if schedule else [])
    shares = [schedule(*step) if schedule else 1 for step in steps]
    assert used == [pytest.approx([rate * share for rate in rates]) for share in shares]


@pytest.mark.parametrize("steps", [1, 5, 10, 19, 20, 320])
def test_the_rate_rises_for_a_tenth_of_the_steps_to_one_and_then_falls_to_all_but_zero(
    steps,
):
    values = [warm_up_and_decay(step, steps) for step in range(steps)]
    warm_up = max(1, steps // 10)
    falling = steps - warm_up
    assert max(values) == values[warm_up - 1] == 1
    # The first step after the warm-up is at the peak as well; from there on each is
    # smaller, by the same amount.
    expected = [(step + 1) / warm_up for step in range(warm_up)]
    expected += [1 - step / falling for step in range(falling)]
    assert values == pytest.approx(expected)
