"""docs/faults.md names a test for each fault, and each of them exists."""

import ast
import builtins
import functools
import re
from pathlib import Path

import environment
import pytest

from lowrank_utils.adapters.config import AdapterFileError
from lowrank_utils.comparison.grid import SweepError
from lowrank_utils.data import DataError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")

OWN_ERRORS = {
    error.__name__: error
    for error in (AdapterFileError, DataError, SweepError, environment.Stop)
}
# What must be among the rows, by words of the fault and the result.
SUBJECTS = [
    *(
        "disk is full",
        "killed",
        "two processes save to one folder",
        "two JupyterLab kernels",
        "read-only",
    ),
    *(
        "data folder is missing, or is a file",
        "cut off",
        "wrong magic number",
        "counts lie",
        "mirror is slow",
    ),
    *(
        "breaks off",
        "403",
        "altered bytes",
        "falls silent",
        "NaN or infinity",
        "empty batch",
        "batch of one",
    ),
    *(
        "rows of zeros",
        "tiny and huge weights",
        "bfloat16",
        "(fuzzed)",
        "papermill",
        "lowrank-compare",
    ),
]


def rows():
    """Return the cells of each row by section."""
    sections = {}
    for section in PAGE.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        table = [line for line in lines if line.startswith("| ")]
        sections[title] = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in table[1:]
        ]
    return sections


ROWS = [row for section in rows().values() for row in section]


def test_there_are_many_rows_in_every_section_and_none_is_there_twice():
    assert len(ROWS) >= 80
    assert all(len(row) == 4 for row in ROWS), [row for row in ROWS if len(row) != 4]
    assert all(cell for row in ROWS for cell in row)
    for title, section in rows().items():
        faults = [row[0] for row in section]
        assert len(faults) >= 5, title
        assert len(set(faults)) == len(faults), title


@pytest.mark.parametrize("subject", SUBJECTS)
def test_it_has_a_row_about(subject):
    assert [row for row in ROWS if subject in row[0]]


@functools.cache
def functions(path):
    """Return the source of each function of a file, with its decorators and what stands
    in the file above them."""
    text = path.read_text(encoding="utf-8")
    return {
        node.name: ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_test_of_a_row_exists_and_holds_something(row):
    found = re.fullmatch(r"`(tests/[a-z/]+/test_\w+\.py)::(test_\w+)`", row[3])
    assert found, row[3]
    file, name = found.groups()
    source = functions(ROOT / file)[name]
    assert re.search(
        r"\bassert|pytest\.raises|\b(?:refused|unchanged|check_adapter)\(", source
    ), "it asserts nothing"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_the_errors_of_a_row_are_errors(row):
    for name in re.findall(r"`([A-Z]\w+)`", row[1]):
        if name == "FIX":
            continue
        error = OWN_ERRORS.get(name) or getattr(builtins, name)
        assert issubclass(error, BaseException)
