"""The stored results of the comparison are what the code computes."""

import os
from dataclasses import replace

import pytest
import torch

from lowrank_utils.experiment import adapt, prepare
from lowrank_utils.grid import expand, notebook_defaults, read_grids
from lowrank_utils.tables import TASK, read_table
from lowrank_utils.training import accuracy, reproducible

RESULTS = {"comparison": "mnist-5k", "comparison_mnist": "mnist"}

needs_whole_mnist = pytest.mark.skipif(
    "LOWRANK_DATA_DIR" not in os.environ, reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST"
)


@pytest.fixture
def stored(root, name):
    return read_table(root / "notebooks" / "results" / f"{name}.csv")


@pytest.fixture
def settings(root, name):
    folder = root / "notebooks"
    runs = expand(read_grids(folder / "comparison.yaml"), notebook_defaults(folder / "07_comparison.ipynb"))
    return [replace(run, data_set=RESULTS[name]) for run in runs]


@pytest.fixture(autouse=True)
def torchs_state():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("name", RESULTS)
def test_every_run_of_the_grid_is_there(stored, settings):
    expected = {
        (tuple(getattr(run, name) for name in TASK), method, rank, seed)
        for run in settings
        for method, rank in run.configurations()
        for seed in run.seeds
    }
    found = {
        (
            tuple(row[name] for name in TASK),
            row["method"],
            None if row.isna()["rank"] else row["rank"],
            row["seed"],
        )
        for _, row in stored.iterrows()
    }
    assert found == expected
    assert len(stored) == len(expected)


@pytest.mark.parametrize(
    ("name", "shift"),
    [
        ("comparison", "rotation"),
        ("comparison", "unseen classes"),
        pytest.param("comparison_mnist", "rotation", marks=needs_whole_mnist),
    ],
)
def test_some_of_them_are_computed_again(stored, settings, shift):
    (run,) = [s for s in settings if s.shift == shift and s.ranks == [2] and "DoRA" in s.methods]
    reproducible(run.pretraining_seed)
    task, test = prepare(run, progress=False)
    for method in ("LoRA", "DoRA", "full"):
        rank = None if method == "full" else 2
        chosen = stored["rank"].isna() if rank is None else stored["rank"] == rank
        rows = stored[
            (stored["shift"] == shift) & (stored["method"] == method) & chosen & (stored["seed"] == 3)
        ]
        (row,) = [row for _, row in rows.iterrows()]
        model, again = adapt(task, run, method, rank, row["learning_rate"], seed=3)
        assert (again.trainable, again.validation[-1]) == (row["trainable"], row["validation"])
        assert accuracy(model, test) == row["test"]
