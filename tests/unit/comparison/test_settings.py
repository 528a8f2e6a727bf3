"""Wrong settings are refused before anything is computed, by name."""

import re
from dataclasses import replace

import pytest

from lowrank_utils.comparison.settings import Settings, settings_of_notebook

GOOD = {
    "data_set": "mnist-5k",
    "shift": "rotation",
    "rotation": -45.0,
    "networks": [3, 4],
    "methods": ["LoRA", "DoRA with m's rate"],
    "ranks": [2, 4],
    "alpha": 8.0,
    "scaling": "alpha/rank",
    "init": "peft",
    "adaptation_examples": 100,
    "batch_size": 64,
    "steps": [2, 4],
    "tuning_points": 2,
    "tuning_seeds": [101, 102],
    "seeds": [1, 2],
    "pretraining_epochs": 1,
    "dtype": "float64",
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("name", "value", "error", "said"),
    [
        (
            "data_set",
            "cifar",
            ValueError,
            "data_set must be one of 'mnist', 'mnist-5k'; got 'cifar'",
        ),
        ("shift", "mirror", ValueError, "shift must be one of"),
        (
            "rotation",
            "45",
            TypeError,
            "rotation must be a finite number; got '45' (str)",
        ),
        ("rotation", float("nan"), ValueError, "rotation must be a finite number"),
        (
            "adaptation_examples",
            9,
            ValueError,
            "adaptation_examples must be a whole number, 10 or more; got 9",
        ),
        (
            "adaptation_examples",
            99.5,
            TypeError,
            "adaptation_examples must be a whole number",
        ),
        ("methods", "LoRA", TypeError, "methods must be a list; got 'LoRA' (str)"),
        ("methods", [], ValueError, "methods is empty"),
        ("methods", ["LoRA", "QLoRA"], ValueError, "a method must be one of "),
        (
            "methods",
            ["LoRA", "LoRA"],
            ValueError,
            "methods must have each entry once; got ['LoRA'] more often",
        ),
        ("methods", [["LoRA"]], ValueError, "a method must be one of"),
        ("ranks", 4, TypeError, "ranks must be a list; got 4 (int)"),
        ("ranks", [], ValueError, "ranks is empty"),
        (
            "ranks",
            [4, 0],
            ValueError,
            "a rank must be a whole number, 1 or more; got 0",
        ),
        ("ranks", [-1], ValueError, "a rank must be a whole number, 1 or more; got -1"),
        (
            "ranks",
            [2.5],
            TypeError,
            "a rank must be a whole number, 1 or more; got 2.5 (float)",
        ),
        ("ranks", [True], TypeError, "a rank must be"),
        (
            "ranks",
            [4, 4],
            ValueError,
            "ranks must have each entry once; got [4] more often",
        ),
        ("alpha", float("inf"), ValueError, "alpha must be a finite number"),
        ("scaling", "alpha/r", ValueError, "scaling must be one of"),
        ("init", "zeros", ValueError, "init must be one of"),
        ("networks", [], ValueError, "networks is empty"),
        ("networks", 3, TypeError, "networks must be a list; got 3 (int)"),
        (
            "networks",
            [3, 3],
            ValueError,
            "networks must have each entry once; got [3] more often",
        ),
        ("networks", [1.5], TypeError, "seed must be a whole number"),
        ("steps", [], ValueError, "steps is empty"),
        (
            "steps",
            [0],
            ValueError,
            "a number of steps must be a whole number, 1 or more; got 0",
        ),
        ("steps", [4, 2], ValueError, "steps must begin with the shortest; got [4, 2]"),
        (
            "steps",
            [2, 3],
            ValueError,
            "steps must be whole epochs, multiples of 2 with 100 examples in batches of 64",
        ),
        (
            "tuning_points",
            0,
            ValueError,
            "tuning_points must be a whole number, 1 or more; got 0",
        ),
        ("tuning_points", 6, ValueError, "tuning_points must be a power of two; got 6"),
        ("tuning_seeds", [], ValueError, "tuning_seeds is empty"),
        ("batch_size", "64", TypeError, "batch_size must be"),
        ("seeds", [], ValueError, "seeds is empty"),
        (
            "seeds",
            [1, 2, 1],
            ValueError,
            "seeds must have each entry once; got [1] more often",
        ),
        ("seeds", [-1], ValueError, "seed must be a whole number"),
        (
            "tuning_seeds",
            [2],
            ValueError,
            "seeds and tuning_seeds must have none in common; got [2] in both",
        ),
        ("pretraining_epochs", 0, ValueError, "pretraining_epochs must be"),
        (
            "dtype",
            "float16",
            ValueError,
            "dtype must be one of 'float32', 'float64'; got 'float16'",
        ),
        (
            "device",
            "tpu9",
            ValueError,
            "device must be one that torch has here, such as 'cpu'; got 'tpu9'",
        ),
        ("device", 3.5, ValueError, "device must be one that torch has here"),
        ("device", None, ValueError, "device must be one that torch has here"),
        ("device", "meta", ValueError, "device must be one that torch has here"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(name, value, error, said):
    with pytest.raises(error, match=re.escape(said)):
        Settings.of(GOOD | {name: value})


def test_unknown_and_missing_names_are_refused():
    with pytest.raises(
        ValueError, match="unknown: rnak; the settings are data_set, shift"
    ):
        Settings.of(GOOD | {"rnak": 4})
    with pytest.raises(ValueError, match="missing: seeds"):
        Settings.of({name: value for name, value in GOOD.items() if name != "seeds"})


def test_good_settings_come_back_as_they_were():
    settings = Settings.of(GOOD)
    assert settings.as_dict() == GOOD
    assert Settings.names() == list(GOOD)
    assert settings == Settings.of(GOOD)
    assert settings != replace(settings, seeds=[1, 3])


def test_a_whole_number_and_the_same_one_with_a_point_are_one_setting():
    whole = Settings.of(GOOD | {"alpha": 8, "rotation": -45})
    assert whole == Settings.of(GOOD)
    assert repr(whole.as_dict()) == repr(GOOD)


def test_an_epoch_has_as_many_steps_as_batches():
    assert Settings.of(GOOD).steps_per_epoch == 2
    assert Settings.of(GOOD | {"batch_size": 50}).steps_per_epoch == 2
    assert (
        Settings.of(
            GOOD | {"adaptation_examples": 1000, "steps": [320, 1280]}
        ).steps_per_epoch
        == 16
    )


def test_only_methods_with_a_rank_run_with_each():
    settings = Settings.of(GOOD | {"methods": ["frozen", "LoRA", "full", "gain"]})
    assert settings.configurations() == [
        ("frozen", None),
        ("LoRA", 2),
        ("LoRA", 4),
        ("full", None),
        ("gain", 2),
        ("gain", 4),
    ]


def test_a_notebooks_variables_are_its_settings():
    history = [
        "",
        "import torch",
        "ranks = [2]",
        "# Parameters\nranks = [2, 4]\nresult_path = 'x.json'\n",
        "other = 1",
    ]
    namespace = GOOD | {"In": history, "other": 1, "result_path": "x.json"}
    assert settings_of_notebook(namespace) == Settings.of(GOOD)


def test_what_papermill_was_given_besides_is_refused():
    # papermill itself only logs it, and the run would use the default ranks.
    history = ["", "# Parameters\nrank = 16\nsteps = [2]\nsede = 1\n"]
    with pytest.raises(
        ValueError,
        match=r"unknown parameter: rank, sede; the parameters are data_set, .*, result_path",
    ):
        settings_of_notebook(GOOD | {"In": history, "rank": 16, "sede": 1})
