"""The protocol: all methods get the same, nothing is chosen by the test split, and seeds come in pairs."""

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from test_settings import GOOD

from lowrank_utils import experiment
from lowrank_utils.data import Digits, invert, load_mnist, permute_pixels, rotate
from lowrank_utils.experiment import (
    Choice,
    Task,
    adapt,
    choose_learning_rates,
    prepare,
    run_seeds,
    shift,
    weight_changes,
    write_result,
)
from lowrank_utils.settings import SHIFTS, Settings
from lowrank_utils.training import accuracy

SETTINGS = Settings.of(GOOD | {"learning_rates": [0.001, 0.02], "pretraining_epochs": 2, "epochs": 2})
EVERY = replace(
    SETTINGS,
    methods=["frozen", "last layer", "magnitude", "LoRA", "LoRA matched", "DoRA", "DoRA norm kept", "full"],
)


@functools.cache
def prepared():
    return prepare(SETTINGS, progress=False)


@pytest.fixture
def task():
    return prepared()[0]


@pytest.fixture
def test_split():
    return prepared()[1]


def test_the_task_is_shifted_digits_without_the_test_split(task, test_split):
    splits = load_mnist("mnist-5k", seed=123, dtype=torch.float64)
    for part, original in (
        (task.train, splits.train),
        (task.validation, splits.validation),
        (test_split, splits.test),
    ):
        assert torch.equal(part.images, rotate(original, 45.0).images)
        assert torch.equal(part.labels, original.labels)
    assert Task._fields == ("pretrained", "train", "validation")
    # The pretrained network knows upright digits, and rotated ones much less.
    assert accuracy(task.pretrained, splits.validation) > 0.85
    assert 0.15 < accuracy(task.pretrained, task.validation) < 0.6
    assert task.pretrained.layers[0].weight.dtype == torch.float64


@pytest.mark.parametrize("name", SHIFTS)
def test_each_shift(name):
    digits = Digits(torch.rand(40, 784, dtype=torch.float64), torch.arange(40) % 10)
    shifted = shift(digits, replace(SETTINGS, shift=name, rotation=30.0, pretraining_seed=7))
    if name == "unseen classes":
        assert shifted.labels.unique().tolist() == [5, 6, 7, 8, 9]
        assert torch.equal(shifted.images, digits.images[digits.labels >= 5])
        return
    expected = {
        "rotation": rotate(digits, 30.0),
        "inversion": invert(digits),
        "permutation": permute_pixels(digits, 7),
    }
    assert torch.equal(shifted.images, expected[name].images)
    assert torch.equal(shifted.labels, digits.labels)


def test_unseen_classes_are_unseen():
    settings = replace(SETTINGS, shift="unseen classes")
    task, test = prepare(settings, progress=False)
    splits = load_mnist("mnist-5k", seed=123, dtype=torch.float64)
    seen = Digits(
        splits.validation.images[splits.validation.labels < 5],
        splits.validation.labels[splits.validation.labels < 5],
    )
    assert accuracy(task.pretrained, seen) > 0.9
    assert accuracy(task.pretrained, test) == 0
    for part in (task.train, task.validation, test):
        assert part.labels.min() == 5
    with pytest.raises(
        ValueError, match="adaptation_examples must be at most 1,740 for unseen classes on mnist-5k"
    ):
        prepare(replace(settings, adaptation_examples=1741), progress=False)


def test_methods_of_one_seed_see_the_same_digits_in_the_same_order(task, monkeypatch):
    seen = []

    def spy(model, digits, **options):
        seen.append((digits.images.clone(), options["seed"], options["epochs"], options["batch_size"]))
        return original(model, digits, **options)

    original = experiment.train
    monkeypatch.setattr(experiment, "train", spy)
    for method in ("last layer", "LoRA", "DoRA", "full"):
        adapt(task, SETTINGS, method, 2, 0.001, seed=1)
    adapt(task, SETTINGS, "LoRA", 2, 0.001, seed=2)
    first, *others, another = seen
    assert len(first[0]) == 100
    for other in others:
        assert torch.equal(other[0], first[0])
        assert other[1:] == first[1:] == (1, 2, 64)
    assert not torch.equal(another[0], first[0])
    # Each class has its share in a sample.
    labels = [task.train.labels[(task.train.images == image).all(dim=1)].item() for image in first[0]]
    assert [labels.count(digit) for digit in range(10)] == [10] * 10


