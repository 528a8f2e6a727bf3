"""The rule that says what a cell is on a slide."""

import nbformat
import pytest
from slide_types import SLIDE_TYPES, assign_slide_types, is_set_up, slide_type

CODE = nbformat.v4.new_code_cell("x = 1")
TEXT = nbformat.v4.new_markdown_cell("Some words.")


def code(source, *tags):
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


@pytest.mark.parametrize(
    ("source", "previous", "expected"),
    [
        ("# Title", None, "slide"),
        ("## Section\n\nWords.", CODE, "slide"),
        ("### Exercise 1.1", CODE, "subslide"),
        ("Words.", CODE, "fragment"),
        ("Words.\n\n## Section", CODE, "fragment"),
        ("Words.", TEXT, "subslide"),
    ],
)
def test_text(source, previous, expected):
    assert slide_type(nbformat.v4.new_markdown_cell(source), previous) == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (code("import torch\n\nreproducible(seed=1)\nuse_style()"), "skip"),
        (code("from lowrank_utils.checks import check_a"), "skip"),
        (code("print(1)"), "subslide"),
        (code("check_a(a)", "exercise", "raises-exception"), "-"),
        (code("def a(): ...", "solution", "hide-cell"), "notes"),
        (code("LoRA(0)", "raises-exception"), "subslide"),
        (nbformat.v4.new_raw_cell("raw"), "skip"),
    ],
)
def test_code(cell, expected):
    assert slide_type(cell, TEXT) == expected


def test_what_computes_is_no_set_up():
    assert is_set_up(code("import torch"))
    assert not is_set_up(code("import torch\ntorch.manual_seed(1)"))
    assert not is_set_up(code("use_style()\nx = 1"))


def test_a_choice_made_by_hand_stays_and_an_unknown_one_does_not():
    cells = [nbformat.v4.new_markdown_cell("# Title") for _ in range(3)]
    cells[0].metadata["slideshow"] = {"slide_type": "skip"}
    cells[1].metadata["slideshow"] = {"slide_type": ""}
    assign_slide_types(nbformat.v4.new_notebook(cells=cells))
    assert [cell.metadata.slideshow.slide_type for cell in cells] == [
        "skip",
        "slide",
        "slide",
    ]
    assert all(cell.metadata.slideshow.slide_type in SLIDE_TYPES for cell in cells)
