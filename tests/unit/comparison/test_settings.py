"""Wrong settings are refused before anything is computed, by name."""

import re
from dataclasses import replace

import pytest

from lowrank_utils.comparison.settings import Settings, settings_of_notebook

GOOD = {"data_set": "mnist-5k", "shift": "rotation", "rotation": -45.0}
GOOD |= {"networks": [3, 4], "methods": ["LoRA", "DoRA with m's rate"], "ranks": [2, 4]}
GOOD |= {"alpha": 8.0, "scaling": "alpha/rank", "init": "peft"}
GOOD |= {"adaptation_examples": 100, "batch_size": 64, "steps": [2, 4]}
GOOD |= {"tuning_points": 2, "tuning_seeds": [101, 102], "seeds": [1, 2]}
GOOD |= {"pretraining_epochs": 1, "dtype": "float64", "device": "cpu"}


WRONG_TYPES = [
    ("rotation", "45", "rotation must be a finite number; got '45' (str)"),
    ("adaptation_examples", 99.5, "adaptation_examples must be a whole number"),
    ("methods", "LoRA", "methods must be a list; got 'LoRA' (str)"),
    ("ranks", 4, "ranks must be a list; got 4 (int)"),
    ("ranks", [2.5], "a rank must be a whole number, 1 or more; got 2.5 (float)"),
    ("ranks", [True], "a rank must be"),
    ("networks", 3, "networks must be a list; got 3 (int)"),
    ("networks", [1.5], "seed must be a whole number"),
    ("batch_size", "64", "batch_size must be"),
]
TWICE = "must have each entry once; got"
DEVICE = "device must be one that torch has here, such as 'cpu'"
WRONG_VALUES = [
    ("data_set", "cifar", "data_set must be one of 'mnist', 'mnist-5k'; got 'cifar'"),
    ("shift", "no shift", "shift must be one of"),
    ("rotation", float("nan"), "rotation must be a finite number"),
    ("adaptation_examples", 9, "must be a whole number, 10 or more; got 9"),
    ("methods", [], "methods is empty"),
    ("methods", ["LoRA", "QLoRA"], "a method must be one of "),
    ("methods", ["LoRA", "LoRA"], f"methods {TWICE} ['LoRA'] more often"),
    ("methods", [["LoRA"]], "a method must be one of"),
    ("ranks", [], "ranks is empty"),
    ("ranks", [4, 0], "a rank must be a whole number, 1 or more; got 0"),
    ("ranks", [4, 4], f"ranks {TWICE} [4] more often"),
    ("alpha", float("inf"), "alpha must be a finite number"),
    ("scaling", "alpha/r", "scaling must be one of"),
    ("init", "zeros", "init must be one of"),
    ("networks", [], "networks is empty"),
    ("networks", [3, 3], f"networks {TWICE} [3] more often"),
    ("steps", [], "steps is empty"),
    ("steps", [0], "a number of steps must be a whole number, 1 or more; got 0"),
    ("steps", [4, 2], "steps must begin with the shortest; got [4, 2]"),
    ("steps", [2, 3], "steps must be whole epochs, multiples of 2 with 100 examples"),
    ("tuning_points", 0, "tuning_points must be a whole number, 1 or more; got 0"),
    ("tuning_points", 6, "tuning_points must be a power of two; got 6"),
    ("tuning_seeds", [], "tuning_seeds is empty"),
    ("tuning_seeds", [2], "seeds and tuning_seeds must have none in common; got [2]"),
    ("seeds", [], "seeds is empty"),
    ("seeds", [1, 2, 1], f"seeds {TWICE} [1] more often"),
    ("seeds", [-1], "seed must be a whole number"),
    ("pretraining_epochs", 0, "pretraining_epochs must be"),
    ("dtype", "float16", "dtype must be one of 'float32', 'float64'; got 'float16'"),
    ("device", "tpu9", f"{DEVICE}; got 'tpu9'"),
    ("device", 3.5, DEVICE),
    ("device", None, DEVICE),
    ("device", "meta", DEVICE),
]


@pytest.mark.parametrize(
    ("error", "name", "value", "said"),
    [(TypeError, *row) for row in WRONG_TYPES]
    + [(ValueError, *row) for row in WRONG_VALUES],
)
def test_a_wrong_setting_is_refused_by_name(error, name, value, said):
    with pytest.raises(error, match=re.escape(said)):
        Settings.of(GOOD | {name: value})


def test_unknown_and_missing_names_are_refused():
    with pytest.raises(ValueError, match="unknown: rnak; the settings are data_set, "):
        Settings.of(GOOD | {"rnak": 4})
    with pytest.raises(ValueError, match="missing: seeds"):
        Settings.of({name: value for name, value in GOOD.items() if name != "seeds"})


def test_good_settings_come_back_as_they_were():
    settings = Settings.of(GOOD)
    assert settings.as_dict() == GOOD
    assert Settings.names() == list(GOOD)
    assert settings != replace(settings, seeds=[1, 3])
    # A whole number and the same one with a point are one setting.
    whole = Settings.of(GOOD | {"alpha": 8, "rotation": -45})
    assert whole == settings
    assert repr(whole.as_dict()) == repr(GOOD)


def test_an_epoch_has_as_many_steps_as_batches():
    large = {"adaptation_examples": 1000, "steps": [320, 1280]}
    for changes, steps in (({}, 2), ({"batch_size": 50}, 2), (large, 16)):
        assert Settings.of(GOOD | changes).steps_per_epoch == steps


def test_only_methods_with_a_rank_run_with_each():
    settings = Settings.of(GOOD | {"methods": ["frozen", "LoRA", "full", "gain"]})
    lora, gain = ([(method, rank) for rank in (2, 4)] for method in ("LoRA", "gain"))
    expected = [("frozen", None), *lora, ("full", None), *gain]
    assert settings.configurations() == expected


def test_a_notebooks_variables_are_its_settings():
    given = "# Parameters\nranks = [2, 4]\nresult_path = 'x.json'\n"
    history = ["", "import torch", "ranks = [2]", given, "other = 1"]
    namespace = GOOD | {"In": history, "other": 1, "result_path": "x.json"}
    assert settings_of_notebook(namespace) == Settings.of(GOOD)


def test_what_papermill_was_given_besides_is_refused():
    # papermill itself only logs it, and the run would use the default ranks.
    history = ["", "# Parameters\nrank = 16\nsteps = [2]\nsede = 1\n"]
    said = (
        r"unknown parameter: rank, sede; the parameters are data_set, .*, result_path"
    )
    with pytest.raises(ValueError, match=said):
        settings_of_notebook(GOOD | {"In": history, "rank": 16, "sede": 1})
