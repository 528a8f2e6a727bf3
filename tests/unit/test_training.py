"""The training loop, accuracy and the reproducible setting."""

import functools
import math
import os
import random
import subprocess
import sys
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tqdm
from support import ALL, DORA, assert_same_state, blobs, every_wrapper, normal, snapshot
from torch import nn

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

train = functools.partial(training.train, progress=False)


def perceptron(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return MultilayerPerceptron(12, 8, 6, 3).to(dtype)


def adapted(wrapper, seed=0):
    model = perceptron(seed)
    replace_linear_layers(model, wrapper, 2, 2.0)
    freeze_linear_layers(model)
    return model


class Recorder(nn.Module):
    """Remembers what it was shown, and in which mode; the first number of an example is
    its index."""

    def __init__(self, classes=3):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(classes, dtype=torch.float64))
        self.trained_on, self.evaluated_on = [], []

    def forward(self, x):
        (self.trained_on if self.training else self.evaluated_on).append(
            x[:, 0].int().tolist()
        )
        return self.scores.expand(len(x), -1)


def numbered(count, first=0):
    images = torch.zeros(count, 12, dtype=torch.float64)
    images[:, 0] = torch.arange(first, first + count)
    return Digits(images, torch.arange(count) % 3)


class FirstFeatures(nn.Module):
    """Takes the features themselves for scores, so the digits say what it gets
    right."""

    def __init__(self, classes=2):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.classes = classes

    def forward(self, x):
        return self.factor * x[:, : self.classes]


def scored(correct):
    """Return digits of class 0 that ``FirstFeatures`` classifies correctly or not, as
    ``correct`` says."""
    images = torch.tensor(
        [[1.0, 0.0] if right else [0.0, 1.0] for right in correct], dtype=torch.float64
    )
    return Digits(images, torch.zeros(len(correct), dtype=torch.int64))


def still(parameters, _learning_rate):
    """An optimizer that never moves anything."""
    return torch.optim.SGD(parameters, lr=0.0)


# --- What training does ------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, *ALL])
def test_the_loss_goes_down_and_new_examples_are_classified(wrapper):
    model = perceptron() if wrapper is None else adapted(wrapper)
    digits, fresh = blobs(), blobs(90, seed=1)
    before = accuracy(model, fresh)
    history = train(model, digits, epochs=25, learning_rate=0.01, batch_size=16)
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert accuracy(model, fresh) > max(0.9, before)


def test_training_in_place_returns_a_history_with_one_entry_per_epoch():
    model = perceptron()
    history = train(
        model,
        blobs(50),
        epochs=3,
        learning_rate=0.01,
        batch_size=16,
        validation=blobs(9, seed=1),
    )
    assert isinstance(history, History)
    assert (
        len(history.loss)
        == len(history.train_accuracy)
        == len(history.validation_accuracy)
        == 3
    )
    assert history.steps == 3 * 4
    assert history.train_accuracy[-1] == accuracy(model, blobs(50))
    assert history.validation_accuracy[-1] == accuracy(model, blobs(9, seed=1))


def test_training_is_not_measured_unless_wanted_and_ends_alike():
    models = [perceptron(seed=1) for _ in range(2)]
    measured, silent = (
        train(
            model,
            blobs(),
            epochs=2,
            learning_rate=0.01,
            measure_training=wanted,
            progress=False,
        )
        for model, wanted in zip(models, (True, False), strict=True)
    )
    assert len(measured.train_accuracy) == 2
    assert silent.train_accuracy == []
    assert silent.loss == measured.loss
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(m.parameters() for m in models), strict=True)
    )


def test_after_each_epoch_the_model_can_be_looked_at():
    model, seen = perceptron(), []

    def look(trained):
        assert trained is model
        seen.append(trained.layers[0].weight.detach().clone())

    train(
        model, blobs(), epochs=3, learning_rate=0.01, after_epoch=look, progress=False
    )
    assert len(seen) == 3
    assert torch.equal(seen[-1], model.layers[0].weight)
    assert not torch.equal(seen[0], seen[1])


