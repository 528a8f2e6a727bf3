"""Make nbval strict, and lend small and read-only disks to tests.

nbval skips pictures and cells that were never run, and its kernels inherit pytest's environment.
"""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
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

# Root mean square difference of two pictures, as a fraction of full scale. The first lets through another
# anti-aliasing of the same drawing, and not another drawing; the plotted numbers are printed or asserted besides.
# Another release of matplotlib sets texts a little larger or smaller and so moves the axes: the second.
PICTURE_TOLERANCE, OTHER_RELEASE_TOLERANCE = 0.02, 0.15


def picture_tolerance(release):
    """Return how much a picture may differ from the stored one under this release of matplotlib."""
    constraints = (Path(__file__).parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.search(r"^matplotlib==(\S+)$", constraints, flags=re.MULTILINE)[1]
    return PICTURE_TOLERANCE if release == pinned else OTHER_RELEASE_TOLERANCE


def picture_difference(stored: str, new: str, sides: float = 0) -> float:
    """Return the root mean square difference of two base64 PNGs from 0 to 1; 1 if their sizes differ.

    Sides that differ by no more than the fraction ``sides`` are cut to the shorter one.
    """
    first, second = (
        matplotlib.image.imread(io.BytesIO(base64.b64decode(p)), format="png") for p in (stored, new)
    )
    if np.max(np.abs(np.divide(first.shape, second.shape) - 1)) > sides:
        return 1.0
    height, width = np.minimum(first.shape, second.shape)[:2]
    first, second = first[:height, :width], second[:height, :width]
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
        allowed = picture_tolerance(matplotlib.__version__)
        difference = picture_difference(before, after, sides=0 if allowed == PICTURE_TOLERANCE else 0.05)
        if difference > allowed:
            cell.comparison_traceback.append(
                f"picture {number} differs by {difference:.3f} (allowed: {allowed})"
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


@pytest.fixture
def mount(tmp_path):
    """Mount ``tmp_path / "disk"`` as a disk of its own, as the options say; called again, change the options."""
    disk, mounted = tmp_path / "disk", []

    def change(options):
        disk.mkdir(exist_ok=True)
        remount = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(disk)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a disk of its own takes Linux and the right to mount ({error})")
        mounted.append(options)
        return disk

    yield change
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
