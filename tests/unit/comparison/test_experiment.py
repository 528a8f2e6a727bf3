"""The protocol: all methods get the same, nothing is chosen by the test split, and
networks share nothing."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import assert_same_state, snapshot
from test_settings import GOOD

from lowrank_utils.comparison import experiment
from lowrank_utils.comparison.experiment import (
    Run,
    Task,
    adapt,
    choose,
    prepare,
    run_experiment,
    space_of,
    write_result,
)
from lowrank_utils.comparison.methods import METHODS
from lowrank_utils.comparison.settings import Settings
from lowrank_utils.comparison.tuning import Point, Range, Space
from lowrank_utils.data import Digits, load_mnist, permute_pixels
from lowrank_utils.training import History, accuracy

pytestmark = pytest.mark.slow

SETTINGS = Settings.of(GOOD | {"pretraining_epochs": 2, "steps": [4], "networks": [3]})
UNSEEN = replace(SETTINGS, shift="unseen classes")
POINT = Point(0.02, 10.0)
DORA = "DoRA with m's rate"


@functools.cache
def prepared(shift, network=3):
    return prepare(replace(SETTINGS, shift=shift), network, progress=False)


@pytest.fixture
def task():
    return prepared("rotation")[0]


@pytest.fixture
def test_split():
    return prepared("rotation")[1]


@pytest.fixture
def trainings(monkeypatch):
    """What each training got: its images, labels and options."""
    seen = []
    original = experiment.train

    def spy(model, digits, **options):
        seen.append((digits.images.clone(), digits.labels.clone(), options))
        return original(model, digits, **options)

    monkeypatch.setattr(experiment, "train", spy)
    return seen


def adapted(task, method, seed=1, settings=SETTINGS):
    point = None if method == "frozen" else POINT
    return adapt(task, settings, method, 2, 4, point, seed)


def rows(images):
    return {image.numpy().tobytes() for image in images}


def raw_splits(network=3):
    return load_mnist("mnist-5k", validation=1_000, seed=network, dtype=torch.float64)


def test_the_network_is_pretrained_on_the_training_split_alone(trainings):
    prepare(replace(SETTINGS, shift="raw inversion"), network=3, progress=False)
    ((images, labels, options),) = trainings
    split = raw_splits().train
    assert len(labels) == 3_000
    assert torch.equal(images, split.images)
    assert torch.equal(labels, split.labels)
    assert (options["seed"], options["epochs"]) == (3, 2)


def test_what_a_task_holds_comes_from_disjoint_splits_and_never_from_the_test_split(
    task, test_split
):
    held = "network pretrained train validation last_layer_rate"
    assert " ".join(Task._fields) == held
    parts = (task.train, task.validation, test_split)
    assert [len(part.labels) for part in parts] == [3_000, 1_000, 1_000]
    sets = [rows(part.images) for part in parts]
    assert len(set.union(*sets)) == sum(map(len, sets))
    for part, original in zip(parts, raw_splits(), strict=True):
        assert torch.equal(part.labels, original.labels)


def test_images_that_nobody_may_see_change_nothing(task, monkeypatch):
    """With other validation and test images the pretrained network and the training
    images are the same."""
    spoilt = raw_splits()
    for digits in (spoilt.validation, spoilt.test):
        digits.images.fill_(0.5)
        digits.labels.fill_(7)
    monkeypatch.setattr(experiment, "load_mnist", lambda *_, **__: spoilt)
    other, _ = prepare(SETTINGS, network=3, progress=False)
    assert torch.equal(other.train.images, task.train.images)
    assert_same_state(other.pretrained, snapshot(task.pretrained))


def test_each_network_has_its_own_splits_start_and_pixels(task, test_split):
    other, other_test = prepared("rotation", 4)
    assert other.network == 4
    weights = [one.pretrained.layers[0].weight for one in (task, other)]
    assert not torch.equal(*weights)
    assert rows(other_test.images) != rows(test_split.images)
    for network in (3, 4):
        mine, test = prepared("permutation", network)
        raw, parts = raw_splits(network), (mine.train, mine.validation, test)
        permuted = [permute_pixels(part, network).images for part in raw]
        # In the same way in all splits: the mean of the training images is subtracted
        # from each.
        mean = permuted[0].mean(dim=0)
        for part, images in zip(parts, permuted, strict=True):
            assert torch.allclose(part.images, images - mean, atol=1e-12)


def test_unseen_classes_are_unseen():
    task, test = prepared("unseen classes")
    assert accuracy(task.pretrained, test) == 0
    for part in (task.train, task.validation, test):
        assert part.labels.min() == 5
    assert len(task.validation.labels) == 500, "enough to choose by"
    too_many = replace(UNSEEN, adaptation_examples=1491, steps=[24])
    with pytest.raises(ValueError, match="adaptation_examples must be at most 1,490"):
        prepare(too_many, network=3, progress=False)


def test_a_trained_last_layer_has_one_rate_in_all_methods_with_adapters(
    task, trainings
):
    assert task.last_layer_rate is None
    task, _ = prepare(UNSEEN, network=3, progress=False)
    alone = [options for *_, options in trainings[1:]]
    assert task.last_layer_rate in {options["learning_rate"] for options in alone}
    assert all(options["factors"] == {} for options in alone)
    trainings.clear()
    for method in ("LoRA", "DoRA with one rate", "m alone", "full", "last layer"):
        adapted(task, method, settings=UNSEEN)
    rates = [
        options["learning_rate"] * options["factors"].get("layers.4.*", 0.0)
        for *_, options in trainings
    ]
    assert rates == pytest.approx([task.last_layer_rate] * 3 + [0.0] * 2)
    assert trainings[0][2]["factors"]["*.lora.B"] == 10.0


# Method → by what the rate of its part is multiplied.
FACTORS = {"last layer": {}, "DoRA with one rate": {}, "full": {}}
FACTORS |= {"LoRA": {"*.lora.B": 10.0}, "LoRA matched above": {"*.lora.B": 10.0}}
FACTORS |= {DORA: {"*.m": 10.0}, "gain": {"*.g": 10.0}, "random rows": {"*.v": 10.0}}


def test_methods_of_one_seed_see_the_same_digits_at_their_rates(task, trainings):
    for method in FACTORS:
        adapted(task, method)
    adapted(task, "LoRA", seed=2)
    *same, (another, *_) = trainings
    images, labels, _ = same[0]
    assert rows(images) <= rows(task.train.images)
    # Each class has its share in a sample.
    assert torch.bincount(labels).tolist() == [10] * 10
    assert not torch.equal(another, images)
    fixed = {"epochs": 2, "seed": 1, "batch_size": 64, "learning_rate": 0.02}
    fixed["schedule"] = experiment.warm_up_and_decay
    for training, factors in zip(same, FACTORS.values(), strict=True):
        assert torch.equal(training[0], images)
        assert torch.equal(training[1], labels)
        assert training[2] == training[2] | fixed | {"factors": factors}


def test_methods_of_one_seed_start_from_the_same_a_and_another_seed_from_another(
    task, monkeypatch
):
    starts = []

    def note(model, *_, **__):
        starts.append([model.layers[index].lora.A.tolist() for index in (0, 2, 4)])
        return History(loss=[0.5])

    monkeypatch.setattr(experiment, "train", note)
    for method, seed in (("LoRA", 1), (DORA, 1), ("random rows", 1), ("LoRA", 2)):
        adapted(task, method, seed)
    first, *others, another = starts
    assert others == [first] * 2
    assert all(one != other for one, other in zip(first, another, strict=True))


def test_the_pretrained_network_stays_as_it_was(task):
    before = snapshot(task.pretrained)
    for method in METHODS:
        adapted(task, method)
    assert_same_state(task.pretrained, before)


def test_a_frozen_network_is_measured_and_not_trained(task):
    model, run = adapt(task, SETTINGS, "frozen", None, 4, None, seed=1)
    ends = (False, accuracy(task.pretrained, task.validation), None, {})
    assert run == (3, "frozen", None, 4, 1, 0, None, None, None, *ends)
    assert_same_state(model, snapshot(task.pretrained))


def test_a_run_says_what_it_was(task):
    model, run = adapted(task, DORA, seed=5)
    trainable = 2 * (784 + 128 + 128 + 256 + 256 + 10) + 394
    ends = (False, accuracy(model, task.validation), None, run.negative)
    loss = run.training_loss
    assert run == (3, DORA, 2, 4, 5, trainable, 0.02, 10.0, loss, *ends)
    assert 0 < loss < math.log(10)
    # Twice the same gives the same, to the last digit.
    assert adapted(task, DORA, seed=5)[1] == run


def test_negative_entries_are_counted_layer_by_layer(task, monkeypatch):
    def turn(model, *_, **__):
        with torch.no_grad():
            for count, index in enumerate((0, 2, 4), start=1):
                layer = model.layers[index]
                (layer.m if hasattr(layer, "m") else layer.g)[:count] = -1.0
        return History(loss=[0.5])

    assert adapted(task, "LoRA")[1].negative == {}
    monkeypatch.setattr(experiment, "train", turn)
    expected = {"layers.0": 1 / 128, "layers.2": 2 / 256, "layers.4": 3 / 10}
    for method in (DORA, "gain", "m alone"):
        assert adapted(task, method)[1].negative == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shift", "loss", "dead"),
    [
        ("rotation", math.log(10) + 1e-6, True),
        ("rotation", math.log(10) - 1e-3, False),
        ("rotation", None, True),
        # Guessing is among the classes that a task has.
        ("unseen classes", math.log(5) + 1e-6, True),
        ("unseen classes", math.log(5) - 1e-3, False),
    ],
)
def test_a_run_no_better_than_guessing_is_dead(monkeypatch, shift, loss, dead):
    def end(*_, **__):
        if loss is None:
            raise FloatingPointError("the loss is nan in epoch 1")
        return History(loss=[0.01, loss])

    task, _ = prepared(shift)
    monkeypatch.setattr(experiment, "train", end)
    _, run = adapted(task, "LoRA", settings=replace(SETTINGS, shift=shift))
    assert (run.dead, run.training_loss) == (dead, loss)


def test_rates_that_blow_up_score_nothing_and_stop_no_experiment(task, monkeypatch):
    def blow_up(*_, learning_rate, **__):
        if learning_rate > 0.005:
            raise FloatingPointError("the loss is inf in epoch 1")
        return History(loss=[0.5])

    monkeypatch.setattr(experiment, "train", blow_up)
    (choice,) = choose(task, replace(SETTINGS, tuning_points=4), "LoRA", 2)
    assert choice.chosen.rate < 0.005
    blown_up = [point for point in choice.scores if point.rate > 0.005]
    assert {choice.score(point) for point in blown_up} == {0.0}


def test_a_choice_is_made_by_validation_and_with_the_tuning_seeds_alone(
    task, monkeypatch, trainings
):
    looks = []

    def spy(model, digits, **options):
        looks.append(digits is task.validation)
        return accuracy(model, digits, **options)

    monkeypatch.setattr(experiment, "accuracy", spy)
    # The data isn't loaded again.
    monkeypatch.setattr(experiment, "load_mnist", None)
    settings = replace(SETTINGS, steps=[2, 4], tuning_points=4)
    assert len(choose(task, settings, "gain", 2)) == 2
    assert set(looks) == {True}
    assert {options["seed"] for *_, options in trainings} == {101, 102}
    assert {options["epochs"] for *_, options in trainings} == {1, 2}


def test_points_are_drawn_from_what_the_method_says():
    for name, method in METHODS.items():
        part = method.part and Range(method.part.low, method.part.high)
        assert space_of(name) == Space(Range(*method.rates), part), name


def test_methods_look_at_the_same_points_above_one_network(task, monkeypatch):
    monkeypatch.setattr(experiment, "train", lambda *_, **__: History(loss=[0.5]))
    settings = replace(SETTINGS, tuning_points=4)

    def points(method, task=task):
        (choice,) = choose(task, settings, method, 2)
        return list(choice.scores)[:4]

    assert points("gain") == points("random rows") == points(DORA)
    assert points("LoRA with one rate") == points("DoRA with one rate")
    assert points("gain") != points("gain", task._replace(network=4))


METHODS_OF_EACH_KIND = ["frozen", "LoRA", "m alone"]
SMALL = replace(SETTINGS, methods=METHODS_OF_EACH_KIND, ranks=[1], steps=[2])


@functools.cache
def small():
    return run_experiment(SMALL, progress=False)


def test_every_method_runs_at_every_length_above_every_network(monkeypatch):
    tests, looks = [], []

    def remember(*arguments, **options):
        task, test = prepare(*arguments, **options)
        tests.append(test)
        return task, test

    def spy(model, digits, **options):
        looks.append(digits)
        return accuracy(model, digits, **options)

    monkeypatch.setattr(experiment, "prepare", remember)
    monkeypatch.setattr(experiment, "accuracy", spy)
    settings = replace(SMALL, networks=[3, 4], ranks=[1, 2], steps=[2, 4])
    tuned, runs = run_experiment(settings, progress=False)
    methods = [("frozen", None), ("LoRA", 1), ("LoRA", 2), ("m alone", None)]
    cells = [(n, *method, s) for n in (3, 4) for method in methods for s in (2, 4)]
    assert [run[:5] for run in runs] == [(*c, seed) for c in cells for seed in (1, 2)]
    assert [one[:4] for one in tuned] == [c for c in cells if c[1] != "frozen"]
    # Each network is prepared once, and its test split is looked at once for each run.
    seen = [sum(digits is test for digits in looks) for test in tests]
    assert seen == [len(runs) / 2] * 2
    chosen = {one[:4]: one.choice.chosen for one in tuned}
    for run in runs:
        assert 0 <= run.test <= 1
        rates = chosen.get(run[:4], Point(None))
        assert (run.learning_rate, run.factor) == rates


def test_the_test_labels_decide_nothing_but_the_test_accuracy(monkeypatch):
    def spoilt(*arguments, **options):
        splits = load_mnist(*arguments, **options)
        labels = (splits.test.labels + 1) % 10
        return splits._replace(test=Digits(splits.test.images, labels))

    tuned, runs = small()
    monkeypatch.setattr(experiment, "load_mnist", spoilt)
    tuned_then, then = run_experiment(SMALL, progress=False)
    assert tuned_then == tuned
    assert then != runs
    accuracies = [run.test for run in runs]
    assert [r._replace(test=a) for r, a in zip(then, accuracies, strict=True)] == runs


def test_a_result_is_written_whole_and_reads_back_as_it_was(tmp_path, monkeypatch):
    tuned, runs = small()
    path = tmp_path / "result.json"
    result = write_result(SMALL, tuned, runs, path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    read = json.loads(path.read_text())
    for returned in (result, write_result(SMALL, tuned, runs)):
        assert json.loads(json.dumps(returned)) == read
    assert Settings.of(read["settings"]) == SMALL
    assert [Run(**run) for run in read["runs"]] == runs
    first, choice = read["choices"][0], tuned[0].choice
    points = [[*point, scores] for point, scores in choice.scores.items()]
    assert first["points"] == points
    assert (first["learning_rate"], first["factor"]) == choice.chosen
    assert first["score"] == choice.score(choice.chosen)
    # Cut off at any moment before its last one, writing leaves what was there.
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_result(SMALL, [], [], path)
    assert json.loads(path.read_text()) == read


def test_float32_and_a_device_are_taken():
    settings = replace(SETTINGS, dtype="float32", device="cpu", pretraining_epochs=1)
    task, test = prepare(settings, network=3, progress=False)
    model, run = adapted(task, "random rows", settings=settings)
    tensors = [*task.pretrained.parameters(), task.train.images, test.images]
    tensors += model.parameters()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert run.training_loss > 0
