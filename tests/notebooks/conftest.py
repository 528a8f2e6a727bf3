"""What the tests of the notebooks share: the notebooks themselves, read once."""

import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

sys.path.insert(0, str(ROOT / "figures"))


# The tests that take minutes each come first, so that no core waits for one of them in
# the end.
LONGEST = (
    "09_transformer.ipynb",
    "test_comparison_parameters.py",
    "test_parameters.py",
)


def pytest_collection_modifyitems(items):
    """Put the longest tests first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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
