"""The protocol: all methods get the same, nothing is chosen by the test split, and
networks share nothing."""

import copy
import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_settings import GOOD

from lowrank_utils.comparison import experiment
from lowrank_utils.comparison.experiment import (
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
from lowrank_utils.comparison.tuning import Point
from lowrank_utils.data import Digits, Splits, load_mnist, permute_pixels
from lowrank_utils.training import History, accuracy

SETTINGS = Settings.of(GOOD | {"pretraining_epochs": 2, "steps": [4], "networks": [3]})
POINT = Point(0.02, 10.0)


@functools.cache
def prepared():
    return prepare(SETTINGS, network=3, progress=False)


@pytest.fixture
def task():
    return prepared()[0]


@pytest.fixture
def test_split():
    return prepared()[1]


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


def rows(images):
    return {image.numpy().tobytes() for image in images}


def raw_splits(network=3):
    return load_mnist("mnist-5k", validation=1_000, seed=network, dtype=torch.float64)


def test_the_network_is_pretrained_on_the_training_split_alone(trainings):
    prepare(replace(SETTINGS, shift="raw inversion"), network=3, progress=False)
    ((images, labels, options),) = trainings
    splits = raw_splits()
    assert rows(images) == rows(splits.train.images)
    assert len(images) == len(labels) == 3_000
    assert not rows(images) & (
        rows(splits.validation.images) | rows(splits.test.images)
    )
    assert options["seed"] == 3
    assert options["epochs"] == 2


def test_what_a_task_holds_comes_from_disjoint_splits_and_never_from_the_test_split(
    task, test_split
):
    assert Task._fields == (
        "network",
        "pretrained",
        "train",
        "validation",
        "last_layer_rate",
    )
    sets = [rows(digits.images) for digits in (task.train, task.validation, test_split)]
    assert [
        len(digits.labels) for digits in (task.train, task.validation, test_split)
    ] == [
        3_000,
        1_000,
        1_000,
    ]
    assert not sets[0] & sets[1]
    assert not (sets[0] | sets[1]) & sets[2]
    splits = raw_splits()
    for part, original in zip(
        (task.train, task.validation, test_split), splits, strict=True
    ):
        assert torch.equal(part.labels, original.labels)


def test_images_that_nobody_may_see_change_nothing(monkeypatch):
    """With other validation and test images the pretrained network and the training
    images are the same."""
    spoilt = raw_splits()
    for digits in (spoilt.validation, spoilt.test):
        digits.images.fill_(0.5)
        digits.labels.fill_(7)
    monkeypatch.setattr(experiment, "load_mnist", lambda *_, **__: spoilt)
    other, _ = prepare(SETTINGS, network=3, progress=False)
    task, _ = prepared()
    assert torch.equal(other.train.images, task.train.images)
    for mine, its in zip(
        other.pretrained.parameters(), task.pretrained.parameters(), strict=True
    ):
        assert torch.equal(mine, its)


def test_each_network_has_its_own_splits_start_and_pixels(task):
    other, other_test = prepare(SETTINGS, network=4, progress=False)
    assert other.network == 4
    assert not torch.equal(
        other.pretrained.layers[0].weight, task.pretrained.layers[0].weight
    )
    assert rows(other_test.images) != rows(prepared()[1].images)
    shuffled = replace(SETTINGS, shift="permutation")
    orders = []
    for network in (3, 4):
        mine, test = prepare(shuffled, network, progress=False)
        splits = raw_splits(network)
        for part, original in (
            (mine.train, splits.train),
            (mine.validation, splits.validation),
            (test, splits.test),
        ):
            # In the same way in all splits: the mean of the training images is
            # subtracted from each.
            expected = permute_pixels(original, network).images
            expected = expected - permute_pixels(splits.train, network).images.mean(
                dim=0
            )
            assert torch.allclose(part.images, expected, atol=1e-12)
        orders.append(
            permute_pixels(
                Digits(torch.arange(784.0)[None], torch.zeros(1)), network
            ).images
        )
    assert not torch.equal(*orders)


def test_unseen_classes_are_unseen():
    settings = replace(SETTINGS, shift="unseen classes")
    task, test = prepare(settings, network=3, progress=False)
    assert accuracy(task.pretrained, test) == 0
    for part in (task.train, task.validation, test):
        assert part.labels.min() == 5
    assert len(task.validation.labels) == 500, "enough to choose by"
    too_many = replace(settings, adaptation_examples=1491, steps=[24])
    with pytest.raises(
        ValueError,
        match="adaptation_examples must be at most 1,490 for unseen classes on mnist-5k",
    ):
        prepare(too_many, network=3, progress=False)


def test_a_trained_last_layer_has_one_rate_in_all_methods_with_adapters(trainings):
    settings = replace(SETTINGS, shift="unseen classes")
    task, _ = prepare(settings, network=3, progress=False)
    alone = [options for *_, options in trainings[1:]]
    assert task.last_layer_rate in {options["learning_rate"] for options in alone}
    assert all(options["factors"] == {} for options in alone)
    trainings.clear()
    methods = ("LoRA", "DoRA with one rate", "m alone", "full", "last layer")
    for method in methods:
        adapt(
            task,
            settings,
            method,
            2,
            4,
            POINT if METHODS[method].part else Point(0.02),
            seed=1,
        )
    rates = [
        options["learning_rate"] * options["factors"].get("layers.4.*", 0.0)
        for *_, options in trainings
    ]
    assert rates == pytest.approx([task.last_layer_rate] * 3 + [0.0] * 2)
    assert trainings[0][2]["factors"]["*.lora.B"] == 10.0
    assert prepared()[0].last_layer_rate is None


def test_methods_of_one_seed_see_the_same_digits_in_the_same_order(task, trainings):
    methods = (
        "last layer",
        "LoRA",
        "LoRA matched above",
        "DoRA with m's rate",
        "random rows",
        "full",
    )
    for method in methods:
        adapt(task, SETTINGS, method, 2, 4, POINT, seed=1)
    adapt(task, SETTINGS, "LoRA", 2, 4, POINT, seed=2)
    first, *others, another = trainings
    assert len(first[0]) == 100
    assert rows(first[0]) <= rows(task.train.images)
    same = ("epochs", "seed", "batch_size", "schedule")
    for images, labels, options in others:
        assert torch.equal(images, first[0])
        assert torch.equal(labels, first[1])
        assert [options[name] for name in same] == [first[2][name] for name in same]
    assert [first[2][name] for name in same[:3]] == [2, 1, 64]
    assert first[2]["schedule"] is experiment.warm_up_and_decay
    assert not torch.equal(another[0], first[0])
    # Each class has its share in a sample.
    assert torch.bincount(first[1]).tolist() == [10] * 10


def test_methods_of_one_seed_start_from_the_same_a_and_another_seed_from_another(
    task, monkeypatch
):
    starts = []

    def note(model, *_, **__):
        starts.append(
            [model.layers[index].lora.A.detach().clone() for index in (0, 2, 4)]
        )
        return History(loss=[0.5])

    monkeypatch.setattr(experiment, "train", note)
    for method, seed in (
        ("LoRA", 1),
        ("DoRA with m's rate", 1),
        ("random rows", 1),
        ("LoRA", 2),
    ):
        adapt(task, SETTINGS, method, 2, 4, POINT, seed)
    first, *others, another = starts
    for index in range(3):
        assert all(torch.equal(other[index], first[index]) for other in others)
        assert not torch.equal(another[index], first[index])


def test_a_method_trains_at_its_rate_and_its_part_at_the_factor(task, trainings):
    for method in ("LoRA", "DoRA with m's rate", "DoRA with one rate", "gain", "full"):
        adapt(
            task,
            SETTINGS,
            method,
            2,
            4,
            POINT if METHODS[method].part else Point(0.02),
            seed=1,
        )
    assert [options["factors"] for *_, options in trainings] == [
        {"*.lora.B": 10.0},
        {"*.m": 10.0},
        {},
        {"*.g": 10.0},
        {},
    ]
    assert {options["learning_rate"] for *_, options in trainings} == {0.02}


def test_the_pretrained_network_stays_as_it_was(task):
    before = copy.deepcopy(task.pretrained.state_dict())
    for method in METHODS:
        point = (
            None
            if method == "frozen"
            else POINT
            if METHODS[method].part
            else Point(0.02)
        )
        adapt(task, SETTINGS, method, 2, 4, point, seed=1)
    assert all(
        torch.equal(value, before[name])
        for name, value in task.pretrained.state_dict().items()
    )


def test_a_frozen_network_is_measured_and_not_trained(task):
    model, run = adapt(task, SETTINGS, "frozen", None, 4, None, seed=1)
    assert (
        run.trainable,
        run.learning_rate,
        run.training_loss,
        run.dead,
        run.negative,
    ) == (
        0,
        None,
        None,
        False,
        {},
    )
    assert run.validation == accuracy(task.pretrained, task.validation)
    for name, value in model.state_dict().items():
        assert torch.equal(value, task.pretrained.state_dict()[name])


def test_a_run_says_what_it_was(task):
    model, run = adapt(task, SETTINGS, "DoRA with m's rate", 2, 4, POINT, seed=5)
    assert (run.network, run.method, run.rank, run.steps, run.seed) == (
        3,
        "DoRA with m's rate",
        2,
        4,
        5,
    )
    assert (run.learning_rate, run.factor, run.test) == (0.02, 10.0, None)
    assert run.trainable == 2 * (784 + 128 + 128 + 256 + 256 + 10) + 394
    assert run.validation == accuracy(model, task.validation)
    assert 0 < run.training_loss < math.log(10)
    # Twice the same gives the same, to the last digit.
    assert adapt(task, SETTINGS, "DoRA with m's rate", 2, 4, POINT, seed=5)[1] == run


def test_negative_entries_are_counted_layer_by_layer(task, monkeypatch):
    def turn(model, *_, **__):
        with torch.no_grad():
            for place, index in enumerate((0, 2, 4)):
                part = getattr(
                    model.layers[index], "m", getattr(model.layers[index], "g", None)
                )
                part[: place + 1] = -1.0
        return History(loss=[0.5])

    monkeypatch.setattr(experiment, "train", turn)
    expected = {"layers.0": 1 / 128, "layers.2": 2 / 256, "layers.4": 3 / 10}
    for method in ("DoRA with m's rate", "gain", "m alone"):
        assert adapt(task, SETTINGS, method, 2, 4, POINT, seed=1)[
            1
        ].negative == pytest.approx(expected)
    monkeypatch.undo()
    assert adapt(task, SETTINGS, "LoRA", 2, 4, POINT, seed=1)[1].negative == {}


@pytest.mark.parametrize(
    ("loss", "dead"),
    [
        (math.log(10) + 1e-6, True),
        (math.log(10) - 1e-3, False),
        (0.1, False),
        (None, True),
    ],
)
def test_a_run_that_ends_no_better_than_guessing_is_dead_and_counts(
    task, monkeypatch, loss, dead
):
    def end(*_, **__):
        if loss is None:
            raise FloatingPointError("the loss is nan in epoch 1")
        return History(loss=[0.01, loss])

    monkeypatch.setattr(experiment, "train", end)
    _, run = adapt(task, SETTINGS, "LoRA", 2, 4, POINT, seed=1)
    assert run.dead == dead
    assert run.training_loss == loss


def test_guessing_is_among_the_classes_that_a_task_has(monkeypatch):
    task, _ = prepare(
        replace(SETTINGS, shift="unseen classes"), network=3, progress=False
    )
    monkeypatch.setattr(experiment, "train", lambda *_, **__: History(loss=[2.0]))
    assert adapt(
        task, replace(SETTINGS, shift="unseen classes"), "LoRA", 2, 4, POINT, seed=1
    )[1].dead
    assert math.log(5) < 2.0 < math.log(10)


def test_rates_that_blow_up_score_nothing_and_stop_no_experiment(task, monkeypatch):
    def blow_up(*_, learning_rate, **__):
        if learning_rate > 0.005:
            raise FloatingPointError("the loss is inf in epoch 1")
        return History(loss=[0.5])

    monkeypatch.setattr(experiment, "train", blow_up)
    (choice,) = choose(task, replace(SETTINGS, tuning_points=4), "LoRA", 2)
    assert choice.chosen.rate < 0.005
    assert {
        score
        for point, scores in choice.scores.items()
        if point.rate > 0.005
        for score in scores
    } == {0.0}


def test_a_choice_is_made_by_validation_and_with_the_tuning_seeds_alone(
    task, monkeypatch, trainings
):
    looks = []

    def spy(model, digits, **options):
        looks.append(digits is task.validation)
        return accuracy(model, digits, **options)

    monkeypatch.setattr(experiment, "accuracy", spy)
    monkeypatch.setattr(
        experiment,
        "load_mnist",
        lambda *_, **__: pytest.fail("the data is loaded again"),
    )
    settings = replace(SETTINGS, steps=[2, 4], tuning_points=4)
    choices = choose(task, settings, "gain", 2)
    assert len(choices) == 2
    assert looks
    assert all(looks)
    assert {options["seed"] for *_, options in trainings} == {101, 102}
    assert {options["epochs"] for *_, options in trainings} == {1, 2}
    for choice in choices:
        assert all(
            0 <= score <= 1 for scores in choice.scores.values() for score in scores
        )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frozen"])
def test_points_are_drawn_from_what_the_method_says(method):
    space = space_of(method)
    assert (space.rate.low, space.rate.high) == METHODS[method].rates
    part = METHODS[method].part
    assert (space.factor is None) == (part is None)
    if part:
        assert (space.factor.low, space.factor.high) == (part.low, part.high)


def test_methods_look_at_the_same_points_above_one_network_and_at_others_above_another(
    task, monkeypatch
):
    monkeypatch.setattr(experiment, "train", lambda *_, **__: History(loss=[0.5]))
    settings = replace(SETTINGS, tuning_points=4)

    def points(method, task):
        return [
            point
            for choice in choose(task, settings, method, 2)
            for point in list(choice.scores)[:4]
        ]

    assert (
        points("gain", task)
        == points("random rows", task)
        == points("DoRA with m's rate", task)
    )
    assert points("LoRA with one rate", task) == points("DoRA with one rate", task)
    assert points("gain", task) != points("gain", task._replace(network=4))


@pytest.fixture
def small():
    return replace(
        SETTINGS,
        networks=[3, 4],
        methods=["frozen", "LoRA", "m alone"],
        ranks=[1, 2],
        steps=[2, 4],
        seeds=[1, 2],
    )


def test_every_method_rank_and_length_runs_with_every_seed_above_every_network(
    small, monkeypatch
):
    order = []
    original = experiment.accuracy

    def spy(model, digits, **options):
        order.append(
            "test" if len(digits.labels) == 1_000 and digits is tests[-1] else "other"
        )
        return original(model, digits, **options)

    tests = []
    prepare_one = experiment.prepare

    def remember(*arguments, **options):
        task, test = prepare_one(*arguments, **options)
        tests.append(test)
        return task, test

    monkeypatch.setattr(experiment, "prepare", remember)
    monkeypatch.setattr(experiment, "accuracy", spy)
    tuned, runs = run_experiment(small, progress=False)
    cells = [
        (network, method, rank, steps)
        for network in (3, 4)
        for method, rank in [
            ("frozen", None),
            ("LoRA", 1),
            ("LoRA", 2),
            ("m alone", None),
        ]
        for steps in (2, 4)
    ]
    assert [
        (run.network, run.method, run.rank, run.steps, run.seed) for run in runs
    ] == [(*cell, seed) for cell in cells for seed in (1, 2)]
    assert [(one.network, one.method, one.rank, one.steps) for one in tuned] == [
        cell for cell in cells if cell[1] != "frozen"
    ]
    # Each network is prepared once, and its test split is looked at once for each run.
    assert len(tests) == 2
    assert order.count("test") == len(runs)
    chosen = {
        (one.network, one.method, one.rank, one.steps): one.choice.chosen
        for one in tuned
    }
    for run in runs:
        assert 0 <= run.test <= 1
        point = chosen.get((run.network, run.method, run.rank, run.steps), Point(None))
        assert (run.learning_rate, run.factor) == (point.rate, point.factor)


def test_the_test_labels_decide_nothing_but_the_test_accuracy(small, monkeypatch):
    settings = replace(small, networks=[3], ranks=[1], steps=[2])
    honest = run_experiment(settings, progress=False)
    original = experiment.load_mnist

    def spoilt(*arguments, **options):
        splits = original(*arguments, **options)
        return Splits(
            splits.train,
            splits.validation,
            Digits(splits.test.images, (splits.test.labels + 1) % 10),
        )

    monkeypatch.setattr(experiment, "load_mnist", spoilt)
    fooled = run_experiment(settings, progress=False)
    assert honest[0] == fooled[0]
    assert [run._replace(test=None) for run in honest[1]] == [
        run._replace(test=None) for run in fooled[1]
    ]
    assert any(a.test != b.test for a, b in zip(honest[1], fooled[1], strict=True))


def test_a_result_is_written_whole_and_reads_back_as_it_was(
    small, tmp_path, monkeypatch
):
    settings = replace(small, networks=[3], ranks=[1], steps=[2])
    tuned, runs = run_experiment(settings, progress=False)
    path = tmp_path / "result.json"
    result = write_result(settings, tuned, runs, path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    read = json.loads(path.read_text())
    assert (
        read
        == json.loads(json.dumps(result))
        == json.loads(json.dumps(write_result(settings, tuned, runs)))
    )
    assert Settings.of(read["settings"]) == settings
    assert [run["test"] for run in read["runs"]] == [run.test for run in runs]
    first, of_tuned = read["choices"][0], tuned[0].choice
    assert first["points"] == [
        [*point, scores] for point, scores in of_tuned.scores.items()
    ]
    assert (first["learning_rate"], first["factor"]) == of_tuned.chosen
    assert first["score"] == of_tuned.score(of_tuned.chosen)
    # Cut off at any moment before its last one, writing leaves what was there.
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_result(settings, [], [], path)
    assert json.loads(path.read_text()) == read


def test_float32_and_a_device_are_taken():
    task, test = prepare(
        replace(SETTINGS, dtype="float32", device="cpu", pretraining_epochs=1),
        network=3,
        progress=False,
    )
    dtypes = {
        task.pretrained.layers[0].weight.dtype,
        task.train.images.dtype,
        test.images.dtype,
    }
    assert dtypes == {torch.float32}
    model, run = adapt(
        task, replace(SETTINGS, dtype="float32"), "random rows", 1, 4, POINT, seed=1
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.training_loss > 0
