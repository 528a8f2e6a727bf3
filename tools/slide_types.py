"""Say for every cell of a notebook what it is on a slide, from what it is in the
notebook.

The type stands in a cell's metadata, as JupyterLab shows it (Property Inspector, "Slide
Type") and nbconvert reads it. ``execute_notebooks.py`` gives one to each cell that has
none, so a choice made by hand stays.
"""

import ast

from nbformat import NotebookNode

SLIDE_TYPES = ("slide", "subslide", "fragment", "-", "skip", "notes")

# What a set-up cell calls besides its imports.
SET_UP_CALLS = {"reproducible", "use_style"}


def is_set_up(cell: NotebookNode) -> bool:
    """Tell whether a code cell only imports and sets what the others need."""
    if "raises-exception" in cell.metadata.get("tags", []):
        return False
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and isinstance(node.value.func, ast.Name)
            and node.value.func.id in SET_UP_CALLS
        )
        for node in ast.parse(cell.source).body
    )


def slide_type(cell: NotebookNode, previous: NotebookNode | None) -> str:
    """Return one of ``SLIDE_TYPES`` for a cell.

    A section opens a slide, and what follows in it stands below. Code has a slide of
    its own, and the words after it come when you press the key: first the class says
    what it sees. A solution is for the teacher's eyes.

    Args:
        cell: the cell to show.
        previous: the one above it, if there is one.
    """
    if cell.cell_type == "markdown":
        if cell.source.startswith(("# ", "## ")):
            return "slide"
        follows_code = previous is not None and previous.cell_type == "code"
        return (
            "fragment"
            if follows_code and not cell.source.startswith("#")
            else "subslide"
        )
    tags = cell.metadata.get("tags", [])
    # A slider moves in JupyterLab; on a slide it would be its code alone.
    if cell.cell_type != "code" or is_set_up(cell) or "interactive" in tags:
        return "skip"
    if "solution" in tags:
        return "notes"
    if "exercise" in tags:
        return "-"
    return "subslide"


def assign_slide_types(notebook: NotebookNode) -> None:
    """Give a slide type to every cell of ``notebook`` that has none, in place."""
    previous = None
    for cell in notebook.cells:
        slideshow = cell.metadata.setdefault("slideshow", NotebookNode())
        if slideshow.get("slide_type") not in SLIDE_TYPES:
            slideshow.slide_type = slide_type(cell, previous)
        previous = cell
