"""Make nbval strict: it skips pictures and cells that were never run, and its kernels inherit pytest's environment."""

import base64
import io
import os
import sys
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
from nbval.plugin import IPyNbCell, IPyNbFile

from lowrank_utils._kernels import kernel_environment

# Tests import the project's scripts, and what several folders of tests share.
for folder in ("tests", "tools"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

nbval_runtest, nbval_compare_outputs, nbval_setup = (
    IPyNbCell.runtest,
    IPyNbCell.compare_outputs,
    IPyNbFile.setup,
)

# Root mean square difference of two pictures, as a fraction of full scale. It lets through another
# anti-aliasing of the same drawing, and not another drawing; the plotted numbers are printed or asserted besides.
PICTURE_TOLERANCE = 0.02


def picture_difference(stored: str, new: str) -> float:
    """Return the root mean square difference of two base64 PNGs from 0 to 1; 1 if their sizes differ."""
    first, second = (
        matplotlib.image.imread(io.BytesIO(base64.b64decode(p)), format="png") for p in (stored, new)
    )
    if first.shape != second.shape:
        return 1.0
    return float(np.sqrt(np.mean((first - second) ** 2)))


def pictures(outputs):
    """Return the PNGs among a cell's outputs, in order."""
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def runtest(cell):
    """Run a cell of a notebook, which must have been executed when it was stored."""
    if cell.cell.execution_count is None and cell.cell.source.strip():
        cell.raise_cell_error(
            "the stored cell was never executed: run tools/execute_notebooks.py on the notebook"
        )
    nbval_runtest(cell)


def compare_outputs(cell, test, ref, skip_compare=None):
    """Compare a cell's outputs as nbval does, and its pictures too."""
    if not nbval_compare_outputs(cell, test, ref, skip_compare):
        return False
    stored, new = pictures(ref), pictures(test)
    if len(stored) != len(new):
        cell.comparison_traceback.append(f"{len(stored)} stored pictures, {len(new)} drawn now")
        return False
    for number, (before, after) in enumerate(zip(stored, new, strict=True), start=1):
        difference = picture_difference(before, after)
        if difference > PICTURE_TOLERANCE:
            cell.comparison_traceback.append(
                f"picture {number} differs by {difference:.3f} (allowed: {PICTURE_TOLERANCE})"
            )
            return False
    return True


def setup(notebook):
    """Start a notebook's kernel in the environment that its stored outputs were made in."""
    with mock.patch.dict(os.environ, kernel_environment(), clear=True):
        nbval_setup(notebook)


def pytest_configure():
    # nbval has no hooks for these, so its methods are wrapped; its options and its collection stay in charge.
    IPyNbCell.runtest = runtest
    IPyNbCell.compare_outputs = compare_outputs
    IPyNbFile.setup = setup
    # Kernels run in notebooks/, where a relative folder would be another one.
    if folder := os.environ.get("LOWRANK_DATA_DIR"):
        os.environ["LOWRANK_DATA_DIR"] = str(Path(folder).absolute())
