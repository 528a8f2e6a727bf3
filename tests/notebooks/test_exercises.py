"""The exercises as a reader meets them: the notebooks' own solutions, stubs and, in a
real kernel, wrong answers."""

import ast
import builtins
import re

import pytest
import torch
from execute_notebooks import execute
from nbformat.v4 import new_code_cell, new_notebook

from lowrank_utils import checks


def tagged(notebook, tag):
    return [
        cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])
    ]


def function_and_check(source):
    """Return the function that an exercise's cell defines, as code, and the name of its
    check."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    return function, re.search(r"^(check_\w+)\(", source, flags=re.MULTILINE)[1]


def namespace(notebook):
    """Return what the notebook's imports give, without running anything else of it."""
    names = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    exec(ast.unparse(node), names)
    return names


def define_what_it_uses(function, notebook, names):
    """Run the notebook's own definitions of what a solution uses beyond imports."""
    used = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    own = {argument.arg for argument in function.args.args}
    own |= {node.id for node in used if isinstance(node.ctx, ast.Store)}
    missing = {node.id for node in used} - own - names.keys() - set(dir(builtins))
    for cell in notebook.cells:
        if cell.cell_type == "code" and missing:
            for node in ast.parse(cell.source).body:
                targets = [
                    getattr(target, "id", None)
                    for target in getattr(node, "targets", [])
                ]
                if {getattr(node, "name", None), *targets} & missing:
                    exec(ast.unparse(node), names)


@pytest.mark.parametrize("tag", ["exercise", "solution"])
def test_stubs_ask_and_solutions_pass(tag, notebook, capsys):
    names = namespace(notebook)
    for source in tagged(notebook, tag):
        function, check = function_and_check(source)
        define_what_it_uses(function, notebook, names)
        exec(ast.unparse(function), names)
        getattr(checks, check)(names[function.name])
        shown = capsys.readouterr().out
        number = re.search(r"(?:# Solution |\"Exercise )(\d+\.\d)", source)[1]
        expected = (
            f"To do: Exercise {number}: "
            if tag == "exercise"
            else f"Exercise {number}: correct\n"
        )
        assert shown.startswith(expected)


def test_each_check_belongs_to_one_exercise(notebook):
    used = [function_and_check(source)[1] for source in tagged(notebook, "exercise")]
    assert used == [
        function_and_check(source)[1] for source in tagged(notebook, "solution")
    ]
    assert len(used) == len(set(used)) >= 3


WRONG = {
    "a recognised mistake": "lambda x, weight, bias, A, B, alpha, m: x @ weight.T + bias + alpha * (x @ A @ B)",
    "values from elsewhere": "lambda *inputs: 42",
    "an error of its own": "lambda x, weight, *rest: x @ weight",
}


@pytest.fixture(scope="module")
def tracebacks(tmp_path_factory):
    """What JupyterLab shows under each wrong answer to exercise 5.2."""
    cells = [new_code_cell("from lowrank_utils.checks import check_dora_output")]
    for answer in WRONG.values():
        cell = new_code_cell(
            f"dora_output = {answer}\n\n\ncheck_dora_output(dora_output)"
        )
        cell.metadata.tags = ["raises-exception"]
        cells.append(cell)
    notebook = new_notebook(cells=cells)
    execute(notebook, tmp_path_factory.mktemp("kernel"))
    plain = re.compile(r"\x1b\[[0-9;]*m")
    return {
        name: plain.sub("", "\n".join(cell.outputs[0].traceback))
        for name, cell in zip(WRONG, notebook.cells[1:], strict=True)
    }


def test_a_wrong_answer_gets_its_hint_and_nothing_else(tracebacks):
    assert (
        tracebacks["a recognised mistake"]
        == "ExerciseError: that is LoRA: nothing is scaled by c"
    )
    assert (
        tracebacks["values from elsewhere"]
        == "ExerciseError: dora_output must be a tensor; got int"
    )


def test_an_error_in_the_reader_s_function_names_the_line_and_the_shapes(tracebacks):
    text = tracebacks["an error of its own"]
    assert text.startswith("ExerciseError: your function stopped at `dora_output = ")
    assert "mat1 and mat2 shapes cannot be multiplied (5x7 and 4x7)" in text
    assert "weight (4, 7)" in text
    assert text.endswith("is a transpose missing, or one too many?")
    assert len(text.splitlines()) == 1, text


@pytest.fixture(autouse=True)
def float64_as_in_the_notebooks():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
