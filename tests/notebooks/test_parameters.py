"""Notebook 06 runs with other parameters, and on the whole MNIST where that is at
hand."""

import os
import re

import nbformat
import papermill
import pytest

from lowrank_utils.comparison.kernels import kernel_environment

NOTEBOOK = "06_finetuning_on_mnist.ipynb"


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """Run notebook 06 with some parameters, and return all that it printed."""
    for name in os.environ.keys() - kernel_environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run_with(**parameters):
        out = tmp_path / "out.ipynb"
        papermill.execute_notebook(
            root / "notebooks" / NOTEBOOK,
            out,
            parameters,
            cwd=root / "notebooks",
            progress_bar=False,
            kernel_name="python3",
        )
        cells = nbformat.read(out, as_version=4).cells
        return "".join(
            o.text
            for cell in cells
            for o in cell.get("outputs", [])
            if o.output_type == "stream"
        )

    return run_with


def percent(pattern, text):
    """Return the percentage that ``pattern`` captures, as a fraction."""
    return float(re.search(pattern, text)[1]) / 100


def test_every_parameter_has_a_type_and_a_meaning(root):
    parameters = papermill.inspect_notebook(str(root / "notebooks" / NOTEBOOK))
    assert {"data_set", "epochs", "rank", "alpha", "seed"} <= parameters.keys()
    for parameter in parameters.values():
        assert parameter["inferred_type_name"] in {"str", "int", "float"}
        assert parameter["help"]


def test_the_test_split_is_looked_at_in_one_cell(root):
    """Settings are chosen, and networks looked into, on the validation split."""
    cells = nbformat.read(root / "notebooks" / NOTEBOOK, as_version=4).cells
    looking = [
        c.source
        for c in cells
        if c.cell_type == "code" and re.search(r"splits\.test|_test\b", c.source)
    ]
    assert len(looking) == 1
    assert "rotated test images" in looking[0]
    place = [cell.source for cell in cells].index(looking[0])
    assert cells[place - 1].source.count("Now the test split, once: ") == 1


# Exercise cells raise by design, and papermill says so for each of them.
@pytest.mark.filterwarnings("ignore")
def test_another_rank_and_seed_run_to_the_end(run):
    printed = run(
        rank=2, alpha=4.0, seed=7, adaptation_epochs=2, adaptation_examples=500
    )
    assert "3,518" in printed  # trained parameters of DoRA at rank 2
    assert "Solution 6.3: correct" in printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    "LOWRANK_DATA_DIR" not in os.environ,
    reason="LOWRANK_DATA_DIR isn't set to a folder with the whole MNIST",
)
def test_the_whole_mnist_runs_to_the_end(run):
    printed = run(data_set="mnist", epochs=1, adaptation_epochs=3)
    assert "55,000 images" in printed
    before = percent(r"pretrained network on rotated images: ([\d.]+)%", printed)
    assert percent(r"accuracy on the validation split: ([\d.]+)%", printed) > 0.94
    for method in ("full", "LoRA", "DoRA, norm detached", "DoRA, norm kept"):
        assert percent(rf"{method} +[\d,]+ +([\d.]+)%", printed) > before + 0.3
