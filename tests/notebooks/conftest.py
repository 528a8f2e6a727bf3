"""What the tests of the notebooks share: the notebooks themselves, read once."""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))

sys.path.insert(0, str(ROOT / "figures"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    """Each notebook's file in turn."""
    return request.param


@pytest.fixture
def notebook(path):
    """Each notebook in turn."""
    return nbformat.read(path, as_version=4)


@pytest.fixture
def root():
    """The folder of the project."""
    return ROOT