def test_without_validation_its_history_is_empty():
    assert (
        train(perceptron(), blobs(), epochs=2, learning_rate=0.01).validation_accuracy
        == []
    )


def test_histories_do_not_share_their_lists():
    History().loss.append(1.0)
    assert History().loss == []


@every_wrapper
def test_the_same_seed_gives_the_same_weights_bit_for_bit_and_another_seed_others(
    wrapper,
):
    models = [adapted(wrapper) for _ in range(3)]
    histories = [
        train(model, blobs(), epochs=2, learning_rate=0.01, batch_size=16, seed=seed)
        for model, seed in zip(models, (5, 5, 6), strict=True)
    ]
    assert_same_state(models[1], snapshot(models[0]))
    assert histories[1] == histories[0]
    assert histories[2].loss != histories[0].loss
    assert not torch.equal(models[2].layers[0].lora.B, models[0].layers[0].lora.B)


def test_training_neither_draws_from_nor_seeds_the_global_generators():
    model = perceptron()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(model, blobs(), epochs=2, learning_rate=0.01, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_what_was_drawn_before_does_not_change_the_order_of_the_examples():
    first, second = Recorder(), Recorder()
    train(first, numbered(10), epochs=1, learning_rate=0.1, seed=3)
    torch.rand(5)
    train(second, numbered(10), epochs=1, learning_rate=0.1, seed=3)
    assert first.trained_on == second.trained_on


def test_every_example_is_seen_once_per_epoch_and_the_last_batch_may_be_smaller():
    model = Recorder()
    history = train(model, numbered(10), epochs=3, learning_rate=0.1, batch_size=4)
    assert [len(batch) for batch in model.trained_on] == [4, 4, 2] * 3
    epochs = [list(chain(*model.trained_on[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert history.steps == 9
    # Shuffled anew for each epoch.
    assert len({tuple(epoch) for epoch in [*epochs, range(10)]}) == 4


def test_a_batch_larger_than_the_set_is_the_whole_set():
    model = Recorder()
    history = train(model, numbered(10), epochs=2, learning_rate=0.1, batch_size=1000)
    assert [len(batch) for batch in model.trained_on] == [10, 10]
    assert history.steps == 2


def test_images_and_labels_stay_together_when_they_are_shuffled():
    # Example i has the score i for its own class, so the loss is small only for the
    # right pairs.
    digits = Digits(20 * torch.eye(10, dtype=torch.float64), torch.arange(10))
    model = FirstFeatures(classes=10)
    history = train(
        model, digits, epochs=1, learning_rate=0.1, batch_size=3, optimizer=still
    )
    assert history.loss[0] < 1e-6


def test_the_loss_is_the_mean_over_the_examples_and_not_over_the_batches():
    # The last batch of one counts as one example, not as half of the epoch.
    model, digits = perceptron(), blobs(17)
    expected = F.cross_entropy(model(digits.images), digits.labels).item()
    history = train(
        model, digits, epochs=1, learning_rate=0.1, batch_size=16, optimizer=still
    )
    assert history.loss[0] == pytest.approx(expected, rel=1e-12)


def test_validation_digits_are_measured_in_evaluation_mode_and_never_learnt_from():
    model = Recorder()
    train(
        model,
        numbered(10),
        epochs=2,
        learning_rate=0.1,
        validation=numbered(6, first=100),
    )
    assert max(chain(*model.trained_on)) == 9
    assert sorted(chain(*model.evaluated_on)) == sorted(
        2 * [*range(10), *range(100, 106)]
    )

    without, with_validation = perceptron(), perceptron()
    train(without, blobs(), epochs=2, learning_rate=0.01)
    train(
        with_validation,
        blobs(),
        epochs=2,
        learning_rate=0.01,
        validation=blobs(30, seed=1),
    )
    assert_same_state(with_validation, snapshot(without))


def test_training_leaves_the_model_in_training_mode_whatever_it_was_before():
    for mode in (True, False):
        model = perceptron().train(mode)
        train(model, blobs(), epochs=1, learning_rate=0.01)
        assert model.training


@every_wrapper
def test_only_the_adapters_reach_the_optimizer_and_only_they_move(wrapper):
    model = adapted(wrapper)
    before = snapshot(model)
    made = []

    def recording(parameters, learning_rate):
        made.append(torch.optim.AdamW(parameters, learning_rate, weight_decay=0.1))
        return made[0]

    train(
        model, blobs(), epochs=3, learning_rate=0.01, batch_size=16, optimizer=recording
    )
    assert len(made) == 1
    assert made[0].defaults["lr"] == 0.01
    given = {id(p) for group in made[0].param_groups for p in group["params"]}
    names = [n for n, p in model.named_parameters() if id(p) in given]
    adapters = ["lora.A", "lora.B"] + (["m"] if wrapper in DORA else [])
    assert len(given) == len(names)
    assert sorted(names) == sorted(
        f"layers.{i}.{name}" for i in (0, 2, 4) for name in adapters
    )
    for name, tensor in snapshot(model).items():
        assert torch.equal(tensor, before[name]) == (name not in names), name


def test_the_default_optimizer_is_adam_with_the_learning_rate():
    ours, theirs = perceptron(), perceptron()
    digits = blobs(16)
    train(ours, digits, epochs=4, learning_rate=0.03, batch_size=16)
    update = torch.optim.Adam(theirs.parameters(), lr=0.03)
    for _ in range(4):
        update.zero_grad()
        F.cross_entropy(theirs(digits.images), digits.labels).backward()
        update.step()
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_the_default_optimizer_takes_the_steps_of_torchs_fused_adam_to_the_last_bit():
    ours, theirs = perceptron(), perceptron()
    digits, counted = blobs(16), []
    updates = (
        training.adam(ours.parameters(), 0.03),
        torch.optim.Adam(theirs.parameters(), 0.03, fused=True),
    )
    for update in updates:
        update.register_step_post_hook(lambda optimizer, *_: counted.append(optimizer))
    for _ in range(4):
        for model, update in zip((ours, theirs), updates, strict=True):
            update.zero_grad()
            F.cross_entropy(model(digits.images), digits.labels).backward()
            update.step()
    assert counted == 4 * [*updates]
    assert_same_state(ours, snapshot(theirs))
    assert all(
        parameter.requires_grad and parameter.is_leaf for parameter in ours.parameters()
    )
    state, expected = (update.state_dict()["state"] for update in updates)
    assert state.keys() == expected.keys()
    for number, entries in expected.items():
        assert entries.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(
            torch.equal(state[number][name], entry) for name, entry in entries.items()
        )


def test_training_loads_no_compiler():
    code = (
        "import sys, torch\n"
        "from lowrank_utils.data import Digits\n"
        "from lowrank_utils.training import MultilayerPerceptron, reproducible, train\n"
        "reproducible(0)\n"
        "digits = Digits(torch.rand(8, 5), torch.arange(8) % 3)\n"
        "history = train(MultilayerPerceptron(5, 4, 4, 3), digits, epochs=2, learning_rate=0.01)\n"
        "print(history.steps, 'torch._dynamo' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "2 False"


def test_gradients_do_not_add_up_from_step_to_step():
    ours, theirs = perceptron(), perceptron()
    digits = Digits(blobs(16).images[:1].repeat(6, 1), blobs(16).labels[:1].repeat(6))
    train(
        ours,
        digits,
        epochs=2,
        learning_rate=0.1,
        batch_size=2,
        optimizer=torch.optim.SGD,
    )
    for _ in range(6):
        for parameter in theirs.parameters():
            parameter.grad = None
        F.cross_entropy(theirs(digits.images[:2]), digits.labels[:2]).backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= 0.1 * parameter.grad
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


# --- Device and dtype ----------------------------------------------------------------------------


def test_digits_are_brought_into_the_precision_of_the_model():
    model = perceptron(dtype=torch.float32)
    digits = blobs(dtype=torch.float64)
    train(
        model,
        digits,
        epochs=1,
        learning_rate=0.01,
        validation=blobs(9, dtype=torch.float16),
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert digits.images.dtype == torch.float64
    assert 0 <= accuracy(model, digits) <= 1


def test_a_dtype_and_a_device_convert_the_model_in_place():
    model = adapted(LinearWithDoRA)
    train(
        model, blobs(), epochs=1, learning_rate=0.01, dtype=torch.float32, device="cpu"
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_training_on_another_device_brings_everything_there():
    model = adapted(LinearWithDoRA)
    history = train(
        model, blobs(), epochs=1, learning_rate=0.01, device="cuda", validation=blobs(9)
    )
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert math.isfinite(history.loss[0])


# --- What is refused --------------------------------------------------------------------------------


def test_a_loss_that_is_no_longer_finite_is_an_error_that_names_the_epoch_and_the_learning_rate():
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is (nan|inf) in epoch \d+; .* smaller than 1e\+200",
    ):
        train(
            perceptron(),
            blobs(),
            epochs=9,
            learning_rate=1e200,
            optimizer=torch.optim.SGD,
        )


def test_nan_in_the_images_is_an_error_in_the_first_epoch():
    digits = blobs()
    digits.images[7, 3] = float("nan")
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is nan in epoch 1; .* look for NaN in the images",
    ):
        train(perceptron(), digits, epochs=2, learning_rate=0.01)


REFUSED = [
    ({"epochs": 0}, ValueError, "epochs must be a whole number, 1 or more; got 0"),
    ({"epochs": -1}, ValueError, "epochs must be a whole number, 1 or more; got -1"),
    (
        {"epochs": 1.5},
        TypeError,
        r"epochs must be a whole number, 1 or more; got 1\.5 \(float\)",
    ),
    ({"epochs": True}, TypeError, r"epochs must be .*; got True \(bool\)"),
    (
        {"batch_size": 0},
        ValueError,
        "batch_size must be a whole number, 1 or more; got 0",
    ),
    ({"batch_size": "64"}, TypeError, r"batch_size must be .*; got '64' \(str\)"),
    ({"seed": -1}, ValueError, "seed must be a whole number, 0 to 4294967295; got -1"),
    (
        {"learning_rate": 0},
        ValueError,
        "learning_rate must be a finite number larger than 0; got 0",
    ),
    (
        {"learning_rate": -0.1},
        ValueError,
        r"learning_rate must be .* larger than 0; got -0\.1",
    ),
    (
        {"learning_rate": float("nan")},
        ValueError,
        "learning_rate must be a finite number .*; got nan",
    ),
    (
        {"learning_rate": float("inf")},
        ValueError,
        "learning_rate must be a finite number .*; got inf",
    ),
    (
        {"learning_rate": "0.1"},
        TypeError,
        r"learning_rate must be .*; got '0\.1' \(str\)",
    ),
    ({"dtype": "float64"}, TypeError, "dtype must be a torch dtype"),
    ({"dtype": torch.int32}, ValueError, "dtype must be a floating-point dtype"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_a_wrong_argument_is_refused_before_anything_has_changed(
    arguments, error, message
):
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        train(model, blobs(), **{"epochs": 1, "learning_rate": 0.01, **arguments})
    assert_same_state(model, before)


def test_a_model_with_nothing_to_train_is_refused_and_left_as_it_was():
    model = perceptron()
    freeze_linear_layers(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="model has no trainable parameters: everything is frozen"
    ):
        train(model, blobs(), epochs=1, learning_rate=0.01, dtype=torch.float32)
    assert_same_state(model, before)


def test_an_empty_set_to_train_on_is_refused_by_name():
    with pytest.raises(ValueError, match="digits is empty"):
        train(perceptron(), blobs(0), epochs=1, learning_rate=0.01)


def test_an_empty_set_to_validate_on_is_refused_before_the_first_step():
    # load_mnist(validation=0) returns one.
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(ValueError, match="validation is empty"):
        train(model, blobs(), epochs=1, learning_rate=0.01, validation=blobs(0))
    assert_same_state(model, before)


# --- The progress bar ---------------------------------------------------------------------------------


def test_a_progress_bar_counts_the_steps_and_is_cleared_at_the_end(monkeypatch, capsys):
    # Explicitly on, since TQDM_DISABLE may be set where the tests run.
    monkeypatch.setattr(
        training, "tqdm", functools.partial(tqdm.tqdm, disable=False, mininterval=0)
    )
    training.train(perceptron(), blobs(10), epochs=2, learning_rate=0.01, batch_size=4)
    shown = capsys.readouterr().out
    assert "0/6" in shown
    assert "6/6" in shown
    assert "step" in shown
    assert shown.endswith("\r")


def test_with_progress_off_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(
        training, "tqdm", functools.partial(tqdm.tqdm, disable=False, mininterval=0)
    )
    train(perceptron(), blobs(), epochs=2, learning_rate=0.01)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_the_environment_variable_tqdm_disable_silences_the_bar():
    # tqdm reads it when it is imported, so this takes a new process.
    code = (
        "import torch\n"
        "from lowrank_utils.data import Digits\n"
        "from lowrank_utils.training import train\n"
        "train(torch.nn.Linear(4, 2), Digits(torch.ones(6, 4), torch.zeros(6, dtype=torch.int64)),\n"
        "      epochs=1, learning_rate=0.1)\n"
        "print('done')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "done\n"
    assert "step" not in run.stderr


# --- accuracy -------------------------------------------------------------------------------------------


def test_accuracy_is_the_fraction_of_digits_whose_highest_score_is_the_label():
    assert accuracy(FirstFeatures(), scored([True, True, False, True])) == 0.75
    assert accuracy(FirstFeatures(), scored([False])) == 0.0
    assert accuracy(FirstFeatures(), scored([True] * 3)) == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 4096])
def test_accuracy_counts_examples_and_not_batches(batch_size):
    # By batches of 3 it would be the mean of 1 and 0.
    assert (
        accuracy(FirstFeatures(), scored([True, True, True, False, False]), batch_size)
        == 0.6
    )


def test_accuracy_shows_no_more_than_batch_size_examples_at_once():
    model = Recorder()
    accuracy(model, numbered(10), batch_size=4)
    assert model.evaluated_on == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = FirstFeatures()
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        return self.dropout(self.features(x))


def test_accuracy_is_measured_without_dropout_and_restores_the_mode_of_every_module():
    model = WithDropout()
    digits = scored([True] * 40)
    for outer, inner in [(True, True), (True, False), (False, False), (False, True)]:
        model.train(outer)
        model.features.train(inner)
        assert accuracy(model, digits) == 1.0
        assert model.training is outer
        assert model.dropout.training is outer
        assert model.features.training is inner


def test_accuracy_restores_the_mode_even_if_the_model_fails():
    model = perceptron().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accuracy(model, Digits(normal(4, 5), torch.zeros(4, dtype=torch.int64)))
    assert model.training


def test_accuracy_records_nothing_for_gradients_and_changes_nothing():
    model = adapted(LinearWithLoRA)
    before = snapshot(model)
    recorded = []
    model.register_forward_hook(
        lambda _module, _inputs, scores: recorded.append(scores.requires_grad)
    )
    accuracy(model, blobs())
    assert recorded == [False]
    assert_same_state(model, before)
    assert all(p.grad is None for p in model.parameters())


def test_accuracy_of_no_digits_is_refused():
    with pytest.raises(
        ValueError, match="digits is empty; accuracy needs at least one"
    ):
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
    reproducible(7)
    first = draw()
    second = draw()
    reproducible(7)
    assert draw() == first
    for one, another in zip(first, second, strict=True):
        assert one != another
    reproducible(8)
    for one, another in zip(first, draw(), strict=True):
        assert one != another


def test_it_sets_the_default_dtype_and_allows_only_deterministic_algorithms(
    monkeypatch,
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    reproducible(0)
    assert torch.get_default_dtype() == torch.float64
    assert nn.Linear(2, 2).weight.dtype == torch.float64
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    reproducible(0, torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_a_setting_of_the_workspace_that_is_already_made_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    reproducible(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "seed must be a whole number, 0 to 4294967295; got -1"),
        (
            (1.0,),
            TypeError,
            r"seed must be a whole number, 0 to 4294967295; got 1\.0 \(float\)",
        ),
        ((None,), TypeError, r"seed must be .*; got None \(NoneType\)"),
        ((2**32,), ValueError, "seed must be .*; got 4294967296"),
        (
            (0, "float64"),
            TypeError,
            r"dtype must be a torch dtype .*; got 'float64' \(str\)",
        ),
        (
            (0, torch.int64),
            ValueError,
            r"dtype must be a floating-point dtype .*; got torch\.int64",
        ),
    ],
)
def test_a_wrong_argument_is_refused_before_any_state_has_changed(
    arguments, error, message
):
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    with pytest.raises(error, match=message):
        reproducible(*arguments)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.get_default_dtype() == before[2]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_training_run_ends_alike_with_one_thread_and_with_two():
    states = []
    for threads in (1, 2):
        reproducible(0)
        torch.set_num_threads(threads)
        model = MultilayerPerceptron(200, 64, 32, 3)
        train(model, blobs(300, features=200), epochs=2, learning_rate=0.01)
        states.append(snapshot(model))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-9, atol=1e-9)


def test_it_leaves_torch_one_thread_so_that_sums_are_taken_in_one_order():
    torch.set_num_threads(2)
    reproducible(0)
    assert torch.get_num_threads() == 1


# --- Rates of each part, and of each step ---------------------------------------------------------------


def sgd(parameters, learning_rate):
    return torch.optim.SGD(parameters, learning_rate)


def test_an_epoch_with_factors_takes_the_steps_of_a_loop_with_two_rates():
    ours, theirs, digits = adapted(LinearWithDoRA), adapted(LinearWithDoRA), blobs(50)
    before = snapshot(ours)
    train(
        ours,
        digits,
        epochs=1,
        learning_rate=0.01,
        batch_size=16,
        seed=5,
        factors={"*.m": 30},
        optimizer=sgd,
    )
    order = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    for batch in (order[:16], order[16:32], order[32:48], order[48:]):
        theirs.zero_grad()
        F.cross_entropy(theirs(digits.images[batch]), digits.labels[batch]).backward()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter -= (0.3 if name.endswith(".m") else 0.01) * parameter.grad
    for name, expected in snapshot(theirs).items():
        torch.testing.assert_close(
            ours.state_dict()[name], expected, rtol=1e-10, atol=1e-12
        )
        assert torch.equal(expected, before[name]) == (".linear." in name)


@pytest.mark.parametrize("optimizer", [training.adam, sgd])
@pytest.mark.parametrize("factors", [{}, {"*.m": 1}, {"*.lora.*": 1, "*.m": 1.0}])
def test_factors_of_one_change_no_bit(optimizer, factors):
    plain, grouped = adapted(LinearWithDoRA), adapted(LinearWithDoRA)
    options = {
        "epochs": 2,
        "learning_rate": 0.01,
        "batch_size": 16,
        "optimizer": optimizer,
    }
    expected = train(plain, blobs(), **options)
    assert train(grouped, blobs(), factors=factors, **options) == expected
    assert_same_state(grouped, snapshot(plain))


def test_factors_reach_the_default_optimizer():
    plain, faster = adapted(LinearWithDoRA), adapted(LinearWithDoRA)
    before = snapshot(plain)
    for model, factors in ((plain, None), (faster, {"*.m": 30})):
        train(
            model,
            blobs(16),
            epochs=1,
            learning_rate=0.001,
            batch_size=16,
            factors=factors,
        )
    # Adam's first step is as long as the rate, whatever the gradient.
    for name, tensor in snapshot(faster).items():
        factor = 30 if name.endswith(".m") else 1
        move = plain.state_dict()[name] - before[name]
        torch.testing.assert_close(
            tensor - before[name], factor * move, rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (
            {"*.magnitude": 3},
            ValueError,
            r"no trainable parameter matches '\*\.magnitude'; trainable are: ",
        ),
        ({"layers.0.*": 3, "*.bias": 3}, ValueError, r"layers\.0\.bias is matched by"),
        ({"*.bias": 0}, ValueError, r"the factor of '\*\.bias' must be"),
        (["*.bias"], TypeError, "factors must be a dict of pattern → factor; got list"),
    ],
)
def test_wrong_factors_are_refused_before_the_first_step(factors, error, message):
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        train(model, blobs(), epochs=1, learning_rate=0.01, factors=factors)
    assert_same_state(model, before)


def recording_sgd(used):
    """Return an optimizer to give to ``train``, which notes the rates that it really
    steps with."""

    def made(parameters, learning_rate):
        update = torch.optim.SGD(parameters, learning_rate)
        update.register_step_pre_hook(
            lambda optimizer, *_: used.append(
                [group["lr"] for group in optimizer.param_groups]
            )
        )
        return update

    return made


@pytest.mark.parametrize(
    "schedule", [warm_up_and_decay, lambda step, steps: (1 + step) / (7 * steps)]
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

    options = {"factors": factors, "schedule": noted, "optimizer": recording_sgd(used)}
    # Four batches in each of six epochs, the last of them smaller.
    train(
        adapted(LinearWithDoRA),
        blobs(50),
        epochs=6,
        learning_rate=0.01,
        batch_size=16,
        **options,
    )
    assert list(dict.fromkeys(asked)) == [(step, 24) for step in range(24)]
    assert used == [
        pytest.approx([rate * schedule(step, 24) for rate in rates])
        for step in range(24)
    ]


def test_without_a_schedule_the_rates_stay():
    used = []
    train(
        adapted(LinearWithDoRA),
        blobs(50),
        epochs=3,
        learning_rate=0.01,
        batch_size=16,
        factors={"*.m": 30},
        optimizer=recording_sgd(used),
    )
    assert used == 12 * [pytest.approx([0.01, 0.3])]


def test_a_schedule_moves_the_weights_of_a_hand_written_loop():
    ours, theirs, digits = perceptron(), perceptron(), blobs(16)

    def schedule(step, steps):
        return 2.0 ** (steps - step)

    train(
        ours,
        digits,
        epochs=3,
        learning_rate=0.01,
        batch_size=16,
        schedule=schedule,
        optimizer=sgd,
    )
    for rate in (0.08, 0.04, 0.02):
        theirs.zero_grad()
        F.cross_entropy(theirs(digits.images), digits.labels).backward()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter -= rate * parameter.grad
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_schedule_of_zeros_leaves_the_weights_as_they_are():
    model = perceptron()
    before = snapshot(model)
    train(
        model,
        blobs(),
        epochs=2,
        learning_rate=0.5,
        schedule=lambda *_: 0.0,
        optimizer=sgd,
    )
    assert_same_state(model, before)


@pytest.mark.parametrize("steps", [1, 5, 10, 19, 20, 320])
def test_the_rate_rises_for_a_tenth_of_the_steps_to_one_and_then_falls_to_all_but_zero(
    steps,
):
    values = [warm_up_and_decay(step, steps) for step in range(steps)]
    warm_up = max(1, steps // 10)
    assert values[:warm_up] == pytest.approx(
        [(step + 1) / warm_up for step in range(warm_up)]
    )
    assert max(values) == values[warm_up - 1] == 1
    # The first step after the warm-up is at the peak as well; from there on each is
    # smaller, by the same amount.
    falling = values[warm_up:]
    assert falling == pytest.approx(
        [1 - step / len(falling) for step in range(len(falling))]
    )
    assert all(later < sooner for sooner, later in pairwise(falling))
    assert 0 < values[-1] <= 1
    if steps > 1:
        assert values[-1] == pytest.approx(1 / (steps - warm_up))
