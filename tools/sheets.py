"""Make an exercise sheet from each notebook: its exercises and what they need, without
solutions. The solutions are a page of their own, and the quiz a file to import.

    python tools/sheets.py                  into build/sheets
    python tools/sheets.py --output FOLDER

A sheet is a notebook. JupyterLab runs it, and the site shows it as a page that can be
printed. Before an exercise stand the cells of its notebook that define what it uses and
that no earlier one has brought along: a lesson's own code may solve an exercise.
"""

import argparse
import ast
import builtins
import os
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from quiz import GIFT_FILE, gift, read_questions

from lowrank_utils.comparison.whole import write_whole

ROOT = Path(__file__).resolve().parent.parent
EXERCISE = re.compile(r"^### Exercise \d", flags=re.MULTILINE)
SET_UP = "*Set-up for what follows: run it first.*"
# Of what is asked and of what the site folds.
KEPT_TAGS = {"raises-exception", "exercise", "hide-input"}
SOLUTION = re.compile(
    r"\n*<details><summary>A sample answer</summary>(.*?)</details>",
    flags=re.DOTALL,
)


def exercises(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """Return the cells of the exercises and their places in the notebook: what is asked,
    and the cell to fill in or to change.
    """
    found = []
    for place, cell in enumerate(notebook.cells):
        asks = cell.cell_type == "markdown" and EXERCISE.search(cell.source)
        if asks:
            found += [(place, cell), (place + 1, notebook.cells[place + 1])]
    return found


def solved(cell: NotebookNode) -> str:
    """Return the code of a solution, without the lines that check it."""
    # They follow two empty lines.
    return cell.source.partition("\n")[2].rpartition("\n\n\n")[0]


def needed(notebook: NotebookNode, chosen: list[int]) -> list[int]:
    """Return the places of the set-up and of the cells that define, directly or through
    others, what the cells in ``chosen`` use, or that let a function change it.
    """
    trees = {
        place: ast.parse(cell.source)
        for place, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
        and not {"exercise", "solution", "interactive"}
        & set(cell.metadata.get("tags", []))
    }
    found = {min(trees)}
    waiting = []
    for place in chosen:
        cell = notebook.cells[place]
        solves = "solution" in cell.metadata.get("tags", [])
        waiting.append((place, ast.parse(solved(cell) if solves else cell.source)))
    while waiting:
        place, tree = waiting.pop()
        for name in _Names(tree).free - set(dir(builtins)):
            for earlier in sorted((p for p in trees if p < place), reverse=True):
                names = _Names(trees[earlier])
                if name in names.bound | names.given and earlier not in found:
                    found.add(earlier)
                    waiting.append((earlier, trees[earlier]))
                if name in names.bound:
                    break
    return sorted(found - set(chosen))


class _Names(ast.NodeVisitor):
    """The names of a cell.

    Attributes:
        free: those that it takes from cells before.
        bound: those that it gives to something.
        given: those of what it lets a function change: it expects no answer, and gives
            it first, as in ``train(model, images)``.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.free: set[str] = set()
        self.bound: set[str] = set()
        self.given: set[str] = set()
        for statement in tree.body:
            call = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                names = [a.id for a in call.args[:1] if isinstance(a, ast.Name)]
                self.given.update(names if call.func.id != "print" else [])
            self.visit(statement)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.bound.add(node.id)
        elif node.id not in self.bound:
            self.free.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        for part in (node.iter, node.target, *node.body, *node.orelse):
            self.visit(part)

    def visit_alias(self, node: ast.alias) -> None:
        self.bound.add((node.asname or node.name).split(".")[0])

    def _visit_scope(self, node: ast.AST, own: set[str]) -> None:
        # What a function or a comprehension binds is its own.
        inner = {
            n.id
            for n in ast.walk(node)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        outer = self.bound
        self.bound = outer | own | inner
        self.generic_visit(node)
        self.bound = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        self._visit_scope(node, arguments)
        self.bound.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_scope(
            node, {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        )

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_scope(node, set())
        self.bound.add(node.name)

    def _visit_comprehension(self, node: ast.AST) -> None:
        self._visit_scope(node, set())

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = (
        _visit_comprehension
    )


def sheet_of(notebook: NotebookNode, link: str) -> NotebookNode:
    """Return the exercise sheet of a notebook.

    Args:
        notebook: one of the series.
        link: leads from the sheet to it.
    """
    title = notebook.cells[0].source.partition("\n")[0].removeprefix("# ")
    cells = [
        new_markdown_cell(
            f"# Exercises: {title}\n\n"
            f"From [the notebook]({link}), which has the solutions. Run the cells in "
            "order. Write what is missing where a cell raises `NotImplementedError`, "
            "and run it again.\n\n## Exercises"
        )
    ]
    brought: set[int] = set()
    for place, cell in exercises(notebook):
        if cell.cell_type == "markdown":
            own = [place + 1]
            below = notebook.cells[place + 2 : place + 3]
            if below and "solution" in below[0].metadata.get("tags", []):
                own.append(place + 2)
            first = sorted({*needed(notebook, own)} - brought)
            brought.update([*first, place + 1])
            if first:
                cells.append(new_markdown_cell(SET_UP))
            for earlier in first:
                cells.append(nbformat.from_dict(notebook.cells[earlier]))
                cells[-1].metadata.tags = ["hide-input"]
        cells.append(nbformat.from_dict(cell))
        if cell.cell_type == "code":
            # On paper there is room below it.
            cells[-1].metadata.tags = [*cell.metadata.get("tags", []), "exercise"]
    sheet = nbformat.v4.new_notebook(metadata=notebook.metadata)
    for number, cell in enumerate(cells, start=1):
        cell.id = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
            tags = KEPT_TAGS & set(cell.metadata.get("tags", []))
            cell.metadata = nbformat.from_dict({"tags": sorted(tags)} if tags else {})
        else:
            cell.source, cell.metadata = SOLUTION.sub("", cell.source), {}
        sheet.cells.append(cell)
    nbformat.validate(sheet)
    return sheet


def sheets(notebooks: str) -> dict[str, str]:
    """Return the texts of all sheets by the names of their files.

    Args:
        notebooks: leads from the folder of the sheets to that of the notebooks.
    """
    return {
        path.name: nbformat.writes(
            sheet_of(nbformat.read(path, as_version=4), f"{notebooks}/{path.name}")
        )
        + "\n"
        for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    }


def solutions() -> str:
    """Return the solutions of all exercises as one page in Markdown."""
    parts = [
        "# Solutions",
        "Of the [exercises](index.md), notebook by notebook. Other ways are as right.",
    ]
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        parts.append("## " + cells[0].source.partition("\n")[0].removeprefix("# "))
        for cell in cells:
            asked = re.search(r"^### (Exercise .+) \(", cell.source, flags=re.MULTILINE)
            if cell.cell_type == "markdown" and asked:
                parts.append(f"### {asked[1]}")
                # Nothing is folded on a page of solutions.
                parts += [
                    answer[1].strip() for answer in SOLUTION.finditer(cell.source)
                ]
            elif "solution" in cell.metadata.get("tags", []):
                parts.append(f"```python\n{solved(cell)}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "sheets",
        help="default: build/sheets",
    )
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    to_notebooks = os.path.relpath(ROOT / "notebooks", output)
    for name, text in sheets(Path(to_notebooks).as_posix()).items():
        write_whole(output / name, text)
    # The page's list of exercises is the site's.
    write_whole(output / "solutions.md", solutions().replace("](index.md)", "](.)"))
    write_whole(output / GIFT_FILE, gift(read_questions()))
    print(f"The sheets are in {output}")


if __name__ == "__main__":
    main()