def test_lora_and_dora_of_one_seed_start_from_the_same_a(task):
    def start(method, seed):
        # A learning rate this small moves nothing that can be seen.
        return adapt(task, SETTINGS, method, 2, 1e-12, seed)[0].layers[0].lora.A.detach()

    assert torch.allclose(start("LoRA", 1), start("DoRA", 1), atol=1e-9)
    assert torch.allclose(start("LoRA", 1), start("DoRA norm kept", 1), atol=1e-9)
    assert not torch.allclose(start("LoRA", 1), start("LoRA", 2), atol=1e-2)


def test_the_pretrained_network_stays_as_it_was(task):
    before = copy.deepcopy(task.pretrained.state_dict())
    for method in EVERY.methods:
        adapt(task, EVERY, method, 2, 0.02, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in task.pretrained.state_dict().items())


def test_a_frozen_network_is_measured_and_not_trained(task):
    model, run = adapt(task, EVERY, "frozen", None, None, seed=1)
    assert run.trainable == 0
    assert run.learning_rate is None
    assert run.validation == [accuracy(task.pretrained, task.validation)]
    assert run.changes == []
    assert all(
        torch.equal(value, task.pretrained.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_a_run_says_what_it_was(task):
    model, run = adapt(task, SETTINGS, "DoRA", 2, 0.02, seed=5)
    assert (run.method, run.rank, run.learning_rate, run.seed, run.test) == ("DoRA", 2, 0.02, 5, None)
    assert run.trainable == 2 * (784 + 128 + 128 + 256 + 256 + 10) + 394
    assert len(run.validation) == len(run.changes) == 2
    assert run.validation[-1] == accuracy(model, task.validation)
    assert [len(epoch) for epoch in run.changes] == [3, 3]
    assert run.changes[-1] == weight_changes(model, task.pretrained)


def test_weight_changes_are_those_of_the_weight_that_the_layer_amounts_to(task):
    model, _ = adapt(task, SETTINGS, "DoRA", 2, 0.02, seed=5)
    for (length, turn), layer in zip(
        weight_changes(model, task.pretrained), [model.layers[i] for i in (0, 2, 4)], strict=True
    ):
        before, after = layer.linear.weight, layer.weight
        assert length == pytest.approx((after.norm(dim=1) - before.norm(dim=1)).abs().mean().item())
        assert turn == pytest.approx((1 - torch.cosine_similarity(after, before, dim=1)).mean().item())
        assert length > 0
    assert weight_changes(task.pretrained, task.pretrained) == [(0, pytest.approx(0, abs=1e-12))] * 3


def test_nothing_is_chosen_by_the_test_split(task, test_split, monkeypatch):
    """With test labels that are all wrong, the choices and all but the test accuracies are the same."""
    settings = replace(SETTINGS, methods=["LoRA", "full"], ranks=[2])
    choices = choose_learning_rates(task, settings, progress=False)
    spoilt = Digits(test_split.images, (test_split.labels + 1) % 10)
    monkeypatch.setattr(experiment, "load_mnist", lambda *_, **__: pytest.fail("the data is loaded again"))
    assert choose_learning_rates(task, settings, progress=False) == choices
    honest = run_seeds(task, test_split, settings, choices, progress=False)
    fooled = run_seeds(task, spoilt, settings, choices, progress=False)
    assert [run._replace(test=None) for run in honest] == [run._replace(test=None) for run in fooled]
    assert all(a.test != b.test for a, b in zip(honest, fooled, strict=True))


def test_the_test_split_is_looked_at_once_for_each_run(task, test_split, monkeypatch):
    looks = []

    def spy(model, digits, **options):
        looks.append(digits is test_split)
        return accuracy(model, digits, **options)

    monkeypatch.setattr(experiment, "accuracy", spy)
    settings = replace(SETTINGS, methods=["LoRA", "frozen"], ranks=[2])
    choices = choose_learning_rates(task, settings, progress=False)
    assert not any(looks)
    run_seeds(task, test_split, settings, choices, progress=False)
    assert sum(looks) == 2 * 2


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "full"])
def test_a_run_that_is_not_followed_ends_the_same(task, method):
    rank = None if method == "full" else 2
    followed_model, followed = adapt(task, SETTINGS, method, rank, 0.01, 5)
    model, run = adapt(task, SETTINGS, method, rank, 0.01, 5, follow=False)
    assert len(followed.validation) == SETTINGS.epochs == len(followed.changes)
    assert run.validation == followed.validation[-1:]
    assert run.changes == []
    for one, other in zip(model.parameters(), followed_model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rate_is_chosen_by_the_mean_over_the_tuning_seeds(task, monkeypatch):
    scores = {(0.001, 1): 0.5, (0.001, 2): 0.7, (0.02, 1): 0.9, (0.02, 2): 0.2}
    monkeypatch.setattr(experiment, "_validation_score", lambda *arguments: scores[arguments[-2:]])
    settings = replace(SETTINGS, methods=["frozen", "LoRA", "full"], seeds=[7, 8], tuning_seeds=[1, 2])
    choices = choose_learning_rates(task, settings, progress=False)
    assert [(choice.method, choice.rank) for choice in choices] == [("LoRA", 2), ("LoRA", 4), ("full", None)]
    for choice in choices:
        assert choice.scores == pytest.approx({0.001: 0.6, 0.02: 0.55})
        assert choice.learning_rate == 0.001


def test_a_choice_names_the_best_rate_and_whether_it_lies_at_the_edge():
    assert Choice("LoRA", 2, {0.01: 0.5, 0.1: 0.9, 0.001: 0.2}).learning_rate == 0.1
    assert Choice("LoRA", 2, {0.01: 0.5, 0.1: 0.9, 0.001: 0.2}).at_edge
    assert not Choice("LoRA", 2, {0.01: 0.9, 0.1: 0.5, 0.001: 0.2}).at_edge
    # Of equal ones the smallest.
    assert Choice("LoRA", 2, {0.1: 0.9, 0.01: 0.9}).learning_rate == 0.01


def test_a_rate_that_makes_the_loss_infinite_is_not_chosen(task):
    settings = replace(SETTINGS, methods=["full"], learning_rates=[0.001, 1e200])
    (choice,) = choose_learning_rates(task, settings, progress=False)
    assert choice.scores[1e200] == 0
    assert choice.learning_rate == 0.001
    with pytest.raises(FloatingPointError):
        run_seeds(task, task.validation, settings, [Choice("full", None, {1e200: 1.0})], progress=False)


def test_every_method_and_rank_runs_with_every_seed_at_its_own_rate(task, test_split):
    settings = replace(EVERY, ranks=[2], epochs=1)
    rates = {"LoRA": 0.02, "full": 0.001}
    choices = [Choice(m, r, {rates.get(m, 0.01): 0.5}) for m, r in settings.configurations() if m != "frozen"]
    runs = run_seeds(task, test_split, settings, choices, progress=False)
    assert [(run.method, run.rank, run.seed) for run in runs] == [
        (method, rank, seed) for method, rank in settings.configurations() for seed in (1, 2)
    ]
    for run in runs:
        assert run.learning_rate == (None if run.method == "frozen" else rates.get(run.method, 0.01))
        assert 0 <= run.test <= 1
    # Twice the same gives the same, to the last digit.
    assert run_seeds(task, test_split, settings, choices, progress=False) == runs


def test_a_result_is_written_whole_and_reads_back_as_it_was(task, test_split, tmp_path):
    settings = replace(SETTINGS, methods=["LoRA", "frozen"], ranks=[2])
    choices = choose_learning_rates(task, settings, progress=False)
    runs = run_seeds(task, test_split, settings, choices, progress=False)
    result = write_result(settings, choices, runs, tmp_path / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    read = json.loads((tmp_path / "result.json").read_text())
    assert read == json.loads(json.dumps(result))
    assert Settings.of(read["settings"]) == settings
    assert read["runs"][0]["test"] == runs[0].test
    assert read["learning_rates"][0]["scores"] == [list(pair) for pair in choices[0].scores.items()]
    assert write_result(settings, choices, runs) == result


def test_float32_and_a_device_are_taken():
    task, test = prepare(
        replace(SETTINGS, dtype="float32", device="cpu", pretraining_epochs=1), progress=False
    )
    assert (
        task.pretrained.layers[0].weight.dtype
        == task.train.images.dtype
        == test.images.dtype
        == torch.float32
    )
