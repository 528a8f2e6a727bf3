"""Make nbval strict, and lend small and read-only disks to tests.

nbval skips pictures and cells that were never run, and its kernels inherit pytest's
environment.
"""

import base64
import io
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile
from PIL import Image

from lowrank_utils.comparison.kernels import kernel_environment

# Where workers and their kernels each take all cores, their threads wait for one another,
# and small layers take ten times as long. Here, since torch reads it when it is loaded.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

nbval_runtest, nbval_compare_outputs, nbval_setup = (
    IPyNbCell.runtest,
    IPyNbCell.compare_outputs,
    IPyNbFile.setup,
)

# The largest root mean square difference of two pictures, as a fraction of full scale.
# It lets through another anti-aliasing of the same drawing, and not another drawing;
# the plotted numbers are printed or asserted besides.
PICTURE_TOLERANCE = 0.02
# Another release of matplotlib sets texts a little larger or smaller and so moves the
# axes. What is drawn is then compared coarsely, in blocks, at the best of several
# shifts, and in relation to the ink: a blank picture has 1. From matplotlib 3.9.0 to
# the pinned release the pictures differ by up to 0.45, mirrored ones by 0.56 or more.
COARSE_TOLERANCE = 0.5
BLOCK, SHIFTS, SIDES = 8, range(-6, 7, 2), 0.05


def opened(picture: str, mode: str) -> Image.Image:
    """Return a base64 PNG as a picture in a mode of Pillow, such as "RGB" or "L"
    (grey)."""
    return Image.open(io.BytesIO(base64.b64decode(picture))).convert(mode)


def root_mean_square(values: np.ndarray) -> float:
    """Return the root of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(values))))


def picture_difference(stored: str, new: str) -> float:
    """Return the root mean square difference of two base64 PNGs from 0 to 1; 1 if their
    sizes differ."""
    first, second = opened(stored, "RGB"), opened(new, "RGB")
    if first.size != second.size:
        return 1.0
    return root_mean_square(np.asarray(first) / 255 - np.asarray(second) / 255)


def row_blocks(values: np.ndarray) -> np.ndarray:
    """Return the means over ``BLOCK`` rows each."""
    count = len(values) // BLOCK
    return values[: count * BLOCK].reshape(count, BLOCK, -1).mean(axis=1)


def blocks(rows: np.ndarray) -> np.ndarray:
    """Return the means over blocks of ``BLOCK`` by ``BLOCK`` pixels from those over
    rows."""
    return row_blocks(rows.T).T


def coarse_difference(stored: str, new: str) -> float:
    """Return how far two base64 PNGs lie apart that different releases of matplotlib
    drew; 1 if their sides do.

    The unit is the ink of the stored one. Sides may differ by the fraction ``SIDES``.
    """
    first, second = opened(stored, "L"), opened(new, "L")
    if np.max(np.abs(np.divide(second.size, first.size) - 1)) > SIDES:
        return 1.0
    ink, other = (
        1 - np.asarray(picture, dtype=np.float32) / 255
        for picture in (first, second.resize(first.size))
    )
    expected = blocks(row_blocks(ink))
    # The rows' means serve all shifts to the side, which are then of an eighth of the
    # picture.
    differences = [
        root_mean_square(expected - blocks(np.roll(rows, right, axis=1)))
        for rows in (row_blocks(np.roll(other, down, axis=0)) for down in SHIFTS)
        for right in SHIFTS
    ]
    return min(differences) / root_mean_square(expected)


def comparison_of_pictures(release: str) -> tuple[Callable[[str, str], float], float]:
    """Return how pictures are compared under a release of matplotlib, and how much they
    may differ."""
    constraints = (Path(__file__).parent / "constraints.txt").read_text(
        encoding="utf-8"
    )
    pinned = re.search(r"^matplotlib==(\S+)$", constraints, flags=re.MULTILINE)[1]
    if release == pinned:
        return picture_difference, PICTURE_TOLERANCE
    return coarse_difference, COARSE_TOLERANCE


def pictures(outputs):
    """Return the PNGs among a cell's outputs, in order."""
    return [
        output["data"]["image/png"]
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


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
        cell.comparison_traceback.append(
            f"{len(stored)} stored pictures, {len(new)} drawn now"
        )
        return False
    measure, allowed = comparison_of_pictures(matplotlib.__version__)
    for number, (before, after) in enumerate(zip(stored, new, strict=True), start=1):
        difference = measure(before, after)
        if difference > allowed:
            cell.comparison_traceback.append(
                f"picture {number} differs by {difference:.3f} (allowed: {allowed})"
            )
            return False
    return True


def setup(notebook):
    """Start a notebook's kernel in the environment that its stored outputs were made
    in, but on another processor, so that one run says both that they come out again and
    that they are no accident of the machine that made them.
    """
    variables = kernel_environment()
    if not notebook.config.getoption("own_processor"):
        # Here, since a copy of the package and its tests may come without the tools.
        from processors import IS_X86_64, processor

        variables |= processor("SSE", 1) if IS_X86_64 else {}
    with mock.patch.dict(os.environ, variables, clear=True):
        nbval_setup(notebook)


def pytest_addoption(parser):
    parser.addoption(
        "--own-processor",
        action="store_true",
        help="run notebooks with this processor's own vector units; by default with SSE",
    )


def pytest_configure():
    # A shell has what it starts in the background ignore Ctrl-C, and so would all
    # processes that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # nbval has no hooks for these, so its methods are wrapped; its options and its
    # collection stay in charge.
    IPyNbCell.runtest = runtest
    IPyNbCell.compare_outputs = compare_outputs
    IPyNbFile.setup = setup
    # Kernels run in notebooks/, where a relative folder would be another one.
    if folder := os.environ.get("LOWRANK_DATA_DIR"):
        os.environ["LOWRANK_DATA_DIR"] = str(Path(folder).absolute())


@pytest.fixture
def mount(tmp_path):
    """Mount ``tmp_path / "disk"`` as a disk of its own, as the options say; called
    again, change the options."""
    disk, mounted = tmp_path / "disk", []

    def change(options):
        disk.mkdir(exist_ok=True)
        remount = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(disk)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(
                f"a disk of its own takes Linux and the right to mount ({error})"
            )
        mounted.append(options)
        return disk

    yield change
    if mounted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
