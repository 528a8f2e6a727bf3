"""The comparison of stored outputs can fail: a spoilt copy of a notebook is caught, and
an untouched one isn't."""

import base64
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pytest
import torch
from execute_notebooks import execute, normalise
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image, ImageChops, ImageOps
from processors import IS_X86_64

from lowrank_utils.interactive import WITHOUT_A_KERNEL

ROOT = Path(__file__).resolve().parents[2]
CELLS = [
    "import matplotlib.pyplot as plt",
    "print('seven', 7)",
    "fig, axes = plt.subplots()\nline = axes.plot([1, 2, 4])",
    "3 + 4",
]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A small notebook with text, a picture and a result, as the script stores it."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    execute(notebook, tmp_path_factory.mktemp("kernel"))
    return normalise(notebook)


def spoil_text(cells):
    cells[1].outputs[0].text = "seven 8\n"


def spoil_picture(cells):
    data = cells[2].outputs[0].data
    pixels = matplotlib.image.imread(
        io.BytesIO(base64.b64decode(data["image/png"])), format="png"
    )
    out = io.BytesIO()
    matplotlib.image.imsave(out, np.ascontiguousarray(pixels[:, ::-1]), format="png")
    data["image/png"] = base64.b64encode(out.getvalue()).decode()


def drop_picture(cells):
    del cells[2].outputs[0].data["image/png"]


def drop_result(cells):
    cells[3].outputs = []


def never_run(cells):
    cells[1].outputs, cells[1].execution_count = [], None


def ask_for_vectors(cells):
    """On the processor that nbval's kernels are told to have, which isn't this one."""
    source = "import torch\nprint(torch.backends.cpu.get_cpu_capability())"
    cell = new_code_cell(source, execution_count=5)
    width = "DEFAULT" if IS_X86_64 else torch.backends.cpu.get_cpu_capability()
    cell.outputs = [new_output("stream", name="stdout", text=f"{width}\n")]
    cells.append(cell)


# What spoils a copy of the notebook, and the cell in which that must be caught.
CASES = {
    "untouched": (lambda _: None, None),
    "vectors": (ask_for_vectors, None),
    "text": (spoil_text, "Cell 1"),
    "picture": (spoil_picture, "Cell 2"),
    "no_picture": (drop_picture, "Cell 2"),
    "no_result": (drop_result, "Cell 3"),
    "never_run": (never_run, "Cell 1"),
}


@pytest.fixture(scope="module")
def caught(executed, tmp_path_factory):
    """The exit status of nbval over one copy for each case, its output, and the cells
    that it caught by case."""
    folder = tmp_path_factory.mktemp("spoilt")
    for name, (spoil, _) in CASES.items():
        notebook = nbformat.reads(executed, as_version=4)
        spoil(notebook.cells)
        (folder / f"{name}.ipynb").write_text(
            nbformat.writes(notebook), encoding="utf-8"
        )
    for part in ("conftest.py", "constraints.txt"):
        shutil.copy(ROOT / part, folder)
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "--nbval-current-env",
            "-q",
            "--color=no",
            f"--override-ini=pythonpath={ROOT / 'tools'}",
        ],
        cwd=folder,
        env={
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PYTEST")
        },
        capture_output=True,
        text=True,
        check=False,
    )
    found = {name: set() for name in CASES}
    for name, cell in re.findall(
        r"^FAILED (\w+)\.ipynb::(Cell \d+)", run.stdout, flags=re.MULTILINE
    ):
        found[name].add(cell)
    return run, found


@pytest.mark.parametrize("case", CASES)
def test_a_spoilt_output_is_caught(case, caught):
    run, found = caught
    _, cell = CASES[case]
    assert found[case] == ({cell} if cell else set()), run.stdout


def test_a_spoilt_output_is_an_error(caught):
    run, _ = caught
    assert run.returncode == 1


def test_executing_a_notebook_again_gives_the_stored_bytes(root):
    path = root / "notebooks" / "05_dora.ipynb"
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, path.parent)
    again = nbformat.reads(normalise(notebook), as_version=4)
    stored = nbformat.read(path, as_version=4)
    # Pictures may differ in their anti-aliasing elsewhere; nbval's comparison allows
    # for that.
    for first, second in zip(again.cells, stored.cells, strict=True):
        for outputs in (first.get("outputs", []), second.get("outputs", [])):
            for output in outputs:
                output.get("data", {}).pop("image/png", None)
    assert again == stored


def test_a_picture_with_sliders_is_stored_as_one_sentence(tmp_path):
    source = (
        "import matplotlib.pyplot as plt\n"
        "from ipywidgets import IntSlider\n"
        "from lowrank_utils.interactive import PictureWithSliders\n"
        "PictureWithSliders(lambda size: plt.figure(figsize=(size, size)), size=IntSlider(1, 1, 3))"
    )
    notebook = new_notebook(cells=[new_code_cell(source)])
    execute(notebook, tmp_path)
    # What a front end gets, and what is kept of it.
    (shown,) = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    normalise(notebook)
    assert notebook.cells[0].outputs[0].data == {"text/plain": WITHOUT_A_KERNEL}
    assert "widgets" not in notebook.metadata


@pytest.fixture
def comparison(root):
    """The project's conftest.py; that name belongs to several files."""
    spec = importlib.util.spec_from_file_location(
        "the_projects_conftest", root / "conftest.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_comparison_of_pictures_is_that_of_the_pinned_release_or_of_another(
    comparison, root
):
    constraints = (root / "constraints.txt").read_text()
    (pinned,) = [
        line.split("==")[1]
        for line in constraints.splitlines()
        if line.startswith("matplotlib==")
    ]
    assert comparison.comparison_of_pictures(pinned) == (
        comparison.picture_difference,
        0.02,
    )
    assert comparison.comparison_of_pictures(pinned + ".1") == (
        comparison.coarse_difference,
        0.5,
    )


def stored_pictures(root):
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    yield output.data["image/png"]


def as_png(picture):
    content = io.BytesIO()
    picture.save(content, format="png")
    return base64.b64encode(content.getvalue()).decode()


def test_a_picture_of_another_release_may_be_moved_but_not_be_another(comparison, root):
    def refused(stored, new):
        return (
            comparison.coarse_difference(stored, as_png(new))
            > comparison.COARSE_TOLERANCE
        )

    pictures = list(stored_pictures(root))
    assert len(pictures) >= 25
    for stored in pictures:
        picture = comparison.opened(stored, "L")
        assert not refused(
            stored,
            ImageChops.offset(picture, 4, 2).resize(
                (picture.width, picture.height + 2)
            ),
        )
        assert refused(stored, ImageOps.mirror(picture))
        assert refused(stored, ImageOps.flip(picture))
    # Of the last one: itself, an empty one, another one of its size, itself in another.
    assert not refused(stored, picture)
    assert refused(stored, Image.new("L", picture.size, "white"))
    assert refused(stored, comparison.opened(pictures[0], "L").resize(picture.size))
    assert refused(stored, picture.resize((picture.width, 2 * picture.height)))
